"""The examples with tiny settings, as functions and as commands, and the code in the README."""

import importlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
import typing

import keras
import numpy as np
import pytest
from conftest import ROOT, TORCH, check_error, image_network, randomize
from keras import ops
from PIL import Image

import keras_ddpm as kd

README_CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SHORT = {"preset": "cpu", "grid_every": 1, "batch_size": 8, "epochs": 2, "steps_per_epoch": 2}
TINY = {"image_size": 16, "width": 8, "width_multipliers": (1, 2), "num_blocks": 1, "groups": 4}
TINY |= {"attention_resolutions": (8,)}


def test_the_readmes_name_every_example():
    texts = [(ROOT / name).read_text() for name in ("README.md", "examples/README.md")]
    for path in (ROOT / "examples").glob("[!c]*.py"):
        assert all(path.name in text for text in texts), path
        assert f"python examples/{path.name}" in path.read_text()


def run_script(name, *arguments, **environment):
    """Runs an example in a process of its own. Returns the exit status and the output."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    run = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return run.returncode, run.stdout


def call(name, *arguments, **settings):
    """Calls `main` of an example."""
    importlib.import_module(name).main(*arguments, **settings)


def flags(**settings):
    """The same settings on the command line."""
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in settings.items()}
    return [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), *map(str, value))]


def test_the_command_line_is_the_signature(monkeypatch, capsys):
    common = importlib.import_module("common")
    received = []

    def main(model: str, folder: str | None = None, *, seed=0, rate: float | None = None, **settings):
        """Does something.

        Args:
            model: help of
                two lines.
            folder: a folder.
            seed: an integer.
            rate: a number.
            **settings: those of `part`.
        """
        if seed < 0:
            raise common.UsageError("--seed must be 0 or more.")
        if rate == 0:
            raise OSError("There is no rate.")
        received.append((model, folder, seed, rate, settings))

    def part(x, *, widths: tuple[int, ...] = (1, 2), kind: typing.Literal["a", "b"] | None = None, strict=False):
        """Does a part.

        Args:
            x: an array.
            widths: integers.
            kind: a letter.
            strict: an option.
        """

    def run(*functions, line, **options):
        monkeypatch.setattr(sys, "argv", ["name.py", *line.split()])
        common.run(*functions, **options)

    def stop(*functions, **options):
        with pytest.raises(SystemExit) as stopped:
            run(*functions, **options)
        return stopped.value.code, capsys.readouterr()

    run(main, part, line="m")
    run(main, part, line="m f --seed 3 --rate 2 --widths 4 5 --kind b --strict")
    run(main, part, line="m --widths")
    assert received == [
        ("m", None, 0, None, {}),
        ("m", "f", 3, 2.0, {"widths": (4, 5), "kind": "b", "strict": True}),
        ("m", None, 0, None, {"widths": ()}),
    ]
    for line, message in [
        ("", "the following arguments are required: model"),
        ("m --seed 1.5", "argument --seed: invalid int value: '1.5'"),
        ("m --kind c", "argument --kind: invalid choice: 'c'"),
        ("m --seed -1", "--seed must be 0 or more."),
    ]:
        status, printed = stop(main, part, line=line)
        assert status == 2 and printed.err.splitlines()[-1].startswith(f"name.py: error: {message}")
    assert stop(main, part, line="m --rate 0")[0] == "name.py: There is no rate."

    status, printed = stop(main, part, line="--help", presets={"full": {}, "small": {"widths": (1,), "strict": True}})
    text = " ".join(printed.out.split())
    assert status == 0 and "x: an array" not in text and __doc__ in text
    for argument in [
        " model help of two lines. folder a folder. options:",
        "--seed SEED an integer. (default: 0)",
        "--rate RATE a number. --",
        "--widths [WIDTHS ...] integers. (default: (1, 2); small: (1,))",
        "--kind {a,b} a letter. --",
        "--strict an option.",
    ]:
        assert argument in text

    def edit(command, images: tuple[str, ...] | None = None, *, output="out", **settings):
        """Edits.

        Args:
            command: a function.
            images: files.
            output: a folder.
            **settings: those of `command`.
        """
        received.append((command, images, output, settings))

    def darken(x, *, by=0.5):
        """Makes images darker.

        Args:
            x: images.
            by: a number.
        """

    received.clear()
    run(edit, commands=(part, darken), line="darken")
    run(edit, commands=(part, darken), line="darken a b --by 1 --output o")
    run(edit, commands=(part, darken), line="part a --strict")
    assert received == [
        (darken, None, "out", {}),
        (darken, ("a", "b"), "o", {"by": 1.0}),
        (part, ("a",), "out", {"strict": True}),
    ]
    assert stop(edit, commands=(part, darken), line="part --by 1")[0] == 2
    assert stop(edit, commands=(part, darken), line="")[0] == 2
    assert "darken Makes images darker." in " ".join(stop(edit, commands=(darken,), line="--help")[1].out.split())


@pytest.mark.parametrize(
    "command",
    [
        *(path.name for path in sorted((ROOT / "examples").glob("[!c]*.py"))),
        *(f"edit.py {name}" for name in ("inpaint", "variations", "interpolate", "reconstruct")),
        *(f"translate.py {name}" for name in ("upscale", "colorize", "sketch")),
    ],
)
def test_every_command_has_help(command, command_line):
    """Making it fails for a parameter that its docstring does not describe."""
    status, text = command_line(*command.split(), "--help")
    assert status == 0 and f"usage: {command} [-h]" in text
    assert command in ("edit.py", "translate.py") or "--output OUTPUT" in text


def check_output(folder):
    for name in ("samples/0001.png", "samples/0002.png", "samples.png", "loss.png", "denoising.gif"):
        with Image.open(folder / name) as picture:
            picture.load()
    with Image.open(folder / "denoising.gif") as gif:
        assert gif.n_frames == 20
    lines = (folder / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,val_loss" and len(lines) == 3
    model = keras.saving.load_model(folder / "model.keras")
    assert model.sample(1, kd.samplers.DDIM(2)).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("deadline", "minutes"), [(None, 3), (types.SimpleNamespace(left=110.0), 2)])
def test_the_estimate_is_of_what_is_left(monkeypatch, capsys, deadline, minutes):
    """A resumed run starts at epoch 8 of 10, and a batch takes a second."""
    common = importlib.import_module("common")
    estimate = common.Estimate(seconds=2, deadline=deadline)
    estimate.set_params({"epochs": 10, "steps": 60})
    monkeypatch.setattr(common.time, "monotonic", itertools.count().__next__)
    estimate.on_epoch_begin(7)
    for batch in range(60):
        estimate.on_train_batch_end(batch)
    assert capsys.readouterr().out == f"\nThe training will take about {minutes} min, at 1 s per batch.\n"


def test_every_run_says_its_estimate(tmp_path, monkeypatch, capsys, model, points):
    """A checkpoint does not hold what the first run has said."""
    common = importlib.import_module("common")
    monkeypatch.setattr(common.time, "monotonic", itertools.count().__next__)
    for epochs, minutes in ((1, 1), (20, 2)):  # 4 batches of 32, and 76 with a second each
        callbacks = [common.Estimate(seconds=2), kd.callbacks.Checkpoint(tmp_path, every=1e9)]
        model.fit(points, epochs=epochs, batch_size=64, callbacks=callbacks, verbose=0)
        assert f"about {minutes} min, at " in capsys.readouterr().out


def test_minutes_set_the_learning_rate_and_the_end(tmp_path, monkeypatch, model, points):
    """Epochs of 4 batches end at 6, 12, ..., 60 s of 60 here. A resumed run knows the seconds before."""
    common = importlib.import_module("common")
    seconds, rates = 0.0, []

    def watch(epoch, logs=None):
        nonlocal seconds
        seconds += 6
        rates.append(float(model.optimizer.learning_rate))
        model.stop_training |= len(rates) == 4

    monkeypatch.setattr(common.time, "monotonic", lambda: seconds)
    data = kd.datasets.Batches(points, batch_size=64, steps_per_epoch=4)
    watching = keras.callbacks.LambdaCallback(on_epoch_end=watch)
    options = {"learning_rate": 0.01, "warmup_steps": 8, "minutes": 1, "checkpoints": tmp_path}
    for num_epochs in (4, 11, 11):  # the first batch that ends too late is the last one, and no run trains after it
        common.train(model, data, 1, callbacks=[watching], **options)
        warm = np.minimum(1, (4 * np.arange(num_epochs) + 2) / 8)
        falling = (1 + np.cos(np.pi * np.arange(num_epochs) / 10)) / 2
        np.testing.assert_allclose(rates[:num_epochs], 0.01 * warm * falling, rtol=1e-6, atol=1e-12)
        assert int(model.optimizer.iterations) == min(4 * num_epochs, 41)
        seconds += 1000  # between the runs
    with pytest.raises(common.UsageError, match="--minutes must be more than 0. Received: 0"):
        common.train(model, data, 1, minutes=0)


def test_a_classifier_serves_its_data_alone(tmp_path, monkeypatch, capsys):
    """It is trained again for other images, labels and numbers of epochs, and only then."""
    common = importlib.import_module("common")
    trained = []

    def train(images, labels, epochs):
        trained.append(epochs)
        x = keras.Input(images.shape[1:])
        return keras.Model(x, keras.layers.Dense(2)(keras.layers.Flatten()(x)))

    monkeypatch.setattr(kd.metrics, "train_classifier", train)
    x = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), dtype="uint8")
    labels = np.arange(8) % 2
    other = [(x, labels, 1), (x, labels, 1), (x, 1 - labels, 1), (x[:, :3, :3], labels, 1), (x[:, :3, :3], labels, 2)]
    for images, kinds, epochs in other:
        data = kd.datasets.Batches(images, kinds, 4)
        common.make_metric(data, data, 4, epochs, 0, tmp_path / "classifier.keras")
    assert trained == [1, 1, 1, 2]


def judged(tmp_path, judge="auto", channels=3, labels=True, noise=0.0, seed=0):
    """Makes a judge of images with one of two colors, which are 0.5 and noise of this deviation apart."""
    data = []
    for num in (40, 20):
        random = np.random.default_rng([seed, num])
        kinds = np.arange(num) % 2
        x = (2 * kinds[:, None, None, None] - 1) / 4 + noise * random.standard_normal((num, 4, 4, channels))
        data.append(kd.datasets.Batches(kd.images.to_uint8(x), kinds if labels else None, 4))
    common = importlib.import_module("common")
    return common.make_judge(*data, 1, tmp_path / "classifier.keras", judge), data[1]


@pytest.fixture
def tiny(monkeypatch):
    """Tiny networks in place of EfficientNet and InceptionV3. Returns the numbers of images that they receive."""
    seen = []

    def colors(images):
        seen.append(len(images))
        return images.mean(axis=(1, 2))

    def refuse():
        raise ModuleNotFoundError("No module named 'torch'. EfficientNet-Lite0 needs more packages.")

    monkeypatch.setattr(kd.metrics, "efficientnet_lite0", lambda: kd.metrics.Extractor(colors))
    monkeypatch.setattr(kd.metrics.features, "_inception", lambda: lambda images: -colors(images))
    return types.SimpleNamespace(seen=seen, refuse=refuse)


def test_a_judge_tells_the_share_in_class_beside_its_own(tmp_path, tiny, capsys):
    """It computes the features of an image once. Other processes read those of the data from files."""
    judge, test = judged(tmp_path, noise=0.01)
    assert "Judge: colors, which is right on 100.0% of 20 held-out images." in capsys.readouterr().out
    assert judge.accuracy == 1 and sum(tiny.seen) == 60
    x = kd.images.from_uint8(test.x)
    assert judge.share(x, np.r_[test.labels[:15], 1 - test.labels[15:]]) == 0.75 and judge.share(x, None) is None
    np.testing.assert_array_equal(judge(x), x.mean(axis=(1, 2)).astype("float64"))
    assert len([*tmp_path.glob("features-colors-colors-*.npy")]) == 2
    again, _ = judged(tmp_path, noise=0.01)
    np.testing.assert_array_equal(again(x), judge(x))
    assert sum(tiny.seen) == 60
    judged(tmp_path, noise=0.01, seed=1)
    assert sum(tiny.seen) == 120 and len([*tmp_path.glob("*.npy")]) == 4


def test_a_judge_that_is_often_wrong_does_not_speak_of_classes(tmp_path, tiny, capsys):
    judge, test = judged(tmp_path, noise=4.0)
    assert judge.accuracy is None and judge.share(kd.images.from_uint8(test.x), test.labels) is None
    assert (
        "This is below 80%, so the share of samples in the class asked for is not measured." in capsys.readouterr().out
    )


def test_the_strongest_available_judge(tmp_path, tiny, monkeypatch, capsys):
    """Photographs have a pretrained one if possible, and gray images a classifier."""
    assert judged(tmp_path)[0].name == "colors"
    assert judged(tmp_path, "inception")[0].name == "<lambda>"
    flat = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()], name="flat")
    flat.save(tmp_path / "flat.keras")
    assert judged(tmp_path, str(tmp_path / "flat.keras"))[0].name == "flat"
    monkeypatch.setattr(
        kd.metrics,
        "train_classifier",
        lambda x, *_: keras.Sequential(
            [keras.Input(x.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(2)], name="trained"
        ),
    )
    assert judged(tmp_path, "classifier")[0].name == "trained"
    assert judged(tmp_path, channels=1)[0].name == "trained"
    assert judged(tmp_path, channels=1, labels=False)[0].name == "colors"
    with pytest.raises(ValueError, match="A classifier needs labels. Choose another --judge"):
        judged(tmp_path, "classifier", labels=False)
    monkeypatch.setattr(kd.metrics, "efficientnet_lite0", tiny.refuse)
    assert judged(tmp_path)[0].name == "<lambda>"
    assert "No module named 'torch'. EfficientNet-Lite0 needs more packages.\nSo" in capsys.readouterr().out
    with pytest.raises(ModuleNotFoundError, match="needs more packages"):
        judged(tmp_path, "efficientnet")


def test_results_with_other_settings_are_not_mixed(tmp_path):
    common = importlib.import_module("common")
    for _ in range(2):
        common.check_settings(tmp_path, {"images_seen": 100})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/000001-00000000.npz").touch()
    with pytest.raises(common.UsageError, match="holds a run"):  # a refused run leaves the settings
        common.open_output(tmp_path)
    with pytest.raises(common.UsageError, match="holds results with other settings. Choose another --output"):
        common.check_settings(tmp_path, {"images_seen": 200})


def test_other_processes_see_a_note_whole(tmp_path):
    common = importlib.import_module("common")
    note = tmp_path / "settings.json"
    common.write_note(note, {"seed": 1})
    with note.open() as opened:
        common.write_note(note, {"seed": 2})
        assert json.load(opened) == {"seed": 1}
    assert common.read_note(note) == {"seed": 2} and len([*tmp_path.iterdir()]) == 1


def test_names_of_a_folder_reach_the_model(tmp_path):
    for index in range(6):
        image = np.full((8, 8, 3), index / 3 - 1)
        kd.images.save(tmp_path / ("rose" if index % 2 else "lily") / f"{index}.png", image)
    for data in importlib.import_module("common").load(tmp_path, 8, labels=True, batch_size=2):
        assert data.class_names == ["lily", "rose"]


def test_flowers_without_network_and_data(tmp_path, monkeypatch, command_line):
    """The main job on drawn flowers. `.ci/run` has the printed command, in a process of its own."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    options = SHORT | TINY | {"patch_size": 2, "width_multipliers": (1,), "num_images": 90}
    options |= {"data_dir": tmp_path / "nothing"}
    status, text = command_line("flowers.py", *flags(**options, dtype_policy="float32", output=tmp_path / "a"))
    assert not status, text
    assert f"Backend: {keras.backend.backend()}. Dtype policy: float32." in text
    assert "NOT TRAINING ON oxford_flowers102: oxford_flowers102 is not in" in text
    assert "Training on drawn flowers instead." in text
    assert "Preset: cpu." in text and "81 images of 16x16" in text and "Saw 32 images. This run took" in text
    check_output(tmp_path / "a")


