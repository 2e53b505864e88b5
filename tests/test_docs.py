"""The documents: their code runs as printed, their links lead somewhere, and the reference is complete."""

import ast
import importlib.util
import inspect
import json
import re
import runpy
import shutil
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, TORCH

import keras_ddpm as kd

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "examples/README.md"]


def name_of(path):
    return str(path.relative_to(ROOT))


def calls_in(table):
    """The calls in the last column of a table that ends in `keras_ddpm`, and those left of it, by the row."""
    header, _, *rows = [line[1:-1].split(" |") for line in table.splitlines()]
    if header[-1].strip() == "keras_ddpm":
        for row in rows:
            yield re.findall("`(.+?)`", row[-1]), re.findall("`(.+?)`", row[1])


def code_of(path):
    """The code of a page in order: its blocks, and the calls in tables."""
    pattern = re.compile(r"^```python\n(.*?)^```|((?:^\|[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
    for block, table in pattern.findall(path.read_text()):
        yield from [call for ours, _ in calls_in(table) for call in ours] if table else [block]


@pytest.mark.skipif(not TORCH, reason="takes longest to compile elsewhere")
@pytest.mark.parametrize("path", [path for path in PAGES[1:] if any(code_of(path))], ids=name_of)
def test_code_of_the_documents(path, tmp_path, monkeypatch):
    """All blocks of a page, in order. A folder stands for the Hugging Face Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(tmp_path / "hub"))
    names = {}
    try:
        for code in code_of(path):
            exec(code, names)
    finally:
        kd.diffusion.PREDICTIONS.pop("difference", None)  # which a page adds
    assert names.get("same", True)  # what a page says of two samples


def hub(folder):
    """A client of the Hugging Face Hub that keeps repositories in a folder, with the arguments of the installed one."""
    calls = {
        "create_repo": lambda repo_id, exist_ok: None,
        "upload_folder": lambda repo_id, folder_path: shutil.copytree(
            folder_path, folder / repo_id, dirs_exist_ok=True
        ),
        "snapshot_download": lambda repo_id, allow_patterns: folder / repo_id,
    }
    if importlib.util.find_spec("huggingface_hub"):
        client = importlib.import_module("huggingface_hub")
        calls = {name: mock.create_autospec(getattr(client, name), side_effect=call) for name, call in calls.items()}
    return types.SimpleNamespace(**calls)


# The classes of objects in the left columns of docs/coming_from.md.
OTHERS = {
    "diffusers": {
        "scheduler": ["DDPMScheduler"],
        "unet": ["UNet2DModel"],
        "pipeline": ["DDPMPipeline", "DDIMPipeline", "DiTPipeline", "RePaintPipeline"],
        "ema": ["training_utils.EMAModel"],
        "EMAModel": ["training_utils.EMAModel"],
        "compute_snr": ["training_utils.compute_snr"],
        "get_cosine_schedule_with_warmup": ["optimization.get_cosine_schedule_with_warmup"],
    },
    "denoising_diffusion_pytorch": {"diffusion": ["GaussianDiffusion"], "trainer": ["Trainer"]},
}


@pytest.mark.skipif(not TORCH, reason="uses no backend")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("package", OTHERS)
def test_the_calls_of_other_packages_exist(package):
    """Names and arguments of the left columns, by the signatures of the installed package."""
    pytest.importorskip(package)
    text = (ROOT / "docs/coming_from.md").read_text()
    (table,) = re.findall(rf"^\| \| {package.replace('_', '-')} \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    theirs = [call for _, calls in calls_in(table) for call in calls]
    checked = 0
    for node in (node for call in theirs for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Call)):
        name, _, attribute = ast.unparse(node.func).partition(".")
        paths = [f"{path}.{attribute}".strip(".") for path in OTHERS[package].get(name, [name])]
        fitting = [path for path in paths if accepts(package, path, node, of_object=name.islower() and not attribute)]
        assert fitting, ast.unparse(node)
        checked += 1
    assert checked > 15


def accepts(package, path, call, of_object):
    """Whether a function or class, or with `of_object` an object of the class, takes the arguments of a call."""
    value = importlib.import_module(package)
    for name in path.split("."):
        if inspect.ismodule(value) and not hasattr(value, name):
            value = importlib.import_module(f"{value.__name__}.{name}")
        elif (value := getattr(value, name, None)) is None:
            return False
    if of_object and inspect.isclass(value):
        value = value.__call__ if "__call__" in vars(value) else value.forward
    is_method = inspect.isfunction(value) and "self" in inspect.signature(value).parameters
    arguments = [None] * (len(call.args) + is_method)
    try:
        inspect.signature(value).bind(*arguments, **{keyword.arg: None for keyword in call.keywords})
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_no_sentence_is_long(path):
    """At most 35 words, and a README of at most 150 lines."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$|^#.*$|^\|.*$|^!\[.*$", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    for sentence in re.split(r"\n\s*\n|\n\s*[-*] |\n\s*\d+\. |(?<=[.:!?])\s", text):
        assert len(sentence.split()) <= 35, sentence
    assert path != ROOT / "README.md" or len(path.read_text().splitlines()) <= 150


def public():
    """Yields the public modules, and the name and value of each of their public classes and functions."""
    internal = [kd.model, kd.diffusion, kd.ema, kd.samplers.loop, kd.training.corruption]
    for module in [*filter(inspect.ismodule, (getattr(kd, name) for name in kd.__all__)), *internal]:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                yield module, f"{module.__name__}.{name}", value


def test_the_reference_is_complete():
    """Every public name has a docstring that names its arguments, and its module is on the page."""
    text = (ROOT / "docs/reference.md").read_text()
    for module, name, value in public():
        assert f"::: {module.__name__}\n" in text, name
        documented = inspect.getdoc(value) or ""
        assert documented, name
        if hasattr(value, "__wrapped__"):  # what a layer computes, and documents
            continue
        arguments = {n for n in inspect.signature(value).parameters if n not in ("args", "kwargs", "name", "options")}
        missing = {n for n in arguments if n.lower() not in documented.lower()}
        elsewhere = "Args and errors: as in" in documented or "Keras' " in documented
        assert not missing or elsewhere, (name, missing)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        assert str(path.relative_to(ROOT / "docs")) in navigation


@pytest.mark.skipif(not TORCH, reason="takes longest to compile elsewhere")
def test_the_notebook(tmp_path, monkeypatch):
    """Every cell, at a small size. A cell that ends in an image shows one."""
    notebook = json.loads((ROOT / "examples/flowers.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    names, images = {}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            code = "".join(cell["source"]).replace("2048", "64").replace("epochs=5", "epochs=1")
            *lines, last = ast.parse(code).body
            if isinstance(last, ast.Expr):
                exec(compile(ast.Module(lines, []), "notebook", "exec"), names)
                images += hasattr(eval(ast.unparse(last), names), "_repr_png_")
            else:
                exec(code, names)
    assert images == 6


KERAS_IO = ROOT / "examples/keras_io/ddpm_flowers.py"


def test_the_example_for_keras_io_has_its_form():
    """A header, text in docstrings without LaTeX, lines below 90, names of more than one letter, and Black's format."""
    source = KERAS_IO.read_text()
    made = runpy.run_path(str(KERAS_IO.parent / "to_notebook.py"))
    (kind, text), *parts = made["blocks"](source)
    assert kind == "header"
    header = made["header"](text)
    expected = ["Title", "Author", "Date created", "Last modified", "Description", "Accelerator"]
    assert [*header] == expected and header["Accelerator"] == "GPU"
    assert all(re.fullmatch(r"20\d\d/\d\d/\d\d", header[name]) for name in expected[2:4])
    assert {kind for kind, _ in parts} == {"text", "code", "shell"}
    lines = source.splitlines()
    assert max(map(len, lines)) < 90 and len(lines) < 250
    assert not any(word in source for word in ("$", "argparse", "sys.argv", "train_on_batch"))
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert min(map(len, names)) > 1
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=88", "--check", str(KERAS_IO)]
    subprocess.run(command, check=True, capture_output=True)


def test_the_notebook_for_keras_io_holds_all_of_the_example(tmp_path):
    path = tmp_path / "example.ipynb"
    subprocess.run([sys.executable, str(KERAS_IO.parent / "to_notebook.py"), str(path)], check=True)
    cells = json.loads(path.read_text())["cells"]
    header, *shown = [line for cell in cells for line in "".join(cell["source"]).splitlines() if line]
    assert header.startswith("# ") and "!pip install" in "\n".join(shown)
    written = [line for line in KERAS_IO.read_text().splitlines() if line.strip('"') not in ("", "shell")]
    assert [line.removeprefix("!") for line in shown[5:]] == written[6:]
    for cell in cells:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]).replace("!", "#"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No level has resolution")
def test_the_example_for_keras_io_trains(tmp_path, monkeypatch):
    """In miniature, on drawn flowers, with other values of the constants at the top."""
    from matplotlib import pyplot

    source = KERAS_IO.read_text().replace('os.environ["KERAS_BACKEND"] = "jax"', "")
    small = {"image_size": 16, "batch_size": 8, "width": 16, "width_multipliers": (1, 2), "num_epochs": 1}
    for name, value in {**small, "steps_per_epoch": 2}.items():
        source, number = re.subn(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.MULTILINE)
        assert number == 1, name

    def flowers(image_size, batch_size, labels, **options):
        x, kinds = kd.datasets.procedural_flowers(48, image_size)
        data = {"x": kd.images.to_uint8(x), "labels": kinds, "class_names": [*kd.datasets.FLOWER_KINDS]}
        return [kd.datasets.Batches(**data, batch_size=batch_size, **more) for more in (options, {"shuffle": False})]

    monkeypatch.setattr(kd.datasets, "oxford_flowers", flowers)
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.close()))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(source, "ddpm_flowers", "exec"), names)
    assert len(shown) == 9 and (tmp_path / "flowers.keras").exists()
    assert np.isfinite(names["history"].history["val_loss"]).all()
