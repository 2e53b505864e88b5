"""Draws new images with a trained model. Nothing is trained.

    python examples/sample.py                                      # 64 flowers
    python examples/sample.py --labels sunflower "bird of paradise"
    python examples/sample.py --num 1000 --output runs/thousand    # the same command goes on after Ctrl-C
    python examples/sample.py --size 128                           # twice as large, by a second model
    python examples/sample.py --model runs/flowers/model.keras     # a model of your own
    python examples/sample.py --list                               # the names of the classes

Output files in --output:

    00000.png ...   single images. Number i depends on --seed, i and its label, not on --num.
    grid.png        the first 64 of them
    denoising.gif   with --gif: how 16 of them emerge from noise
    settings.json   what was asked for. Other settings need another folder.
    model.json      which model drew: its contents. Another model at the same path draws all images anew.
"""

import json
import pathlib

import common
import keras
import numpy as np
from PIL import Image

import keras_ddpm as kd

BATCH = 32


def labels_of(model, names, num):
    """The label of each image: those that are asked for in turn, or all classes in turn."""
    if model.condition is None or not model.condition.num_classes:
        if names:
            raise ValueError("The model has no classes, so --labels has no effect.")
        return None
    numbered = all(name.isdecimal() for name in names) and not set(names) & {*(model.condition.class_names or ())}
    asked = [int(name) for name in names] if numbered else list(names)
    known = model.condition.encoded(
        asked or np.arange(model.condition.num_classes), len(asked) or model.condition.num_classes
    )
    return np.resize(known, num)


def drawn(path):
    """The image that a file holds, as a uint8 array; `None` if there is no file, or it was not written to its end."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (OSError, SyntaxError):
        return None


def main(
    *,
    model="flowers64",
    labels: tuple[str, ...] = (),
    num=64,
    output="runs/sample",
    guidance: float | None = None,
    steps: int | None = None,
    size: int | None = None,
    seed=0,
    grid=8,
    gif=False,
    list=False,
):
    """Draws images.

    Args:
        model: a preset of the package or a .keras file.
        labels: names or numbers of classes, which take turns. By default all classes take turns.
        num: number of images.
        output: folder for the output files.
        guidance: guidance scale for models with labels. 1 is no guidance. By default the model's own.
        steps: number of steps of the model's sampler. By default its own.
        size: 128 enlarges flowers of 64x64 pixels by a second model.
        seed: random seed.
        grid: number of columns of the grid.
        gif: also write denoising.gif.
        list: print the names of the classes, and draw nothing.
    """
    if num < 1 or grid < 1:
        raise common.UsageError(f"At least 1 image and 1 column are needed. Received: {num} and {grid}")
    trained = common.load_model(model)
    if list:
        print("\n".join((trained.condition and trained.condition.class_names) or ["The classes have no names."]))
        return
    asked = labels_of(trained, labels, num)
    guidance = trained.guidance_scale if guidance is None else guidance
    options = lambda part: {} if asked is None else {"labels": asked[part], "guidance_scale": guidance}
    sampler = common.sampler_of(trained, steps)
    num_states = len(sampler.steps(trained.diffusion.schedule))  # raises an error for a wrong number
    shape = trained.data_shape
    if size is not None:
        if gif or (size, *shape) != (128, 64, 64, 3):
            raise common.UsageError("--size 128 enlarges pictures of 64x64, without --gif.")
        upscaler = common.load_model("flowers128", ("label", "image"))
        shape = upscaler.data_shape

    out = pathlib.Path(output)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"model": str(model), "labels": [*labels], "guidance": guidance, "sampler": str(sampler), "seed": seed}
    settings |= {} if size is None else {"size": size}
    common.check_settings(out, settings)
    path = lambda index: out / f"{index:05d}.png"
    config = np.frombuffer(json.dumps(trained.get_config()).encode(), "uint8")
    contents = {"contents": common.checksum(config, *trained.ema_weights)}
    if not common.is_noted(out / "model.json", contents):
        for old in out.glob("[0-9]*.png"):  # by another model
            old.unlink()
        common.write_note(out / "model.json", contents)
    progress = keras.utils.Progbar(num, unit_name="image")
    for first in range(0, num, BATCH):
        last = min(first + BATCH, num)
        if any(drawn(path(index)) is None for index in range(first, last)):
            images = trained.sample(last - first, sampler, seed, first=first, **options(slice(first, last)))
            if size is not None:
                kinds = None if asked is None else asked[first:last]
                images = kd.editing.upscale(upscaler, images, seed + 1 + first, labels=kinds)
            for index, image in zip(range(first, last), images):
                kd.images.save(path(index), image)
        progress.update(last)

    scale = max(1, 128 // max(shape[:2]))
    first_ones = [drawn(path(index)).reshape(shape) for index in range(min(num, 64))]
    kd.images.save(out / "grid.png", kd.images.grid(kd.images.from_uint8(first_ones), grid), scale)
    if gif:
        few = min(num, 16)
        _, x_t, x_0 = trained.sample(few, sampler, seed, return_trajectory=num_states, **options(slice(few)))
        common.save_denoising(out / "denoising.gif", x_t, x_0, scale)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
