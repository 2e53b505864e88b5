"""The examples as people start them, with tiny settings, and the README's code as it is printed."""

import importlib
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

import keras_ddpm as kd

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
README_CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SHORT = "--preset cpu --grid-every 1 --batch-size 8 --epochs 2 --steps-per-epoch 2".split()
TINY = [*SHORT, *"--image-size 16 --width 8 --width-multipliers 1 2 --groups 4".split()]


def test_the_readmes_name_every_example():
    texts = [(ROOT / name).read_text() for name in ("README.md", "examples/README.md")]
    for path in (ROOT / "examples").glob("[!c]*.py"):
        assert all(path.name in text for text in texts), path
        assert f"python examples/{path.name}" in path.read_text()


def flowers(*arguments, **environment):
    return example("flowers.py", *arguments, **environment)


def example(name, *arguments, **environment):
    """Runs a script; returns exit status and output."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    run = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return run.returncode, run.stdout


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


def test_flowers_without_network_and_data(tmp_path):
    """The main job on the built-in flowers; then its model is fine-tuned on a folder."""
    offline = {"https_proxy": "http://127.0.0.1:9", "TFDS_DATA_DIR": str(tmp_path / "nothing")}
    options = ["--num-images", 90, "--dtype-policy", "mixed_bfloat16", "--output", tmp_path / "a"]
    status, text = flowers(*TINY, *options, **offline)
    assert status == 0, text
    assert f"backend {keras.backend.backend()}, mixed_bfloat16." in text
    assert "NOT TRAINING ON oxford_flowers102: oxford_flowers102 is not in" in text
    assert "Going on with drawn flowers." in text
    assert "Preset: " in text and "81 images of 16x16" in text and "Saw 32 images in" in text
    check_output(tmp_path / "a")

    for index, flower in enumerate(kd.datasets.procedural_flowers(20, 16)[0]):
        kd.images.save(tmp_path / f"pictures/{index}.png", flower)
    (tmp_path / "pictures/broken.png").write_text("no picture")
    arguments = ["--init", tmp_path / "a/model.keras", "--dataset", tmp_path / "pictures", "--output", tmp_path / "b"]
    status, text = flowers(*arguments, *SHORT)
    assert status == 0 and "18 images of 16x16 to train on and 2 held out" in text, text
    assert "Skipped" in text and "broken.png" in text
    check_output(tmp_path / "b")
    status, text = flowers(*arguments, "--strict")
    assert status == 1 and "broken.png cannot be read" in text.splitlines()[-1]
    status, text = flowers(*arguments, "--width", 16)
    assert status == 2 and "--init brings its own network and process. Received as well: width" in text


@pytest.mark.slow
def test_flowers_on_photographs(tmp_path, data_dir):
    status, text = flowers(*TINY, "--dataset", "oxford_flowers102", "--data-dir", data_dir, "--output", tmp_path)
    assert status == 0, text
    assert "7366 images of 16x16 to train on and 819 held out" in text
    check_output(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--dataset", "oxford_flowers102", "--data-dir", "nowhere"], 1, "oxford_flowers102 is not in nowhere"),
        (["--preset", "big"], 2, "--preset: invalid choice: 'big' .*full.*cpu"),
        (["--output", "/dev/null/x"], 1, "--output /dev/null/x cannot be written to"),
        (["--dataset", "roses"], 2, "auto, oxford_flowers102, procedural or a folder. Received: roses"),
        (["--image-size", "2"], 1, r"at least 4x4. Received: image_shape=\(2, 2, 3\)"),
        (
            ["--dataset", "procedural", "--num-images", "20", "--batch-size", "64"],
            1,
            "size of the data, 18. Received: 64",
        ),
    ],
)
def test_flowers_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, status, message):
    """In this process, which is quicker: the message of `sys.exit` is what would be printed, with a status of 1."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(sys, "argv", ["flowers.py", "--preset", "cpu", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples/flowers.py"), run_name="__main__")
    got, text = (2, capsys.readouterr().err) if stop.value.code == 2 else (1, stop.value.code)
    assert got == status and re.search(message, text.splitlines()[-1]), text


