"""Trains a DDPM on flowers and draws new ones.

    python examples/flowers.py                                  # Oxford Flowers 102, or drawn flowers when offline
    python examples/flowers.py --resume                         # goes on with the run after Ctrl-C or a crash
    python examples/flowers.py --dataset procedural --epochs 3  # every setting has a flag
    python examples/flowers.py --init runs/flowers/model.keras --learning-rate 1e-4  # fine-tunes a trained model
    python examples/flowers.py --init flowers64 --perceptual 0.1 --max-guidance-scale 4  # sharper, at half the calls

The `full` and `reference` presets are for accelerators. `reference` has the network of the model that comes with the
package, and would take days on two cores. `full` has a larger one. The `cpu` preset takes about ten minutes there.

Output files in --output:

    samples/0001.png ...  samples from the same 16 noises during training, with 10 steps
    history.csv loss.png  the losses. The validation loss is that of the averaged weights.
    samples.png           64 samples at the end
    denoising.gif         how 16 of them emerge from noise: x_t on the left, the prediction of x_0 on the right
    model.keras           the model with its averaged weights and the optimizer
    checkpoints/          from which --resume goes on; one every ten minutes, and one after Ctrl-C
"""

import inspect
import pathlib
import time
from typing import Literal

import common
import keras
import numpy as np

import keras_ddpm as kd

DATASETS = ["auto", "oxford_flowers102", "procedural"]
# The settings of each preset that differ from the defaults of `load`, `make_model` and `train`.
PRESETS = {
    "full": {},
    "reference": {
        "width": 48,
        "width_multipliers": (1, 2, 3, 3),
        "num_blocks": 1,
        "batch_size": 256,
        "epochs": 334,
        "learning_rate": 1e-3,
        "warmup_steps": 500,
    },
    "cpu": {
        "image_size": 32,
        "patch_size": 1,
        "width": 24,
        "width_multipliers": (1, 2, 4),
        "num_blocks": 1,
        "attention_resolutions": (16,),
        "ema_decay": 0.99,
        "batch_size": 32,
        "epochs": 8,
        "steps_per_epoch": 225,
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "grid_every": 1,
        "num_images": 2048,
    },
}


def make_model(
    size,
    class_names,
    seed,
    *,
    width=96,
    width_multipliers: tuple[int, ...] = (1, 2, 4, 6),
    num_blocks=2,
    attention_resolutions: tuple[int, ...] = (16, 8),
    groups=8,
    dropout=0.0,
    patch_size=2,
    prediction: Literal["epsilon", "x0", "v"] = "x0",
    schedule: Literal["linear", "cosine"] = "cosine",
    timesteps=1000,
    ema_decay=0.999,
    dtype_policy: Literal["auto", "float32", "mixed_bfloat16"] = "auto",
):
    """Makes an untrained model.

    Args:
        size: side of the images in pixels.
        class_names: names of the classes, or `None` for a model without labels.
        seed: random seed.
        width: number of channels at the highest resolution.
        width_multipliers: number of channels at each resolution, divided by `width`.
        num_blocks: number of residual blocks per resolution.
        attention_resolutions: sides in pixels at which attention is used.
        groups: number of groups of the group normalization.
        dropout: dropout rate.
        patch_size: side of the patches in pixels. The network works at the size of the images divided by it.
        prediction: what the network predicts.
        schedule: noise schedule.
        timesteps: number of diffusion steps T.
        ema_decay: decay of the averaged weights.
        dtype_policy: dtype policy of Keras. "auto" chooses the faster one.
    """
    keras.config.set_dtype_policy(kd.dtype_policy() if dtype_policy == "auto" else dtype_policy)
    network = kd.networks.unet(
        (size, size, 3),
        width,
        width_multipliers,
        num_blocks,
        attention_resolutions,
        groups,
        dropout,
        num_classes=class_names and len(class_names),
        patch_size=patch_size,
    )
    diffusion = kd.GaussianDiffusion(getattr(kd.schedules, schedule)(timesteps), prediction)
    return kd.DiffusionModel(network, diffusion, ema_decay, seed=seed, class_names=class_names)


