"""Files with which other programs sample: a network in ONNX, and the process and samplers in JSON.

A program needs an ONNX runtime and one linear update for each row, as `rows` explains. The guide "Without Python"
has it in Python and in JavaScript.
"""

import contextlib
import importlib
import json
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_ddpm import _checks, editing, guidance, samplers
from keras_ddpm.model import DiffusionModel
from keras_ddpm.samplers import rows
from keras_ddpm.schedules import Schedule

__all__ = ["default_tables", "onnx", "safetensors"]

_OPSET = 18  # of ONNX
_SMALLEST = 4096  # numbers in a tensor that is stored in half precision; sines of t, say, need more


def onnx(
    model: DiffusionModel,
    folder: str | pathlib.Path,
    tables: Mapping[str, samplers.Sampler] | None = None,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: tuple | None = None,
    half_precision: bool = True,
) -> pathlib.Path:
    """Writes the files that a program needs to sample without Keras.

    `denoiser.onnx` is the network with the averaged weights, for any batch size. It computes in float32. Its inputs are
    x_t `(batch, ...)` and t `(batch,)`, and the conditions of the network, such as `label`. Its output is y.

    - `image` has the network's size, and holds noise of the level `image_noise`, as in `conditions.seen`. Zeros with
      the level 1 mean that the image is missing.
    - `scale` is 1 / w for a guidance scale w from 1 to `max_guidance_scale`. Then y has guidance in this one call. For
      other w, it is 1 in the two calls with and without the label.

    `model.json` holds the names of the inputs, the shape of the data, the schedule and the prediction, the range of
    x_0, the standard deviation of x_T, the class names, the null label, and `max_guidance_scale`, which is 1 if the
    network is not told the scale.

    `samplers.json` holds the rows of the samplers, by name: under "sample", and under "inpaint" with each step made
    five times, as in `editing.inpaint`. A row has the columns of `rows.ROW`. It also has the guidance scale, the
    factors of x_t and y in x_0 (`x_0_from_x`, `x_0_from_y`), and the scales of signal and noise after the row (`alpha`,
    `sigma`).

    Args:
        model: a `DiffusionModel`.
        folder: where the files are written. It is made if it does not exist.
        tables: samplers by name; `None` for some with 6 to 100 steps, the default of `model.sample` first.
        guidance_scale: w of the rows, as in `DiffusionModel.sample`.
        guidance_interval: times `(low, high)` outside of which w is 1, as in `guidance.Guidance`.
        half_precision: whether large weights are stored in 16 bits. The file has half of the size then.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: if the package `onnx`, or what Keras needs to write ONNX, is not installed.
        ValueError: if a sampler has more steps than the schedule, a weight is too large for half precision, or
            guidance is out of range.
        onnx.checker.ValidationError: if the network has an operation that ONNX does not have.
    """
    tools = _import("onnx")
    schedule = model.diffusion.schedule
    asked = guidance.Guidance(interval=guidance_interval)
    wanted = default_tables(model) if tables is None else tables
    steps = {name: sampler.steps(schedule) for name, sampler in wanted.items()}
    resampled = {name: editing.resampled(some, schedule, num_resamples=5) for name, some in steps.items()}
    described = {
        kind: {name: _described(np.concatenate(some), model, asked, guidance_scale) for name, some in several.items()}
        for kind, several in {"sample": steps, "inpaint": resampled}.items()
    }
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        path = pathlib.Path(temporary) / "denoiser.onnx"
        model.export(str(path), format="onnx", opset_version=_OPSET, verbose=False)
        graph = tools.load(path)  # also the files beside it that hold large weights
    _rename_output(graph.graph, "y")
    _write_out_erfc(graph.graph, tools)
    if half_precision:
        _halve(graph.graph, tools)
    tools.checker.check_model(graph, full_check=True)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tools.save(graph, folder / "denoiser.onnx")
    (folder / "model.json").write_text(json.dumps(_description(model, graph)))
    (folder / "samplers.json").write_text(json.dumps(described))
    return folder


def safetensors(model: DiffusionModel, path: str | pathlib.Path) -> None:
    """Writes the averaged weights in the format of the package `safetensors`, by their paths in the network.

    The path of a weight in a nested model begins with the names of the models around it.

    Args:
        model: a `DiffusionModel`.
        path: the file.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: if two weights have the same path.
    """
    paths = dict(_paths(model.network))
    # The package writes the memory of an array whatever the order of its axes there.
    values = [np.ascontiguousarray(keras.ops.convert_to_numpy(average)) for average in model.ema_weights]
    arrays = {paths[id(v)]: value for v, value in zip(model.network.weights, values)}
    _checks.require(len(arrays) == len(values), "Two weights have the same path", paths=sorted(paths.values()))
    _import("safetensors.numpy").save_file(arrays, path)


