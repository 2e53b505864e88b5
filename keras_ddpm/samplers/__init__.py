"""Samplers: from noise to data in steps.

A sampler is a table of numbers with one row for each network call, as `rows.py` explains. For example, DDIM from t to s
keeps the noise ε = (x − alpha_t x_0) / sigma_t. Its row is

    row(t, from_x=sigma_s / sigma_t, from_x_0=alpha_s - alpha_t * sigma_s / sigma_t)

To add a sampler, subclass `Sampler` as a frozen dataclass. If each step calls the network once, override
`coefficients`. It gets the scales at both ends of all steps and returns the columns by name. Otherwise override
`steps`, which returns the rows of each step. Columns that are not given are 0.
"""

from keras_ddpm.samplers.rows import NUM_PREVIOUS, ROW, add_noise_back, row, step
from keras_ddpm.samplers.searching import Trajectories, optimized
from keras_ddpm.samplers.solvers import DDIM, DDPM, IPNDM, DPMSolver, Heun, Langevin, Sampler, UniPC

__all__ = [
    "NUM_PREVIOUS",
    "ROW",
    "add_noise_back",
    "row",
    "step",
    "Trajectories",
    "optimized",
    "DDIM",
    "DDPM",
    "IPNDM",
    "DPMSolver",
    "Heun",
    "Langevin",
    "Sampler",
    "UniPC",
]
