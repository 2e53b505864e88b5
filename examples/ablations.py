"""What each part of the recipe of the flowers is worth: the kernel distance after the same number of images.

    python examples/ablations.py                      # all rows, one after the other
    python examples/ablations.py --only recipe v      # some of them
    python examples/ablations.py --seed 1             # all with another seed

Most rows change one thing in the recipe, which is that of `python examples/flowers.py --preset reference` in smaller
batches, as only few images are seen. The row `guided` is the recipe, sampled as examples/sample.py does. Two rows are
the recipes of other packages: `keras_io` of "Denoising Diffusion Probabilistic Model" and `clear` of "Denoising
Diffusion Implicit Models" on keras.io, each with the sampler that it recommends. A network of patches cannot tell the
noise of single pixels well, so rows that predict noise, v or the flow have a network without patches. It has a quarter
of the parameters and 1.2 times the operations. Compare them with `no_patches`, which is the recipe in this network.

The distance compares as many samples as there are held-out photographs with these, in the features of a judge. FID,
precision and recall do the same. The judge is the strongest network that is available. A classifier that is trained on
the other photographs is the last choice. The samples of networks with labels get the labels of the photographs. The
share in the class asked for is measured if the judge is right on 80 % of the photographs. A row that is in the output
folder is not computed again, so several processes can share the work.

Output files in --output:

    features-*.npy             features of the photographs, or classifier.keras if a classifier is the judge
    settings.json              what the rows have in common. Other settings need another folder.
    NAME-SEED.json             the result of a row
    ablations-NAMES-SEED.png   samples of each row from the same noises
"""

import dataclasses
import pathlib
from typing import Any

import common
import keras
import numpy as np
from flowers import PRESETS, make_model

import keras_ddpm as kd

# The distance is the kernel distance times 1000. "in class" is the share of samples in the class asked for.
COLUMNS = ("distance", "fid", "precision", "recall", "in class")


class Immiscible(kd.DiffusionModel):
    """Trains each image with the nearest of four noises (Li et al., 2024)."""

    def draw_noise(self, x_0, generator):
        noises = keras.ops.stack([super(Immiscible, self).draw_noise(x_0, generator) for _ in range(4)])
        distances = keras.ops.sum(keras.ops.square(noises - x_0), axis=(2, 3, 4))
        nearest = keras.ops.argmin(distances, axis=0)[None, :, None, None, None]
        return keras.ops.take_along_axis(noises, nearest, axis=0)[0]


@dataclasses.dataclass
class Recipe:
    """How a model is made, trained and sampled. The defaults are the recipe."""

    prediction: str = "x0"
    schedule: kd.schedules.Schedule = dataclasses.field(default_factory=kd.schedules.cosine)
    network: dict = dataclasses.field(default_factory=dict)
    model: type = kd.DiffusionModel
    labels: bool = True
    num_images: int | None = None
    loss: str = "mse"
    weight: Any = None
    batch_size: int = 32
    learning_rate: float = 8e-4
    ema_decay: float = 0.999
    sampler: Any = None
    guidance_scale: float = 1.0


def clear_schedule(timesteps=1000):
    """The angles of "Denoising Diffusion Implicit Models" on keras.io: the signal falls from 0.95 to 0.02."""
    angle = np.linspace(np.arccos(0.95), np.arccos(0.02), timesteps)
    return kd.schedules.Schedule(np.r_[1, np.cos(angle)], np.r_[0, np.sin(angle)])


def rows():
    """The recipes by name."""
    cosine = kd.schedules.cosine()
    pixels = {"patch_size": 1, "width": 24, "width_multipliers": (1, 2, 4)}
    return {
        "recipe": Recipe(),
        "guided": Recipe(sampler=kd.samplers.UniPC(10, spacing="logsnr"), guidance_scale=1.5),
        "v": Recipe("v", network=pixels),
        "epsilon": Recipe("epsilon", network=pixels),
        "flow": Recipe("flow", kd.schedules.straight(), pixels),
        "linear": Recipe(schedule=kd.schedules.linear()),
        "more_noise": Recipe(schedule=kd.schedules.input_scaled(cosine, 0.5)),
        "less_noise": Recipe(schedule=kd.schedules.input_scaled(cosine, 2.0)),
        "min_snr": Recipe(weight=lambda diffusion: diffusion.min_snr_weight()),
        "mae": Recipe(loss="mae"),
        "no_patches": Recipe(network=pixels),
        "dropout": Recipe(network={"dropout": 0.1}),
        "immiscible": Recipe(model=Immiscible),
        "no_labels": Recipe(labels=False),
        "batch_16": Recipe(batch_size=16, learning_rate=8e-4 / 2**0.5),
        "batch_64": Recipe(batch_size=64, learning_rate=8e-4 * 2**0.5),
        "batch_128": Recipe(batch_size=128, learning_rate=8e-4 * 2),
        "rate_4e-4": Recipe(learning_rate=4e-4),
        "rate_16e-4": Recipe(learning_rate=16e-4),
        "ema_99": Recipe(ema_decay=0.99),
        "keras_io": Recipe(
            "epsilon",
            kd.schedules.linear(),
            pixels,
            labels=False,
            num_images=1020,
            learning_rate=2e-4,
            sampler=kd.samplers.DDPM(),
        ),
        "clear": Recipe(
            "v",
            clear_schedule(),
            pixels,
            labels=False,
            loss="mae",
            batch_size=64,
            learning_rate=1e-3,
            sampler=kd.samplers.DDIM(20),
        ),
    }


