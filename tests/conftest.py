"""Shared fixtures. `--data-dir`, or KERAS_DDPM_DATA, names the folder of TensorFlow Datasets with the real data."""

import importlib.metadata
import os
import pathlib
import re
import runpy
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores, and PyTorch's threads wait busily

ROOT = pathlib.Path(__file__).parent.parent
# JAX compiles each program once for all processes and runs, in a quarter of the time. `.ci/run` has a part with
# optimizations. A release that does not know a flag ends the process.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ.get("KERAS_BACKEND") == "jax" and importlib.metadata.version("jax").startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", flags)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache/d/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras import ops  # noqa: E402

import keras_ddpm as kd  # noqa: E402
from keras_ddpm._backend import devices  # noqa: E402

sys.path.insert(0, str(ROOT / "examples"))
BACKEND = keras.backend.backend()
TORCH = BACKEND == "torch"
# Tests of a few steps do not compile them. JAX does, as it compiles each operation of an eager step by itself.
EAGER = BACKEND != "jax"

# How many programs the whole suite may compile: steps of training, evaluation and prediction that Keras traces.
# Compiling takes most of the time, so a test that needs one more asks which one could go. JAX has more of them, as it
# compiles the steps that others run eagerly.
BUDGET = {"tensorflow": 410, "jax": 680, "torch": 0}
PROGRAMS = dict.fromkeys(("train_step", "test_step", "predict_step"), 0)


def pytest_addoption(parser):
    parser.addoption("--data-dir", default=os.environ.get("KERAS_DDPM_DATA"), help="folder of prepared real data")
    parser.addoption("--plain", action="store_true", help="without the fast functions for PyTorch")
    parser.addoption("--host", action="store_true", help="on JAX and PyTorch, also the tests that use no tensors")


def optimize_graphs(on):
    """Whether TensorFlow optimizes what it compiles. Without, the tests take an eighth less time."""
    if BACKEND == "tensorflow":
        sys.modules["tensorflow"].config.optimizer.set_experimental_options({"disable_meta_optimizer": not on})


def iterate_without_autotuning(dataset):
    """The iterator of a dataset of TensorFlow, without the thread that tunes it.

    Now and then that thread misses that it is to end, and the end of an epoch waits for up to a minute.
    """
    options = sys.modules["tensorflow"].data.Options()
    options.autotune.enabled = False
    return iterate(dataset.with_options(options))


optimize_graphs(False)
if BACKEND == "tensorflow":
    iterate = sys.modules["tensorflow"].data.Dataset.__iter__
    sys.modules["tensorflow"].data.Dataset.__iter__ = iterate_without_autotuning


@pytest.fixture
def optimized_graphs():
    """For tests that compare with a process of their own, in which TensorFlow optimizes."""
    optimize_graphs(True)
    yield
    optimize_graphs(False)


def pytest_configure(config):
    if config.getoption("--plain") and TORCH:
        devices.plain_functions.update(fast_functions())
    for name in PROGRAMS:
        setattr(keras.Model, name, counted(name))


def counted(name):
    """The step of Keras, counting how often it is traced."""
    step = getattr(keras.Model, name)

    def counting(*args, **kwargs):
        PROGRAMS[name] += is_traced(args)
        return step(*args, **kwargs)

    return counting


def is_traced(arguments):
    """Whether a step is called to compile it: not on PyTorch, nor with `run_eagerly`."""
    if BACKEND == "tensorflow":
        return not sys.modules["tensorflow"].executing_eagerly()
    tracer = sys.modules["jax"].core.Tracer if BACKEND == "jax" else ()
    return any(isinstance(x, tracer) for x in keras.tree.flatten(arguments))


