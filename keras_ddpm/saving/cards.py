"""Cards: what a model is, in Markdown beside its file."""

import pathlib
import warnings
from typing import Any

from keras_ddpm.saving import loading

__all__ = ["Presets", "write"]

_TEMPLATE = pathlib.Path(__file__).with_name("card.md")


class Presets:
    """An attribute of a class: the names of the models in the package, with the first sentence of their cards."""

    def __get__(self, *args: Any) -> dict[str, str]:
        paths = sorted(loading.PRESETS.glob("*.md"))
        return {path.stem: path.read_text("utf-8").split("\n\n")[1] for path in paths}


def write(model: Any, path: pathlib.Path) -> None:
    """Writes the card of a `DiffusionModel`, unless there is one. The folder gives the model its name.

    Args:
        model: a `DiffusionModel`.
        path: the file.
    """
    condition = model.condition
    task = "image-to-image" if condition and "image" in condition else "unconditional-image-generation"
    names = (condition and condition.class_names) or ()
    options = f", labels={names[0]!r}" if names else ""
    parts = ", ".join(condition.given if condition else ["none"])
    facts = {"model": model, "parameters": model.network.count_params(), "task": task, "options": options}
    facts |= {"name": path.resolve().parent.name, "condition": parts, "classes": ", ".join(names).replace("|", r"\|")}
    text = _TEMPLATE.read_text("utf-8").format(**facts)
    if not path.exists():
        path.write_text(text, "utf-8")
    kept = path.read_text("utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| ") and row.split(" | ")[0] in kept]
    if stale := [row for row in rows if row not in kept]:
        warnings.warn(f"{path} was kept, but this model has {stale}", stacklevel=3)