@pytest.mark.slow
def test_flowers_fine_tune(tmp_path, command_line):
    """A model on a folder of other classes, in which one file cannot be read."""
    network = image_network((16, 16, 3), num_classes=2)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(20)), class_names=["rose", "tulip"])
    (tmp_path / "a").mkdir()
    model.save(tmp_path / "a/model.keras")
    for index, flower in enumerate(kd.datasets.procedural_flowers(20, 16)[0]):
        kd.images.save(tmp_path / "pictures" / ("tulip", "fern", "moss")[index % 3] / f"{index}.png", flower)
    (tmp_path / "pictures/fern/broken.png").write_text("no picture")
    options = {"init": tmp_path / "a/model.keras", "dataset": tmp_path / "pictures", "output": tmp_path / "b"}
    arguments = flags(**SHORT, **options)
    status, text = run_script("flowers.py", *arguments)
    assert status == 0 and "18 images of 16x16, with 2 held out" in text, text
    assert "Skipped" in text and "broken.png" in text
    check_output(tmp_path / "b")
    assert keras.saving.load_model(tmp_path / "b/model.keras").class_names == ("fern", "moss", "tulip")
    check_error(command_line("flowers.py", *arguments), 2, r"b holds a run\. Go on with it by --resume, replace it by")
    arguments.append("--overwrite")
    check_error(command_line("flowers.py", *arguments, "--strict"), 1, "broken.png cannot be read")
    assert not list((tmp_path / "b/checkpoints").glob("*"))
    result = command_line("flowers.py", *arguments, "--width", 16, "--groups", 4)
    check_error(result, 2, "--init determines the network and the process. Received as well: width, groups$")


