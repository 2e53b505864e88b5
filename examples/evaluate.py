"""Measures the quality of a trained model and writes a report of one page.

    python examples/evaluate.py MODEL.keras --dataset oxford_flowers102          # features of the strongest judge
    python examples/evaluate.py MODEL.keras --dataset FOLDER --judge inception   # features of InceptionV3
    python examples/evaluate.py MODEL.keras --dataset FOLDER --judge FILE.keras  # features of any Keras model

Samples are rounded to 8 bits and compared with as many images that the model was not trained on. These images are the
held-out part of --dataset. Therefore --dataset and --seed must have the same values as in the training with
examples/flowers.py, your_images.py or another example.

Next to each number stands its floor, which is the number for as many real images instead of samples. It is given as
the mean and the standard deviation of ten draws. The real images are other held-out images if there are enough, and
training images otherwise.

    KID                 unbiased kernel distance of features: 0 on average for perfect samples
    p-value             probability of a KID of this size if samples and images have the same distribution, by a
                        permutation test
    FID                 Frechet distance. It depends on the number of images, so compare it only with its floor.
    precision, recall   the share of samples that look real, and the share of real images that samples resemble
    in class            the share of samples in the class asked for, by a linear probe of the features. Its floor is the
                        share of all held-out images whose class the probe finds. It is missing if that is below 80 %.
    memorisation        the share of samples that are nearer to a training image than 95 % of held-out images are
    bits per dimension  variational bound for held-out images, with either variance of DDPM

Output files in --output:

    features-*    features of the data, which the next run uses again; classifier.keras, if a classifier is the judge
    beside.png    held-out images, and below each row uncurated samples, of the same classes if the model knows classes
    report.json   the numbers, n, the sampler, and the name and hash of the extractor
    report.png    uncurated samples; the samples nearest to training images, next to these images; the distances of
                  samples and of held-out images to training images; the numbers; the error and the bound by t
"""

import json
import pathlib

import common
import keras
import numpy as np

import keras_ddpm as kd


