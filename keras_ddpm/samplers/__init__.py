"""Samplers: from noise to data in steps.

A sampler is a table of numbers with one row for each network call, as `rows.py` explains. For example, DDIM from t to s
keeps the noise ε = (x − alpha_t x_0) / sigma_t. Its row is

    row(t, from_x=sigma_s / sigma_t, from_x_0=alpha_s - alpha_t * sigma_s / sigma_t)

To add a sampler, subclass `Sampler` as a frozen dataclass. If each step calls the network once, override
`coefficients`. It gets the scales at both ends of all steps and returns the columns by name. Otherwise override
`steps`, which returns the rows of each step. Columns that are not given are 0.
"""

from keras_ddpm.samplers import rows, searching, solvers
from keras_ddpm.samplers.rows import *
from keras_ddpm.samplers.searching import *
from keras_ddpm.samplers.solvers import *

__all__ = [*rows.__all__, *searching.__all__, *solvers.__all__]
