"""Threads that sample at once, or while a model trains, as in a web page: they wait for each other."""

import contextlib
import threading

import keras
import numpy as np
import pytest
from conftest import TORCH, weights

import keras_ddpm as kd

DDIM = kd.samplers.DDIM(5)


def run_threads(*jobs):
    """Runs the jobs in threads. Returns what they raised."""
    raised = []

    def run(job):
        try:
            job()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_one_model_in_several_threads(model):
    """On JAX each call gives the buffers of the weights away until it ends."""
    expected = [model.sample(seed + 1, DDIM, seed=seed) for seed in range(3)]
    got = {}

    def job(seed):
        for _ in range(5):
            got[seed] = model.sample(seed + 1, DDIM, seed=seed)

    assert not run_threads(*(lambda seed=seed: job(seed) for seed in range(3)))
    assert all(np.array_equal(got[seed], x) for seed, x in enumerate(expected))


def test_several_models_in_several_threads():
    """On PyTorch each is recorded, and PyTorch records one function at a time."""
    diffusion = kd.GaussianDiffusion(kd.schedules.linear(25))
    make = (lambda: kd.networks.unet((8, 8, 1), 4, (1,), 1, (), 2)) if TORCH else (lambda: kd.networks.mlp(2, 8, 1))
    models = [kd.DiffusionModel(make(), diffusion) for _ in range(3)]
    sampler = kd.samplers.DDIM(25)
    assert not run_threads(*(lambda model=model: model.sample(2, sampler, seed=0) for model in models))


def test_models_that_guide_each_other(fresh_model, monkeypatch):
    """Sampling holds both, in the same order whichever guides, or two threads could wait for each other."""
    model = fresh_model
    other, held = kd.DiffusionModel.from_model(model), []

    class Turn(contextlib.nullcontext):
        def __enter__(self):
            held.append(self.enter_result)

    for each in (model, other):
        monkeypatch.setattr(each, "turn", Turn(each))
    model.sample(2, DDIM, seed=0, guidance=kd.guidance.Guidance(guide=other), guidance_scale=2.0)
    other.sample(2, DDIM, seed=0, guidance=kd.guidance.Guidance(guide=model), guidance_scale=2.0)
    assert len(held) == 4 and held[:2] == held[2:] and held[0] is not held[1]


@pytest.mark.parametrize("steps_per_execution", [1] + [2] * (keras.backend.backend() != "torch"))
def test_sampling_during_training(request, points, steps_per_execution):
    """Between two steps, and in a callback that holds the model by its own name. Training is not disturbed."""
    model = request.getfixturevalue("model" if steps_per_execution == 1 else "fresh_model")
    if steps_per_execution > 1:
        model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2), steps_per_execution=steps_per_execution)
    data = kd.datasets.Batches(points, batch_size=32)
    variables = [*model.variables, *model.optimizer.variables, model._fit_random.state]
    before = weights(variables)
    expected = model.fit(data, epochs=10, validation_data=points, verbose=0).history
    for v, value in zip(variables, before):
        v.assign(value)
    data.epoch = 0
    sampled = []

    def in_callback(batch, logs):
        sampled.append(model.sample(2, DDIM, seed=0))

    history = {}

    def fit():
        callback = keras.callbacks.LambdaCallback(on_train_batch_end=in_callback)
        options = {"validation_data": points, "callbacks": [callback], "verbose": 0}
        history.update(model.fit(data, epochs=10, **options).history)

    def sample():
        for _ in range(10):
            assert np.all(np.isfinite(model.sample(2, DDIM, seed=0)))

    assert not run_threads(fit, sample)
    assert history == expected
    assert len(sampled) == 10 * len(data) // steps_per_execution
    assert not np.array_equal(sampled[0], sampled[-1])
    assert np.all(np.isfinite(model.sample(2, DDIM, seed=0)))


def test_an_error_in_a_step_lets_others_sample(model, points):
    def fail(batch, logs):
        raise ZeroDivisionError

    for hook in ("on_train_batch_begin", "on_test_batch_begin"):
        with pytest.raises(ZeroDivisionError):
            callback = keras.callbacks.LambdaCallback()
            setattr(callback, hook, fail)
            model.fit(points, validation_data=points, callbacks=[callback], verbose=0)
        raised = run_threads(lambda: model.sample(2, DDIM, seed=0))
        assert not raised or keras.backend.backend() == "jax", hook
    with pytest.raises(ZeroDivisionError):
        model.evaluate(points, callbacks=[callback], verbose=0)
    assert model.turn.acquire(blocking=False)
    model.turn.release()
