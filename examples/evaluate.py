"""How good a trained model is, in numbers that say what they are of, on one page.

    python examples/evaluate.py MODEL.keras --dataset oxford_flowers102                # features of InceptionV3
    python examples/evaluate.py MODEL.keras --dataset fashion_mnist --train-extractor  # of a classifier of the data
    python examples/evaluate.py MODEL.keras --dataset FOLDER --extractor FILE.keras    # of any Keras model

Samples, rounded to 8 bits, are compared with as many images that the model was not trained on: the held-out part of
--dataset, which must be what examples/flowers.py, your_images.py and the others trained on, with the same --seed.
Beside each number stands its floor: what as many real images get in place of the samples, mean and deviation of ten
draws; from other held-out images where there are enough, else from training images.

    KID                 kernel distance of features, without bias: 0 on average for perfect samples
    p-value             of a permutation test: how probable such a KID is if samples and images are of one distribution
    FID                 Frechet distance: depends on the number of images, so compare it with its floor alone
    precision, recall   the share of samples that look real, and of real images that samples come close to
    memorisation        the share of samples that are nearer to a training image than 95 % of held-out images are
    bits per dimension  the variational bound for held-out images, with either variance of DDPM

Everything goes to --output:

    report.json   the numbers, n, the sampler, and the extractor's name and hash
    report.png    samples, uncurated; those nearest to training images, beside them; distances to training images of
                  samples and of held-out images; the numbers; the error and the bound by t
"""

import json

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


