"""Reads mutated files: `python fuzz.py NUMBER [SEED]`. Each is refused in one line, or gives what the whole one gives.

Of a model, the parts are mutated before they are packed, so that no checksum gives the mutation away. Such a part may
give another model. A crash or a file that takes more than ten seconds ends the process.
"""

import faulthandler
import io
import pathlib
import sys
import tempfile
import warnings

import hostile
import keras
import numpy as np
from PIL import Image

import keras_ddpm as kd

KINDS = {}


def kind(function):
    """A function from a generator and a folder to a mutated file, how to read it, and what the whole file gives."""
    KINDS[function.__name__] = function
    return function


def mutated(content, random):
    """The bytes with some flipped, cut off, inserted, repeated, or set to extremes."""
    content = bytearray(content)
    for _ in range(random.integers(1, 5)):
        place, length = random.integers(len(content) + 1), random.integers(1, 9)
        piece = [random.bytes(length), bytes(length), b"\xff" * length, bytes(content[place : place + length])]
        kept = random.choice([0, length])
        content[place : place + kept] = piece[random.integers(4)]
        if random.random() < 0.1:
            del content[random.integers(len(content) + 1) :]
    return bytes(content)


def weights(model):
    return [keras.ops.convert_to_numpy(v) for v in model.weights]


@kind
def model(random, folder):
    path = folder / "x.keras"
    hostile.write(path, hostile.genuine())
    expected = path.read_bytes()
    path.write_bytes(mutated(expected, random))
    return lambda: weights(kd.saving.load_model(path)), MODEL


@kind
def model_parts(random, folder):
    parts = hostile.genuine()
    name = random.choice(["config.json", "model.weights.h5"])
    hostile.write(folder / "x.keras", parts | {name: mutated(parts[name], random)})
    return lambda: kd.saving.load_model(folder / "x.keras") and None, None


@kind
def checkpoint(random, folder):
    """The only one in its folder, so the run starts anew: with a warning, or not at all."""
    name, content = CHECKPOINT
    damaged = mutated(content, random)
    (folder / name).write_bytes(damaged)

    def read():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(folder)
        if any("is set aside" in str(warning.message) for warning in caught):
            raise ValueError("set aside")

    return read, None


@kind
def npz(random, folder):
    stream, x = io.BytesIO(), np.arange(192, dtype="uint8").reshape(1, 8, 8, 3)
    np.savez_compressed(stream, x=x)
    (folder / "x.npz").write_bytes(mutated(stream.getvalue(), random))
    return lambda: [kd._files.arrays(folder / "x.npz").get("x", x)], [x]


@kind
def npy(random, folder):
    stream = io.BytesIO()
    np.save(stream, np.arange(192, dtype="uint8").reshape(1, 8, 8, 3))
    (folder / "x.npy").write_bytes(mutated(stream.getvalue(), random))  # has no checksum
    return lambda: kd.datasets.from_arrays(folder / "x.npy", batch_size=1) and None, None


@kind
def picture(random, folder):
    stream, ending = io.BytesIO(), random.choice(["bmp", "gif", "jpeg", "png", "tiff", "webp"])
    Image.fromarray(random.integers(0, 256, (16, 16, 3), "uint8")).save(stream, ending)
    (folder / f"x.{ending}").write_bytes(mutated(stream.getvalue(), random))
    return lambda: kd.datasets.from_folder(folder, 8, strict=True, batch_size=1) and None, None


def fit(folder):
    """A step of training, with a checkpoint in the folder."""
    model = kd.DiffusionModel(kd.networks.mlp(2, 4, 1), kd.GaussianDiffusion(kd.schedules.linear(25)), seed=0)
    model.compile(loss="mse", optimizer="sgd", run_eagerly=True)
    model.fit(np.zeros((2, 2), "float32"), verbose=0, callbacks=[kd.callbacks.Checkpoint(folder)])


def whole():
    """What whole files give: the weights of a model, and the name and bytes of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "x.keras")
        hostile.write(path, hostile.genuine())
        fit(pathlib.Path(folder, "run"))
        (written,) = pathlib.Path(folder, "run").glob("*.npz")
        return weights(kd.saving.load_model(path)), (written.name, written.read_bytes())


def main(number, seed=0):
    counts = dict.fromkeys(KINDS, 0)
    warnings.simplefilter("ignore")
    for index in range(number):
        name = list(KINDS)[index % len(KINDS)]
        random = np.random.default_rng([seed, index])
        with tempfile.TemporaryDirectory() as folder:
            read, expected = KINDS[name](random, pathlib.Path(folder))
            faulthandler.dump_traceback_later(10, exit=True)
            try:
                got = read()
            except ValueError as error:
                counts[name] += 1
                assert "\n" not in str(error), (index, name, str(error))
            except BaseException:
                print(f"number {index}, {name}, seed {seed}")
                raise
            else:
                same = expected is None or all(map(np.array_equal, got, expected))
                assert same, (index, name, "another result without an error")
            finally:
                faulthandler.cancel_dump_traceback_later()
    print(f"{number} files, of which were refused: {counts}")


if __name__ == "__main__":
    MODEL, CHECKPOINT = whole()
    main(*map(int, sys.argv[1:]))