def pytest_collection_modifyitems(config, items):
    if BACKEND != "tensorflow" and not config.getoption("--host"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("host")])
        items[:] = [item for item in items if not item.get_closest_marker("host")]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds what a worker compiled."""
    for name, number in getattr(node, "workeroutput", {}).get("programs", {}).items():
        PROGRAMS[name] += number


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["programs"] = PROGRAMS
    elif over_budget(session.config) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    numbers = ", ".join(f"{number} {name}" for name, number in PROGRAMS.items())
    text = f"Compiled programs: {numbers}. The budget of the whole suite is {BUDGET[BACKEND]}."
    terminalreporter.write_line(text, red=over_budget(config))
    if BACKEND != "tensorflow" and not config.getoption("--host"):
        terminalreporter.write_line("Tests that use no tensors run on TensorFlow, or with --host.")


def over_budget(config):
    """Whether more was compiled than the usual tests may. `-m slow` may, and more workers, which share less."""
    usual, options = config.getini("addopts"), config.option
    is_usual = options.markexpr in usual and str(options.numprocesses) in usual
    return is_usual and sum(PROGRAMS.values()) > BUDGET[BACKEND]


def fast_functions():
    return {name for name in devices.FAST if "random_state" not in name}  # which has no plain form


@pytest.fixture
def plain_functions(monkeypatch):
    """A function that switches fast functions off until the test ends: all, or those with the names given."""

    def switch_off(*names):
        names = names or fast_functions()
        monkeypatch.setattr(devices, "plain_functions", devices.plain_functions | set(names))

    return switch_off if TORCH else lambda *names: None


@pytest.fixture
def data_dir(request):
    """The folder of the real data; without one the test is skipped."""
    folder = request.config.getoption("--data-dir")
    if not folder:
        pytest.skip("no real data: give --data-dir=FOLDER or set KERAS_DDPM_DATA")
    assert pathlib.Path(folder).is_dir(), folder
    return folder


@pytest.fixture(autouse=True)
def _fresh(request):
    if request.config.getoption("--plain") and request.node.get_closest_marker("fast"):
        pytest.skip("needs the fast functions, or a process with them")
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def fresh_model():
    """A small model of points, compiled. Tests use it that compile it again or change how it computes."""
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(kd.schedules.linear(50)), seed=0)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2))
    return model


SHARED = {}


def parts(model):
    """What a test may replace in a model, besides values of variables."""
    return [model._compiled_with, model.optimizer, model.corruption, model.sampler, model.diffusion]


@pytest.fixture
def model(request):
    """`fresh_model`, with the programs that earlier tests compiled. Its values are put back before each test."""
    if not SHARED:
        model = SHARED["model"] = request.getfixturevalue("fresh_model")
        variables = [*model.variables, *model.optimizer.variables, model._fit_random.state]
        SHARED["parts"], SHARED["values"] = parts(model), list(zip(variables, weights(variables)))
    model = SHARED["model"]
    for v, value in SHARED["values"]:
        v.assign(value)
    model.stop_training = False
    yield model
    if any(now is not before for now, before in zip(parts(model), SHARED["parts"])):
        SHARED.clear()  # the next test gets a fresh one


@pytest.fixture
def uncompiled(monkeypatch):
    """Sampling runs eagerly, for tests that ask what is called when. Only TensorFlow compiles anew in each run."""
    if BACKEND == "tensorflow":
        monkeypatch.setattr(kd.samplers.loop._Program, "run_eagerly", True)


@pytest.fixture
def popen():
    """`subprocess.Popen` with the output as text. All processes have ended when the test has."""
    processes = []

    def start(command, **options):
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def points():
    """Points in [-1, 1], `(256, 2)`."""
    return np.random.default_rng(0).uniform(-1, 1, (256, 2)).astype("float32")


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Runs an example as a command in this process, which is faster. Returns the exit status and the output."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
            sys.exit(0)
        printed = "".join(capsys.readouterr())
        if isinstance(stop.value.code, str):  # which Python prints
            return 1, f"{printed}{stop.value.code}\n"
        return stop.value.code, printed

    return run


def check_error(result, status, message):
    """Checks that the last line of the output is the whole message, after the name of the script."""
    got, text = result
    *_, line = text.splitlines()
    assert got == status and re.match(r"\w+\.py: " + ("error: " if status == 2 else ""), line), text
    assert re.search(message, line) and "Traceback" not in text, text


def weights(variables):
    """The values of variables."""
    return [ops.convert_to_numpy(v) for v in variables]


def randomize(network, scale=0.3):
    """Gives every weight a random value, as a fresh network outputs zeros."""
    random = np.random.default_rng(0)
    network.set_weights([scale * random.standard_normal(w.shape) for w in network.get_weights()])


def image_network(shape, **kwargs):
    """A network for tests that need any network of images. It compiles faster than a U-Net."""
    return kd.networks.dit(shape, patch_size=4, width=8, depth=1, num_heads=1, **kwargs)


def small_unet(**kwargs):
    """A compiled model of 8x8 images."""
    model = kd.DiffusionModel(kd.networks.unet((8, 8, 1), 8, (1,), 1, (), 4), seed=0, **kwargs)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-3))
    return model
