"""Small models of Fashion-MNIST with three networks: a basic U-Net, the full U-Net and a transformer.

    python examples/fashion_mnist.py

With T = 100 steps, four small models see the same batches. The first follows common tutorials: a U-Net of plain
convolutions that predicts the noise, the linear schedule and 100 steps of DDPM. The second has the same network with
the better choices of this package: v-prediction, the cosine schedule, averaged weights and a fast sampler. The third
adds residual blocks and attention (Ho et al., 2020). The fourth is a transformer of patches (Peebles and Xie, 2023).
Any functional Keras model of [x_t, t] can be the network. The basic U-Net is written in this file.

Samples are compared with held-out images by their kernel distance (KID times 1000) in the features of a classifier.
A distance of 0 is perfect. The distance of as many training images is printed first.

Output files in --output:

    training.png     25 training images
    networks.png     25 samples of each model, uncurated, with the distance
    samples.png      25 samples of the full U-Net
    denoising.png    how they emerge from noise: x_t and the prediction of x_0
    model.keras      the full U-Net
    checkpoints/     from which --resume goes on after Ctrl-C or a crash
    settings.json    the settings with which it goes on
"""

import time

import common
import keras
from keras import layers

import keras_ddpm as kd


def basic_unet(image_shape, widths=(16, 32, 64)):
    """A U-Net with two convolutions per level and the time as input, without residual blocks and attention."""
    x_t, t = keras.Input(image_shape), keras.Input((), dtype="int32")
    embedding = layers.Dense(64, activation="swish")(kd.layers.TimestepEmbedding(64)(t))

    def block(x, width):
        for _ in range(2):
            x = kd.layers.GroupNormalization(8)(layers.Conv2D(width, 3, padding="same")(x))
            x = layers.Add()([x, layers.Reshape((1, 1, width))(layers.Dense(width)(embedding))])
            x = layers.Activation("swish")(x)
        return x

    x, skips = x_t, []
    for width in widths[:-1]:
        skips.append(block(x, width))
        x = layers.MaxPooling2D()(skips[-1])
    x = block(x, widths[-1])
    for width in reversed(widths[:-1]):
        x = block(layers.Concatenate()([layers.UpSampling2D()(x), skips.pop()]), width)
    return keras.Model([x_t, t], layers.Conv2D(image_shape[-1], 3, padding="same")(x))


def make_networks(shape):
    """A dict from names to a function that makes the network, and its learning rate."""
    size = shape[0] // 4
    return {
        "basic U-Net": (lambda: basic_unet(shape), 2e-3),
        "full U-Net": (lambda: kd.networks.unet(shape, 16, (1, 2, 4), 1, attention_resolutions=(size,)), 2e-3),
        "transformer": (lambda: kd.networks.dit(shape, patch_size=4, width=128, depth=6, num_heads=4), 1e-3),
    }


def main(
    *,
    output="runs/fashion_mnist",
    resume=False,
    overwrite=False,
    seed=0,
    data_dir: str | None = None,
    epochs=3,
    steps_per_epoch: int | None = None,
    classifier_epochs=5,
    num_samples=1000,
):
    """Trains four models, measures samples and draws figures.

    Args:
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        epochs: number of training epochs.
        steps_per_epoch: number of batches of 32 images per epoch. By default all 1875.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of samples per distance.
    """
    out = common.open_output(output, resume, overwrite)
    common.check_settings(out, {"seed": seed, "epochs": epochs, "steps_per_epoch": steps_per_epoch})
    keras.utils.set_random_seed(seed)
    options = {"data_dir": data_dir, "seed": seed, "steps_per_epoch": steps_per_epoch}
    data, test = common.load("fashion_mnist", 28, channels=1, labels=True, **options)
    kd.images.save(out / "training.png", kd.images.from_uint8(data.x[:25]), scale=2)
    _, distance_of, _ = common.make_metric(data, test, num_samples, classifier_epochs, seed)

    networks = make_networks(data.x.shape[1:])
    tutorial = kd.GaussianDiffusion(kd.schedules.linear(100))
    better = kd.GaussianDiffusion(kd.schedules.cosine(100), "v")
    ddpm = kd.samplers.DDPM()
    models = {"basic U-Net,\nas in tutorials": ("basic U-Net", tutorial, {"sampler": ddpm, "use_ema": False})}
    models |= {name: (name, better, {"sampler": kd.samplers.DPMSolver(20)}) for name in networks}
    print("network                           parameters  minutes to train  s to sample  kernel distance x 1000")
    columns = {}
    for title, (name, diffusion, options) in models.items():
        keras.utils.set_random_seed(seed)
        make, learning_rate = networks[name]
        model = kd.DiffusionModel(make(), diffusion, seed=seed)
        start = time.time()
        checkpoints = out / "checkpoints" / title.replace("\n", " ")
        common.train(model, data, epochs, learning_rate, checkpoints=checkpoints, verbose=0)
        trained = time.time()
        x = model.sample(num_samples, seed=seed, batch_size=min(250, num_samples), **options)
        sampled, distance = time.time(), distance_of(x)
        columns[f"{title}: {distance:.0f}"] = x[:25]
        print(
            f"{title.replace(chr(10), ' '):32} {model.network.count_params():11,} {(trained - start) / 60:17.1f} "
            f"{sampled - trained:12.0f} {distance:23.1f}",
            flush=True,
        )
        if name == "full U-Net":
            model.save(out / "model.keras")
            kd.images.save(out / "samples.png", x[:25], scale=2)
            common.draw_denoising(out / "denoising.png", model, ddpm, seed)
    kd.plots.table(out / "networks.png", {"": columns}, columns=5, size=0.4)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
