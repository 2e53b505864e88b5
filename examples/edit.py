"""Edits images with a trained model.

    python examples/edit.py inpaint photo.jpg --mask mask.png           # fills the black part of the mask
    python examples/edit.py variations photo.jpg --strengths 0.3 0.6    # similar images
    python examples/edit.py interpolate first.jpg second.jpg            # images between two
    python examples/edit.py reconstruct photo.jpg --num-steps 10 50     # to noise and back, and the error

The model comes from examples/flowers.py, or from another example with --model. Images are cropped and resized to the
size that the model was trained on. Without files, held-out photographs of flowers are read from --data-dir. Without
--data-dir, flowers are drawn that examples/flowers.py does not train on by default.

The command writes all images side by side to --output/COMMAND.png, and each image to the folder --output/COMMAND.
"""

import pathlib

import common
import numpy as np

import keras_ddpm as kd


def inpaint(
    model, x, *, seed=0, mask: str | None = None, num=4, num_steps: int | None = None, num_resamples=10, **options
):
    """Fills a part of each image.

    Args:
        model: the model.
        x: images.
        seed: random seed of the first filling. The next fillings use the next seeds.
        mask: image file that is white where pixels are known and black where they are filled. By default the middle
            is filled.
        num: number of fillings.
        num_steps: number of steps of DDPM. By default 50.
        num_resamples: number of times that each step is repeated.
        **options: options of `model.sample`.
    """
    if num < 1:
        raise common.UsageError(f"At least 1 --num is needed. Received: {num}")
    size = x.shape[1]
    if mask:
        known = kd.images.load(mask, size, channels=1) > 127
    else:
        known = np.ones((size, size, 1))
        known[size // 4 : -size // 4, size // 4 : -size // 4] = 0
    masks = np.broadcast_to(known, (*x.shape[:-1], 1))
    options |= {"num_steps": num_steps, "num_resamples": num_resamples}
    columns = {"image": x, "known": np.where(masks, x, 0)}
    for number in range(seed, seed + num):
        columns[f"filled, seed {number}"] = kd.editing.inpaint(model, x, masks, number, **options)
    return columns


def variations(model, x, *, seed=0, strengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0), **options):
    """Generates images that are similar to each image.

    Args:
        model: the model.
        x: images.
        seed: random seed.
        strengths: strengths in [0, 1], from the same image to an unrelated one.
        **options: options of `model.sample`.
    """
    columns = {"image": x}
    for strength in strengths:
        columns[f"strength {strength:g}"] = kd.editing.variations(model, x, strength, seed, **options)
    return columns


def interpolate(model, x, *, num=7, num_steps: int | None = None, **options):
    """Generates images between the two images of each pair.

    Args:
        model: the model.
        x: images, the pairs one after another.
        num: number of images, including both ends.
        num_steps: number of steps of DDIM in each direction. By default 100.
        **options: options of `model.sample`.
    """
    if len(x) % 2:
        raise ValueError(f"Images must come in pairs. Received: {len(x)}")
    between = kd.editing.interpolate(model, x[::2], x[1::2], num, num_steps=num_steps, **options)
    return {f"{fraction:.0%}": images for fraction, images in zip(np.linspace(0, 1, num), between)}


def reconstruct(model, x, *, num_steps: tuple[int, ...] = (25, 100, 400), **options):
    """Turns each image into noise and back, and prints the error.

    Args:
        model: the model.
        x: images.
        num_steps: numbers of steps of DDIM in each direction.
        **options: options of `model.sample`.
    """
    columns = {"image": x}
    for steps in num_steps:
        steps = min(steps, model.diffusion.timesteps)
        noise = kd.editing.encode(model, x, num_steps=steps, **options)
        again = kd.editing.decode(model, noise, num_steps=steps, **options)
        error = np.sqrt(np.mean((again - x) ** 2))
        print(f"{steps:5} steps: root mean squared error {error:.4f} of pixels in [-1, 1]", flush=True)
        columns |= {f"x_T,\n{steps} steps": noise / 3, f"{steps} steps,\nerror {error:.3f}": again}
    return columns


def main(
    command,
    images: tuple[str, ...] | None = None,
    *,
    output="runs/edit",
    data_dir: str | None = None,
    model="runs/flowers/model.keras",
    num_flowers=4,
    label: int | None = None,
    guidance_scale=1.0,
    **settings,
):
    """Edits images and writes the results.

    Args:
        command: one of the functions above.
        images: image files. By default flowers.
        output: folder for the output files.
        data_dir: folder of prepared data sets, for photographs of flowers. By default flowers are drawn.
        model: trained .keras file.
        num_flowers: number of flowers.
        label: class of the images, for a model with classes.
        guidance_scale: guidance scale of the class.
        **settings: arguments of `command`.
    """
    if num_flowers < 1:
        raise common.UsageError(f"At least 1 --num-flowers is needed. Received: {num_flowers}")
    out, name = pathlib.Path(output), command.__name__
    trained = common.load_model(model)
    size, _, channels = trained.data_shape
    if images:
        x = kd.images.from_uint8(np.stack([kd.images.load(path, size, channels) for path in images]))
    elif channels != 3:
        raise ValueError(f"{model} was not trained on color images. Give image files, because flowers are in color.")
    elif data_dir:
        held_out = kd.datasets.oxford_flowers(size, data_dir=data_dir)[1]
        x = kd.images.from_uint8(held_out.x[:num_flowers])
    else:
        x, _ = kd.datasets.procedural_flowers(num_flowers, size, seed=1)
    columns = command(trained, x, labels=label, guidance_scale=guidance_scale, **settings)
    for column, results in enumerate(columns.values()):
        for row, image in enumerate(results):
            kd.images.save(out / name / f"{row + 1}-{column + 1}.png", image)
    kd.plots.table(out / f"{name}.png", {"": columns}, size=1.1)
    print(f"Wrote {out / name}.png and {out / name}/.")


if __name__ == "__main__":
    common.run(main, commands=(inpaint, variations, interpolate, reconstruct))