def test_the_readmes_code(tmp_path, monkeypatch):
    """As printed, but for the size of the job."""
    fifteen_lines, own_data, *_ = README_CODE
    flowers, _ = kd.datasets.procedural_flowers(64, 16)
    batches = [kd.datasets.from_arrays(flowers, batch_size=8, steps_per_epoch=2)] * 2
    monkeypatch.setattr(kd.datasets, "oxford_flowers", lambda image_size, batch_size: batches)
    small = [("64, 64, 3", "16, 16, 3), 8, (1, 2"), ("groups=8", "groups=4, num_blocks=1")]
    for old, new in [*small, ("epochs=800", "epochs=10"), ("DDIM(50)", "DDIM(3)")]:
        assert old in fifteen_lines
        fifteen_lines = fifteen_lines.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(fifteen_lines, {})
    for name in ("samples/0010.png", "flowers.png"):
        with Image.open(name) as picture:
            assert picture.size == (74, 74)

    for index, flower in enumerate(flowers):
        kd.images.save(f"pictures/{index}.png", flower)
    np.savez("pictures.npz", x=kd.images.to_uint8(flowers))
    monkeypatch.setattr(kd.datasets, "from_tfds", lambda name, batch_size, data_dir: None)
    exec(own_data, {})


@pytest.mark.slow
def test_the_readmes_conditions_and_editing(monkeypatch):
    _, _, conditional, _ = README_CODE
    flowers, labels = kd.datasets.procedural_flowers(64, 16)
    batches = kd.datasets.from_arrays(flowers, labels + 70, batch_size=8, steps_per_epoch=2)
    monkeypatch.setattr(kd.datasets, "oxford_flowers", lambda image_size, batch_size, labels: (batches, None))
    for old, new in [("64, 64, 3), ", "16, 16, 3), 16, (1, 2), "), ("16, 64, 64, 1", "2, 16, 16, 1"), ("32:", "8:")]:
        assert old in conditional
        conditional = conditional.replace(old, new)
    names = {}
    for old, new in [("epochs=800", "epochs=1"), ("sample(16", "sample(2"), ("[:8]", "[:1]"), ("[8:]", "[1:]")]:
        assert old in conditional
        conditional = conditional.replace(old, new)
    exec(conditional, names)
    assert names["between"].shape == (5, 1, 16, 16, 3) and names["similar"].shape == (2, 16, 16, 3)
    assert np.array_equal(names["filled"][:, :, :8], names["roses"][:, :, :8])


@pytest.mark.slow
def test_the_readmes_metrics(tmp_path, monkeypatch, capsys):
    *_, code = README_CODE
    flowers, labels = kd.datasets.procedural_flowers(150, 16)
    options = {"batch_size": 8, "steps_per_epoch": 2}
    batches = [kd.datasets.from_arrays(kd.images.to_uint8(flowers), labels, **options) for _ in range(2)]
    monkeypatch.setattr(kd.datasets, "oxford_flowers", lambda image_size, labels: batches)
    for old, new in [
        ("64, 64, 3)", "16, 16, 3), 16, (1, 2), 1, ()"),
        ("epochs=800", "epochs=2"),
        ("num_samples=500, every=10", "num_samples=100, every=2, sampler=kd.samplers.DDIM(2)"),
        ("x), 500", "x), 100"),
        ("[:100]", "[:2]"),
    ]:
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "'num_generated': 100, 'extractor': 'classifier'" in capsys.readouterr().out
    assert pathlib.Path("best.keras").is_file()


