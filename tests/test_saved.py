"""Files that earlier versions saved.

For each kind of network, `saved_by_0_1/` holds a model that version 0.1 saved on TensorFlow, and an `.npz` file with
that version's results: `samples` of the average, `raw` samples of the raw weights, and the loss of the data `x`.
"""

import pathlib

import keras
import numpy as np
import pytest

import keras_ddpm as kd

FOLDER = pathlib.Path(__file__).parent / "saved_by_0_1"


@pytest.mark.parametrize("kind", ["unet", "dit", "mlp"])
def test_files_of_version_0_1_sample_the_same(kind):
    model, expected = keras.saving.load_model(FOLDER / f"{kind}.keras"), np.load(FOLDER / f"{kind}.npz")
    guidance = {"labels": 1, "guidance_scale": 2.0} if kind == "unet" else {}
    samples = model.sample(2, kd.samplers.DPMSolver(5), seed=3, **guidance)
    np.testing.assert_allclose(samples, expected["samples"], atol=1e-5)
    raw = model.sample(2, kd.samplers.DDIM(5), seed=3, use_ema=False)
    np.testing.assert_allclose(raw, expected["raw"], atol=1e-5)


def test_a_file_of_version_0_1_trains_on(tmp_path):
    model, expected = keras.saving.load_model(FOLDER / "unet.keras"), np.load(FOLDER / "unet.npz")
    if keras.backend.backend() == "tensorflow":  # other backends draw other noise
        loss = model.evaluate(expected["x"], expected["labels"], verbose=0)
        np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    assert model.network.get_layer("up_1_upsample").transposed
    model.fit(expected["x"], expected["labels"], verbose=0)
    model.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    assert np.array_equal(again.sample(2, seed=0, labels=0), model.sample(2, seed=0, labels=0))


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # Keras' own, before the error
def test_bare_weights_of_version_0_1_are_refused(tmp_path):
    old = keras.saving.load_model(FOLDER / "unet.keras")
    old.save_weights(tmp_path / "old.weights.h5")
    network = kd.networks.unet((8, 8, 1), 4, (1, 1), 1, (), 2, num_classes=3)
    with pytest.raises(ValueError, match="saved by keras_ddpm 0.1. Load the `.keras` file"):
        kd.DiffusionModel(network).load_weights(tmp_path / "old.weights.h5")