def go_on(init, seed, *, max_guidance_scale=1.0, loss_weight: Literal["own", "snr"] = "own"):
    """Loads a trained model to train it on.

    Args:
        init: file or preset of the model.
        seed: random seed.
        max_guidance_scale: largest guidance scale that --init learns, so that guidance costs one call of the network. 1
            is none.
        loss_weight: weights of the loss with --init. "snr" is the signal-to-noise ratio up to 20, plus 4. Small noise,
            which decides on details, then counts up to six times as much.
    """
    model = common.load_model(init)
    network = keras.models.clone_model(model.network, clone_function=in_policy, recursive=True)
    options = {"network": network, "seed": seed}
    if max_guidance_scale > 1:
        options["max_guidance_scale"] = max_guidance_scale
        if "scale" not in (model.condition or ()):
            options["network"] = kd.networks.with_guidance_scale(network)
    if loss_weight == "snr":
        weight = np.exp(np.minimum(model.diffusion.schedule.log_snr, np.log(20.0))) + 4.0
        options["loss_weight"] = weight / weight[1:].mean()
    return kd.DiffusionModel.from_model(model, **options)


def in_policy(layer):
    """A copy of a layer of a network in float32, which computes in the faster policy."""
    config = layer.get_config()
    if "dtype" in config and layer.name not in ("conv_out", "crop", "pad") and "sinusoid" not in layer.name:
        config["dtype"] = kd.dtype_policy()
    return type(layer).from_config(config)


def load(
    dataset,
    seed,
    *,
    image_size=64,
    labels: Literal["auto", "yes", "no"] = "auto",
    data_dir: str | None = None,
    strict=False,
    num_images=4096,
    batch_size=64,
    steps_per_epoch: int | None = None,
):
    """Loads batches of training data and of held-out data.

    Args:
        dataset: as in `main`.
        seed: random seed.
        image_size: side of the images in pixels.
        labels: whether the model learns the kinds of flowers, so that it can be asked for them. The kinds of pictures
            in a folder are its subfolders. "auto" is "yes" unless there are pictures outside of them.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        strict: stop at images in the folder that cannot be read.
        num_images: number of procedural flowers.
        batch_size: number of images per batch.
        steps_per_epoch: number of batches per epoch. By default all.
    """
    if labels == "auto" and dataset not in DATASETS:
        outside = any(file.suffix.lower() in kd.datasets.ENDINGS for file in pathlib.Path(dataset).glob("[!.]*"))
        labels = "no" if outside else "yes"
    return common.load(
        "oxford_flowers102" if dataset == "auto" else dataset,
        image_size,
        data_dir=data_dir,
        seed=seed,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        labels=labels != "no",
        strict=strict,
        num_drawn=num_images,
        require_real_data=dataset != "auto",
    )