def test_a_model_to_go_on_with(tmp_path):
    """The network is told the guidance scale without effect yet, and small noise counts more."""
    model = kd.DiffusionModel(image_network((8, 8, 3), num_classes=3), kd.GaussianDiffusion(prediction="x0"))
    model.save(tmp_path / "model.keras")
    found = importlib.import_module("flowers").go_on(
        tmp_path / "model.keras", 0, max_guidance_scale=3.0, loss_weight="snr"
    )
    assert found.corruption.max_guidance_scale == 3 and "scale" in found.condition
    options = {"labels": 1, "guidance_scale": 2.0}
    sampler = kd.samplers.DDIM(2)
    expected = model.sample(2, sampler, 0, labels=1)
    np.testing.assert_allclose(found.sample(2, sampler, 0, **options), expected, atol=0.1)  # in half precision, or not
    weight, snr = found.corruption.loss_weight, np.exp(model.diffusion.schedule.log_snr)
    wanted = np.minimum(snr[1:], 20) + 4
    np.testing.assert_allclose(weight[1:], wanted / wanted.mean(), rtol=1e-6)


@pytest.mark.slow
def test_flowers_go_on_after_interruptions(popen, tmp_path):
    """With the same samples, byte for byte, as without them."""
    options = SHORT | TINY | {"dataset": "procedural", "num_images": 90, "epochs": 6, "steps_per_epoch": 8}
    status, text = run_script("flowers.py", *flags(**options, output=tmp_path / "a"))
    assert status == 0, text
    arguments = flags(**options, output=tmp_path / "b")
    command = [sys.executable, str(ROOT / "examples/flowers.py"), *map(str, arguments)]
    for number, epoch, more in [(signal.SIGINT, 2, []), (signal.SIGTERM, 4, ["--resume"])]:
        process = popen(command + more, stderr=subprocess.STDOUT, preexec_fn=own_ctrl_c)
        while not (tmp_path / f"b/samples/{epoch:04d}.png").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        printed, _ = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else 143), printed
        assert "Traceback" not in printed and f"Stopped by {number.name}" in printed
        assert not (tmp_path / "b/samples.png").exists()
    status, text = run_script("flowers.py", *arguments, "--resume")
    assert status == 0, text
    for name in ("samples.png", "samples/0006.png", "history.csv", "denoising.gif"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


def own_ctrl_c():
    """A shell may start jobs that ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
def test_flowers_on_photographs(tmp_path, data_dir, capsys):
    call("flowers", dataset="oxford_flowers102", data_dir=data_dir, output=tmp_path, **SHORT, **TINY)
    assert "7366 images of 16x16, with 819 held out" in capsys.readouterr().out
    check_output(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--dataset", "oxford_flowers102", "--data-dir", "nowhere"], 1, "oxford_flowers102 is not in nowhere"),
        (["--preset", "big"], 2, "--preset: invalid choice: 'big' .*full.*cpu"),
        (["--output", "/dev/null/x"], 1, "Cannot write to --output /dev/null/x: "),
        (["--dataset", "roses"], 2, "auto, oxford_flowers102, procedural or a folder. Received: roses"),
        (["--image-size", "2"], 1, r"\b4x4\b.*\. Received: image_shape=\(2, 2, 3\)"),
        (
            ["--dataset", "procedural", "--num-images", "20", "--batch-size", "64"],
            1,
            r"\b18\b.*\. Received: .*\b64$",
        ),
    ],
)
def test_flowers_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, command_line, arguments, status, message):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    result = command_line("flowers.py", "--preset", "cpu", "--output", tmp_path, *arguments)
    check_error(result, status, message)


def test_presets_of_flowers(tmp_path, monkeypatch):
    """Settings that are not given come from the preset, and the rest from the defaults."""
    monkeypatch.chdir(tmp_path)
    flowers = importlib.import_module("flowers")
    called = []
    monkeypatch.setattr(flowers, "train", lambda model, data, *_, **settings: called.append((model, data, settings)))
    tiny = TINY | {"dataset": "procedural", "num_images": 80, "dtype_policy": "float32"}
    flowers.main(preset="cpu", epochs=7, width=8, groups=4, dataset="procedural", num_images=80)
    flowers.main(preset="full", epochs=7, **tiny)
    (cpu, cpu_data, of_cpu), (full, full_data, of_full) = called
    assert (cpu.data_shape, full.data_shape) == ((32, 32, 3), (16, 16, 3))
    for model in (cpu, full):
        assert model.condition.class_names == tuple(kd.datasets.FLOWER_KINDS) and model.diffusion.prediction == "x0"
    assert (len(cpu_data), cpu_data.batch_size, of_cpu["epochs"], of_cpu["warmup_steps"]) == (225, 32, 7, 100)
    assert (len(full_data), full_data.batch_size, of_full) == (1, 64, {"epochs": 7})
    for accelerator, epochs in [(True, None), (False, 8)]:
        monkeypatch.setattr(kd, "has_accelerator", lambda found=accelerator: found)
        flowers.main(**tiny)
        assert called[-1][2].get("epochs") == epochs


def test_labels_of_flowers(tmp_path):
    """Kinds are learned unless pictures in a folder have none. Hidden files do not count."""
    flowers = importlib.import_module("flowers")
    for kind in ("lily", "rose"):
        for index in range(4):
            kd.images.save(tmp_path / f"kinds/{kind}/{index}.png", np.full((8, 8, 3), index / 4))
    options = {"seed": 0, "image_size": 8, "num_images": 20, "batch_size": 2}
    assert flowers.load(str(tmp_path / "kinds"), **options)[0].class_names == ["lily", "rose"]
    (tmp_path / "kinds/._rose.png").touch()
    assert flowers.load(str(tmp_path / "kinds"), **options)[0].class_names == ["lily", "rose"]
    (tmp_path / "kinds/lily/.thumbnails").mkdir()
    assert flowers.load(str(tmp_path / "kinds/lily"), **options)[0].class_names is None
    assert flowers.load("procedural", **options)[0].class_names == [*kd.datasets.FLOWER_KINDS]
    assert flowers.load("procedural", labels="no", **options)[0].class_names is None


def test_the_readmes_code(tmp_path, monkeypatch):
    """As printed, but for the size of the job."""
    fifteen_lines, own_data, preset = README_CODE
    for old, new in [("1024", "64"), ("epochs=6", "epochs=2"), ("width=24", "width=16")]:
        assert old in fifteen_lines
        fifteen_lines = fifteen_lines.replace(old, new)
    monkeypatch.chdir(tmp_path)
    if TORCH:  # it takes longest to compile elsewhere, and test_saved.py loads the model there
        exec(preset, {})
    names = {}
    exec(fifteen_lines, names)
    for name, scale in [("samples/0002.png", 1), ("flowers.png", 4)]:
        with Image.open(name) as picture:
            assert picture.size == (74 * scale, 74 * scale)

    flowers = names["images"]
    kd.images.save("pictures/{:03d}.png", flowers)
    np.savez("pictures.npz", x=kd.images.to_uint8(flowers))
    monkeypatch.setattr(kd.datasets, "from_tfds", lambda name, batch_size, data_dir: None)
    exec(own_data, {})


@pytest.mark.slow
def test_the_readmes_code_learns(tmp_path, monkeypatch):
    """As printed."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(README_CODE[0], names)
    losses = names["model"].history.history["loss"]
    assert losses[-1] < losses[0] / 2


@pytest.fixture
def few_images(monkeypatch):
    """The examples read a thousand images of a data set, and their networks are tiny."""
    read = kd.datasets.from_tfds
    monkeypatch.setattr(kd.datasets, "from_tfds", lambda name, part, **kwargs: read(name, f"{part}[:1000]", **kwargs))
    monkeypatch.setattr(
        kd.networks, "unet", lambda shape, *_, num_classes=None, **__: image_network(shape, num_classes=num_classes)
    )


@pytest.mark.slow
def test_samplers(tmp_path, data_dir, few_images, capsys, command_line):
    options = {"data_dir": data_dir, "output": tmp_path, "epochs": 1, "steps_per_epoch": 2, "classifier_epochs": 1}
    call("samplers", evaluations=(6, 24), spacings=("uniform", "optimized"), num_samples=8, **options)
    check_metric(capsys.readouterr().out, 8)
    header, *rows = (tmp_path / "distances.csv").read_text().splitlines()
    assert header == "sampler,spacing,network calls,distance,share in class" and len(rows) == 9 * 2 - 1 + 1
    assert {int(row.split(",")[-3]) for row in rows} == {5, 6, 24}  # Heun calls an odd number
    for name in ("distances.png", "samples.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
    # The other examples take the models, without labels, and the classifier.
    options |= {"model": str(tmp_path / "model.keras"), "num_samples": 20}
    call("guidance", guide=str(tmp_path / "guide.keras"), scales=(1.0, 2.0), **options)
    assert len(re.findall(r"^ +[12] +- +[0-9.]+$", capsys.readouterr().out, re.M)) == 2
    distilled = tmp_path / "distilled"
    distilled.mkdir()
    for name in ("classifier.keras", "classifier.json"):
        (tmp_path / name).rename(distilled / name)
    options |= {"output": distilled, "num_pairs": 16, "batch_size": 8, "num_seeds": 1}
    options |= {"num_point_pairs": 64, "point_epochs": 1, "num_points": 20, "num_sets": 2}
    del options["steps_per_epoch"]
    call("distill", guide=str(tmp_path / "guide.keras"), guidance_scale=2.0, **options)
    text = capsys.readouterr().out
    assert text.count("distilled, one call: ") == text.count("distilled, two calls: ") == 2, text
    assert "Made 16 pairs" in text and np.load(distilled / "pairs.npy").shape == (16, 28, 28, 1)
    same = {"guide": str(tmp_path / "guide.keras"), "guidance_scale": 2.0, "resume": True}
    call("distill", **options, **same)  # reads the pairs
    text = capsys.readouterr().out
    assert "Made" not in text and "Trained for 0.0 minutes" in text
    for name in ("map.png", "images.png"):
        with Image.open(distilled / name) as picture:
            picture.load()
    fast = kd.saving.load_model(distilled / "model.keras")
    assert fast.sampler == kd.samplers.DDIM(1) and fast.sample(1, seed=0).shape == (1, 28, 28, 1)
    for arguments, message in [
        (("--num-sets", 1), "--num-sets must be at least 2. Received: 1$"),
        (("--num-pairs", 8), "--batch-size must be at most --num-pairs, 8. Received: 64$"),
        (("--learning-rate", 0), r"The learning rate must be in \(0, 1\]. Received: 0.0$"),
        (("--guide", "guide.keras"), "--guide needs a --guidance-scale other than 1"),
        (("--guidance-scale", 2), "--guidance-scale needs a --model"),
    ]:
        check_error(command_line("distill.py", *arguments), 2, message)
    check_error(command_line("samplers.py", "--spacings", "even"), 2, "takes uniform, .* Received: even$")
    check_error(command_line("samplers.py", "--evaluations", 1, 9), 2, r"between 2 and 1000. Received: \(1, 9\)$")


@pytest.mark.slow
def test_ablations(tmp_path, data_dir, capsys, monkeypatch, command_line):
    monkeypatch.setattr(kd.networks, "unet", lambda shape, *_, **kwargs: image_network(shape))
    options = {"data_dir": data_dir, "output": tmp_path, "images_seen": 128, "num_samples": 8}
    options |= {"judge": "classifier", "classifier_epochs": 1}
    call("ablations", image_size=16, only=("no_labels", "clear"), **options)
    call("ablations", image_size=16, only=("clear",), **options)  # reads the result
    text = capsys.readouterr().out
    check_metric(text, 8)
    assert "recipe, seed         distance         fid   precision      recall    in class\n" in text
    found = re.findall(r"^(no_labels|clear)-0 +((?:-?[\d.e+]+ +){4}-)$", text, re.M)
    assert [name for name, _ in found].count("clear") == 2 and len(found) == 4 and len(set(found)) == 2, text
    check_pictures(tmp_path, "ablations-no_labels-clear-0")
    check_error(command_line("ablations.py", "--only", "best"), 2, r"takes recipe, guided, .* Received: best$")


def test_ablations_immiscible_noise_is_the_nearest_of_four():
    """The mean square distance of x_0 to the nearest of four noises, in four dimensions, by a million draws."""
    ablations = importlib.import_module("ablations")
    network = image_network((2, 2, 1))
    model = ablations.Immiscible(network, kd.GaussianDiffusion(kd.schedules.cosine(10), "x0"))
    x_0 = np.full((20_000, 2, 2, 1), 0.5, "float32")
    noise = ops.convert_to_numpy(model.draw_noise(ops.convert_to_tensor(x_0), keras.random.SeedGenerator(0)))
    draws = np.random.default_rng(0).standard_normal((250_000, 4, 4))
    expected = np.sum((draws - 0.5) ** 2, axis=-1).min(axis=-1).mean()
    got = np.sum((noise - x_0) ** 2, axis=(1, 2, 3)).mean()
    assert abs(got - expected) < 0.05 < abs(5 - expected), (got, expected)  # 5 for independent noise


def check_metric(text, num):
    assert re.search(r"^Judge: classifier, which is right on [\d.]+% of \d+ held-out images.$", text, re.M), text
    assert re.search(rf"^Kernel distance x 1000 of {num} training images: -?[\d.]+ ± [\d.]+ ", text, re.M), text


@pytest.mark.slow
def test_moons(tmp_path, capsys, command_line):
    call("moons", output=tmp_path, steps=40, num_samples=100, num_pairs=2)
    text = capsys.readouterr().out
    assert text.count("large variance: ") == 2 and text.count("small variance: ") == 2, text
    assert np.load(tmp_path / "samples.npy").shape == (100, 2)
    for name in ("forward.png", "reverse.png", "score.png", "guidance.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
    check_error(command_line("moons.py", "--steps", 3), 2, "At least 4 --steps")


@pytest.mark.slow
def test_schedules(tmp_path, offline, capsys):
    call("schedules", steps=1, **offline)
    text = capsys.readouterr().out
    # After one step the network predicts almost nothing. The error of v is v, whose mean square is 1 for noise alone.
    errors = [float(line.rsplit(": ", 1)[1]) for line in text.splitlines() if line.startswith("Mean squared error")]
    assert len(errors) == 3 and errors[0] < 0.1, text
    for name in ("scales.png", "resolutions.png", "difficulty.png"):
        assert read(tmp_path / "out" / name).ndim == 3


def test_moons_exact_denoiser_is_the_mean():
    """The mean of x_0 given x_t is computed from a million points, weighted by their likelihood."""
    schedule = kd.schedules.cosine(100)
    model = importlib.import_module("moons").best_model(schedule)
    x_0, _ = kd.datasets.moons(1_000_000)
    for t in (20, 60, 95):
        x_t = schedule.alpha[t] * x_0[:5] + schedule.sigma[t] * np.random.default_rng(t).standard_normal((5, 2))
        for got, x in zip(model.denoise(x_t, t), x_t):
            logits = -np.sum((x - schedule.alpha[t] * x_0) ** 2, axis=1) / (2 * schedule.sigma[t] ** 2)
            weights = np.exp(logits - logits.max())
            np.testing.assert_allclose(got, weights @ x_0 / weights.sum(), atol=0.01)


@pytest.mark.slow
def test_guidance(tmp_path, data_dir, few_images, capsys, command_line):
    options = {"data_dir": data_dir, "output": tmp_path, "epochs": 1, "steps_per_epoch": 2, "classifier_epochs": 1}
    call("guidance", num_samples=20, scales=(0.0, 2.0), **options)
    check_metric(capsys.readouterr().out, 20)
    header, *rows = (tmp_path / "guidance.csv").read_text().splitlines()
    assert header == "guidance scale,share in class,distance" and [row.split(",")[0] for row in rows] == ["0.0", "2.0"]
    for name in ("guidance.png", "samples/0001.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
    model = str(tmp_path / "model.keras")
    call("guidance", model=model, num_samples=20, scales=(1.0, 9.0), interval=(2000, 2000), num_steps=2, **options)
    (_, *of_one), (_, *of_nine) = (row.split(",") for row in (tmp_path / "guidance.csv").read_text().split()[-2:])
    assert of_one == of_nine, "guidance acts outside of the interval"
    check_error(command_line("guidance.py", "--scales", -1, 2), 2, r"must be 0 or more. Received: \(-1.0, 2.0\)$")
    result = command_line(
        "guidance.py", "--num-samples", 19, "--data-dir", data_dir, "--output", tmp_path, "--overwrite"
    )
    check_error(result, 2, "--num-samples must be at least 20")
    result = command_line("guidance.py", "--model", model, "--resume")
    check_error(result, 2, "--model is trained already, so --resume and --overwrite have no effect.$")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Arguments of a run without data and without a network connection, on drawn flowers. Networks are tiny."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    for name in ("mnist", "oxford_flowers102"):  # folders with the name of a data set
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    unet = lambda shape, *_, num_classes=None, image_channels=None, **__: image_network(
        shape, num_classes=num_classes, image_channels=image_channels
    )
    monkeypatch.setattr(kd.networks, "unet", unet)
    return {"data_dir": str(tmp_path / "nothing"), "output": str(tmp_path / "out")}


def check_pictures(folder, *names):
    """Checks that the middle of each picture is neither empty nor only black and white."""
    for name in names:
        pixels = read(folder / f"{name}.png").astype("int32")
        height, width = pixels.shape[:2]
        middle = pixels[height // 4 : -height // 4, width // 4 : -width // 4]
        assert middle.std() > 5 and len(np.unique(middle)) > 30, name


@pytest.mark.slow
def test_mnist(tmp_path, offline, capsys):
    call("mnist", steps=5, more_steps=5, num_samples=20, classifier_epochs=1, **offline)
    text = capsys.readouterr().out
    check_metric(text, 20)
    assert "NOT TRAINING ON mnist" in text and text.count("kernel distance") == 9, text
    check_pictures(tmp_path / "out", "schedules", "embedding", "choices", "samples", "denoising", "editing")
    assert keras.saving.load_model(tmp_path / "out/model.keras").data_shape == (28, 28, 1)
    with pytest.raises(ValueError, match="out holds results with other settings"):
        call("mnist", steps=10, resume=True, **offline)


def test_mnist_can_receive_the_noise_level(monkeypatch):
    """The output of the network at t is that of the bare network at 1000 sqrt(alpha_bar_t)."""
    bare = kd.networks.mlp(2, 8, 1)
    bare.layers[-1].set_weights([np.ones((8, 2)), np.zeros(2)])
    monkeypatch.setattr(kd.networks, "unet", lambda *_, **__: bare)
    schedule = kd.schedules.linear(1000)
    network = importlib.import_module("mnist").make_network(schedule.alpha)
    x, level = np.ones((1, 2), "float32"), schedule.alpha[[300]]
    outputs = [
        network([x, np.array([300])]),
        bare([x, np.round(1000 * level).astype("int32")]),
        bare([x, np.array([300])]),
    ]
    output, expected, other = map(ops.convert_to_numpy, outputs)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    assert not np.allclose(output, other)


@pytest.mark.slow
def test_fashion_mnist(tmp_path, offline, monkeypatch, capsys):
    dit = kd.networks.dit
    monkeypatch.setattr(kd.networks, "dit", lambda shape, **_: dit(shape, 7, 8, 1, 1))
    call("fashion_mnist", epochs=1, steps_per_epoch=2, num_samples=20, classifier_epochs=1, **offline)
    text = capsys.readouterr().out
    rows = text[text.index("network  ") :].splitlines()[1:-1]
    names = ["basic U-Net, as in tutorials", "basic U-Net", "full U-Net", "transformer"]
    assert len(rows) == 4 and all(row.startswith(name) for row, name in zip(rows, names)), text
    check_pictures(tmp_path / "out", "training", "networks", "samples", "denoising")


def test_your_images(tmp_path, offline, command_line):
    """Trains on a folder of very few pictures that are not all square."""
    for index, flower in enumerate(kd.datasets.procedural_flowers(5, 20)[0]):
        kd.images.save(tmp_path / f"mine/{index % 2}/{index}.png", flower[: 16 + index % 4])
    call("your_images", tmp_path / "mine", epochs=2, steps_per_epoch=2, image_size=18, **offline)
    check_pictures(tmp_path / "out", "pictures", "samples/0002", "samples", "denoise")
    assert read(tmp_path / "out/loss.png").ndim == 3
    assert keras.saving.load_model(tmp_path / "out/model.keras").data_shape == (18, 18, 3)
    output = ["--output", offline["output"], "--overwrite"]
    check_error(command_line("your_images.py", tmp_path / "yours", *output), 1, "no folder")
    kd.images.save(tmp_path / "one/a.png", flower)
    result = command_line("your_images.py", tmp_path / "one", *output)
    check_error(result, 1, "At least 2 images are needed, because one tenth is held out. Received: 1$")


@pytest.mark.parametrize(
    "command", ["upscale", *(pytest.param(c, marks=pytest.mark.slow) for c in ("colorize", "sketch"))]
)
def test_translate(tmp_path, offline, capsys, command, command_line, monkeypatch):
    translate, folder = importlib.import_module("translate"), tmp_path / "out" / command
    options = {
        "dataset": "procedural",
        "image_size": 16,
        "epochs": 1,
        "steps_per_epoch": 2,
        "attention_resolutions": (2,),
    }
    if command == "upscale":
        monkeypatch.setattr(kd.metrics, "efficientnet_lite", lambda version: lambda images: [images, images[:, ::2]])
        options |= {"labels": True, "image_noise": 0.2, "perceptual": 0.1}
    translate.main(getattr(translate, command), **options, **offline)
    lines = re.findall(r"^(.*): PSNR (-?[\d.]+) dB \(200 held-out pictures\)$", capsys.readouterr().out, re.M)
    expected = ["condition", "result", "mean of two"][command != "upscale" :]
    assert [name for name, _ in lines] == expected
    assert read(folder / "results.png").std() > 5  # the network is not trained, but conditions and truth are drawn
    model = keras.saving.load_model(folder / "model.keras")
    assert model.condition["image"].shape == (16, 16, 3 if command == "upscale" else 1)
    if command == "upscale":
        assert model.corruption.image_noise == 0.2 and len(model.class_names) == len(kd.datasets.FLOWER_KINDS)
        check_added(model, 0)
        with Image.open(folder / "results.png") as picture:
            assert picture.width > picture.height / 3
        result = command_line("translate.py", "upscale", "--factor", 5, "--output", tmp_path / "other")
        check_error(result, 2, "--factor must be 2 or more and divide --image-size 32. Received: 5$")


def check_added(model, share):
    """Checks that the network adds this share of the condition image, with its noise, to what it computes."""
    for v in model.network.weights:
        v.assign(ops.zeros(v.shape))
    known = {"image": np.random.default_rng(0).standard_normal((2, *model.data_shape))}
    given = {v.name: known.get(v.name, np.zeros((2, *v.shape[1:]))) for v in model.network.inputs}
    got = model.network(tuple(ops.cast(given[v.name], v.dtype) for v in model.network.inputs))
    np.testing.assert_allclose(ops.convert_to_numpy(got), share * known["image"], rtol=1e-6)


@pytest.mark.skipif(not TORCH, reason="takes longer to compile elsewhere")
def test_translate_begins_with_a_trained_model(tmp_path, offline, command_line):
    """All weights but those of x_t, which is joined with the image. Of the guidance scale, the network is told 1."""
    names = tuple(kd.datasets.FLOWER_KINDS)
    network = kd.networks.with_guidance_scale(kd.networks.unet((16, 16, 3), num_classes=len(names)))
    randomize(network)
    trained = kd.DiffusionModel(network, max_guidance_scale=2.5, guidance_scale=2.5, class_names=names)
    trained.save(tmp_path / "trained.keras")
    options = {"init": tmp_path / "trained.keras", "image-size": 16, "steps-per-epoch": 1, "learning-rate": 1e-9}
    arguments = ["upscale", *flags(**options, epochs=1, **offline)]
    assert command_line("translate.py", *arguments, "--labels")[0] == 0
    model = keras.saving.load_model(tmp_path / "out/upscale/model.keras")
    assert model.condition.names == ("label", "image", "image_noise", "scale") and model.class_names == names
    assert (model.guidance_scale, model.corruption.max_guidance_scale) == (1, 1)
    found = {v.path: ops.convert_to_numpy(v) for v in model.network.weights}
    kept = [np.array_equal(v.shape, found[v.path].shape) for v in network.weights]
    assert kept.count(False) == 1
    for v in itertools.compress(network.weights, kept):
        np.testing.assert_allclose(found[v.path], ops.convert_to_numpy(v), atol=1e-6)
    check_added(model, 1)
    check_error(command_line("translate.py", *arguments, "--overwrite"), 1, "missing=.'label_embedding/embeddings'")


@pytest.mark.skipif(not TORCH, reason="takes longer to compile elsewhere")
def test_translate_measures_a_trained_model(tmp_path, offline, command_line, monkeypatch):
    """The distances are those of the enlarged pictures, here in the features of a model that sees their means."""
    drawn, unet, names = kd.datasets.procedural_flowers, kd.networks.unet, tuple(kd.datasets.FLOWER_KINDS)
    monkeypatch.setattr(kd.datasets, "procedural_flowers", lambda num, *args, **options: drawn(200, *args, **options))
    x = keras.Input((16, 16, 3))
    keras.Model(x, keras.layers.GlobalAveragePooling2D()(x)).save(tmp_path / "mean.keras")
    networks = {"base": unet((8, 8, 3), num_classes=5), "up": unet((16, 16, 3), num_classes=5, image_channels=3)}
    for name, network in networks.items():
        randomize(network)
        model = kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="x0"), class_names=names)
        model.save(tmp_path / f"{name}.keras")
    arguments = ["upscale", "--factor", 2, "--model", tmp_path / "up.keras", "--judge", tmp_path / "mean.keras"]
    measured = [*arguments, "--base", tmp_path / "base.keras", "--num", 20, "--output", offline["output"]]
    status, text = command_line("translate.py", *measured)
    found = re.findall(
        r"^([\w ]+): (PSNR [-\d.]+ dB, )?kernel distance x 1000 ([-\d.]+) \(20 ([-\w]+) pict", text, re.M
    )
    rows = ["condition", "result", "mean of two"]
    assert status == 0 and [name for name, *_ in found] == ["truth", *rows, *rows], text
    assert [of for *_, of in found] == 4 * ["held-out"] + 3 * ["drawn"]
    assert [bool(error) for _, error, *_ in found] == [False] + 3 * [True] + 3 * [False]
    truth, condition, result, *_ = (float(value) for _, _, value, _ in found)
    assert abs(condition - truth) < 0.3 * abs(result - truth)  # interpolation keeps the means of pictures
    for name in ("results", "drawn"):
        assert read(tmp_path / "out/upscale" / f"{name}.png").ndim == 3
    for line, status, message in [
        (["--model", tmp_path / "base.keras"], 1, "base.keras takes no images as conditions.$"),
        (
            ["--base", tmp_path / "up.keras"],
            1,
            "up.keras needs a condition that this example does not provide: image",
        ),
        (["--base", "flowers64"], 1, r"flowers64 draws \(64, 64, 3\), but conditions are \(8, 8, 3\).$"),
        (["--judge", "classifier"], 2, "--judge takes efficientnet, inception or a .keras file. Received: classifier$"),
        (["--judge", "nothing.keras"], 2, "--judge takes .* or a .keras file. Received: nothing.keras$"),
        (["--num", 1], 2, "--num must be 2 or more. Received: 1$"),
        (["--dataset", ROOT / "README.md"], 1, "README.md is a file. Expected the name of a data set, or a folder"),
        (["--overwrite"], 2, "--model is trained already, so --resume and --overwrite have no effect.$"),
    ]:
        check_error(command_line("translate.py", *arguments, *line), status, message)


def test_conditions_of_translate():
    """Means of blocks, brightness, and dark lines at edges."""
    translate, x = importlib.import_module("translate"), np.zeros((1, 4, 4, 3), "float32")
    x[:, :, 2:] = 1
    np.testing.assert_allclose(translate.upscale(x, factor=2)[0, :, :, 0], [[0, 1], [0, 1]])
    np.testing.assert_allclose(translate.colorize(x)[0, 0, :, 0], [0, 0, 1, 1], atol=1e-6)
    assert translate.colorize(x * [1, 0, 0]).max() == np.float32(0.299)
    np.testing.assert_allclose(translate.sketch(x)[0, 0, :, 0], [1, -1, -1, 1])
    with pytest.raises(ValueError, match="The pictures are gray"):
        translate.colorize(x[..., :1])
    assert translate.psnr(x, x + 0.2) == pytest.approx(20, abs=1e-3)


@pytest.mark.slow
def test_your_images_on_photographs(tmp_path, offline, data_dir, capsys):
    """Without a folder, photographs are written to one, in place of those of an earlier run."""
    kd.images.save(tmp_path / "out/pictures/9999.png", np.zeros((8, 8, 3)))
    call("your_images", epochs=1, steps_per_epoch=1, **offline | {"data_dir": data_dir})
    assert len(list((tmp_path / "out/pictures").glob("*.png"))) == 968
    assert "Training on 872 pictures, with 96 held out" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate(tmp_path, offline, capsys, command_line):
    """The report shows that the samples of an untrained model are far from flowers."""
    model = kd.DiffusionModel(kd.networks.unet((16, 16, 3)), kd.GaussianDiffusion(kd.schedules.cosine(20), "v"))
    path = str(tmp_path / "model.keras")
    model.save(path)
    options = {"num_samples": 40, "num_likelihood": 4, "classifier_epochs": 1, "judge": "classifier"}
    call("evaluate", path, dataset="procedural", num_images=900, **options, **offline)
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["num_samples"] == 40 and report["extractor"] == "classifier" and len(report["extractor_hash"]) == 12
    for name in ("kid", "fid"):
        assert report[name]["value"] > report[name]["floor"] + 3 * report[name]["floor_deviation"], text
    assert report["precision"]["value"] < report["precision"]["floor"] and report["kid_p_value"] < 0.05
    assert report["memorisation"]["floor"] == 0.05
    assert report["bits_per_dimension"]["small"]["num_images"] == 4
    check_pictures(tmp_path / "out", "report", "beside")
    call("evaluate", path, dataset="procedural", num_images=900, x0_error=1.0, **options, **offline)
    weighed = json.loads((tmp_path / "out/report.json").read_text())["bits_per_dimension"]["small"]["value"]
    assert weighed > report["bits_per_dimension"]["small"]["value"] + 0.1  # "v" follows x_t already
    assert (report["num_training"], report["floor"]) == (810, "held-out images, 40 at a time, 10 draws")
    of_vectors = tmp_path / "of_vectors.keras"
    kd.DiffusionModel(kd.networks.dit((8, 8, 3), 4, 8, 1, 1, context_dim=2)).save(of_vectors)
    for arguments, status, message in [
        (["nowhere.keras"], 1, "There is no model file nowhere.keras"),
        ([of_vectors], 1, "of_vectors.keras needs a condition that this example does not provide: context.$"),
        ([path, "--data-dir", offline["data_dir"]], 1, "oxford_flowers102 is not in"),
        ([path, "--num-samples", 3], 2, "At least 20 --num-samples"),
        ([path, "--dataset", "procedural", "--num-images", 90], 1, "procedural has 9 held-out images, of which at"),
    ]:
        check_error(command_line("evaluate.py", *arguments, "--output", offline["output"]), status, message)


def test_sample(tmp_path, monkeypatch, command_line):
    """Single images, which depend on the seed and their number, and are made once."""
    network = image_network((8, 8, 3), num_classes=3)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(), class_names=["lily", "red rose", "tulip"])
    randomize(network)
    model.save(tmp_path / "model.keras")
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "model.keras", "--steps", 4]
    assert command_line("sample.py", *arguments, "--list") == (0, "lily\nred rose\ntulip\n")
    few = [*arguments, "--output", "few", "--labels", "red rose", "tulip", "--guidance", 1.5]
    assert command_line("sample.py", *few, "--num", 5, "--gif", "--grid", 3)[0] == 0
    made = {path.name: path.stat().st_mtime_ns for path in sorted(pathlib.Path("few").glob("0*.png"))}
    assert [*made] == [f"{index:05d}.png" for index in range(5)]
    expected = kd.saving.load_model("model.keras").sample(
        5, kd.samplers.DPMSolver(4, eta=1.0), seed=0, labels=[1, 2, 1, 2, 1], guidance_scale=1.5
    )
    for index, image in enumerate(kd.images.to_uint8(expected)):
        assert np.max(np.abs(read(f"few/{index:05d}.png").astype("int32") - image)) <= 1
    assert read("few/grid.png").shape == (16 * (2 * 10 + 2), 16 * (3 * 10 + 2), 3)
    with Image.open("few/denoising.gif") as animation:
        assert animation.n_frames == 4

    # A damaged image is drawn again, and the others are not.
    whole = pathlib.Path("few/00002.png").read_bytes()
    pathlib.Path("few/00002.png").write_bytes(whole[:60])
    status, _ = command_line("sample.py", *few, "--num", 40)
    assert pathlib.Path("few/00002.png").read_bytes() == whole
    assert status == 0 and len([*pathlib.Path("few").glob("0*.png")]) == 40
    assert command_line("sample.py", *few, "--num", 32)[0] == 0
    for line, status, message in [
        ([*few, "--seed", 1], 2, "few holds results with other settings"),
        ([*arguments, "--labels", "rose"], 1, "There is no class 'rose'. Similar names: red rose"),
        ([*arguments, "--labels", "3"], 1, "Labels must be integers in 0..2"),
        ([*arguments, "--num", 0], 2, "At least 1 image"),
        ([*arguments, "--steps", 0], 1, "`num_steps`"),
        ([*arguments, "--size", 128], 2, "--size 128 enlarges pictures of 64x64"),
        (["--model", "nowhere.keras"], 1, "There is no model file nowhere.keras"),
    ]:
        check_error(command_line("sample.py", *line), status, message)

    # Another model at the same path draws anew, and images of the old one are gone. Names count as the model, too.
    for change in ({}, {"class_names": ["red rose", "lily", "tulip"]}):
        model = kd.DiffusionModel.from_model(model, **change)
        for v in model.ema_weights if not change else []:
            v.assign(0.5 * v)
        before = pathlib.Path("few/00000.png").stat().st_mtime_ns
        model.save("model.keras")
        assert command_line("sample.py", *few, "--num", 3)[0] == 0
        assert pathlib.Path("few/00000.png").stat().st_mtime_ns > before
        assert len([*pathlib.Path("few").glob("0*.png")]) == 3


def test_samples_that_are_not_square(tmp_path, command_line):
    network = kd.networks.unet((4, 12, 1), 8, (1,), 1, (), 4)
    kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(25), "x0")).save(tmp_path / "wide.keras")
    wide = ["--model", tmp_path / "wide.keras", "--num", 3, "--grid", 3, "--steps", 2, "--output", tmp_path / "wide"]
    assert command_line("sample.py", *wide)[0] == 0
    assert read(tmp_path / "wide" / "00002.png").shape[:2] == (4, 12)
    assert read(tmp_path / "wide" / "grid.png").shape[:2] == (10 * (4 + 2 * 2), 10 * (3 * (12 + 2) + 2))


