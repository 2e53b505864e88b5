"""Several devices and processes: what `keras.distribution` on JAX and `tf.distribute` on TensorFlow leave to a model.

On JAX a program sees whole batches, and the layouts of its arrays divide them over the devices. On TensorFlow each
replica runs the program on its own part. Keras 3.15 has neither on PyTorch, so there is one replica.
"""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops


def _jax_distribution():
    return keras.distribution.distribution() if keras.backend.backend() == "jax" else None


def _tf_strategy():
    """TensorFlow's current strategy if it has several replicas."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    return strategy if strategy.num_replicas_in_sync > 1 else None


def in_scope(method: Callable) -> Callable:
    """Decorates a method of a model: its strategy is the current one. Only models of TensorFlow have one."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        strategy = getattr(self, "distribute_strategy", None)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            return method(self, *args, **kwargs)

    return wrapped


def is_chief() -> bool:
    """Whether this process writes files and prints: it is the only one, or number 0 of several.

    On TensorFlow, `TF_CONFIG` tells the number. A strategy that was told otherwise is known in its scope only.
    """
    return _process()[0] == 0


def several() -> bool:
    """Whether there are several processes."""
    return _process()[1] > 1


def _process():
    """The number of this process, and how many there are."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.process_index(), jax.process_count()
    if backend == "tensorflow":
        import tensorflow as tf

        resolver = getattr(tf.distribute.get_strategy(), "cluster_resolver", None)
        resolver = resolver or tf.distribute.cluster_resolver.TFConfigClusterResolver()
        jobs = resolver.cluster_spec().as_dict()
        if jobs:  # a "chief" is number 0, and otherwise the first "worker"
            after_chief = "chief" in jobs and resolver.task_type != "chief"
            return resolver.task_id + after_chief, sum(map(len, jobs.values()))
    return 0, 1


def by_chief(method: Callable) -> Callable:
    """Decorates a method that writes a file. The chief calls it, and other processes do nothing."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        if not is_chief():
            return None
        if not several():
            return method(*args, **kwargs)
        # Keras makes variables when it saves, and would wait until all processes make them. A new thread has neither
        # distribution nor strategy.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(method, *args, **kwargs).result()

    return wrapped


def data_parts() -> tuple[int, int, int]:
    """How batches are divided: into how many equal parts, and number and count of the shares of the processes.

    TensorFlow divides the batches by itself.
    """
    distribution = _jax_distribution()
    if distribution is None:
        return 1, 0, 1
    mesh = distribution.device_mesh
    parts = dict(zip(mesh.axis_names, mesh.shape))[distribution.batch_dim_name]
    return parts, distribution.data_shard_id, min(parts, distribution.num_processes)


def program_parts() -> int:
    """Into how many equal parts `part` divides a batch."""
    strategy = _tf_strategy()
    return strategy.num_replicas_in_sync if strategy else data_parts()[0]


def part(x: Any) -> Any:
    """In a compiled program: this replica's part of a batch, or on JAX the batch, divided over the devices."""
    strategy, distribution = _tf_strategy(), _jax_distribution()
    if strategy:
        number, size = _number(), ops.shape(x)[0] // program_parts()
        return x[number * size : (number + 1) * size]
    if distribution is None:
        return x
    return keras.distribution.distribute_tensor(x, distribution.get_data_layout(x.shape))


def whole(x: Any) -> Any:
    """In a compiled program: a result of parts. On JAX every device gets all of it; Keras joins those of TensorFlow."""
    distribution = _jax_distribution()
    if distribution is None:
        return x
    layout = keras.distribution.TensorLayout((None,) * len(x.shape), distribution.device_mesh)
    return keras.distribution.distribute_tensor(x, layout)


def mean(x: Any) -> Any:
    """In a training step: the mean of a number over the replicas."""
    if not _tf_strategy():
        return x
    import tensorflow as tf

    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, x)


def value_of(v: keras.Variable) -> np.ndarray:
    """The value of a variable. With several processes, a metric of TensorFlow has what this process added to it."""
    strategy = _tf_strategy()
    if strategy and several():  # it would add up those of all processes, and wait for them
        return strategy.experimental_local_results(v.value)[0].numpy()
    return ops.convert_to_numpy(v)


def joined(logs: dict) -> dict:
    """At the end of a step: the logs of a replica, so that Keras takes their mean over the replicas.

    With several processes of TensorFlow, Keras 3.15 takes the mean along an axis that numbers do not have.
    """
    if _tf_strategy() and several():
        return {name: ops.reshape(value, (1,)) for name, value in logs.items()}
    return logs


def undivided(loss: Any) -> Any:
    """Outside of a training step: a loss that Keras divided by the number of replicas, to add up their gradients."""
    strategy = _tf_strategy()
    return loss * strategy.num_replicas_in_sync if strategy else loss


def _number():
    """The number of this replica, 0 outside of a replica."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context.replica_id_in_sync_group if context else 0


class Seeds(keras.random.SeedGenerator):
    """Seeds that differ from replica to replica, by the replica's number alone. Those of replica 0 are Keras' own."""

    def next(self, ordered: bool = True) -> Any:
        seed = super().next(ordered)
        return seed + ops.cast(_number(), seed.dtype) * np.array([0x9E3779B9, 0]) if _tf_strategy() else seed
