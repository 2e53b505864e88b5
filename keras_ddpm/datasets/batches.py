"""Batches of data in memory or in a memory-mapped file."""

import concurrent.futures
import dataclasses
import functools
import os
from typing import Any

import keras
import numpy as np

from keras_ddpm import _checks, images
from keras_ddpm._backend import replicas
from keras_ddpm.datasets import cache

__all__ = ["Batches"]


@dataclasses.dataclass(eq=False, repr=False)
class Batches(keras.utils.PyDataset):
    """Batches of data in memory, or in a memory-mapped file: `x_0`, or `(x_0, condition)` if there are labels.

    With `shuffle`, the batches of all epochs are cut from one endless sequence of permutations of the data. Every batch
    is full, and all examples are seen equally often. A batch depends on the seed, the epoch and its number alone.

    Several devices of JAX need batches that they can share. If the data in order do not divide by their number, the
    last batch is filled up with an example of weight 0. Several processes of JAX each get their share of every batch.

    Args:
        x: array `(num, ...)`, possibly memory-mapped. uint8 images are scaled to [-1, 1] in the batches. Floats must be
            finite and are not scaled. A memory-mapped file is read one batch at a time.
        labels: array `(num,)` of labels, another condition `(num, ...)`, or a dict of them by name, such as `{"label":
            labels, "image": images}`; `None` for none. uint8 images are scaled like `x`.
        batch_size: number of examples in a batch.
        shuffle: whether to shuffle. Otherwise an epoch is the data in order, and its last batch may be smaller.
        flip: whether to mirror each image with probability 1/2, together with its condition image.
        steps_per_epoch: number of batches in an epoch of shuffled data. By default `num // batch_size`.
        seed: seed of the order and of the flips.
        class_names: the name of each label 0..K − 1, if they have names.
        num_workers: number of threads that make the next batches in the meantime. 0 makes each when it is needed. Use
            this instead of Keras' `workers`, which in 3.15 do not keep the order.

    Attributes:
        epoch: number of the epoch, which determines its batches. It counts on in further calls of `fit`; with
            `initial_epoch`, `fit` starts there.

    Raises:
        ValueError: if `batch_size` is larger than the data, floats are not finite, the number of labels differs from
            the number of examples, `flip` is set for data that are not images, or an epoch has no steps.
    """

    x: np.ndarray
    labels: Any = None
    batch_size: int = 64
    shuffle: bool = True
    flip: bool = False
    steps_per_epoch: int | None = None
    seed: int = 0
    class_names: list[str] | None = None
    num_workers: int = 0

    shuffles_itself = True  # by the number of the epoch, so `fit` sets `epoch` and leaves the order alone

    def __post_init__(self) -> None:
        super().__init__()
        if self.class_names is not None:
            self.class_names = list(_checks.names([*map(_checks.text, self.class_names)]))
        self.x = x = np.asarray(self.x)
        _checks.counts(high=len(x), batch_size=self.batch_size)
        _checks.counts(low=0, seed=self.seed, num_workers=self.num_workers)
        flags = {"shuffle": self.shuffle, "flip": self.flip}
        _checks.require(all(isinstance(flag, bool) for flag in flags.values()), "Expected True or False", **flags)
        _checks.counts(optional=True, steps_per_epoch=self.steps_per_epoch)
        _checks.require(x.dtype == "uint8" or _is_finite(x), "The data hold NaN or infinite values")
        _checks.require(not self.flip or x.ndim == 4, "Only images can be flipped", shape=x.shape)
        if self.labels is not None:
            parts = self.labels if isinstance(self.labels, dict) else {"labels": self.labels}
            parts = {name: np.asarray(values) for name, values in parts.items()}
            for name, values in parts.items():
                _checks.require(values.shape[:1] == x.shape[:1], f"Expected {len(x)} {name}", shape=values.shape)
                if values.dtype == "uint64":  # PyTorch lacks it
                    parts[name] = values.astype("int64")
            self.labels = parts if isinstance(self.labels, dict) else parts["labels"]
        self.epoch = 0
        self._begun = False
        self._owner: int | None = None
        self._pool: Any = None
        self._coming: dict = {}

    def __repr__(self) -> str:
        labels = "" if self.labels is None else ", with labels"
        return f"<Batches of {self.batch_size} of {len(self.x)} examples {self.x.shape[1:]} {self.x.dtype}{labels}>"

    @property
    def num_examples(self) -> int:
        """Number of examples in the data."""
        return len(self.x)

    def __len__(self) -> int:
        full, rest = divmod(len(self.x), self.batch_size)
        return (self.steps_per_epoch or full) if self.shuffle else full + (rest > 0)

    def __getitem__(self, step: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        if not 0 <= step < len(self):
            raise IndexError(f"There are {len(self)} batches. Received: {step}")
        batch = self.epoch * len(self) + step if self.shuffle else step
        share = replicas.data_parts()
        if not self.num_workers:
            return self._batch(batch, *share)
        if self._owner != os.getpid():  # threads do not come along into a process that is forked
            pool = concurrent.futures.ThreadPoolExecutor(self.num_workers)
            self._owner, self._pool, self._coming = os.getpid(), pool, {}
        end = batch + 1 + 2 * self.num_workers
        ahead = range(batch, end if self.shuffle else min(end, len(self)))
        # Batches of an earlier place in the data are no longer wanted.
        wanted = [(n, *share) for n in ahead]
        self._coming = {which: self._coming.get(which) or self._pool.submit(self._batch, *which) for which in wanted}
        return self._coming.pop((batch, *share)).result()

    def _batch(self, batch, parts, process, num_processes):
        """Makes a batch, given how batches are divided, as in `replicas.data_parts`."""
        num = len(self.x)
        row = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        chosen, weight = row, None
        _checks.require(self.batch_size % parts == 0, f"{parts} devices need a multiple", batch_size=self.batch_size)
        if self.shuffle:
            chosen = np.array([_permutation(num, self.seed, i // num)[i % num] for i in row])
        elif num % parts:
            filled = num + -num % parts
            row = row[row < filled]
            # This makes the mean over batches equal the mean over the data.
            chosen, weight = np.minimum(row, num - 1), np.where(row < num, filled / num, 0.0).astype("float32")
        else:
            chosen = row[row < num]
        mirrored = np.random.default_rng([self.seed, 1, batch]).random(len(chosen)) < 0.5
        mine = slice(len(chosen) * process // num_processes, len(chosen) * (process + 1) // num_processes)
        chosen, mirrored = chosen[mine], mirrored[mine]
        x, labels = self._examples(chosen, mirrored), self.labels
        if labels is not None:
            labels = keras.tree.map_structure(lambda values: self._chosen(values, chosen, mirrored), labels)
        if weight is not None:
            return x, labels, weight[mine]
        return x if labels is None else (x, labels)

    def _examples(self, chosen, mirrored):
        x = self._chosen(self.x, chosen, mirrored)
        cache.forget(self.x)
        return images.from_uint8(x) if x.dtype == "uint8" else x.astype("float32")

    def _chosen(self, values, chosen, mirrored):
        values = values[chosen]
        if self.flip and values.ndim > 3:
            values[mirrored] = values[mirrored, :, ::-1]
        return images.from_uint8(values) if values.dtype == "uint8" and values.ndim > 3 else values

    def __getstate__(self):
        return self.__dict__ | {"_owner": None, "_pool": None, "_coming": {}}

    def on_epoch_begin(self) -> None:
        self._begun = True

    def on_epoch_end(self) -> None:
        """Moves on to the next epoch. Keras calls this before the first epoch, too, and then starts its workers."""
        self.epoch += self._begun
        self._begun = False


def _is_finite(x, at_once=2**22):
    """Whether all numbers are finite. A part of a file is in memory at once."""
    size = max(1, at_once // max(1, x[0].size))
    for start in range(0, len(x), size):
        if not np.all(np.isfinite(x[start : start + size])):
            return False
        cache.forget(x)
    return True


@functools.lru_cache(maxsize=4)
def _permutation(num, seed, number):
    """The order of the data in pass `number`. Several are kept, as a batch may span two passes."""
    return np.random.default_rng([seed, 0, number]).permutation(num)