@pytest.fixture
def edit(tmp_path, monkeypatch, capsys):
    """A function that calls a command of edit.py with an untrained model of classes and returns what it prints."""
    model = kd.DiffusionModel(image_network((8, 8, 3), num_classes=2), kd.GaussianDiffusion())
    (tmp_path / "runs/flowers").mkdir(parents=True)
    model.save(tmp_path / "runs/flowers/model.keras")
    for name, color in {"white": 1.0, "black": -1.0}.items():
        kd.images.save(tmp_path / f"{name}.png", np.full((12, 12, 3), color))
    monkeypatch.chdir(tmp_path)

    def run(command, images=None, **settings):
        call("edit", getattr(importlib.import_module("edit"), command), images, **settings)
        return capsys.readouterr().out

    return run


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.slow
def test_edit(edit):
    edit("inpaint", ["white.png", "black.png"], num=2, num_steps=3, label=1)
    known = np.ones((8, 8), bool)
    known[2:6, 2:6] = False
    for row, color in enumerate((255, 0)):
        fillings = [read(f"runs/edit/inpaint/{row + 1}-{column}.png") for column in (3, 4)]
        assert all(np.all(filling[known] == color) for filling in fillings)
        assert not np.array_equal(*fillings)
    edit("inpaint", ["white.png"], mask="white.png", num=1, num_steps=2)
    assert np.all(read("runs/edit/inpaint/1-3.png") == 255)

    edit("variations", ["white.png"], strengths=(0, 1), label=0, guidance_scale=2)
    assert np.all(read("runs/edit/variations/1-2.png") == 255)
    assert not np.all(read("runs/edit/variations/1-3.png") == 255)

    edit("interpolate", ["white.png", "black.png"], num=3, num_steps=2)
    assert np.all(read("runs/edit/interpolate/1-1.png") == 255) and np.all(read("runs/edit/interpolate/1-3.png") == 0)

    text = edit("reconstruct", num_flowers=2, num_steps=(2, 4))
    assert [line.split()[0] for line in text.splitlines()[:2]] == ["2", "4"]
    assert pathlib.Path("runs/edit/reconstruct/2-5.png").is_file()
    for name in ("inpaint", "variations", "interpolate", "reconstruct"):
        assert np.ptp(read(f"runs/edit/{name}.png")[..., :3]) == 255


