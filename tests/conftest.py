"""Shared fixtures. `--data-dir`, or KERAS_DDPM_DATA, names the folder of TensorFlow Datasets with the real data."""

import os
import pathlib

import keras
import numpy as np
import pytest

import keras_ddpm as kd


def pytest_addoption(parser):
    parser.addoption("--data-dir", default=os.environ.get("KERAS_DDPM_DATA"), help="folder of prepared real data")


@pytest.fixture
def data_dir(request):
    """The folder of the real data; without one the test is skipped."""
    folder = request.config.getoption("--data-dir")
    if not folder:
        pytest.skip("no real data: give --data-dir or set KERAS_DDPM_DATA")
    assert pathlib.Path(folder).is_dir(), folder
    return folder


@pytest.fixture(autouse=True)
def _fresh():
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
