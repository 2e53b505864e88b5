"""Trains a model that makes pictures from pictures: the condition of the network is an image.

    python examples/translate.py upscale     # pictures of 32x32 from pictures of 8x8
    python examples/translate.py colorize    # colors for gray pictures
    python examples/translate.py sketch      # pictures from their edges
    python examples/translate.py colorize --dataset FOLDER --image-size 64
    python examples/translate.py upscale --factor 2 --perceptual 0.1   # sharper, with `pip install ".[judge]"`
    python examples/translate.py upscale --factor 2 --model flowers128 --base flowers64 --judge efficientnet \
        --dataset oxford_flowers102                                    # measures a trained model

The conditions are made from the pictures themselves, so any pictures will do. By default flowers are drawn. A tenth of
the pictures is held out. On them, the command prints the error as PSNR. A result is one of many pictures that fit the
condition, so its PSNR is lower than that of their mean. With --judge, it also prints kernel distances to pictures of
the training, for held-out pictures, for conditions enlarged by interpolation, and for results. With --base, it prints
the last two for conditions that another model has drawn, too.

Output files in --output/COMMAND:

    results.png           condition, two results and truth of held-out pictures
    drawn.png             the same of conditions that the model of --base has drawn
    model.keras           the model, if it was trained here
    checkpoints/          from which --resume goes on after Ctrl-C or a crash
"""

import pathlib

import common
import keras
import numpy as np

import keras_ddpm as kd


def upscale(x, *, factor=4):
    """Makes pictures larger.

    Args:
        x: pictures in [-1, 1].
        factor: how many times larger.
    """
    num, size, _, channels = x.shape
    if factor < 2 or size % factor:
        raise common.UsageError(f"--factor must be 2 or more and divide --image-size {size}. Received: {factor}")
    return x.reshape(num, size // factor, factor, size // factor, factor, channels).mean(axis=(2, 4))


def colorize(x):
    """Gives gray pictures their colors.

    Args:
        x: pictures in [-1, 1].
    """
    if x.shape[-1] != 3:
        raise ValueError("The pictures are gray, so they have no colors to learn.")
    return x @ np.array([[0.299], [0.587], [0.114]], "float32")  # the brightness of ITU-R BT.601


def sketch(x):
    """Makes pictures from their edges.

    Args:
        x: pictures in [-1, 1].
    """
    gray = np.pad(x.mean(axis=-1), [(0, 0), (1, 1), (1, 1)], "edge")
    down, right = gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1], gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2]
    return np.clip(1 - 2 * np.hypot(down, right), -1, 1)[..., None]


def psnr(x, truth):
    """The peak signal-to-noise ratio in decibels of pictures in [-1, 1], whose range is 2."""
    return float(10 * np.log10(4 / np.mean((x - truth) ** 2)))


def report(rows, truth, metric):
    """Prints the errors of pictures by what they show and of what, and their distances if there is a metric."""
    for name, of, picture in rows:
        values = [f"PSNR {psnr(picture, truth):.1f} dB"] if of == "held-out" and picture is not truth else []
        values += [f"kernel distance x 1000 {1000 * metric.compare(picture):.1f}"] if metric else []
        if values:
            print(f"{name}: {', '.join(values)} ({len(picture)} {of} pictures)", flush=True)


