"""Trains a model that makes pictures from pictures: the condition of the network is an image.

    python examples/translate.py upscale     # pictures of 32x32 from pictures of 8x8
    python examples/translate.py colorize    # colors for gray pictures
    python examples/translate.py sketch      # pictures from their edges
    python examples/translate.py colorize --dataset FOLDER --image-size 64
    python examples/translate.py upscale --factor 2 --perceptual 0.1   # sharper, with `pip install ".[judge]"`

The conditions are made from the pictures themselves, so any pictures will do. By default flowers are drawn. A tenth of
the pictures is held out. On them, the command prints the error as PSNR, and the distance of the results with --judge.
A result is one of many pictures that fit the condition, so its PSNR is lower than that of their mean.

Output files in --output/COMMAND:

    results.png           condition, two results and truth of held-out pictures
    model.keras           the model
    checkpoints/          from which --resume goes on after Ctrl-C or a crash
"""

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
    judge: str | None = None,
    **settings,
):
    """Trains a model on pairs of conditions and pictures.

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
        judge: "efficientnet", "inception" or a .keras file, in whose features distances are measured. By default none.
        **settings: arguments of `command`.
    """
    out = common.open_output(f"{output}/{command.__name__}", resume, overwrite)
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(kd.dtype_policy())
    train, held_out = common.load(dataset, image_size, data_dir=data_dir, seed=seed, labels=labels)
    x, truth = (kd.images.from_uint8(data.x) for data in (train, held_out))
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
        trained = common.load_model(init)
        if "scale" in (trained.condition or ()):  # all of its weights need a place
            network = kd.networks.with_guidance_scale(network)
        options |= {"guidance_scale": 1.0, "max_guidance_scale": 1.0, "loss_weight": None}
        model = kd.DiffusionModel.from_model(trained, network=network, **options)
    else:
        model = kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="x0"), **options)
    loss = kd.losses.PerceptualLoss(kd.metrics.efficientnet_lite(2), perceptual) if perceptual else "mse"
    common.train(model, batches, epochs, learning_rate, loss=loss, checkpoints=out / "checkpoints")
    model.save(out / "model.keras")

    truth = truth[:200]
    given = command(truth, **settings)
    options = {"images": given, "labels": held_out.labels[: len(truth)] if labels else None}
    results = [model.sample(len(truth), seed=number, **options) for number in (seed, seed + 1)]
    seen = keras.ops.convert_to_numpy(kd.conditions.seen(given, None, None, truth.shape[1:])).clip(-1, 1)
    pictures = {"condition": seen} if seen.shape[-1] == truth.shape[-1] else {}
    pictures |= {"result": results[0], "mean of two": (results[0] + results[1]) / 2}
    extractor = common.find_extractor(judge, train) if judge else None
    for name, picture in pictures.items():
        line = f"{name}: PSNR {psnr(picture, truth):.1f} dB"
        if extractor:
            metric = kd.metrics.KernelInceptionDistance(extractor, subset_size=len(truth))
            metric.update_state(real_images=truth)
            line += f", kernel distance x 1000 {1000 * metric.compare(picture):.1f}"
        print(f"{line} ({len(truth)} held-out pictures)")
    rows = np.repeat(seen[:8], 3, axis=-1) if seen.shape[-1] == 1 and truth.shape[-1] == 3 else seen[:8]
    columns = {"condition": rows, "result": results[0][:8], "another": results[1][:8], "truth": truth[:8]}
    kd.plots.table(out / "results.png", {"": columns}, size=1.1)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main, commands=(upscale, colorize, sketch))
