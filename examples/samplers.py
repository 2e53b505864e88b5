"""How good samples are after how many network calls, for every sampler: the figures behind the default.

    python examples/samplers.py                                                    # trains on Fashion-MNIST first
    python examples/samplers.py --model runs/samplers/model.keras --evaluations 10 20  # the trained model again

Each sampler starts from the same noise. The distance of its samples to held-out images is the kernel distance (KID,
here times 1000) in the features of a small classifier, which is trained first; its accuracy is printed. It is 0 for
perfect samples, on average: how far it strays from that is shown by the distances of as many images of the training
data.

Everything goes to --output:

    model.keras           the trained model
    distances.csv         sampler, spacing, network calls, distance
    distances.png         the same as curves
    samples.png           samples from the same three noises, by sampler and network calls
"""

import csv
import functools
import time

import common
import keras

import keras_ddpm as kd

S = kd.samplers
# From a number of network calls to the sampler that makes as many, or one less.
SAMPLERS = {
    "DDPM": S.DDPM,
    "DDPM, large": functools.partial(S.DDPM, variance="large"),
    "DDIM": S.DDIM,
    "DPMSolver": S.DPMSolver,
    "DPMSolver, eta=1": functools.partial(S.DPMSolver, eta=1.0),
    "Heun": lambda calls, **spacing: S.Heun((calls + 1) // 2, **spacing),
    "Langevin": lambda calls, **spacing: S.Langevin(calls - 1, step_size=0.4, **spacing),
    "DDIM + Langevin": lambda calls, **spacing: S.Langevin(predictor=S.DDIM((calls + 1) // 2, **spacing)),
}
SPACINGS = ["uniform", "logsnr", "karras"]


def make_model(data, args, num_classes=None):
    """A small network for the images in `data`, with v: in few steps it comes further than the noise."""
    size = data.x.shape[1:]
    network = kd.networks.unet(size, 16, (1, 2, 4), 1, attention_resolutions=(size[0] // 4,), num_classes=num_classes)
    return kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="v"), seed=args.seed)


def plot(path, rows, floor):
    with kd.plots.figure(path, size=(8, 6)) as axes:
        lines = {name: tuple(zip(*[row[2:] for row in rows if row[:2] == [name, "uniform"]])) for name in SAMPLERS}
        axes.axhspan(0, sum(floor), color="lightgrey", label="training images, mean + deviation")
        kd.plots.curves(axes, lines, xlabel="network calls", xscale="log", yscale="log")
        axes.set_ylabel("kernel distance × 1000")
        ticks = sorted({row[2] for row in rows if row[0] == "DDIM"})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()


def make_parser(doc, name, num_samples):
    parser = common.make_parser(doc, name)
    parser.add_argument("--dataset", default="fashion_mnist", help="labelled data set with splits train and test")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--model", help="a trained .keras file, instead of training")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps-per-epoch", type=int, help="shorter epochs")
    parser.add_argument("--classifier-epochs", type=int, default=5)
    parser.add_argument("--num-samples", type=int, default=num_samples)
    return parser


def load_data(args):
    """Batches of training and of held-out images; makes the output folder, too."""
    args.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(args.seed)
    return common.load(
        args.dataset, args.image_size, args, channels=1, labels=True, steps_per_epoch=args.steps_per_epoch
    )


def main(arguments=None):
    parser = make_parser(__doc__, "samplers", num_samples=500)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 50, 100, 1000])
    args = parser.parse_args(arguments)
    if min(args.evaluations) < 2 or max(args.evaluations) > 1000:
        parser.error(f"--evaluations must be between 2 and 1000. Received: {args.evaluations}")
    data, test = load_data(args)
    _, distance, floor = common.make_metric(data, test, args)
    if args.model:
        model = common.load_model(args.model)
    else:
        model = make_model(data, args)
        common.train(model, data, args.epochs)
        model.save(args.output / "model.keras")

    rows, samples = [], {name: {} for name in SAMPLERS}
    for calls in args.evaluations:
        for name, make in SAMPLERS.items():
            for spacing in SPACINGS if calls <= 20 else SPACINGS[:1]:
                start = time.time()
                sampler = make(calls, spacing=spacing)
                x = model.sample(args.num_samples, sampler, seed=args.seed, batch_size=min(250, args.num_samples))
                rows.append([name, spacing, len(sampler.table(model.diffusion.schedule)), distance(x)])
                if spacing == "uniform":
                    samples[name][f"{calls} calls"] = x[:3]
                print(
                    "{:16} {:8} {:5} calls: {:8.2f}".format(*rows[-1]) + f"   ({time.time() - start:.0f} s)", flush=True
                )
        with open(args.output / "distances.csv", "w", newline="") as file:
            csv.writer(file).writerows([["sampler", "spacing", "network calls", "distance"], *rows])
    plot(args.output / "distances.png", rows, floor)
    kd.plots.table(args.output / "samples.png", samples, columns=3)


if __name__ == "__main__":
    common.run(main)