def measure(extractor, samples, held_out, real, seed):
    """Computes the metrics.

    Returns:
        A dict from names to the value, its standard error, and the mean and the standard deviation of the floor. And
        the p-value of the KID.
    """
    num = len(samples)
    found = {}
    kid = kd.metrics.KernelInceptionDistance(extractor, subset_size=num // 10)
    for metric, names in [
        (kid, ["kid"]),
        (kd.metrics.FrechetInceptionDistance(extractor), ["fid"]),
        (kd.metrics.PrecisionRecall(extractor), ["precision", "recall"]),
    ]:
        metric.update_state(real_images=held_out)
        metric.compare(samples)
        floor = metric.floor(real, num, seed=seed)
        columns = [np.atleast_1d(column).tolist() for column in (metric.result(), metric.standard_error(), *floor)]
        found |= {name: list(row) for name, *row in zip(names, *columns)}
    return found, kid.p_value()


def draw(path, samples, pairs, lines, copies, bits):
    with kd.plots.figure(path, 2, 3, (18, 12)) as ((grid, nearest, distances), (text, error, bound)):
        kd.plots.show(samples[:64], 8, grid)
        grid.set_title("Samples, uncurated")
        kd.plots.show(pairs, 8, nearest)
        nearest.set_title("Samples nearest to training images, each next to its image")
        options = {"bins": 30, "histtype": "step", "density": True}
        distances.hist(copies.held_out_distances, label="held-out images", **options)
        distances.hist(copies.distances, label="samples", **options)
        distances.set(title="Feature distance to the nearest training image")
        distances.legend()
        text.text(0, 1, "\n".join(lines), family="monospace", va="top", transform=text.transAxes)
        text.set_axis_off()
        times = range(1, len(bits["small"].terms) + 1)
        errors = {"x_0": (times, bits["small"].errors)}
        kd.plots.curves(error, errors, xlabel="t", yscale="log", title="Mean squared error of the predicted x_0")
        terms = {variance: (times, found.terms) for variance, found in bits.items()}
        kd.plots.curves(bound, terms, xlabel="t", xscale="log", yscale="log", title="Bits per dimension, by t")


def main(
    model: str,
    *,
    output="runs/evaluate",
    seed=0,
    data_dir: str | None = None,
    dataset="oxford_flowers102",
    num_images=2048,
    judge="auto",
    classifier_epochs=5,
    num_samples=1000,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    num_likelihood=100,
    x0_error: float | None = None,
):
    """Measures a model and writes the report.

    Args:
        model: trained .keras file or a preset of the package.
        output: folder for the output files.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        dataset: name of a data set, "procedural" or a folder of images.
        num_images: number of procedural flowers.
        judge: network whose features are compared: efficientnet, inception, classifier or a .keras file. By default
            the first of these that is available, and a classifier for gray images.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of samples.
        num_steps: number of steps of DPMSolver. By default the default sampler of the model is used.
        guidance_scale: guidance scale of samples of a model with labels. By default the model's own.
        num_likelihood: number of images for the bits per dimension.
        x0_error: error of a network that predicts x_0 from little noise. For the bits per dimension, its predictions
            are weighed against x_t by it. By default the model's own.
    """
    if num_samples < 20 or num_likelihood < 1:
        raise common.UsageError("At least 20 --num-samples and 1 --num-likelihood are needed.")
    out = pathlib.Path(output)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(seed)
    trained = common.load_model(model)
    conditional = trained.condition is not None
    size, _, channels = trained.data_shape
    train, test = common.load(
        dataset,
        size,
        data_dir=data_dir,
        seed=seed,
        channels=channels,
        labels=conditional or judge == "classifier" or dataset in common.DATASETS,
        num_drawn=num_images,
        require_real_data=True,
    )
    if train.x.shape[1:] != trained.data_shape:
        raise ValueError(f"{model} generates images {trained.data_shape}, but {dataset} has {train.x.shape[1:]}.")
    order = np.random.default_rng(seed).permutation(len(test.x))
    num = min(num_samples, len(test.x))
    if num < 20:
        raise ValueError(f"{dataset} has {num} held-out images, of which at least 20 are needed.")
    held_out, others = (kd.images.from_uint8(test.x[part]) for part in (order[:num], order[num:]))
    labels = test.labels[order[:num]] if conditional else None
    training = kd.images.from_uint8(train.x)
    real, of_real = (others, "held-out") if len(others) >= num else (training, "training")
    features = common.make_judge(train, test, classifier_epochs, out / "classifier.keras", judge)

    sampler = kd.samplers.DPMSolver(num_steps) if num_steps else trained.default_sampler
    print(f"Drawing {num} samples with {sampler}.", flush=True)
    guidance_scale = trained.guidance_scale if guidance_scale is None else guidance_scale
    guidance = {"labels": labels, "guidance_scale": guidance_scale} if conditional else {}
    samples = trained.sample(num, sampler, seed, batch_size=min(250, num), **guidance)
    samples = kd.images.from_uint8(kd.images.to_uint8(samples))
    beside = [images[part] for part in (slice(10), slice(10, 20)) for images in (held_out, samples)]
    kd.images.save(out / "beside.png", np.stack(beside), max(1, 128 // size))
    found, p_value = measure(features, samples, held_out, real, seed)
    if share := features.share(samples, labels):
        error = np.sqrt(share * (1 - share) / num)
        found["in class"] = [share, error, features.accuracy, None]
    seen = np.concatenate([training, training[:, :, ::-1]]) if train.flip else training
    features.keep(out, seen)
    copies = kd.metrics.memorisation(features, seen, held_out, samples)
    found["memorisation"] = [copies.share, copies.standard_error, copies.quantile, None]
    few = slice(num_likelihood)
    of_few = None if labels is None else labels[few]
    weighed = trained
    if x0_error is not None:
        process = kd.GaussianDiffusion.from_config(trained.diffusion.get_config() | {"x0_error": x0_error})
        weighed = kd.DiffusionModel.from_model(trained, diffusion=process)
    bits = kd.likelihood.bits_per_dimension(weighed, held_out[few], seed, labels=of_few)

    keys = ("value", "standard_error", "floor", "floor_deviation")
    report = {
        "model": model,
        "dataset": dataset,
        "sampler": str(sampler),
        "guidance_scale": guidance_scale if conditional else None,
        "num_samples": num,
        "num_held_out": num,
        "num_training": len(training),
        "floor": f"{of_real} images, {num} at a time, 10 draws",
        "extractor": features.name,
        "extractor_hash": features.hash,
        "seed": seed,
        **{name: dict(zip(keys, row)) for name, row in found.items()},
        "kid_p_value": p_value,
        "bits_per_dimension": {
            variance: {"value": of.total, "standard_error": of.standard_error, "num_images": len(held_out[few])}
            for variance, of in bits.items()
        },
    }
    lines = [
        f"{model}",
        f"{num} samples of {sampler}" + f", guidance {guidance_scale:g}" * conditional,
        f"compared with {num} held-out images of {dataset}",
    ]
    lines += [f"features of {features.name} ({features.hash}); floor: {of_real} images", ""]
    lines += ["                   value          ±      floor          ±"]
    for name, row in found.items():
        lines.append(f"{name:13}" + "".join("" if value is None else f"{value:11.4g}" for value in row))
    lines += ["", f"p-value of the KID: {p_value:.3g}", "", f"bits per dimension, {len(held_out[few])} images:"]
    lines += [f"    {variance}: {of.total:.3f} ± {of.standard_error:.3f}" for variance, of in bits.items()]
    print("\n".join(lines))
    closest = np.argsort(copies.distances)[:32]
    pairs = np.stack([samples[closest], seen[copies.nearest[closest]]], axis=1).reshape(-1, *samples.shape[1:])
    draw(out / "report.png", samples, pairs, lines, copies, bits)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
