"""Trains on a folder of your own pictures at 64x64.

    python examples/your_images.py FOLDER
    python examples/your_images.py          # first writes pictures of five kinds of flowers to a folder

The folder and its subfolders may contain image files of any size. Each is cropped to its central square and resized.
A hundred pictures give a first impression, but the network memorizes them. Thousands are better. To train a larger
network on an accelerator, use `examples/flowers.py --dataset FOLDER --preset full`.

Output files in --output:

    pictures.png          some of the pictures, as the network sees them
    samples/0001.png ...  samples from the same noises after each epoch
    loss.png              the losses. The validation loss is measured on one tenth of the pictures, which is held out.
    samples.png           16 new pictures
    denoise.png           the task of the network: held-out pictures with noise, x_t, and the prediction of x_0
    model.keras           the model, for examples/edit.py and others
    checkpoints/          from which --resume goes on after Ctrl-C or a crash
"""

import shutil

import common
import keras
import numpy as np

import keras_ddpm as kd


def write_flowers(folder, data_dir, seed):
    """Writes pictures of the five most frequent kinds of flowers to a folder."""
    flowers = common.load("oxford_flowers102", 64, data_dir=data_dir, seed=seed, labels=True)[0]
    kinds = np.argsort(-np.bincount(flowers.labels))[:5]
    for index in np.flatnonzero(np.isin(flowers.labels, kinds)):
        kd.images.save(folder / f"{index}.png", kd.images.from_uint8(flowers.x[index]))


def main(
    folder: str | None = None,
    *,
    output="runs/your_images",
    resume=False,
    overwrite=False,
    seed=0,
    data_dir: str | None = None,
    image_size=64,
    width=16,
    epochs=12,
    steps_per_epoch=250,
):
    """Trains on a folder of pictures and draws new ones.

    Args:
        folder: folder of image files. By default flowers are written to a folder.
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        image_size: side of the images in pixels.
        width: width of the network.
        epochs: number of training epochs.
        steps_per_epoch: number of batches of 16 pictures per epoch.
    """
    out = common.open_output(output, resume, overwrite)
    keras.utils.set_random_seed(seed)
    if folder is None:
        folder = out / "pictures"
        if not (resume and folder.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            write_flowers(folder, data_dir, seed)
    x = kd.datasets.from_folder(folder, image_size, batch_size=1).x
    kd.images.save(out / "pictures.png", kd.images.from_uint8(x[:16]))
    batch_size = max(1, min(16, len(x) - max(1, len(x) // 10)))
    train, held_out = common.split(x, batch_size=batch_size, seed=seed, flip=True, steps_per_epoch=steps_per_epoch)
    print(f"Training on {train.num_examples} pictures, with {held_out.num_examples} held out.", flush=True)

    network = kd.networks.unet((image_size, image_size, 3), width, (1, 2, 4, 8), 1, (-(-image_size // 8),))
    diffusion = kd.GaussianDiffusion(kd.schedules.shifted(kd.schedules.cosine(1000), image_size, 32), "v")
    model = kd.DiffusionModel(network, diffusion, ema_decay=0.995, seed=seed)
    history = common.train(
        model,
        train,
        epochs,
        checkpoints=out / "checkpoints",
        validation_data=held_out,
        callbacks=[kd.callbacks.SampleGrid(out / "samples/{epoch:04d}.png")],
    )
    model.save(out / "model.keras")
    kd.plots.loss(out / "loss.png", history)
    # Noise in each step corrects some errors of a network that was trained for a few minutes.
    kd.images.save(out / "samples.png", model.sample(16, kd.samplers.DPMSolver(50, eta=1), seed=seed))

    x_0 = kd.images.from_uint8(held_out.x[:4])
    noise = np.random.default_rng(seed).standard_normal(x_0.shape)
    rows = {"x_t": {"picture": x_0}, "predicted\nx_0": {"picture": x_0}}
    for t in (100, 300, 500, 700, 900):
        alpha, sigma = diffusion.schedule.alpha[t], diffusion.schedule.sigma[t]
        x_t = alpha * x_0 + sigma * noise
        rows["x_t"][f"t = {t}"], rows["predicted\nx_0"][f"t = {t}"] = x_t, model.denoise(x_t, t)
    kd.plots.table(out / "denoise.png", rows, size=0.8)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
