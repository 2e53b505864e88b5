"""Figures."""

import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from keras_ddpm import images


def loss(path, history):
    """Writes the curves of the losses, on a logarithmic scale.

    Args:
        path: file name; its ending gives the format.
        history: a dict of lists, one number an epoch, as `fit` returns in `History.history`; entries whose name
            does not end in "loss" are left out.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in history.items():
        if name.endswith("loss"):
            axes.plot(range(1, len(values) + 1), values, marker="." if len(values) < 50 else "", label=name)
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def show(axes, x, columns=None):
    """Draws a grid of images on axes of Matplotlib.

    Args:
        axes: the axes.
        x: `(num, height, width, channels)` in [-1, 1].
        columns: how many a row; by default as many as make the grid about square.
    """
    axes.imshow(images.to_uint8(images.grid(x, columns)), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
