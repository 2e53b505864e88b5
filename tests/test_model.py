"""The model as a whole: saving, loading, resuming, and invalid arguments."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import small_unet
from conftest import weights
from keras import ops

import keras_ddpm as kd


def test_saves_and_loads_in_a_new_process(tmp_path):
    """Bit for bit the same samples, the optimizer and the random state with them."""
    model = small_unet()
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)).astype("float32")
    model.fit(images, epochs=2, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    samplers = {"ddim": kd.samplers.DDIM(5), "ddpm": kd.samplers.DDPM(5)}
    expected = {name: model.sample(3, sampler, seed=4) for name, sampler in samplers.items()}
    expected["raw"] = model.sample(3, samplers["ddim"], seed=4, use_ema=False)
    code = """
import keras, numpy as np, keras_ddpm as kd
model = keras.saving.load_model("model.keras")
assert int(model.optimizer.iterations) == 4 and model.loss == "mse"
ddim = kd.samplers.DDIM(5)
np.savez("samples.npz", ddim=model.sample(3, ddim, seed=4), ddpm=model.sample(3, kd.samplers.DDPM(5), seed=4),
         raw=model.sample(3, ddim, seed=4, use_ema=False))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    samples = np.load(tmp_path / "samples.npz")
    for name, x in expected.items():
        assert np.array_equal(samples[name], x), name
    assert not np.array_equal(expected["raw"], expected["ddim"])


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, points):
    def make():
        keras.utils.set_random_seed(0)
        model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
        model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2))
        return model

    def fit(model):
        return model.fit(
            points, epochs=1, shuffle=False, validation_data=points, callbacks=[kd.callbacks.EMAWeights()], verbose=0
        )

    whole, first = make(), make()
    fit(whole)
    fit(first)
    first.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert fit(whole).history == fit(resumed).history
    assert all(map(np.array_equal, weights(whole.weights), weights(resumed.weights)))


def test_summary_shows_the_network_and_counts_it_once(model):
    lines = []
    model.compile(loss="mse", optimizer="adam")
    model.summary(print_fn=lambda line: lines.append(line))
    text = "\n".join(lines)
    assert f"Total params: {model.network.count_params():,}" in text and "block_0_dense_1" in text


def test_config():
    diffusion = kd.GaussianDiffusion(kd.schedules.cosine(20), "v", None)
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), diffusion, 0.9, diffusion.min_snr_weight(), "batch", seed=5)
    copy = kd.DiffusionModel.from_config(model.get_config())
    assert copy.get_config() == model.get_config()
    assert np.array_equal(copy.loss_weight, model.loss_weight) and copy.timestep_sampling == "batch"
    copy.set_weights(model.get_weights())
    assert np.array_equal(copy.sample(2, kd.samplers.DDIM(3), seed=0), model.sample(2, kd.samplers.DDIM(3), seed=0))


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="needs a backend other than TensorFlow")
def test_does_not_import_tensorflow():
    code = """
import sys, numpy as np, keras_ddpm as kd
model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1))
model.compile(loss="mse", optimizer="adam")
model.fit(np.zeros((8, 2), "float32"), epochs=1, verbose=0)
model.fit(kd.datasets.from_arrays(np.zeros((8, 2), "float32"), batch_size=4), epochs=1, verbose=0)
model.sample(2, kd.samplers.DDIM(2))
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_construction():
    network = kd.networks.mlp(2, 16, 1)
    with pytest.raises(ValueError, match="ema_decay=1.0"):
        kd.DiffusionModel(network, ema_decay=1.0)
    with pytest.raises(ValueError, match="uniform.*batch.*stratified.*'per image'"):
        kd.DiffusionModel(network, timestep_sampling="per image")
    with pytest.raises(ValueError, match="timestep_sampling.*uniform"):
        kd.DiffusionModel(network, timestep_sampling=["uniform"])
    for loss_weight in (np.ones(1000), "min_snr", kd.GaussianDiffusion().min_snr_weight):
        with pytest.raises(ValueError, match="an array of 1001 numbers, for t = 0..1000"):
            kd.DiffusionModel(network, loss_weight=loss_weight)
    for dtype in ("mixed_bfloat16", keras.DTypePolicy("float16")):
        with pytest.raises(ValueError, match="Only the network has a dtype policy"):
            kd.DiffusionModel(network, dtype=dtype)
    with pytest.raises(ValueError, match="must be a `GaussianDiffusion`"):
        kd.DiffusionModel(network, kd.schedules.linear())
    diffusion = kd.GaussianDiffusion(kd.schedules.straight(), "flow")
    for weight in (diffusion.min_snr_weight(), diffusion.p2_weight()):
        with pytest.raises(ValueError, match=r"never trained there. Received: loss_weight\[1000\]=0.0"):
            kd.DiffusionModel(network, diffusion, loss_weight=weight)
    with pytest.raises(ValueError, match=r"loss_weight\[3\]=nan"):
        kd.DiffusionModel(network, loss_weight=np.where(np.arange(1001) == 3, np.nan, 1.0))
    x, t, free = keras.Input((2,)), keras.Input(()), keras.Input((None, 2))
    wider = keras.Model([x, t], ops.concatenate([x, t[:, None]], axis=1))
    for network in (keras.Model([x], 2 * x), wider, keras.Model([free, t], free * t[:, None, None]), keras.Model()):
        with pytest.raises(ValueError, match="must be a functional model"):
            kd.DiffusionModel(network)
