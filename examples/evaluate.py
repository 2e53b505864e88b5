"""How good a trained model is, in numbers that say what they are of, on one page.

    python examples/evaluate.py MODEL.keras --dataset oxford_flowers102                    # features of InceptionV3
    python examples/evaluate.py MODEL.keras --dataset fashion_mnist --train-extractor      # of a classifier of the data
    python examples/evaluate.py MODEL.keras --dataset fashion_mnist --extractor FILE.keras # of any Keras model

Samples, rounded to 8 bits, are compared with as many images that the model was not trained on. Beside each number
stands its floor: what as many training images get in place of the samples, mean and deviation of ten draws.

    KID                 kernel distance of features, without bias: 0 on average for perfect samples
    p-value             of a permutation test: how probable such a KID is if samples and images are of one distribution
    FID                 Frechet distance: depends on the number of images, so compare it with its floor alone
    precision, recall   the share of samples that look real, and of real images that samples come close to
    memorisation        the share of samples that are nearer to a training image than 95 % of held-out images are
    bits per dimension  the variational bound for held-out images, with either variance of DDPM

Everything goes to --output:

    report.json   the numbers, n, the sampler, and the extractor's name and hash
    report.png    uncurated samples, the samples nearest to a training image beside it, the numbers, the bound by t
"""

import json
import pathlib

import common
import keras
import numpy as np

import keras_ddpm as kd


def make_extractor(args, train):
    if args.extractor:
        return kd.metrics.Extractor(args.extractor)
    if args.train_extractor:
        print("Training a classifier.", flush=True)
        x = kd.images.from_uint8(train.x)
        return kd.metrics.Extractor(kd.metrics.train_classifier(x, train.labels, args.classifier_epochs))
    return kd.metrics.Extractor()


def measure(extractor, samples, held_out, training, seed):
    """A dict from names to value, standard error, and mean and deviation of the floor."""
    num = len(samples)
    found = {}
    for metric in (
        kd.metrics.KernelInceptionDistance(extractor, subset_size=max(2, num // 10)),
        kd.metrics.FrechetInceptionDistance(extractor),
        kd.metrics.PrecisionRecall(extractor),
    ):
        metric.update_state(real_images=held_out)
        metric.compare(samples)
        floor = metric.floor(training, num, seed=seed)
        names = getattr(metric, "names", [metric.name])
        columns = [np.atleast_1d(column).tolist() for column in (metric.result(), metric.standard_error(), *floor)]
        found |= {name: list(row) for name, *row in zip(names, *columns)}
        if metric.name == "kid":
            p_value = metric.p_value()
    return found, p_value


def draw(path, samples, pairs, lines, bits):
    with kd.plots.figure(path, 2, 2, (12, 12)) as ((grid, nearest), (text, curve)):
        kd.plots.show(grid, samples[:64], 8)
        grid.set_title("Samples, uncurated")
        kd.plots.show(nearest, pairs, 8)
        nearest.set_title("The samples nearest to training images, each beside its image")
        text.text(0, 1, "\n".join(lines), family="monospace", fontsize=9, va="top", transform=text.transAxes)
        text.set_axis_off()
        curves = {variance: (range(1, len(found.terms) + 1), found.terms) for variance, found in bits.items()}
        kd.plots.curves(curve, curves, xlabel="t", xscale="log", yscale="log", title="Bits per dimension, by t")


def main(arguments=None):
    parser = common.make_parser(__doc__, "evaluate")
    parser.add_argument("model", help="a trained .keras file")
    parser.add_argument("--dataset", default="oxford_flowers102", help="what it was trained on (default: %(default)s)")
    parser.add_argument("--extractor", help="a .keras file, from images to vectors")
    parser.add_argument("--train-extractor", action="store_true", help="train a classifier of the data")
    parser.add_argument("--classifier-epochs", type=int, default=5)
    parser.add_argument("--num-samples", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--num-steps", type=int, help="of DPMSolver (default: the model's own sampler)")
    parser.add_argument("--num-likelihood", type=int, default=100, help="images for the bound (default: 100)")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(args.seed)
    model = common.load_model(args.model)
    conditional = bool(model.num_classes)
    train, test = common.load(args.dataset, model.data_shape[0], args, labels=args.train_extractor or conditional)
    num = min(args.num_samples, len(test.x))
    random = np.random.default_rng(args.seed)
    held_out = kd.images.from_uint8(test.x[np.sort(random.permutation(len(test.x))[:num])])
    training = kd.images.from_uint8(train.x)
    extractor = make_extractor(args, train)

    sampler = kd.samplers.DPMSolver(args.num_steps) if args.num_steps else model.default_sampler
    print(f"Drawing {num} samples by {sampler}.", flush=True)
    labels = random.choice(train.labels, num) if conditional else None
    samples = model.sample(num, sampler, args.seed, labels=labels, batch_size=min(250, num))
    samples = kd.images.from_uint8(kd.images.to_uint8(samples))
    found, p_value = measure(extractor, samples, held_out, training, args.seed)
    copies = kd.metrics.memorisation(extractor, training, held_out, samples)
    found["memorisation"] = [copies.share, copies.standard_error, copies.quantile, None]
    bits = {
        variance: kd.likelihood.bits_per_dimension(model, held_out[: args.num_likelihood], variance, args.seed)
        for variance in ("small", "large")
    }

    report = {
        "model": pathlib.Path(args.model).name,
        "dataset": args.dataset,
        "sampler": str(sampler),
        "num_samples": num,
        "num_real": num,
        "num_training": len(training),
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "seed": args.seed,
        **{
            name: dict(zip(("value", "standard_error", "floor", "floor_deviation"), row)) for name, row in found.items()
        },
        "kid_p_value": p_value,
        "bits_per_dimension": {
            variance: {
                "value": f.total,
                "standard_error": f.standard_error,
                "num_images": len(held_out[: args.num_likelihood]),
            }
            for variance, f in bits.items()
        },
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [f"{report['model']} on {args.dataset}", f"{num} samples by {sampler}", f"against {num} held-out images"]
    lines += [
        f"features of {extractor.name} ({extractor.hash})",
        "",
        "              value      ±          floor      ±",
    ]
    for name, row in found.items():
        lines.append(f"{name:12} " + "".join(" " * 11 if value is None else f"{value:11.4g}" for value in row))
    lines += ["", f"KID: p = {p_value:.3g}", ""]
    lines += [f"bits per dimension, {v}: {f.total:.3f} ± {f.standard_error:.3f}" for v, f in bits.items()]
    print("\n".join(lines))
    closest = np.argsort(copies.distances)[:32]
    pairs = np.stack([samples[closest], training[copies.nearest[closest]]], axis=1).reshape(-1, *samples.shape[1:])
    draw(args.output / "report.png", samples, pairs, lines, bits)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    common.run(main)
