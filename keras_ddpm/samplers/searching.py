"""Times for a sampler's steps, searched on the trajectories of a model."""

import dataclasses
from typing import NamedTuple

import numpy as np

from keras_ddpm import _checks
from keras_ddpm.samplers.rows import Array
from keras_ddpm.samplers.solvers import DDIM, Sampler
from keras_ddpm.schedules import Schedule

__all__ = ["Trajectories", "optimized"]


class Trajectories(NamedTuple):
    """Samples on their way from noise to data.

    Attributes:
        schedule: the schedule.
        times: array `(N + 1,)` of times t, from T down to 0.
        x: array `(N + 1, num_samples, ...)` of x_t at these times.
        x_0: array `(N, num_samples, ...)` of the x_0 predicted at these times.
    """

    schedule: Schedule
    times: Array
    x: Array
    x_0: Array


def optimized(paths: Trajectories, sampler: Sampler) -> Sampler:
    """Returns the sampler with the times at which its steps start searched for a model.

    The trajectories of a model's samples have nearly the same shape. The search chooses, among their times, the times
    that minimize the total deviation of straight steps from the trajectories.

    >>> model.sampler = optimized(model.trajectories(), UniPC(6))  # the default of `sample`, and saved with the model

    Args:
        paths: `DiffusionModel.trajectories`. They serve any number of searches.
        sampler: a sampler whose steps call the network once, with at most as many steps as the trajectories.

    Returns:
        The sampler with another `spacing`, a tuple of times.

    Raises:
        ValueError: if the sampler has too many steps, or steps of several network calls.

    Reference: Chen et al., 2024 ("On the trajectory regularity of ODE-based diffusion sampling"), section 4.
    """
    once = isinstance(sampler, Sampler) and max(map(len, sampler.steps(paths.schedule))) == 1
    _checks.require(once, "`sampler` must be a sampler whose steps call the network once", sampler=sampler)
    num, wanted = len(paths.x_0), sampler.num_steps or 0
    _checks.counts(high=num, num_steps=wanted)
    alpha, sigma = paths.schedule.alpha[paths.times], paths.schedule.sigma[paths.times]
    deviation = np.full((num + 1, num + 1), np.inf)  # of a step from one time to a later one
    for i, (x, x_0) in enumerate(zip(paths.x, paths.x_0)):
        columns = DDIM().coefficients(alpha[i], sigma[i], alpha[i + 1 :], sigma[i + 1 :])
        for j, from_x, from_x_0 in zip(range(i + 1, num + 1), columns["from_x"], columns["from_x_0"]):
            deviation[i, j] = np.sqrt(np.mean((from_x * x + from_x_0 * x_0 - paths.x[j]) ** 2))
    return dataclasses.replace(sampler, spacing=tuple(map(int, paths.times[shortest_path(deviation, wanted)])))


def shortest_path(lengths: Array, num_steps: int) -> list[int]:
    """The nodes from 0 on, without the last node, of the shortest path to the last node in `num_steps` steps.

    Args:
        lengths: array `(nodes, nodes)`: the length of each step, infinite if there is no step.
        num_steps: number of steps. A path of this length must exist.
    """
    total, origins = np.full(len(lengths), np.inf), []
    total[0] = 0.0
    for _ in range(num_steps):
        sums = total[:, None] + lengths
        origins.append(np.argmin(sums, axis=0))
        total = np.min(sums, axis=0)
    path = [len(lengths) - 1]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return path[:0:-1]