def train(
    model,
    data,
    validation,
    out,
    seed,
    *,
    epochs=800,
    minutes: float | None = None,
    learning_rate=2e-4,
    warmup_steps=1000,
    loss="mse",
    perceptual=0.0,
    perceptual_size=96,
    grid_every=10,
):
    """Trains a model and writes samples.

    Args:
        model: the model.
        data: batches of training data.
        validation: batches of held-out data.
        out: folder for the output files.
        seed: random seed.
        epochs: number of training epochs.
        minutes: how long to train, however fast the device is, in place of `epochs`. By default, `epochs` decides.
        learning_rate: highest learning rate.
        warmup_steps: number of batches during which the learning rate rises.
        loss: name of a Keras loss.
        perceptual: weight of the distance in the features of EfficientNet-Lite2, beside the squared error. It makes
            photographs sharper, and needs `pip install ".[judge]"`. 0 is none.
        perceptual_size: side to which images are enlarged for these features.
        grid_every: number of epochs between sample grids.
    """
    start = time.time()
    if perceptual:
        if loss != "mse" or model.diffusion.prediction != "x0":
            raise common.UsageError("--perceptual is added to the squared error of models that predict x_0.")
        features = kd.metrics.efficientnet_lite(2)
        loss = kd.losses.PerceptualLoss(features, perceptual, perceptual_size)
    size, batch_size = model.data_shape[0], data.batch_size
    length = f"{minutes:g} minutes, with epochs" if minutes else f"{epochs} epochs"
    print(
        f"Training on {data.num_examples} images of {size}x{size}, with {validation.num_examples} held out, for "
        f"{length} of {len(data)} batches of {batch_size}. Parameters: {model.network.count_params():,}. "
        f"Backend: {keras.backend.backend()}. Dtype policy: {model.network.dtype_policy.name}. "
        "The first batch takes longer than the others, as it compiles the network."
    )

    scale = max(1, 128 // size)
    asked = lambda num: common.every_class(model, num, guidance_scale=2.0)
    history = common.train(
        model,
        data,
        epochs,
        learning_rate,
        warmup_steps,
        loss,
        minutes=minutes,
        checkpoints=out / "checkpoints",
        validation_data=validation,
        verbose="auto",
        callbacks=[
            kd.callbacks.SampleGrid(out / "samples/{epoch:04d}.png", every=grid_every, scale=scale, **asked(16)),
            keras.callbacks.CSVLogger(out / "history.csv"),
            keras.callbacks.ModelCheckpoint(out / "model.keras"),
        ],
    )
    kd.plots.loss(out / "loss.png", history)

    steps = min(20, model.diffusion.timesteps)
    sampler = kd.samplers.DPMSolver(steps)
    samples, x_t, x_0 = model.sample(64, sampler, seed, return_trajectory=steps, verbose=1, **asked(64))
    kd.images.save(out / "samples.png", samples, scale)
    common.save_denoising(out / "denoising.gif", x_t[:, :16], x_0[:, :16], scale)
    images_seen = int(model.optimizer.iterations) * batch_size
    print(f"Saw {images_seen:,} images. This run took {(time.time() - start) / 60:.1f} minutes. Wrote {out}.")
    if images_seen < 20_000:
        print("These are few, so the samples are noise or blobs. The presets see 57,600 images and more.")


def main(
    *,
    preset: Literal["auto", "full", "reference", "cpu"] = "auto",
    dataset="auto",
    init: str | None = None,
    output="runs/flowers",
    resume=False,
    overwrite=False,
    devices=1,
    seed=0,
    **settings,
):
    """Makes or loads a model and trains it.

    Args:
        preset: recipe for the settings that are not given. "auto" is "full" with an accelerator and "cpu" without.
        dataset: "oxford_flowers102", "procedural" or a folder of images. "auto" is Oxford Flowers 102, or procedural
            flowers if it is not available.
        init: model to fine-tune with a new optimizer, a .keras file or a preset of the package. Classes of a data set
            that it does not know begin with the embeddings of others. By default a new model is made.
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        devices: number of devices, which share every batch.
        seed: random seed.
        **settings: arguments of `load`, `make_model`, `go_on` and `train`.
    """
    if dataset not in DATASETS and not pathlib.Path(dataset).is_dir():
        raise common.UsageError(f"--dataset must be one of {', '.join(DATASETS)} or a folder. Received: {dataset}")
    of_data, of_model, of_init = (inspect.signature(function).parameters for function in (load, make_model, go_on))
    fixed = {"image_size", "labels", *of_model} if init else {*of_init} - {"init"}
    if given := [name for name in settings if name in fixed]:
        why = "--init determines the network and the process" if init else "These settings are for --init"
        raise common.UsageError(f"{why}. Received as well: {', '.join(given)}")
    if preset == "auto":
        preset = "full" if kd.has_accelerator() else "cpu"
    print(f"Preset: {preset}. Choose with --preset {{{','.join(PRESETS)}}}.")
    settings = PRESETS[preset] | settings
    out = common.open_output(output, resume, overwrite)
    keras.utils.set_random_seed(seed)
    chosen = lambda names: {name: value for name, value in settings.items() if name in names}
    with common.distribute(devices):
        if init:
            keras.config.set_dtype_policy(kd.dtype_policy())
            model = go_on(init, seed, **chosen(of_init))
            settings |= {"image_size": model.data_shape[0], "labels": "yes" if model.condition else "no"}
        data, validation = load(dataset, seed, **chosen(of_data))
        if not init:
            model = make_model(data.x.shape[1], data.class_names, seed, **chosen(of_model))
        elif data.class_names and tuple(data.class_names) != model.class_names:
            model = kd.DiffusionModel.from_model(model, class_names=data.class_names)
        of_training = settings.keys() - of_data.keys() - of_model.keys() - of_init.keys()
        train(model, data, validation, out, seed, **chosen(of_training))


if __name__ == "__main__":
    common.run(main, load, make_model, go_on, train, presets=PRESETS)
