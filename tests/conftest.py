"""Shared fixtures. `--data-dir`, or KERAS_DDPM_DATA, names the folder of TensorFlow Datasets with the real data."""

import os
import pathlib
import re
import runpy
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores, and PyTorch's threads wait busily

import keras
import numpy as np
import pytest
from keras import ops

import keras_ddpm as kd
from keras_ddpm._backend import devices

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
TORCH = keras.backend.backend() == "torch"


def pytest_addoption(parser):
    parser.addoption("--data-dir", default=os.environ.get("KERAS_DDPM_DATA"), help="folder of prepared real data")
    parser.addoption("--plain", action="store_true", help="without the fast functions for PyTorch")


def pytest_configure(config):
    if config.getoption("--plain") and TORCH:
        devices.plain_functions.update(fast_functions())


def fast_functions():
    return {name for name in devices.FAST if "random_state" not in name}  # which has no plain form


@pytest.fixture
def plain_functions(monkeypatch):
    """A function that switches fast functions off until the test ends: all, or those with the names given."""

    def switch_off(*names):
        names = names or fast_functions()
        monkeypatch.setattr(devices, "plain_functions", devices.plain_functions | set(names))

    return switch_off if TORCH else lambda *names: None


@pytest.fixture
def data_dir(request):
    """The folder of the real data; without one the test is skipped."""
    folder = request.config.getoption("--data-dir")
    if not folder:
        pytest.skip("no real data: give --data-dir=FOLDER or set KERAS_DDPM_DATA")
    assert pathlib.Path(folder).is_dir(), folder
    return folder


@pytest.fixture(autouse=True)
def _fresh(request):
    if request.config.getoption("--plain") and request.node.get_closest_marker("fast"):
        pytest.skip("needs the fast functions, or a process with them")
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def model():
    """A small model of points, compiled."""
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(kd.schedules.linear(50)), seed=0)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2))
    return model


@pytest.fixture
def points():
    """Points in [-1, 1], `(256, 2)`."""
    return np.random.default_rng(0).uniform(-1, 1, (256, 2)).astype("float32")


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Runs an example as a command in this process, which is faster. Returns the exit status and the output."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
            sys.exit(0)
        printed = "".join(capsys.readouterr())
        if isinstance(stop.value.code, str):  # which Python prints
            return 1, f"{printed}{stop.value.code}\n"
        return stop.value.code, printed

    return run


def check_error(result, status, message):
    """Checks that the last line of the output is the whole message, after the name of the script."""
    got, text = result
    *_, line = text.splitlines()
    assert got == status and re.match(r"\w+\.py: " + ("error: " if status == 2 else ""), line), text
    assert re.search(message, line) and "Traceback" not in text, text


def weights(variables):
    """The values of variables."""
    return [ops.convert_to_numpy(v) for v in variables]


def randomize(network, scale=0.3):
    """Gives every weight a random value, as a fresh network outputs zeros."""
    random = np.random.default_rng(0)
    network.set_weights([scale * random.standard_normal(w.shape) for w in network.get_weights()])


def image_network(shape, **kwargs):
    """A network for tests that need any network of images. It compiles faster than a U-Net."""
    return kd.networks.dit(shape, patch_size=4, width=8, depth=1, num_heads=1, **kwargs)


def small_unet(**kwargs):
    """A compiled model of 8x8 images."""
    model = kd.DiffusionModel(kd.networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4), seed=0, **kwargs)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-3))
    return model
