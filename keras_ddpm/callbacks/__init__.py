"""Callbacks for `DiffusionModel.fit`."""

from keras_ddpm.callbacks.checkpoint import Checkpoint as Checkpoint
from keras_ddpm.callbacks.ema import EMAWeights as EMAWeights
from keras_ddpm.callbacks.measures import LossByTimestep as LossByTimestep
from keras_ddpm.callbacks.measures import SampleMetrics as SampleMetrics
from keras_ddpm.callbacks.sample_grid import SampleGrid as SampleGrid

__all__ = ["Checkpoint", "EMAWeights", "LossByTimestep", "SampleMetrics", "SampleGrid"]
