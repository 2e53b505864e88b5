"""Feed: the containers in which data come to Keras. It knows arrays, streams and loaders, and no diffusion."""

import copy
import functools
import itertools
import types
from typing import Any

import keras
import numpy as np

from keras_ddpm import _checks

__all__ = ["opened", "with_labels"]


def opened(data: Any, labels: Any = None) -> tuple[Any, tuple]:
    """Looks into data.

    Args:
        data: what `keras.Model.fit` takes as `x`.
        labels: what it takes as `y`.

    Returns:
        The data as Keras can read them; and x, y and weights that can be checked now: all of arrays, and the first
        batch of any other source. A generator gets its first batch back.

    Raises:
        ValueError: if there is no batch, or several arrays stand in a list.
    """
    hint = "A list is several inputs to Keras. Give arrays, one by one: `fit(x_0, labels)`"
    _checks.require(not any(isinstance(given, (list, tuple)) for given in (data, labels)), hint)
    if isinstance(data, types.GeneratorType):
        first = next(data, None)
        batches = itertools.chain([first], data)
        # Keras needs tuples.
        data = (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,) for batch in batches)
    elif isinstance(data, keras.utils.PyDataset):
        first = data[0]
    elif isinstance(data, dict) or hasattr(data, "shape"):
        first = data if labels is None else (data, labels)
    else:
        first = next(iter(() if data is None else data), None)
        if hasattr(data, "collate_fn") and (hasattr(first, "shape") or isinstance(first, dict)):
            # Keras takes a tensor or dict of PyTorch's `DataLoader` apart on other backends.
            data = copy.copy(data)
            data.collate_fn = functools.partial(_in_tuple, data.collate_fn)
    _checks.require(first is not None, "The data hold no batch", data=data)
    x, y, weight = keras.utils.unpack_x_y_sample_weight(first)
    if orders_itself(data) and not isinstance(y, dict) and np.ndim(y) < 4:
        y = data.labels  # those of all batches
    return data, (x, y, weight)


def with_labels(x: Any, y: Any, weight: Any) -> Any:
    """The labels `y` of arrays. Keras ignores sample weights if there are no labels, so dummy labels are added."""
    first = next(iter(x.values())) if isinstance(x, dict) else x
    # PyTorch lacks uint64.
    y = keras.tree.map_structure(lambda v: np.asarray(v, "int64") if getattr(v, "dtype", None) == "uint64" else v, y)
    return np.zeros(len(first)) if y is None and weight is not None and hasattr(first, "shape") else y


def orders_itself(data: Any) -> bool:
    """Whether the order of the data depends on their attribute `epoch` alone, as in `datasets.Batches`."""
    return getattr(data, "shuffles_itself", False)


def _in_tuple(function, *args):
    return (function(*args),)
