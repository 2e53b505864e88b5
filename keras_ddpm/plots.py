"""Figures."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from keras_ddpm import images

__all__ = ["curves", "figure", "loss", "show", "table"]


@contextlib.contextmanager
def figure(
    path: str | pathlib.Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6, 4), **options: Any
) -> Iterator[Any]:
    """Opens a Matplotlib figure, and writes it at the end of the block. Missing folders are created.

    >>> with figure("curves.png", columns=2) as (left, right):
    ...     left.plot([0, 1], [1, 0])

    Args:
        path: file name. Its extension selects the format.
        rows: rows of axes.
        columns: columns of axes.
        size: width and height in inches.
        **options: options of `matplotlib.figure.Figure.subplots`.

    Yields:
        The axes, or an array of axes, as returned by `subplots`.
    """
    made = Figure(figsize=size, layout="constrained")
    yield made.subplots(rows, columns, **options)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=120, bbox_inches="tight")


def loss(path: str | pathlib.Path, history: dict[str, list[float]]) -> None:
    """Writes the curves of the losses, on a logarithmic scale.

    Args:
        path: file name. Its extension selects the format.
        history: dict of lists with one number per epoch, such as `History.history`, which `fit` returns. Only entries
            whose name ends in "loss" are drawn.
    """
    with figure(path) as axes:
        lines = {name: (range(1, len(values) + 1), values) for name, values in history.items() if name.endswith("loss")}
        curves(axes, lines, xlabel="epoch", ylabel="loss", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5, 7)), major_formatter="{x:g}", minor_formatter="")
        axes.grid(which="both", alpha=0.3)


def curves(axes: Axes, lines: dict[str, Any], **settings: Any) -> None:
    """Draws lines with a legend on Matplotlib axes.

    Args:
        axes: the axes.
        lines: dict from names to y, or to pairs `(x, y)`.
        **settings: arguments of `axes.set`, such as `xlabel`, `title`, `yscale`.
    """
    for name, line in lines.items():
        x, y = line if isinstance(line, tuple) else (range(len(line)), line)
        axes.plot(x, y, marker="." if len(x) < 50 else "", label=_plain(name))
    axes.set(**settings)
    axes.grid(alpha=0.3)
    axes.legend()


def show(x: ArrayLike, columns: int | None = None, axes: Axes | None = None) -> None:
    """Draws a grid of images on Matplotlib axes.

    Args:
        x: images in [-1, 1], as in `images.grid`.
        columns: number of images in a row, as in `images.grid`.
        axes: the axes. By default, the current axes of `matplotlib.pyplot`, which notebooks display.
    """
    if axes is None:
        from matplotlib import pyplot  # which looks for a display

        axes = pyplot.gca()
    axes.imshow(images.to_uint8(images.grid(x, columns)), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def table(path: str | pathlib.Path, rows: dict[str, dict[str, Any]], columns: int = 1, size: float = 0.6) -> None:
    """Writes a table whose cells are grids of images.

    Args:
        path: file name. Its extension selects the format.
        rows: dict from row names to dicts, which map column names to images `(num, height, width, channels)` in
            [-1, 1]. Every row must have the columns of the first.
        columns: number of images in a row of a cell.
        size: width of an image in inches.
    """
    names = list(next(iter(rows.values())))
    heights = [max(-(-len(x) // columns) for x in row.values()) for row in rows.values()]
    width = (size * columns + 0.12) * len(names) + 0.1 * max(len(line) for name in rows for line in name.split("\n"))
    height = size * sum(heights) + 0.05 * len(rows) + 0.2 * max(name.count("\n") + bool(name) for name in names)
    with figure(path, len(rows), len(names), (width, height), squeeze=False, height_ratios=heights) as grid:
        for axes_of_row, (row, cells) in zip(grid, rows.items()):
            axes_of_row[0].set_ylabel(_plain(row), rotation=0, ha="right", va="center", fontsize="small")
            for axes, name in zip(axes_of_row, names):
                show(cells[name], columns, axes)
        for axes, name in zip(grid[0], names):
            axes.set_title(_plain(name), fontsize="small")


def _plain(name):
    """A name as Matplotlib shows it, which takes text between two dollars for a formula."""
    return name.replace("$", r"\$")