def measure(extractor, samples, held_out, real, seed):
    """A dict from names to value, standard error, and mean and deviation of the floor."""
    num = len(samples)
    found = {}
    for metric in (
        kd.metrics.KernelInceptionDistance(extractor, subset_size=num // 10),
        kd.metrics.FrechetInceptionDistance(extractor),
        kd.metrics.PrecisionRecall(extractor),
    ):
        metric.update_state(real_images=held_out)
        metric.compare(samples)
        floor = metric.floor(real, num, seed=seed)
        names = getattr(metric, "names", [metric.name])
        columns = [np.atleast_1d(column).tolist() for column in (metric.result(), metric.standard_error(), *floor)]
        found |= {name: list(row) for name, *row in zip(names, *columns)}
        if metric.name == "kid":
            p_value = metric.p_value()
    return found, p_value


def draw(path, samples, pairs, lines, copies, bits):
    with kd.plots.figure(path, 2, 3, (18, 12)) as ((grid, nearest, distances), (text, error, bound)):
        kd.plots.show(grid, samples[:64], 8)
        grid.set_title("Samples, uncurated")
        kd.plots.show(nearest, pairs, 8)
        nearest.set_title("The samples nearest to training images, each beside its image")
        options = {"bins": 30, "histtype": "step", "density": True}
        distances.hist(copies.held_out_distances, label="held-out images", **options)
        distances.hist(copies.distances, label="samples", **options)
        distances.set(title="Distance to the nearest training image, in features")
        distances.legend()
        text.text(0, 1, "\n".join(lines), family="monospace", va="top", transform=text.transAxes)
        text.set_axis_off()
        times = range(1, len(bits["small"].terms) + 1)
        errors = {"x_0": (times, bits["small"].errors)}
        kd.plots.curves(error, errors, xlabel="t", yscale="log", title="Mean squared error of the predicted x_0")
        terms = {variance: (times, found.terms) for variance, found in bits.items()}
        kd.plots.curves(bound, terms, xlabel="t", xscale="log", yscale="log", title="Bits per dimension, by t")


def parse(arguments):
    parser = common.make_parser(__doc__, "evaluate")
    parser.add_argument("model", help="a trained .keras file")
    parser.add_argument(
        "--dataset", default="oxford_flowers102", help="or a folder, or procedural (default: %(default)s)"
    )
    parser.add_argument("--num-images", type=int, default=2048, help="drawn for procedural (default: 2048)")
    extractors = parser.add_mutually_exclusive_group()
    extractors.add_argument("--extractor", help="a .keras file, from images to vectors")
    extractors.add_argument("--train-extractor", action="store_true", help="train a classifier of the data")
    parser.add_argument("--classifier-epochs", type=int, default=5)
    parser.add_argument("--num-samples", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--num-steps", type=int, help="of DPMSolver (default: the model's own sampler)")
    parser.add_argument("--num-likelihood", type=int, default=100, help="images for the bound (default: 100)")
    args = parser.parse_args(arguments)
    if args.num_samples < 20 or args.num_likelihood < 1:
        parser.error("needs at least 20 --num-samples and 1 --num-likelihood.")
    return args


def main(arguments=None):
    args = parse(arguments)
    keras.utils.set_random_seed(args.seed)
    model = common.load_model(args.model)
    if model.conditional and model.num_classes is None:
        raise ValueError(f"{args.model} is conditioned on vectors, of which nothing is known here.")
    size, _, channels = model.data_shape
    labels = args.train_extractor or model.conditional
    options = {"channels": channels, "labels": labels, "num_drawn": args.num_images, "insist": True}
    train, test = common.load(args.dataset, size, args, **options)
    if train.x.shape[1:] != model.data_shape:
        raise ValueError(f"{args.model} makes images {model.data_shape}, {args.dataset} has {train.x.shape[1:]}.")
    order = np.random.default_rng(args.seed).permutation(len(test.x))
    num = min(args.num_samples, len(test.x))
    held_out, others = (kd.images.from_uint8(test.x[part]) for part in (order[:num], order[num:]))
    labels = test.labels[order[:num]] if model.conditional else None
    training = kd.images.from_uint8(train.x)
    real, of_real = (others, "held-out") if len(others) >= num else (training, "training")
    extractor = make_extractor(args, train)

    sampler = kd.samplers.DPMSolver(args.num_steps) if args.num_steps else model.default_sampler
    print(f"Drawing {num} samples by {sampler}.", flush=True)
    samples = model.sample(num, sampler, args.seed, labels=labels, batch_size=min(250, num))
    samples = kd.images.from_uint8(kd.images.to_uint8(samples))
    found, p_value = measure(extractor, samples, held_out, real, args.seed)
    seen = np.concatenate([training, training[:, :, ::-1]]) if train.flip else training
    copies = kd.metrics.memorisation(extractor, seen, held_out, samples)
    found["memorisation"] = [copies.share, copies.standard_error, copies.quantile, None]
    few = slice(args.num_likelihood)
    bits = kd.likelihood.bits_per_dimension(
        model, held_out[few], args.seed, labels=None if labels is None else labels[few]
    )

    report = {
        "model": args.model,
        "dataset": args.dataset,
        "sampler": str(sampler),
        "num_samples": num,
        "num_held_out": num,
        "num_training": len(training),
        "floor": f"{of_real} images, {num} at a time, 10 draws",
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "seed": args.seed,
        **{
            name: dict(zip(("value", "standard_error", "floor", "floor_deviation"), row)) for name, row in found.items()
        },
        "kid_p_value": p_value,
        "bits_per_dimension": {
            variance: {"value": of.total, "standard_error": of.standard_error, "num_images": len(held_out[few])}
            for variance, of in bits.items()
        },
    }
    lines = [f"{args.model}", f"{num} samples by {sampler}", f"against {num} held-out images of {args.dataset}"]
    lines += [f"features of {extractor.name} ({extractor.hash}); floor: {of_real} images", ""]
    lines += ["                   value          ±      floor          ±"]
    for name, row in found.items():
        lines.append(f"{name:13}" + "".join("" if value is None else f"{value:11.4g}" for value in row))
    lines += ["", f"p-value of the KID: {p_value:.3g}", "", f"bits per dimension, {len(held_out[few])} images:"]
    lines += [f"    {variance}: {of.total:.3f} ± {of.standard_error:.3f}" for variance, of in bits.items()]
    print("\n".join(lines))
    closest = np.argsort(copies.distances)[:32]
    pairs = np.stack([samples[closest], seen[copies.nearest[closest]]], axis=1).reshape(-1, *samples.shape[1:])
    draw(args.output / "report.png", samples, pairs, lines, copies, bits)
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    common.run(main)