def _paths(model: keras.Model, before: str = "") -> Iterator[tuple[int, str]]:
    """Yields the identity and the path of each weight of a model and of the models in it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _paths(layer, f"{before}{layer.name}/")
        else:
            yield from ((id(v), before + v.path) for v in layer.weights)


def default_tables(model: DiffusionModel) -> dict[str, samplers.Sampler]:
    """Samplers of the model with few and with many steps, by name. The default of `model.sample` comes first."""
    others = [samplers.DPMSolver(20, eta=1.0), samplers.UniPC(6), samplers.DDIM(50), samplers.DDPM(100)]
    tables: dict[str, samplers.Sampler] = {}
    for sampler in [model.default_sampler, *others]:
        if (sampler.num_steps or 0) <= model.diffusion.timesteps:
            calls = len(sampler.table(model.diffusion.schedule))
            tables.setdefault(f"{type(sampler).__name__}, {calls} steps", sampler)
    return tables


def _described(table: np.ndarray, model: DiffusionModel, asked: guidance.Guidance, guidance_scale: float) -> list[dict]:
    """The rows of a table as dicts of numbers, with what they say about the process and about guidance."""
    schedule: Schedule = model.diffusion.schedule
    t = table["t"].astype("int64")
    arrival = np.append(t[1:], 0)
    from_x, from_y = model.diffusion.x0_coefficients()[t].T
    columns = {name: table[name] for name in rows.COLUMNS} | {
        "guidance_scale": asked.scales(guidance_scale, t),
        "x_0_from_x": from_x,
        "x_0_from_y": from_y,
        "alpha": schedule.alpha[arrival],
        "sigma": schedule.sigma[arrival],
    }
    return [dict(zip(columns, values)) for values in zip(*(column.tolist() for column in columns.values()))]


def _description(model: DiffusionModel, graph: Any) -> dict:
    from keras_ddpm import __version__

    diffusion, condition = model.diffusion, model.condition
    return {
        "keras_ddpm": __version__,
        "opset": graph.opset_import[0].version,
        "inputs": [entry.name for entry in graph.graph.input],
        "shape": model.data_shape,
        "prediction": diffusion.prediction,
        "clip_range": diffusion.clip_range,
        "schedule": diffusion.schedule.get_config(),
        "prior_std": float(np.hypot(diffusion.schedule.alpha[-1], diffusion.schedule.sigma[-1])),
        "num_classes": condition and condition.num_classes,
        "null_label": condition and condition.parts[0].null,
        "max_guidance_scale": model.corruption.max_guidance_scale,
        "class_names": condition and condition.class_names,
    }


def _rename_output(graph: Any, name: str) -> None:
    """Renames the only output of an ONNX graph, which each backend calls otherwise."""
    old = graph.output[0].name
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [name if entry == old else entry for entry in names]
    graph.output[0].name = name


def _write_out_erfc(graph: Any, tools: Any) -> None:
    """Replaces erfc(x), which TensorFlow's GELU calls and ONNX does not have, by 1 − erf(x)."""
    for place, node in reversed([*enumerate(graph.node)]):  # from the end, as a new node moves those after it
        if node.op_type == "Erfc":
            erf = f"{node.name}/erf"
            graph.initializer.append(tools.numpy_helper.from_array(np.float32(1), f"{erf}/one"))
            graph.node.insert(place + 1, tools.helper.make_node("Sub", [f"{erf}/one", erf], node.output))
            graph.node[place].CopyFrom(tools.helper.make_node("Erf", node.input, [erf]))


def _halve(graph: Any, tools: Any) -> None:
    """Stores the large float32 tensors of an ONNX graph in half precision, each with a node that casts it back."""
    for tensor in graph.initializer:
        values = tools.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < _SMALLEST:
            continue
        fits = np.all(np.abs(values) <= np.finfo("float16").max)
        _checks.require(fits, "A weight is infinite, NaN or too large for half precision", name=tensor.name)
        stored = f"{tensor.name}/half"
        graph.node.insert(0, tools.helper.make_node("Cast", [stored], [tensor.name], to=tools.TensorProto.FLOAT))
        tensor.CopyFrom(tools.numpy_helper.from_array(values.astype("float16"), stored))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides that PyTorch warns of each shape that it traces, and that tf2onnx knows no erfc."""
    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        finally:
            logger.setLevel(level)


def _import(name: str) -> Any:
    """Imports a package that only exports need."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = "Exports need more packages: `pip install onnx onnxruntime safetensors tf2onnx`"
        raise ModuleNotFoundError(f"{error}. {hint}", name=error.name) from error