def trained(recipe, data, images_seen, seed):
    """Trains the model of a recipe on `data`, which are batches with labels."""
    names = data.class_names if recipe.labels else None
    reference = PRESETS["reference"]
    settings = {name: reference[name] for name in ("width", "width_multipliers", "num_blocks")} | recipe.network
    network = make_model(data.x.shape[1], names, seed, dtype_policy="auto", **settings).network
    diffusion = kd.GaussianDiffusion(recipe.schedule, recipe.prediction)
    weight = recipe.weight and recipe.weight(diffusion)
    model = recipe.model(network, diffusion, recipe.ema_decay, seed=seed, class_names=names, loss_weight=weight)
    num = slice(recipe.num_images)
    steps = images_seen // recipe.batch_size
    labels = data.labels[num] if recipe.labels else None
    batches = kd.datasets.Batches(
        data.x[num], labels, recipe.batch_size, flip=True, steps_per_epoch=steps, seed=seed, class_names=names
    )
    common.train(model, batches, 1, recipe.learning_rate, steps // 10, recipe.loss)
    return model


def main(
    *,
    output="runs/ablations",
    seed=0,
    data_dir: str | None = None,
    only: tuple[str, ...] = (),
    image_size=64,
    images_seen=100_000,
    judge="auto",
    classifier_epochs=5,
    num_samples=819,
):
    """Trains a model by each recipe and measures its samples.

    Args:
        output: folder for the output files.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        only: names of rows. By default all.
        image_size: side of the images in pixels.
        images_seen: number of training images that each model sees.
        judge: network whose features are compared: efficientnet, inception, classifier or a .keras file. By default
            the first of these that is available, and a classifier for gray images.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of samples of a row.
    """
    recipes = rows()
    if unknown := set(only) - set(recipes):
        raise common.UsageError(f"--only takes {', '.join(recipes)}. Received: {', '.join(unknown)}")
    out = pathlib.Path(output)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"image_size": image_size, "images_seen": images_seen}
    common.check_settings(out, settings | {"judge": judge, "classifier_epochs": classifier_epochs})
    options = {"data_dir": data_dir, "labels": True, "require_real_data": True}
    data, test = common.load("oxford_flowers102", image_size, **options)
    num = min(num_samples, len(test.x))
    keras.utils.set_random_seed(seed)
    path = out / "classifier.keras"
    found, distance_of, _ = common.make_metric(data, test, num, classifier_epochs, seed, path, judge)
    others = [kd.metrics.FrechetInceptionDistance(found), kd.metrics.PrecisionRecall(found)]
    for metric in others:
        metric.update_state(real_images=kd.images.from_uint8(test.x))
    grid = {}
    for name in only or recipes:
        file = out / f"{name}-{seed}.json"
        if file.exists():
            continue
        print(f"{name}:", flush=True)
        keras.utils.set_random_seed(seed)
        recipe = recipes[name]
        model = trained(recipe, data, images_seen, seed)
        asked = {"guidance_scale": recipe.guidance_scale}
        if recipe.labels:
            asked["labels"] = np.resize(test.labels, num)
        samples = model.sample(num, recipe.sampler, seed, batch_size=num, **asked)
        values = [distance_of(samples), *np.hstack([metric.compare(samples) for metric in others])]
        values.append(found.share(samples, asked.get("labels")))
        print(f"{name}: {values[0]:.1f}", flush=True)
        common.write_note(file, {"num_samples": num, **dict(zip(COLUMNS, values))})
        grid[name] = {"": samples[:16]}
    if grid:
        kd.plots.table(out / f"ablations-{'-'.join(only) or 'all'}-{seed}.png", grid, columns=16)
    print("\nrecipe, seed     " + "".join(f"{name:>12}" for name in COLUMNS))
    results = {file.stem: common.read_note(file) for file in out.glob("*-*.json")}
    for name, result in sorted(results.items(), key=lambda row: row[1]["distance"]):
        values = [result[column] for column in COLUMNS]
        print(f"{name:17}" + "".join(" " * 11 + "-" if value is None else f"{value:12.4g}" for value in values))
    if found.accuracy:
        print(f"Of the held-out photographs, the judge finds {found.accuracy:.1%} in their class.")


if __name__ == "__main__":
    common.run(main)