def main(
    command,
    *,
    dataset="procedural",
    output="runs/translate",
    resume=False,
    overwrite=False,
    seed=0,
    data_dir: str | None = None,
    image_size=32,
    width=48,
    width_multipliers: tuple[int, ...] = (1, 2, 3),
    attention_resolutions: tuple[int, ...] = (4,),
    patch_size=2,
    labels=False,
    init: str | None = None,
    image_noise=0.0,
    perceptual=0.0,
    epochs=10,
    steps_per_epoch=150,
    learning_rate=2e-3,
    model: str | None = None,
    base: str | None = None,
    num=200,
    judge: str | None = None,
    **settings,
):
    """Trains a model on pairs of conditions and pictures, or takes a trained one, and measures it.

    Args:
        command: one of the functions above.
        dataset: "oxford_flowers102", "procedural" or a folder of images.
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        image_size: side of the images in pixels.
        width: width of the network.
        width_multipliers: number of channels at each resolution, divided by `width`.
        attention_resolutions: sides at which attention is used.
        patch_size: side of the patches in pixels.
        labels: also tell the network the kinds of the pictures.
        init: a trained model, file or preset, whose weights the network takes over where their shapes fit.
        image_noise: the largest level of noise in the conditions, in [0, 1). Pictures of other models need some.
        perceptual: weight of the distance in the features of EfficientNet-Lite2, beside the squared error. 0 is none.
        epochs: number of training epochs.
        steps_per_epoch: number of batches of 32 pictures per epoch.
        learning_rate: highest learning rate.
        model: a trained model, file or preset, which is measured instead. It determines the image size and the labels.
        base: another one, which draws conditions that are measured, too.
        num: number of held-out pictures, and of drawn ones.
        judge: "efficientnet", "inception" or a .keras file, in whose features distances are measured. By default none.
        **settings: arguments of `command`.
    """
    if num < 2:
        raise common.UsageError(f"--num must be 2 or more. Received: {num}")
    if model and (resume or overwrite):
        raise common.UsageError("--model is trained already, so --resume and --overwrite have no effect.")
    trained = common.load_model(model, ("label", "image")) if model else None
    drawing = common.load_model(base) if base else None
    if model:
        if "image" not in (trained.condition or ()):
            raise ValueError(f"{model} takes no images as conditions.")
        image_size, labels = trained.data_shape[0], "label" in trained.condition
    out = pathlib.Path(output, command.__name__)
    if not model:
        common.open_output(out, resume, overwrite)
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(kd.dtype_policy())
    train, held_out = common.load(dataset, image_size, data_dir=data_dir, seed=seed, labels=labels)
    extractor = common.find_extractor(judge, train) if judge else None
    if judge and not extractor:
        raise common.UsageError(f"--judge takes efficientnet, inception or a .keras file. Received: {judge}")
    if model and train.x.shape[1:] != trained.data_shape:
        raise ValueError(f"{model} makes pictures {trained.data_shape}, but {dataset} has {train.x.shape[1:]}.")
    truth = kd.images.from_uint8(held_out.x[:num])
    given = {"held-out": command(truth, **settings)}
    if base and drawing.data_shape != given["held-out"].shape[1:]:
        raise ValueError(f"{base} draws {drawing.data_shape}, but conditions are {given['held-out'].shape[1:]}.")
    if not model:
        x = kd.images.from_uint8(train.x)
        condition = command(x, **settings)
        batches = kd.datasets.Batches(
            train.x,
            {"image": condition, "label": train.labels} if labels else condition,
            min(32, len(x)),
            flip=True,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            class_names=train.class_names,
        )

        network = kd.networks.unet(
            x.shape[1:],
            width,
            width_multipliers,
            1,
            attention_resolutions,
            num_classes=len(train.class_names) if labels else None,
            patch_size=patch_size,
            image_channels=condition.shape[-1],
        )
        # What is added to the condition is easier to learn. With noise in it, the noise would be in the result, too.
        if condition.shape[-1] == x.shape[-1] and not image_noise:
            image = network.inputs[[v.name for v in network.inputs].index("image")]
            network = keras.Model(network.inputs, network.output + image)
        options = {"ema_decay": 0.995, "image_noise": image_noise, "seed": seed, "class_names": train.class_names}
        if init:
            old = common.load_model(init, ("label", "context", "image"))
            if "scale" in (old.condition or ()):  # all of its weights need a place
                network = kd.networks.with_guidance_scale(network)
            shapes = {v.path: v.shape for v in old.network.weights}
            fitting = sum(shapes.get(v.path) == v.shape for v in network.weights)
            print(f"{fitting} of {len(network.weights)} weights begin as those of {init}.")
            options |= {"guidance_scale": 1.0, "max_guidance_scale": 1.0, "loss_weight": None}
            trained = kd.DiffusionModel.from_model(old, network=network, **options)
        else:
            trained = kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="x0"), **options)
        loss = kd.losses.PerceptualLoss(kd.metrics.efficientnet_lite(2), perceptual) if perceptual else "mse"
        common.train(trained, batches, epochs, learning_rate, loss=loss, checkpoints=out / "checkpoints")
        trained.save(out / "model.keras")

    num, kinds = len(truth), held_out.labels[:num] if labels else None
    if labels and trained.class_names and train.class_names:  # classes of the same names may have other numbers
        kinds = np.asarray(train.class_names)[kinds]
    if base:
        given["drawn"] = drawing.sample(num, seed=seed, labels=kinds if drawing.condition else None, batch_size=32)
    rows = [("truth", "held-out", truth)]
    for of, images in given.items():
        seen = keras.ops.convert_to_numpy(kd.conditions.seen(images, None, None, truth.shape[1:])).clip(-1, 1)
        results = [trained.sample(num, seed=n, images=images, labels=kinds, batch_size=32) for n in (seed, seed + 1)]
        rows += [("condition", of, seen)] if seen.shape[-1] == truth.shape[-1] else []
        rows += [("result", of, results[0]), ("mean of two", of, sum(results) / 2)]
        few = np.repeat(seen[:8], truth.shape[-1] // seen.shape[-1], axis=-1)
        columns = {"condition": few, "result": results[0][:8], "another": results[1][:8]}
        columns |= {"truth": truth[:8]} if of == "held-out" else {}
        name = "results" if of == "held-out" else of
        kd.plots.table(out / f"{name}.png", {"": columns}, size=1.1)
    metric = kd.metrics.KernelInceptionDistance(extractor, subset_size=num) if judge else None
    if metric:
        chosen = np.random.default_rng(seed).permutation(len(train.x))[:2000]
        metric.update_state(real_images=kd.images.from_uint8(train.x[chosen]))
    report(rows, truth, metric)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main, commands=(upscale, colorize, sketch))
