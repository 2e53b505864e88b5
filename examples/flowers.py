"""Trains a DDPM on flowers and draws new ones.

    python examples/flowers.py                                  # Oxford Flowers 102, or drawn flowers when offline
    python examples/flowers.py --resume                         # goes on with the run after Ctrl-C or a crash
    python examples/flowers.py --dataset procedural --epochs 3  # every setting has a flag
    python examples/flowers.py --init runs/flowers/model.keras --learning-rate 1e-4  # fine-tunes a trained model

The `full` preset is for accelerators. The `cpu` preset takes less than ten minutes on two cores.

Output files in --output:

    samples/0001.png ...  samples from the same 16 noises during training, with 20 steps
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
# The settings of each preset that differ from the defaults of `make_model` and `train`.
PRESETS = {
    "full": {},
    "cpu": {
        "image_size": 32,
        "width": 24,
        "width_multipliers": (1, 2, 4),
        "num_blocks": 1,
        # With few training steps these are better than epsilon and the linear schedule.
        "prediction": "v",
        "schedule": "cosine",
        "ema_decay": 0.99,
        "dtype_policy": "float32",
        "batch_size": 32,
        "epochs": 5,
        "steps_per_epoch": 300,
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "grid_every": 1,
        "num_images": 2048,
    },
}


def make_model(
    seed,
    *,
    image_size=64,
    width=64,
    width_multipliers: tuple[int, ...] = (1, 2, 4, 8),
    num_blocks=2,
    attention_resolutions: tuple[int, ...] = (16,),
    groups=8,
    dropout=0.0,
    prediction: Literal["epsilon", "x0", "v"] = "epsilon",
    schedule: Literal["linear", "cosine"] = "linear",
    timesteps=1000,
    ema_decay=0.999,
    dtype_policy: Literal["auto", "float32", "mixed_bfloat16"] = "auto",
):
    """Makes an untrained model.

    Args:
        seed: random seed.
        image_size: side of the images in pixels.
        width: number of channels at the highest resolution.
        width_multipliers: number of channels at each resolution, divided by `width`.
        num_blocks: number of residual blocks per resolution.
        attention_resolutions: sides in pixels at which attention is used.
        groups: number of groups of the group normalization.
        dropout: dropout rate.
        prediction: what the network predicts.
        schedule: noise schedule.
        timesteps: number of diffusion steps T.
        ema_decay: decay of the averaged weights.
        dtype_policy: dtype policy of Keras. "auto" chooses the faster one.
    """
    keras.config.set_dtype_policy(kd.dtype_policy() if dtype_policy == "auto" else dtype_policy)
    network = kd.networks.unet(
        (image_size, image_size, 3), width, width_multipliers, num_blocks, attention_resolutions, groups, dropout
    )
    diffusion = kd.GaussianDiffusion(getattr(kd.schedules, schedule)(timesteps), prediction)
    return kd.DiffusionModel(network, diffusion, ema_decay, seed=seed)


def train(
    model,
    dataset,
    seed,
    *,
    output="runs/flowers",
    resume=False,
    overwrite=False,
    data_dir: str | None = None,
    strict=False,
    num_images=4096,
    batch_size=64,
    epochs=800,
    steps_per_epoch: int | None = None,
    learning_rate=2e-4,
    warmup_steps=1000,
    loss="mse",
    grid_every=10,
):
    """Trains a model and writes samples.

    Args:
        model: the model.
        dataset: as in `main`.
        seed: random seed.
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        strict: stop at images in the folder that cannot be read.
        num_images: number of procedural flowers.
        batch_size: number of images per batch.
        epochs: number of training epochs.
        steps_per_epoch: number of batches per epoch. By default all.
        learning_rate: highest learning rate.
        warmup_steps: number of batches during which the learning rate rises.
        loss: name of a Keras loss.
        grid_every: number of epochs between sample grids.
    """
    start = time.time()
    out = common.open_output(output, resume, overwrite)
    size = model.data_shape[0]
    data, validation = common.load(
        "oxford_flowers102" if dataset == "auto" else dataset,
        size,
        data_dir=data_dir,
        seed=seed,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        strict=strict,
        num_drawn=num_images,
        require_real_data=dataset != "auto",
    )
    print(
        f"Training on {data.num_examples} images of {size}x{size}, with {validation.num_examples} held out, for "
        f"{epochs} epochs of {len(data)} batches of {batch_size}. Parameters: {model.network.count_params():,}. "
        f"Backend: {keras.backend.backend()}. Dtype policy: {model.network.dtype_policy.name}. "
        "The first batch takes longer than the others, as it compiles the network."
    )

    scale = max(1, 128 // size)
    history = common.train(
        model,
        data,
        epochs,
        learning_rate,
        warmup_steps,
        loss,
        checkpoints=out / "checkpoints",
        validation_data=validation,
        verbose="auto",
        callbacks=[
            kd.callbacks.EMAWeights(),
            kd.callbacks.SampleGrid(out / "samples/{epoch:04d}.png", every=grid_every, scale=scale),
            keras.callbacks.CSVLogger(out / "history.csv"),
            keras.callbacks.ModelCheckpoint(out / "model.keras"),
        ],
    )
    kd.plots.loss(out / "loss.png", history)

    samples, x_t, x_0 = model.sample(64, seed=seed, return_trajectory=20, verbose=1)
    kd.images.save(out / "samples.png", samples, scale)
    frames = [np.concatenate([kd.images.grid(x[:16]), kd.images.grid(y[:16])], axis=1) for x, y in zip(x_t, x_0)]
    kd.images.save_gif(out / "denoising.gif", frames, max(1, scale // 2))
    images_seen = epochs * len(data) * batch_size
    print(f"Saw {images_seen:,} images in {(time.time() - start) / 60:.1f} minutes. Wrote {out}.")
    if images_seen < 20_000:
        print("These are few, so the samples are noise or blobs. The presets see 48,000 images and more.")


def main(
    *, preset: Literal["auto", "full", "cpu"] = "auto", dataset="auto", init: str | None = None, seed=0, **settings
):
    """Makes or loads a model and trains it.

    Args:
        preset: recipe for the settings that are not given. "auto" is "full" with an accelerator and "cpu" without.
        dataset: "oxford_flowers102", "procedural" or a folder of images. "auto" is Oxford Flowers 102, or procedural
            flowers if it is not available.
        init: .keras file of a model to fine-tune, with a new optimizer. By default a new model is made.
        seed: random seed.
        **settings: arguments of `make_model` and `train`.
    """
    if dataset not in DATASETS and not pathlib.Path(dataset).is_dir():
        raise common.UsageError(f"--dataset must be one of {', '.join(DATASETS)} or a folder. Received: {dataset}")
    of_model = inspect.signature(make_model).parameters.keys()
    if init and (given := [name for name in settings if name in of_model]):
        raise common.UsageError(f"--init determines the network and the process. Received as well: {', '.join(given)}")
    if preset == "auto":
        preset = "full" if kd.has_accelerator() else "cpu"
    print(f"Preset: {preset}. Choose with --preset {{{','.join(PRESETS)}}}.")
    settings = PRESETS[preset] | settings
    keras.utils.set_random_seed(seed)
    if init:
        model = common.load_model(init)
    else:
        model = make_model(seed, **{name: value for name, value in settings.items() if name in of_model})
    train(model, dataset, seed, **{name: value for name, value in settings.items() if name not in of_model})


if __name__ == "__main__":
    common.run(main, make_model, train, presets=PRESETS)
