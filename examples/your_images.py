"""Trains on a folder of your own pictures at 64x64.

    python examples/your_images.py FOLDER
    python examples/your_images.py          # without one, on five kinds of flowers, which it writes into a folder first

Any image files, in sub-folders too, of any size: the middle is cut out and resized. A hundred pictures are enough to
see something; the network then learns them by heart, thousands are better. `examples/flowers.py --dataset FOLDER
--preset full` trains a larger network, for an accelerator.

Everything goes to --output:

    pictures.png          some of the pictures, as the network sees them
    samples/0001.png ...  the same noises, denoised as training goes on
    loss.png              the losses; the validation loss is of pictures held out, one in ten
    samples.png           16 new pictures
    denoise.png           what the network is asked: pictures held out with noise, x_t, and its prediction of x_0
    model.keras           the model, for examples/edit.py and the rest
"""

import common
import keras
import numpy as np

import keras_ddpm as kd


def write_flowers(folder, args):
    """A folder of photographs of the five commonest kinds, or of drawings of five where there are none."""
    flowers = common.load("oxford_flowers102", 64, args, labels=True)[0]
    kinds = np.argsort(-np.bincount(flowers.labels))[:5]
    for index in np.flatnonzero(np.isin(flowers.labels, kinds)):
        kd.images.save(folder / f"{index}.png", kd.images.from_uint8(flowers.x[index]))


def main(arguments=None):
    parser = common.make_parser(__doc__, "your_images")
    parser.add_argument("folder", nargs="?", help="of image files")
    parser.add_argument("--image-size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--width", type=int, default=16, help="of the network (default: 16)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: 12)")
    parser.add_argument("--steps-per-epoch", type=int, default=250, help="batches of 16 (default: 250)")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(args.seed)
    out, folder = args.output, args.folder
    if folder is None:
        folder = out / "pictures"
        write_flowers(folder, args)
    x = kd.datasets.from_folder(folder, args.image_size, batch_size=1).x
    kd.images.save(out / "pictures.png", kd.images.from_uint8(x[:16]))
    size = max(1, min(16, len(x) - max(1, len(x) // 10)))
    train, held_out = common.split(x, None, size, args.seed, flip=True, steps_per_epoch=args.steps_per_epoch)
    print(f"{train.num_examples} pictures to train on, {held_out.num_examples} held out.", flush=True)

    network = kd.networks.unet((args.image_size,) * 2 + (3,), args.width, (1, 2, 4, 8), 1, (-(-args.image_size // 8),))
    diffusion = kd.GaussianDiffusion(kd.schedules.shifted(kd.schedules.cosine(1000), args.image_size, 32), "v")
    model = kd.DiffusionModel(network, diffusion, ema_decay=0.995, seed=args.seed)
    history = common.train(
        model,
        train,
        args.epochs,
        validation_data=held_out,
        callbacks=[kd.callbacks.EMAWeights(), kd.callbacks.SampleGrid(out / "samples/{epoch:04d}.png")],
    )
    model.save(out / "model.keras")
    kd.plots.loss(out / "loss.png", history)
    # Noise in each step mends some of what a network of a few minutes gets wrong.
    kd.images.save(out / "samples.png", model.sample(16, kd.samplers.DPMSolver(50, eta=1), seed=args.seed))

    x_0 = kd.images.from_uint8(held_out.x[:4])
    noise = np.random.default_rng(args.seed).standard_normal(x_0.shape)
    rows = {"x_t": {"picture": x_0}, "predicted\nx_0": {"picture": x_0}}
    for t in (100, 300, 500, 700, 900):
        alpha, sigma = diffusion.schedule.alpha[t], diffusion.schedule.sigma[t]
        x_t = alpha * x_0 + sigma * noise
        rows["x_t"][f"t = {t}"], rows["predicted\nx_0"][f"t = {t}"] = x_t, model.denoise(x_t, t)
    kd.plots.table(out / "denoise.png", rows, size=0.8)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
