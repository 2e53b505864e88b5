"""The rules for the package's structure and size, each checked on its source code."""

import ast
import io
import os
import pathlib
import re
import subprocess
import sys
import tokenize

import pytest

import keras_ddpm as kd

PACKAGE = pathlib.Path(kd.__file__).parent
MODULES = {path.stem: path.read_text() for path in sorted(PACKAGE.glob("*.py"))}
REPOSITORY = PACKAGE.parent
CORE = {"schedules", "diffusion", "rows", "samplers", "layers", "networks", "ema", "guidance", "sampling", "training"}
CORE |= {"model"}
HARDWARE = {"_torch", "_devices", "_replicas"}


def imports(name):
    """The modules of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_ddpm"):
            module = node.module.partition(".")[2]
            found |= {module} if module else {alias.name for alias in node.names}
    return found & set(MODULES)


def reached(name):
    """The modules that a module needs, directly or not."""
    found, left = set(), [name]
    while left:
        new = imports(left.pop()) - found
        found |= new
        left += new
    return found


def test_sampling_never_sees_a_model():
    assert not reached("sampling") & {"model", "training", "ema", "guidance", "networks", "layers"}
    assert not reached("samplers") & {"sampling", "model", "networks", "layers"}
    assert reached("schedules") <= {"_checks"}


def test_edges_call_the_model_and_not_the_other_way_round():
    """But for the callback that watches the loss of every `fit`, and what that one draws."""
    edges = {"distillation", "editing", "export", "likelihood", "metrics", "features", "datasets", "toys", "plots"}
    assert set(MODULES) - CORE - edges == {
        "__init__", "_cache", "_checks", "_devices", "_replicas", "_torch",
        "callbacks", "checkpoints", "images", "optimizers", "saving",
    }  # fmt: skip
    for name in CORE:
        assert not reached(name) & edges, name
        assert name == "training" or "callbacks" not in imports(name)


@pytest.mark.parametrize("name", ["editing", "callbacks", "export", "likelihood"])
def test_edges_use_public_methods_of_the_model(name):
    assert not re.findall(r"model\._\w+", MODULES[name])


def test_one_door_to_pytorch():
    """The modules of `HARDWARE`, and one line that keeps TensorFlow's data sets from the memory of another backend."""
    pattern = re.compile(r"import torch|from torch|backend\.backend\(\)")
    found = {name: len(pattern.findall(text)) for name, text in MODULES.items() if name not in HARDWARE}
    assert {name: number for name, number in found.items() if number} == {"datasets": 1}


def test_every_fast_function_has_a_plain_one():
    """With the same arguments, marked by the decorator."""
    fast = {node.name: node.args for node in ast.parse(MODULES["_torch"]).body if isinstance(node, ast.FunctionDef)}
    plain = {}
    for text in MODULES.values():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and any(
                "fast_on_torch" in ast.unparse(d) for d in node.decorator_list
            ):
                plain[node.name] = node.args
    assert len(plain) >= 7
    for name, arguments in plain.items():
        assert [a.arg for a in fast[name].args] == [a.arg for a in arguments.args], name


def test_no_row_is_indexed_by_number():
    """Rows have names, in the package, the examples and the tests."""
    files = [*PACKAGE.glob("*.py"), *REPOSITORY.glob("examples/*.py"), *REPOSITORY.glob("tests/*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("row", "rows", "table"):
                numbers = [n for n in ast.walk(node.slice) if isinstance(n, ast.Constant) and isinstance(n.value, int)]
                assert not (isinstance(node.slice, ast.Tuple) and numbers), f"{file}: {ast.unparse(node)}"


def test_import_changes_nothing_in_the_process():
    """No allocator setting, environment variable, logging level or random state."""
    code = """
import ctypes, logging, os, random
import keras, matplotlib, numpy, PIL, scipy.special, matplotlib.figure, matplotlib.colors, PIL.ImageOps
calls = []
def state():
    levels = {name: getattr(logger, "level", 0) for name, logger in logging.root.manager.loggerDict.items()}
    return dict(os.environ), logging.root.level, levels, random.getstate()
class Library:
    def __init__(self, *args): pass
    def __getattr__(self, name):
        if name.startswith("mall"): calls.append(name)
        raise AttributeError(name)
ctypes.CDLL = Library
before = state()
import keras_ddpm
assert before == state() and not calls
assert keras.config.dtype_policy().name == "float32"
assert set(dir(keras_ddpm)) == {"__version__", *(n for n in dir(keras_ddpm) if not n.startswith("_"))}
assert not {"diffusion", "sampling", "training", "ema", "model"} & set(dir(keras_ddpm))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})


def test_names_for_tab_completion():
    """A module shows its own public names, not those that it imports."""
    own = {"MAX_PIXELS", "from_uint8", "to_uint8", "resize", "load", "grid", "save", "save_gif", "to_pil"}
    assert set(dir(kd.images)) == own
    assert {"Batches", "from_folder", "moons"} <= set(dir(kd.datasets)) and "np" not in dir(kd.datasets)


def test_a_backend_that_is_not_installed():
    code = """
import sys
class Missing:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Missing())
import keras_ddpm
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "KERAS_BACKEND": "torch"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "Keras' backend torch is not installed. Install it by `pip install torch`" in process.stderr


def code_lines(source):
    """The numbers of lines that hold a token, without comments and docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def test_the_house_stays_small():
    """At most 3,900 lines of code, 450 lines in a file and 300 in a class.

    The house had 2,349 before checkpoints, answers to bad input, what helps newcomers, samplers of higher order,
    models that come with the package, exports, several devices and processes, and files of decoded images.
    """
    assert sum(len(code_lines(text)) for text in MODULES.values()) <= 3900
    for name, text in MODULES.items():
        assert len(text.splitlines()) <= 450, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno + 1 <= 300, node.name
