"""Callbacks for `DiffusionModel.fit`."""

from keras_ddpm.callbacks.checkpoint import Checkpoint
from keras_ddpm.callbacks.ema import EMAWeights
from keras_ddpm.callbacks.measures import LossByTimestep, SampleMetrics
from keras_ddpm.callbacks.sample_grid import SampleGrid

__all__ = ["Checkpoint", "EMAWeights", "LossByTimestep", "SampleMetrics", "SampleGrid"]