def test_edit_as_a_command(edit, command_line):
    arguments = "white.png black.png --strengths 0 1 --label 0 --output here".split()
    assert command_line("edit.py", "variations", *arguments) == (0, "Wrote here/variations.png and here/variations/.\n")
    assert np.all(read("here/variations/1-2.png") == 255) and np.all(read("here/variations/2-2.png") == 0)


def test_edit_says_in_one_line_what_is_wrong(edit, command_line):
    kd.DiffusionModel(kd.networks.mlp(2, 8), kd.GaussianDiffusion()).save("points.keras")
    kd.DiffusionModel(kd.networks.unet((8, 8, 1), 8, (1,), 1, (), 4)).save("gray.keras")
    for line, message in [
        (
            "inpaint white.png --model nowhere.keras",
            "There is no model file nowhere.keras. Presets of the package: .* `python .*` trains a model.$",
        ),
        ("interpolate white.png", "in pairs. Received: 1$"),
        ("variations white.png --strengths 2", r"`strength` must be in \[0, 1\]. Received: strength=2.0"),
        ("variations white.png --label 2", "Labels must be integers in 0..1, .*values=2"),
        ("variations gray.png", "gray.png"),
        ("variations white.png --model points.keras", "points.keras is not a diffusion model of images"),
        ("variations --model gray.keras", "gray.keras was not trained on color images"),
    ]:
        check_error(command_line("edit.py", *line.split()), 1, message)