@pytest.mark.slow
def test_samplers(tmp_path, data_dir):
    arguments = "--epochs 1 --steps-per-epoch 2 --classifier-epochs 1 --num-samples 8 --evaluations 6".split()
    status, text = example("samplers.py", *arguments, "--data-dir", data_dir, "--output", tmp_path)
    assert status == 0 and "right on" in text and "Kernel distance of as many training images" in text, text
    header, *rows = (tmp_path / "distances.csv").read_text().splitlines()
    assert header == "sampler,spacing,network calls,distance" and len(rows) == 8 * 3
    assert {int(row.split(",")[-2]) for row in rows} == {5, 6}  # Heun calls an odd number
    for name in ("distances.png", "samples.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()


@pytest.mark.slow
def test_moons(tmp_path):
    status, text = example("moons.py", "--output", tmp_path, *"--steps 40 --num-samples 100 --num-pairs 2".split())
    assert status == 0 and text.count("large variance: ") == 2 and text.count("small variance: ") == 2, text
    assert np.load(tmp_path / "samples.npy").shape == (100, 2)
    for name in ("forward.png", "reverse.png", "score.png", "guidance.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()


@pytest.mark.slow
def test_schedules(tmp_path):
    status, text = example("schedules.py", "--output", tmp_path, "--steps", 1)
    assert status == 0, text
    # The network of one step predicts next to nothing: v is off by itself, whose mean square is 1 for noise alone.
    errors = [float(line.rsplit(": ", 1)[1]) for line in text.splitlines() if line.startswith("Mean squared error")]
    assert len(errors) == 3 and errors[0] < 0.1, text
    for name in ("scales.png", "resolutions.png", "difficulty.png"):
        assert read(tmp_path / name).ndim == 3


def test_moons_exact_denoiser_is_the_mean():
    """Of x_0 given x_t, found by weighing a million points with their likelihood."""
    schedule = kd.schedules.cosine(100)
    model = runpy.run_path(str(ROOT / "examples/moons.py"))["best_model"](schedule)
    x_0, _ = kd.datasets.moons(1_000_000)
    for t in (20, 60, 95):
        x_t = schedule.alpha[t] * x_0[:5] + schedule.sigma[t] * np.random.default_rng(t).standard_normal((5, 2))
        for got, x in zip(model.denoise(x_t, t), x_t):
            logits = -np.sum((x - schedule.alpha[t] * x_0) ** 2, axis=1) / (2 * schedule.sigma[t] ** 2)
            weights = np.exp(logits - logits.max())
            np.testing.assert_allclose(got, weights @ x_0 / weights.sum(), atol=0.01)


@pytest.mark.slow
def test_guidance(tmp_path, data_dir):
    options = "--epochs 1 --steps-per-epoch 2 --classifier-epochs 1 --num-samples 20 --scales 0 2".split()
    status, text = example("guidance.py", *options, "--data-dir", data_dir, "--output", tmp_path)
    assert status == 0 and "right on" in text and "Kernel distance of as many training images" in text, text
    header, *rows = (tmp_path / "guidance.csv").read_text().splitlines()
    assert header == "guidance scale,share in class,distance" and [row.split(",")[0] for row in rows] == ["0.0", "2.0"]
    for name in ("guidance.png", "samples/0001.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The arguments of a run without data and network, which goes on with drawn flowers; networks are tiny."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    for name in ("mnist", "oxford_flowers102"):  # folders that happen to have the name of a data set
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    unet = kd.networks.unet
    monkeypatch.setattr(kd.networks, "unet", lambda shape, *_, **kwargs: unet(shape, 8, (1,), 1, (), groups=4))
    return ["--data-dir", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]


def check_pictures(folder, *names):
    """Each with something in its middle, and not black and white alone."""
    for name in names:
        pixels = read(folder / f"{name}.png").astype("int32")
        height, width = pixels.shape[:2]
        middle = pixels[height // 4 : -height // 4, width // 4 : -width // 4]
        assert middle.std() > 5 and len(np.unique(middle)) > 30, name


def in_process(name, *arguments):
    importlib.import_module(name).main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_mnist(tmp_path, offline, capsys):
    in_process("mnist", *offline, *"--steps 5 --more-steps 5 --num-samples 20 --classifier-epochs 1".split())
    text = capsys.readouterr().out
    assert "NOT TRAINING ON mnist" in text and "right on" in text and text.count("kernel distance") == 9, text
    check_pictures(tmp_path / "out", "schedules", "embedding", "choices", "samples", "denoising", "editing")
    assert keras.saving.load_model(tmp_path / "out/model.keras").data_shape == (28, 28, 1)


def test_mnist_is_told_the_noise_level(monkeypatch):
    """The network's answer at t is that of the bare one at 1000 sqrt(alpha_bar_t)."""
    bare = kd.networks.mlp(2, 8, 1)
    bare.layers[-1].set_weights([np.ones((8, 2)), np.zeros(2)])
    monkeypatch.setattr(kd.networks, "unet", lambda *_, **__: bare)
    schedule = kd.schedules.linear(1000)
    told = importlib.import_module("mnist").make_network(schedule.alpha)
    x, level = np.ones((1, 2), "float32"), schedule.alpha[[300]]
    answers = [
        told([x, np.array([300])]),
        bare([x, np.round(1000 * level).astype("int32")]),
        bare([x, np.array([300])]),
    ]
    told, expected, other = map(ops.convert_to_numpy, answers)
    np.testing.assert_allclose(told, expected, rtol=1e-6)
    assert not np.allclose(told, other)


@pytest.mark.slow
def test_fashion_mnist(tmp_path, offline, monkeypatch, capsys):
    dit = kd.networks.dit
    monkeypatch.setattr(kd.networks, "dit", lambda shape, **_: dit(shape, 7, 8, 1, 1))
    options = "--epochs 1 --steps-per-epoch 2 --num-samples 20 --classifier-epochs 1"
    in_process("fashion_mnist", *offline, *options.split())
    text = capsys.readouterr().out
    rows = text[text.index("network  ") :].splitlines()[1:-1]
    names = ["basic U-Net, as in tutorials", "basic U-Net", "full U-Net", "transformer"]
    assert len(rows) == 4 and all(row.startswith(name) for row, name in zip(rows, names)), text
    check_pictures(tmp_path / "out", "training", "networks", "samples", "denoising")


def test_your_images(tmp_path, offline):
    """A folder of very few pictures, not all of them square."""
    for index, flower in enumerate(kd.datasets.procedural_flowers(5, 20)[0]):
        kd.images.save(tmp_path / f"mine/{index % 2}/{index}.png", flower[: 16 + index % 4])
    options = "--epochs 2 --steps-per-epoch 2 --image-size 18".split()
    in_process("your_images", tmp_path / "mine", *offline, *options)
    check_pictures(tmp_path / "out", "pictures", "samples/0002", "samples", "denoise")
    assert read(tmp_path / "out/loss.png").ndim == 3
    assert keras.saving.load_model(tmp_path / "out/model.keras").data_shape == (18, 18, 3)
    with pytest.raises(ValueError, match="no folder"):
        in_process("your_images", tmp_path / "yours", *offline, *options)
    with pytest.raises(ValueError, match="at least 2 are needed. Received: 1"):
        kd.images.save(tmp_path / "one/a.png", flower)
        in_process("your_images", tmp_path / "one", *offline, *options)


@pytest.mark.slow
def test_your_images_on_photographs(tmp_path, offline, data_dir, capsys):
    """Without a folder it writes photographs into one, and trains on that."""
    options = ["--epochs", 1, "--steps-per-epoch", 1, "--data-dir", data_dir]
    in_process("your_images", *offline, *options)
    assert len(list((tmp_path / "out/pictures").glob("*.png"))) == 968
    assert "872 pictures to train on, 96 held out" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate(tmp_path, offline, capsys):
    """A report of an untrained model, whose samples are found to be far from flowers."""
    model = kd.DiffusionModel(kd.networks.unet((16, 16, 3)), kd.GaussianDiffusion(kd.schedules.cosine(20), "v"))
    model.save(tmp_path / "model.keras")
    options = "--num-samples 40 --num-likelihood 4 --classifier-epochs 1 --train-extractor".split()
    in_process("evaluate", tmp_path / "model.keras", "--dataset", "procedural", "--num-images", 900, *offline, *options)
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["num_samples"] == 40 and report["extractor"] == "classifier" and len(report["extractor_hash"]) == 12
    for name in ("kid", "fid"):
        assert report[name]["value"] > report[name]["floor"] + 3 * report[name]["floor_deviation"], text
    assert report["precision"]["value"] < report["precision"]["floor"] and report["kid_p_value"] < 0.05
    assert report["memorisation"]["floor"] == 0.05
    assert report["bits_per_dimension"]["small"]["num_images"] == 4
    check_pictures(tmp_path / "out", "report")
    assert (report["num_training"], report["floor"]) == (810, "held-out images, 40 at a time, 10 draws")
    for arguments, error, message in [
        (["nowhere.keras"], ValueError, "There is no model nowhere.keras"),
        ([tmp_path / "model.keras"], ConnectionError, "oxford_flowers102 is not in"),
        ([tmp_path / "model.keras", "--dataset", "procedural", "--num-samples", 3], SystemExit, "2"),
    ]:
        with pytest.raises(error, match=message):
            in_process("evaluate", *arguments, *offline)


@pytest.fixture
def edit(tmp_path, monkeypatch, capsys):
    """examples/edit.py on an untrained model of classes, in this process: from arguments to what it prints."""
    model = kd.DiffusionModel(kd.networks.unet((8, 8, 3), 8, (1,), 1, (8,), 4, num_classes=2), kd.GaussianDiffusion())
    (tmp_path / "runs/flowers").mkdir(parents=True)
    model.save(tmp_path / "runs/flowers/model.keras")
    for name, colour in {"white": 1.0, "black": -1.0}.items():
        kd.images.save(tmp_path / f"{name}.png", np.full((12, 12, 3), colour))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        runpy.run_path(str(ROOT / "examples/edit.py"))["main"](arguments)
        return capsys.readouterr().out

    return run


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.slow
def test_edit(edit):
    edit("inpaint", "white.png", "black.png", "--num", "2", "--num-steps", "3", "--label", "1")
    known = np.ones((8, 8), bool)
    known[2:6, 2:6] = False
    for row, colour in enumerate((255, 0)):
        fillings = [read(f"runs/edit/inpaint/{row + 1}-{column}.png") for column in (3, 4)]
        assert all(np.all(filling[known] == colour) for filling in fillings)
        assert not np.array_equal(*fillings)
    edit("inpaint", "white.png", "--mask", "white.png", "--num", "1", "--num-steps", "2")
    assert np.all(read("runs/edit/inpaint/1-3.png") == 255)

    edit("variations", "white.png", "--strengths", "0", "1", "--label", "0", "--guidance-scale", "2")
    assert np.all(read("runs/edit/variations/1-2.png") == 255)
    assert not np.all(read("runs/edit/variations/1-3.png") == 255)

    edit("interpolate", "white.png", "black.png", "--num", "3", "--num-steps", "2")
    assert np.all(read("runs/edit/interpolate/1-1.png") == 255) and np.all(read("runs/edit/interpolate/1-3.png") == 0)

    text = edit("reconstruct", "--num-flowers", "2", "--num-steps", "2", "4")
    assert [line.split()[0] for line in text.splitlines()[:2]] == ["2", "4"]
    assert pathlib.Path("runs/edit/reconstruct/2-5.png").is_file()
    for name in ("inpaint", "variations", "interpolate", "reconstruct"):
        assert np.ptp(read(f"runs/edit/{name}.png")[..., :3]) == 255


def test_edit_says_what_is_wrong(edit):
    with pytest.raises(ValueError, match="There is no model nowhere.keras. `python examples/flowers.py` trains one."):
        edit("inpaint", "white.png", "--model", "nowhere.keras")
    with pytest.raises(ValueError, match="in pairs. Received: 1"):
        edit("interpolate", "white.png")
    with pytest.raises(ValueError, match=r"`strength` must be in \[0, 1\]. Received: strength=2.0"):
        edit("variations", "white.png", "--strengths", "2")
    with pytest.raises(ValueError, match="Labels must be integers in 0..1. Received: labels=2"):
        edit("variations", "white.png", "--label", "2")
    with pytest.raises(OSError, match="grey.png"):
        edit("variations", "grey.png")
    points = kd.DiffusionModel(kd.networks.mlp(2, 8), kd.GaussianDiffusion())
    points.save("points.keras")
    with pytest.raises(ValueError, match="points.keras is no diffusion model of images"):
        edit("variations", "white.png", "--model", "points.keras")
