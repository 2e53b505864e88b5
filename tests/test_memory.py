"""Memory stays flat over many calls and epochs."""

import gc
import pathlib
import resource

import numpy as np
import pytest

import keras_ddpm as kd

STATUS = pathlib.Path("/proc/self/statm")


def resident():
    """The memory of this process in MiB."""
    gc.collect()
    return int(STATUS.read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell")
def test_memory_stays_flat(model, points):
    """500 calls of mixed sizes and thresholds, and 200 epochs. A megabyte per ten calls would be seen."""
    data = kd.datasets.Batches(points, batch_size=64)

    def work(calls, epochs):
        for call in range(calls):
            threshold = None if call % 2 else 0.5 + 0.4 * call / calls
            model.sample(
                1 + call % 4,
                kd.samplers.DDIM(3 + call % 5),
                seed=call,
                guidance=kd.guidance.Guidance(dynamic_threshold=threshold),
            )
        model.fit(data, epochs=epochs, validation_data=data, callbacks=[kd.callbacks.EMAWeights()], verbose=0)

    work(40, 20)
    before = resident()
    work(500, 200)
    assert resident() - before < 25
    assert np.all(np.isfinite(model.sample(1, seed=0)))