def test_a_backend_that_does_not_exist():
    status, printed = run_script("flowers.py", "--help", KERAS_BACKEND="pytorch")
    assert status == 1 and "Keras cannot use the backend pytorch" in printed and "Traceback" not in printed


def test_the_package_is_not_installed():
    common = importlib.import_module("common")
    with pytest.raises(SystemExit, match="pip install"), common.quiet_import():
        raise ModuleNotFoundError("No module named 'keras_ddpm'", name="keras_ddpm")


def test_more_devices_than_there_are(command_line, tmp_path):
    result = command_line("flowers.py", "--devices", 99, "--output", tmp_path)
    torch = keras.backend.backend() == "torch"
    check_error(result, 2, "no distribution on PyTorch" if torch else r"--devices must be in 1\.\.\d+")


def test_demo_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, command_line):
    check_error(command_line("demo.py", "--port", 65536), 2, r"--port must be in 0\.\.65535. Received: 65536$")
    check_error(command_line("demo.py", ROOT / "README.md"), 1, "README.md cannot be loaded as a model")
    context = kd.DiffusionModel(kd.networks.dit((4, 4, 3), 4, 8, 1, 1, context_dim=2))
    images = kd.DiffusionModel(kd.networks.dit((64, 64, 3), 32, 8, 1, 1, num_classes=2, image_channels=3))
    for name, model in {"context": context, "image": images}.items():
        model.save(tmp_path / "x.keras")
        message = f"x.keras needs a condition that this example does not provide: {name}.$"
        check_error(command_line("demo.py", tmp_path / "x.keras"), 1, message)
    for upscaler in ("flowers64", tmp_path / "x.keras"):  # without images, and with other labels
        result = command_line("demo.py", "--upscaler", upscaler)
        check_error(result, 1, f"{upscaler} does not enlarge pictures of flowers64, or has other labels")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="Exports need more packages"):
        importlib.import_module("demo").build(context, tmp_path, 1.0)
