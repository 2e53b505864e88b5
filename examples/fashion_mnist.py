"""A tiny model of Fashion-MNIST, and what its network is worth: a basic U-Net, the full one and a transformer.

    python examples/fashion_mnist.py

T = 100 steps, and four small models that see the same batches. The first is what tutorials begin with: a U-Net of plain
convolutions that predicts the noise, with the linear schedule and the 100 steps of DDPM. The second is the same
network with the package's better choices: v-prediction, the cosine schedule, averaged weights, and a fast sampler. The
third has residual blocks and attention beside that (Ho et al., 2020), the fourth is a transformer of patches (Peebles
and Xie, 2023). Any functional Keras model of [x_t, t] is a network: the basic U-Net is written here.

Samples are judged by their kernel distance (KID times 1000) to held-out images in the features of a classifier; 0 is
perfect, and that of as many training images is printed first.

Everything goes to --output:

    training.png     25 images of the data
    networks.png     25 samples of each model, uncurated, with its distance
    samples.png      25 of the full U-Net
    denoising.png    how they come out of noise: x_t and the prediction of x_0
    model.keras      the full U-Net
"""

import time

import common
import keras
from keras import layers

import keras_ddpm as kd


def basic_unet(image_shape, widths=(16, 32, 64)):
    """Two convolutions a level, down and up again, told the time; no residuals, no attention."""
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
    """From names to functions that make a network, and its learning rate."""
    size = shape[0] // 4
    return {
        "basic U-Net": (lambda: basic_unet(shape), 2e-3),
        "full U-Net": (lambda: kd.networks.unet(shape, 16, (1, 2, 4), 1, attention_resolutions=(size,)), 2e-3),
        "transformer": (lambda: kd.networks.dit(shape, patch_size=4, width=128, depth=6, num_heads=4), 1e-3),
    }


def main(arguments=None):
    parser = common.make_parser(__doc__, "fashion_mnist")
    parser.add_argument("--epochs", type=int, default=3, help="(default: 3)")
    parser.add_argument("--steps-per-epoch", type=int, help="batches of 32 in an epoch (default: all, 1875)")
    parser.add_argument("--classifier-epochs", type=int, default=5)
    parser.add_argument("--num-samples", type=int, default=1000, help="to be judged (default: 1000)")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(args.seed)
    data, test = common.load("fashion_mnist", 28, args, channels=1, labels=True, steps_per_epoch=args.steps_per_epoch)
    kd.images.save(args.output / "training.png", kd.images.from_uint8(data.x[:25]), scale=2)
    _, distance_of, _ = common.make_metric(data, test, args)

    networks = make_networks(data.x.shape[1:])
    tutorial = kd.GaussianDiffusion(kd.schedules.linear(100))
    better = kd.GaussianDiffusion(kd.schedules.cosine(100), "v")
    ddpm = kd.samplers.DDPM()
    models = {"basic U-Net,\nas in tutorials": ("basic U-Net", tutorial, {"sampler": ddpm, "use_ema": False})}
    models |= {name: (name, better, {}) for name in networks}
    print("network                           parameters  minutes to train  s to sample  kernel distance x 1000")
    columns = {}
    for title, (name, diffusion, options) in models.items():
        keras.utils.set_random_seed(args.seed)
        make, learning_rate = networks[name]
        model = kd.DiffusionModel(make(), diffusion, seed=args.seed)
        start = time.time()
        common.train(model, data, args.epochs, learning_rate, verbose=0)
        trained = time.time()
        x = model.sample(args.num_samples, seed=args.seed, batch_size=min(250, args.num_samples), **options)
        sampled, distance = time.time(), distance_of(x)
        columns[f"{title}: {distance:.0f}"] = x[:25]
        print(
            f"{title.replace(chr(10), ' '):32} {model.network.count_params():11,} {(trained - start) / 60:17.1f} "
            f"{sampled - trained:12.0f} {distance:23.1f}",
            flush=True,
        )
        if name == "full U-Net":
            model.save(args.output / "model.keras")
            kd.images.save(args.output / "samples.png", x[:25], scale=2)
            common.draw_denoising(args.output / "denoising.png", model, ddpm, args.seed)
    kd.plots.table(args.output / "networks.png", {"": columns}, columns=5, size=0.4)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    common.run(main)
