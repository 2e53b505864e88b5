"""Files that an earlier version saved.

For each kind of network, `saved_before/` holds a model that was trained and saved on TensorFlow by the version before
its modules moved into folders, and an `.npz` file with the results of that version: `samples` of the average, `raw`
samples of the raw weights, and the `loss` of the average on the data `x`.
"""

import pathlib

import keras
import numpy as np
import pytest
from conftest import TORCH

import keras_ddpm as kd

FOLDER = pathlib.Path(__file__).parent / "saved_before"


@pytest.mark.parametrize("kind", ["unet", "dit", "mlp"])
def test_older_files_draw_the_same_and_train_on(kind, tmp_path):
    model, expected = keras.saving.load_model(FOLDER / f"{kind}.keras"), np.load(FOLDER / f"{kind}.npz")
    labels = expected["labels"] if "labels" in expected else None
    condition = {} if labels is None else {"labels": labels[:2]}
    guidance = condition | ({"guidance_scale": 2.0} if condition else {})
    np.testing.assert_allclose(model.sample(2, seed=3, **guidance), expected["samples"], atol=1e-5)
    raw = model.sample(2, kd.samplers.DDPM(5), seed=3, use_ema=False, **condition)
    np.testing.assert_allclose(raw, expected["raw"], atol=1e-5)
    if keras.backend.backend() == "tensorflow":  # other backends draw other noise
        np.testing.assert_allclose(model.evaluate(expected["x"], labels, verbose=0), expected["loss"], rtol=1e-5)
    assert int(model.optimizer.iterations) == 4 and model.optimizer.name.startswith("adam")
    if kind == "unet" and not TORCH:
        return  # it takes longest to compile, and the others train on as it would
    model.fit(expected["x"], labels, verbose=0)
    model.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    assert np.array_equal(again.sample(2, seed=0, **condition), model.sample(2, seed=0, **condition))


def test_the_preset_draws_the_same():
    sampler = kd.samplers.UniPC(3, spacing="logsnr")
    model = kd.DiffusionModel.from_preset("flowers64")
    samples = model.sample(1, sampler, seed=0, labels="rose", guidance_scale=1.5)
    np.testing.assert_allclose(samples, np.load(FOLDER / "flowers64.npz")["samples"], atol=2e-3)
