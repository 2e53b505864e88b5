"""The examples as people start them, with tiny settings, and the README's code as it is printed."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

import keras_ddpm as kd

ROOT = pathlib.Path(__file__).parent.parent
README_CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SHORT = "--preset cpu --grid-every 1 --batch-size 8 --epochs 2 --steps-per-epoch 2".split()
TINY = [*SHORT, *"--image-size 16 --width 8 --width-multipliers 1 2 --groups 4".split()]


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
    status, text = flowers(*TINY, "--num-images", 90, "--output", tmp_path / "a", **offline)
    assert status == 0, text
    assert "NOT TRAINING ON PHOTOGRAPHS: oxford_flowers102 is not in" in text
    assert "To insist: --dataset oxford_flowers102" in text
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
    fifteen_lines, own_data, _ = README_CODE
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
    *_, conditional = README_CODE
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
def test_samplers(tmp_path, data_dir):
    arguments = "--epochs 1 --steps-per-epoch 2 --num-samples 8 --evaluations 6".split()
    status, text = example("samplers.py", *arguments, "--data-dir", data_dir, "--output", tmp_path)
    assert status == 0 and "right on" in text and "Distance of as many training images" in text, text
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
    options = "--epochs 1 --steps-per-epoch 2 --num-samples 20 --scales 0 2".split()
    status, text = example("guidance.py", *options, "--data-dir", data_dir, "--output", tmp_path)
    assert status == 0 and "right on" in text and "Distance of as many training images" in text, text
    header, *rows = (tmp_path / "guidance.csv").read_text().splitlines()
    assert header == "guidance scale,share in class,distance" and [row.split(",")[0] for row in rows] == ["0.0", "2.0"]
    for name in ("guidance.png", "samples/0001.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()


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

    text = edit("reconstruct", "--num-drawn", "2", "--num-steps", "2", "4")
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
