"""The rules for the package's structure and size, each checked on its source code."""

import ast
import importlib
import io
import os
import pathlib
import re
import subprocess
import sys
import tokenize

import pytest

import keras_ddpm as kd

pytestmark = pytest.mark.host

PACKAGE = pathlib.Path(kd.__file__).parent
REPOSITORY = PACKAGE.parent


def name_of(path):
    """The name of a module without the package: "samplers.loop"; a folder has the name of its `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
EDGES = {"distillation", "editing", "export", "likelihood", "metrics", "datasets", "plots"}


def imports(name):
    """The modules of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_ddpm"):
            module = node.module.partition(".")[2]
            names = {f"{module}.{alias.name}".strip(".") for alias in node.names}
            found |= {module for entry in names if entry not in MODULES} | (names & set(MODULES))
    return (found & set(MODULES)) - {""}


def reached(name):
    """The modules that a module needs, directly or not."""
    found, left = set(), [name]
    while left:
        new = imports(left.pop()) - found
        found |= new
        left += new
    return found


def rooms(modules):
    """The folders or files at the top of the package in which modules are."""
    return {name.partition(".")[0] for name in modules}


def test_sampling_never_sees_a_model():
    below = {"schedules", "diffusion", "samplers", "_backend", "_checks"}
    for name in (name for name in MODULES if name.startswith("samplers")):
        assert rooms(reached(name)) <= below, name
    assert rooms(reached("schedules")) == {"_checks"}


def test_edges_call_the_model_and_not_the_other_way_round():
    """The model reaches no edge, and a module below it does not reach the model."""
    core = reached("model")
    assert not rooms(core) & EDGES
    for name in core:
        assert "model" not in reached(name), name


def test_no_circles():
    """A module does not need itself, and a folder's parts do not need the folder."""
    for name in MODULES:
        assert name not in reached(name), name
        assert name.rpartition(".")[0] not in imports(name) - {""}, name


def test_one_class_is_one_reading():
    """No class is made to be joined with attributes of a subclass: each base class of ours is complete or abstract."""
    (model,) = [node for node in ast.parse(MODULES["model"]).body if getattr(node, "name", "") == "DiffusionModel"]
    assert [ast.unparse(base) for base in model.bases] == ["keras.Model"]


@pytest.mark.parametrize("name", ["editing", "export", "likelihood", "distillation"])
def test_edges_use_public_methods_of_the_model(name):
    assert not re.findall(r"model\._\w+", MODULES[name])


def test_callbacks_use_public_methods_of_the_model():
    for name in (name for name in MODULES if name.startswith(("callbacks", "training"))):
        assert not re.findall(r"model\._\w+", MODULES[name]), name


def test_one_door_to_pytorch():
    """The folder `_backend`, and one line that keeps TensorFlow's data sets from the memory of another backend."""
    pattern = re.compile(r"import torch|from torch|backend\.backend\(\)")
    found = {name: len(pattern.findall(text)) for name, text in MODULES.items() if not name.startswith("_backend")}
    assert {name: number for name, number in found.items() if number} == {"datasets.sources": 1}


# Where code names a kind of device: checkpoints hold the random states of CUDA devices, and the data sets of TensorFlow
# must leave the memory of an accelerator to another backend.
DEVICES = {"_backend.torch": {"cuda"}, "datasets.sources": {"GPU"}}


def test_devices_are_asked_for_by_means_of_keras():
    """Code names no kind of accelerator, neither as an attribute nor in a string, except in these places."""
    for name, text in MODULES.items():
        tokens = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type != tokenize.COMMENT]
        docstrings = {string for string in tokens if string.startswith('"""')}
        words = {word for string in set(tokens) - docstrings for word in re.findall(r"[A-Za-z]+", string)}
        found = {word for word in words if word.lower() in ("cuda", "gpu", "mps", "xpu", "tpu", "metal", "rocm")}
        assert found == DEVICES.get(name, set()), name


# Names with an underscore that belong to other packages, by module. Each has a fall-back that a test forces, or is
# bounded by the versions in setup.cfg.
PRIVATE = {
    "_backend.torch": {
        *("_convolution", "_pointwise", "_reorder_convolution", "_weight"),  # names of operations
        "_schema",
        "_get_variable_index",
        "_is_mkldnn_acl_supported",
        "_is_mkldnn_bf16_supported",
        "_momentums",
        "_velocities",
    },
    "model": {"_maybe_symbolic_build", "_use_cached_eval_dataset"},
    "saving.compact": {"_fn_kwargs"},
}


def test_private_names_of_others():
    """Attributes of objects that are not ours, names in strings, and methods of Keras that are overridden."""
    own = {name.rpartition(".")[2] for name in MODULES} | {"_generated"}
    for name, text in MODULES.items():
        nodes = [*ast.walk(ast.parse(text))]
        own_here = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        found = {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()")
        }
        calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func).endswith(("getattr", ".get"))]
        strings = (n for call in calls for argument in call.args for n in ast.walk(argument))
        found |= {n.value for n in strings if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        found = {entry for entry in found if re.fullmatch(r"_[a-z]\w*", entry)}
        overridden = {n for n in own_here if re.match("_[a-z]", n) and text.count(n) == 1}  # nobody else calls it
        assert (found - own_here - own) | overridden == PRIVATE.get(name, set()), name


def test_modules_for_one_backend_use_no_tensors():
    """Marked as a whole by `host`, so JAX and PyTorch skip them."""
    for path in REPOSITORY.glob("tests/test_*.py"):
        text = path.read_text()
        if "pytestmark = pytest.mark.host" in text and path.name != "test_house.py":
            assert not re.search(r"\bops\b|DiffusionModel|\bmodel\b\(", text), path


def test_every_fast_function_has_a_plain_one():
    """With the same arguments, marked by the decorator."""
    bodies = ast.parse(MODULES["_backend.torch"]).body
    fast = {node.name: node.args for node in bodies if isinstance(node, ast.FunctionDef)}
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


def test_every_public_module_says_what_is_public():
    """`__all__` holds names that exist, and no other public name of the package needs to be guessed."""
    for name in MODULES:
        if name and not any(part.startswith("_") for part in name.split(".")):
            module = importlib.import_module(f"keras_ddpm.{name}")
            if name != "training":
                assert module.__all__ and all(hasattr(module, entry) for entry in module.__all__), name


def test_no_row_is_indexed_by_number():
    """Rows have names, in the package, the examples and the tests."""
    files = [*PACKAGE.rglob("*.py"), *REPOSITORY.glob("examples/*.py"), *REPOSITORY.glob("tests/*.py")]
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
assert set(dir(keras_ddpm)) == {"__version__", *keras_ddpm.__all__}
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})


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
    """The number of lines of code. It moves only with a sentence in the commit that says what was bought."""
    assert sum(len(code_lines(text)) for text in MODULES.values()) <= 4573
