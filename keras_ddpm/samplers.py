"""Samplers: from noise to data in steps.

A sampler is a stateless value. It sees the network only as `denoise(x_t, t) -> x_0` and the schedule only as a
`schedules.Schedule`:

    table(schedule)                         float64 array (steps, columns), made on the host; the first column is t
    step(row, denoise, x, noise, memory)    one step from t to s < t; returns x_s and the x_0 predicted on the way
    evaluations                             how often a whole run calls the network on a schedule
    stochastic                              whether it uses `noise`, which is otherwise not drawn

`memory` is the x_0 that the step before returned (zeros at first), which is what multi-step methods need.
`step` is traced once and run in a compiled loop, so it must not branch on values.

To add a sampler whose step is linear in x_0, x_t and noise, subclass `Sampler` and write `coefficients`; any other
also overrides `table` and `step`.
"""

import dataclasses

import numpy as np
from keras import ops

from keras_ddpm.diffusion import posterior_coefficients


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler whose step is x_s = c_0 x_0 + c_t x_t + std noise.

    Args:
        num_steps: how many steps, at most T; `None` for all T. They are spaced evenly from T down to 0.
    """

    num_steps: int | None = None
    stochastic = True

    def __post_init__(self):
        if self.num_steps is not None and (not isinstance(self.num_steps, (int, np.integer)) or self.num_steps < 1):
            raise ValueError(f"`num_steps` must be a positive integer or None. Received: num_steps={self.num_steps}")

    def timesteps(self, schedule):
        """The visited times, `(steps + 1,)` integers from T down to 0."""
        num_steps = self.num_steps or schedule.timesteps
        if num_steps > schedule.timesteps:
            raise ValueError(
                f"A schedule of {schedule.timesteps} steps cannot be sampled in more. Received: num_steps={num_steps}"
            )
        return np.linspace(schedule.timesteps, 0, num_steps + 1).round().astype("int64")

    def table(self, schedule):
        times = self.timesteps(schedule)
        t, s = times[:-1], times[1:]
        coefficients = self.coefficients(schedule.alpha[t], schedule.sigma[t], schedule.alpha[s], schedule.sigma[s])
        return np.stack([t, *coefficients], axis=1)

    def coefficients(self, alpha_t, sigma_t, alpha_s, sigma_s):
        """The columns c_0, c_t and std, from float64 arrays `(steps,)`. The last std must be 0."""
        raise NotImplementedError

    def step(self, row, denoise, x, noise, memory):
        t, from_x_0, from_x_t, std = row
        x_0 = denoise(x, ops.cast(t, "int32"))
        x = from_x_0 * x_0 + from_x_t * x
        return (x + std * noise if self.stochastic else x), x_0


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling, from the posterior q(x_s | x_t, x_0) with the predicted x_0.

    Args:
        num_steps: how many steps, spaced evenly from T down to 0; `None` for all T.
        variance: "small" (the posterior's), "large" (β_t; right for data that is noise), or a number in [0, 1]
            between their logarithms, 0 being "small".

    Raises:
        ValueError: for a number of steps or a variance that is none.

    Reference: Ho et al., 2020, algorithm 2 and section 3.2; Nichol and Dhariwal, 2021, Eq. 15.
    """

    variance: str | float = "small"

    def __post_init__(self):
        super().__post_init__()
        if self.variance not in ("small", "large") and not (
            isinstance(self.variance, (int, float)) and 0 <= self.variance <= 1
        ):
            raise ValueError(
                f"`variance` must be 'small', 'large' or a number in [0, 1]. Received: variance={self.variance!r}"
            )

    def coefficients(self, alpha_t, sigma_t, alpha_s, sigma_s):
        from_x_0, from_x_t, small = posterior_coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        large = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        fraction = {"small": 0.0, "large": 1.0}.get(self.variance, self.variance)
        variance = small ** (1 - fraction) * large**fraction
        variance[-1] = 0.0  # the last step ends at the mean, whatever the variance
        return from_x_0, from_x_t, np.sqrt(variance)


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models: deterministic with `eta=0`, DDPM with `eta=1`.

    The noise is derived again from the (clipped) prediction of x_0.

    Args:
        num_steps: how many steps, spaced evenly from T down to 0; `None` for all T.
        eta: the share of DDPM's noise ("small" variance) that is used, in [0, 1].

    Raises:
        ValueError: for a number of steps that is none or an eta outside [0, 1].

    Reference: Song et al., 2021, Eq. 12 and 16.
    """

    num_steps: int | None = 50
    eta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` must be in [0, 1]. Received: eta={self.eta}")

    @property
    def stochastic(self):
        return self.eta > 0

    def coefficients(self, alpha_t, sigma_t, alpha_s, sigma_s):
        *_, variance = posterior_coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        variance = self.eta**2 * variance
        from_x_t = np.sqrt(sigma_s**2 - variance) / sigma_t
        return alpha_s - alpha_t * from_x_t, from_x_t, np.sqrt(variance)
