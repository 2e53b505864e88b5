"""Wrong inputs over the whole public surface, and the beginning of the one line that each gets."""

import inspect
import re

import keras
import numpy as np
import pytest
from conftest import ROOT, check_error

import keras_ddpm as kd

X = np.zeros((4, 2), "float32")
IMAGES = np.zeros((4, 8, 8, 1), "float32")
LINEAR = kd.schedules.linear(50)
PROCESS = kd.GaussianDiffusion(LINEAR)
NAN, INF = float("nan"), float("inf")


class Models:
    """Small models, made when they are needed."""

    def __getattr__(self, name):
        options = {"points": {}, "labels": {"num_classes": 3}, "vectors": {"context_dim": 2}}
        if name == "images":
            network = kd.networks.unet((8, 8, 1), 8, (1, 2), 1, (), 4)
        else:
            network = kd.networks.mlp(2, 8, 1, **options[name])
        model = kd.DiffusionModel(network, PROCESS, seed=0)
        model.compile(loss="mse", optimizer="adam")
        setattr(self, name, model)
        return model


MODELS = Models()
mlp = lambda **options: kd.networks.mlp(2, 8, 1, **options)
model = lambda **options: kd.DiffusionModel(mlp(), **options)
sample = lambda *args, **options: MODELS.points.sample(*args, **options)
ask = lambda **options: MODELS.labels.sample(2, **options)
fit = lambda *args, **options: MODELS.points.fit(*args, verbose=0, **options)
batches = lambda x=X, **options: kd.datasets.Batches(x, **{"batch_size": 2} | options)


def unet(shape=(8, 8, 1), **options):
    return kd.networks.unet(shape, **{"width": 8, "groups": 4, "attention_resolutions": ()} | options)


def kid(extractor=None, **options):
    return kd.metrics.KernelInceptionDistance(extractor or pixels(), **{"subset_size": 2} | options)


def pixels():
    x = keras.Input((8, 8, 1))
    return keras.Model(x, keras.layers.Flatten()(x))


def measured(real=IMAGES, generated=IMAGES, **options):
    metric = kid(**options)
    metric.update_state(real, generated)
    return metric


TABLE = [
    # Schedules
    (lambda: kd.schedules.Schedule([1, 0.5], [0, 0.5, 1]), r"Expected alpha and sigma of length T \+ 1"),
    (lambda: kd.schedules.Schedule([1], [0]), r"Expected alpha and sigma of length T \+ 1"),
    (lambda: kd.schedules.Schedule([0.9, 0.5], [0.1, 0.5]), "A schedule starts at clean data"),
    (lambda: kd.schedules.Schedule([1, 0.5, 0.6], [0, 0.5, 0.4]), "A schedule's alpha / sigma falls"),
    (lambda: kd.schedules.Schedule([1, NAN], [0, 0.5]), "A schedule's alpha / sigma falls"),
    (lambda: kd.schedules.from_betas([0.1, 1.0]), r"Expected betas \(T,\) in \(0, 1\)"),
    (lambda: kd.schedules.from_betas([[0.1]]), r"Expected betas \(T,\) in \(0, 1\)"),
    (lambda: kd.schedules.from_betas([]), "Expected"),
    (lambda: kd.schedules.linear(10), "Use `cosine` for fewer than 25 steps"),
    (lambda: kd.schedules.linear(50.0), "Use `cosine` for fewer than 25 steps"),
    (lambda: kd.schedules.linear(1000, 0.02, 2.0), r"Expected betas \(T,\) in \(0, 1\)"),
    (lambda: kd.schedules.cosine(0), "`timesteps` must be an integer of at least 1"),
    (lambda: kd.schedules.cosine(True), "`timesteps` must be an integer of at least 1"),
    (lambda: kd.schedules.cosine(50, -1), "`offset` must be 0 or more"),
    (lambda: kd.schedules.cosine(50, NAN), "`offset` must be 0 or more"),
    (lambda: kd.schedules.sigmoid(50, 3, -3), "Expected start < end and tau > 0"),
    (lambda: kd.schedules.sigmoid(50, tau=0), "Expected start < end and tau > 0"),
    (lambda: kd.schedules.straight(-1), "`timesteps` must be an integer of at least 1"),
    (lambda: kd.schedules.input_scaled(LINEAR, 0), "`scale` must be positive"),
    (lambda: kd.schedules.input_scaled(LINEAR, INF), "`scale` must be positive"),
    (lambda: kd.schedules.shifted(LINEAR, 0), "Sizes must be positive"),
    (lambda: kd.schedules.shifted(LINEAR, 64, NAN), "Sizes must be positive"),
    (lambda: kd.schedules.shifted("linear", 64), "Expected a variance-preserving `Schedule`"),
    (lambda: kd.schedules.zero_terminal_snr(kd.schedules.cosine(1)), "A schedule of one step cannot be rescaled"),
    (lambda: kd.schedules.zero_terminal_snr(kd.schedules.straight()), "Expected a variance-preserving `Schedule`"),
    (lambda: LINEAR.until(99), r"`t` must be an integer in 1\.\.50"),
    (lambda: LINEAR.until(0), r"`t` must be an integer in 1\.\.50"),
    (lambda: LINEAR.until(2.0), r"`t` must be an integer in 1\.\.50"),
    # The process
    (lambda: kd.GaussianDiffusion("linear"), "Expected a `Schedule`, such as `schedules.cosine"),
    (lambda: kd.GaussianDiffusion(1000), "Expected a `Schedule`, such as `schedules.cosine"),
    (lambda: kd.GaussianDiffusion(kd.schedules.cosine), "Expected a `Schedule`, such as `schedules.cosine"),
    (lambda: kd.networks.unet(16), "`image_shape` must be .height, width, channels."),
    (lambda: kd.DiffusionModel(kd.networks.mlp()).fit(X), "Call `compile` before `fit`"),
    (lambda: kd.images.to_uint8(np.linspace(0, 255, 5)), "The images lie in 0..255"),
    (lambda: kd.GaussianDiffusion(LINEAR, "noise"), r"Expected one of \['epsilon'"),
    (lambda: kd.GaussianDiffusion(LINEAR, None), r"Expected one of \['epsilon'"),
    (lambda: kd.GaussianDiffusion(LINEAR, clip_range="ab"), r"`clip_range` must be \(low, high\) or None"),
    (lambda: kd.GaussianDiffusion(LINEAR, clip_range=1.0), r"`clip_range` must be \(low, high\) or None"),
    (lambda: kd.GaussianDiffusion(LINEAR, clip_range=(1, -1)), r"`clip_range` must be \(low, high\) or None"),
    (lambda: kd.GaussianDiffusion(LINEAR, clip_range=(0, NAN)), r"`clip_range` must be \(low, high\) or None"),
    (lambda: kd.GaussianDiffusion(LINEAR, clip_range=(0, 1, 2)), r"`clip_range` must be \(low, high\) or None"),
    (lambda: kd.GaussianDiffusion(kd.schedules.straight()), "No x_0 from 'epsilon' at t = 1000"),
    (lambda: PROCESS.q_sample(X, 51, X), r"`t` must hold integers in 0\.\.50"),
    (lambda: PROCESS.q_sample(X, [0, 1, 2, -1], X), r"`t` must hold integers in 0\.\.50"),
    (lambda: PROCESS.q_sample(X, np.full(4, 1.5), X), r"`t` must hold integers in 0\.\.50"),
    (lambda: PROCESS.q_sample(X, NAN, X), r"`t` must hold integers in 0\.\.50"),
    (lambda: PROCESS.target(X, 51, X), r"`t` must hold integers in 0\.\.50"),
    (lambda: PROCESS.predict_x0(X, -1, X), r"`t` must hold integers in 0\.\.50"),
    (lambda: PROCESS.predict_noise(X, 0, X), r"`t` must hold integers in 1\.\.50"),
    (lambda: PROCESS.q_posterior(X, X, 3, 4), "`s` must be smaller than `t`"),
    (lambda: PROCESS.q_posterior(X, X, 3, 3), "`s` must be smaller than `t`"),
    (lambda: PROCESS.q_posterior(X, X, 51, 4), r"`t` must hold integers in 1\.\.50"),
    (lambda: PROCESS.q_posterior(X, X, 4, -1), r"`t` must hold integers in 0\.\.50"),
    (lambda: PROCESS.min_snr_weight(0), "`gamma` must be positive"),
    (lambda: PROCESS.p2_weight(k=0), "`k` must be positive"),
    (lambda: PROCESS.p2_weight(gamma=-1), "`gamma` must be 0 or more"),
    # Networks
    (lambda: unet((8, 8)), r"`image_shape` must be \(height, width, channels\)"),
    (lambda: unet((8, 8, 0)), r"`image_shape` must be \(height, width, channels\)"),
    (lambda: unet((8, 8, 1), width=0), "`width` must be an integer of at least 1"),
    (lambda: unet((8, 8, 1), width=10), "`groups` must divide the channels of every level"),
    (lambda: unet((8, 8, 1), width_multipliers=()), "Expected one or more positive integers"),
    (lambda: unet((8, 8, 1), width_multipliers=(1, 0)), "Expected one or more positive integers"),
    (
        lambda: unet((8, 8, 1), width_multipliers=2),
        "Expected one or more positive integers. Received: width_multipliers=2",
    ),
    (lambda: unet((8, 8, 1), width_multipliers="12"), "Expected one or more positive integers"),
    (lambda: unet((8, 8, 1), attention_resolutions=8), "Expected a sequence of positive integers"),
    (lambda: unet((8, 8, 1), attention_resolutions=[8.0]), "Expected a sequence of positive integers"),
    (lambda: unet((8, 8, 1), attention_resolutions=None), "Expected a sequence of positive integers"),
    (lambda: unet((8, 8, 1), num_blocks=-1), "`num_blocks` must be an integer of at least 1"),
    (lambda: unet((8, 8, 1), groups=0), "`groups` must be an integer of at least 1"),
    (lambda: unet((8, 8, 1), dropout=1.0), r"`dropout` must be in \[0, 1\)"),
    (lambda: unet((8, 8, 1), dropout=NAN), r"`dropout` must be in \[0, 1\)"),
    (lambda: unet((2, 2, 1)), "Levels need 8x8 or more"),
    (lambda: unet((8, 8, 1), num_classes=0), "`num_classes` must be an integer of at least 1"),
    (lambda: unet((8, 8, 1), num_classes=2, context_dim=2), "`num_classes` and `context_dim` cannot both"),
    (lambda: mlp(context_dim=-1), "`context_dim` must be an integer of at least 1"),
    (lambda: kd.networks.mlp(0), "`dim` must be an integer of at least 1"),
    (lambda: kd.networks.mlp(2, 7), "`dim` must be even and at least 4"),
    (lambda: kd.networks.dit((8, 8, 1), width=10), "`width` >= 8 must be a multiple of 4"),
    (lambda: kd.networks.dit((8, 8, 1), patch_size=0), "`patch_size` must be an integer of at least 1"),
    (lambda: kd.layers.TimestepEmbedding(3), "`dim` must be even and at least 4"),
    (lambda: kd.layers.TimestepEmbedding(4, dtype="float16"), "The embedding of the time is computed in float32"),
    # The model
    (lambda: kd.DiffusionModel("unet"), "`network` must be a functional model"),
    (lambda: kd.DiffusionModel(keras.Sequential([keras.layers.Dense(2)])), "`network` must be a functional model"),
    (lambda: kd.DiffusionModel(pixels()), "`network` must be a functional model"),
    (lambda: model(diffusion=LINEAR), "`diffusion` must be a `GaussianDiffusion`"),
    (lambda: kd.DiffusionModel(mlp(num_classes=3), class_names="abc"), "`class_names` must be 3 different names"),
    (lambda: model(ema_decay=1.0), r"`ema_decay` must be in \[0, 1\)"),
    (lambda: model(ema_decay="high"), r"`ema_decay` must be in \[0, 1\)"),
    (lambda: model(label_dropout=-0.1), r"`label_dropout` must be in \[0, 1\)"),
    (lambda: model(loss_weight=[1, 2]), "`loss_weight` must be an array of 1001 numbers"),
    (lambda: model(loss_weight=np.zeros(1001)), r"`loss_weight` must be positive at t = 1\.\.1000"),
    (lambda: model(loss_weight="snr"), "`loss_weight` must be an array of 1001 numbers"),
    (lambda: model(timestep_sampling="random"), "`timestep_sampling` must be one of"),
    (lambda: model(seed=-1), r"`seed` must be an integer in 0\.\.2³² − 1"),
    (lambda: model(seed=2**40), r"`seed` must be an integer in 0\.\.2³² − 1"),
    (lambda: model(seed=1.5), r"`seed` must be an integer in 0\.\.2³² − 1"),
    (lambda: model(dtype="float16"), "Only the network has a dtype policy"),
    (lambda: MODELS.points.save_to_preset("hf://USER/x"), "Expected a folder, which is then uploaded"),
    (lambda: MODELS.points.save("x.h5"), r"The file name must end in \.keras"),
    # Training
    (lambda: fit(), "The data hold no batch"),
    (lambda: fit(np.zeros((4, 3))), r"Expected `data` of shape \('batch', 2\)"),
    (lambda: fit(np.zeros((0, 2))), r"Expected `data` of shape \('batch', 2\)"),
    (lambda: fit(X + NAN), "`data` contains NaN or infinite values"),
    (lambda: fit(X + 255), r"Expected `data` in \[-1.0, 1.0\]"),
    (lambda: fit([[0, 1], [2]]), "A list is several inputs to Keras"),
    (lambda: fit(X, validation_data=X + 5), r"Expected `data` in \[-1.0, 1.0\]"),
    (lambda: MODELS.points.evaluate(X + NAN, verbose=0), "`data` contains NaN or infinite values"),
    (lambda: MODELS.labels.fit(X, verbose=0), "The network has a condition: call `fit"),
    (lambda: MODELS.labels.fit((X, np.zeros(4)), verbose=0), r"A list is several inputs .*: `fit\(x_0, labels\)`"),
    (lambda: MODELS.labels.evaluate((X, np.zeros(4)), verbose=0), r"A list is several inputs .*: `fit\(x_0, labels\)`"),
    (lambda: MODELS.labels.fit(X, np.full(4, 3), verbose=0), r"Labels must be integers in 0\.\.2"),
    (lambda: MODELS.labels.fit(X, np.full(4, 0.5), verbose=0), r"Labels must be integers in 0\.\.2"),
    (lambda: MODELS.labels.fit(X, [0, 1, 2, 0], verbose=0), "A list is several inputs to Keras"),
    (lambda: MODELS.labels.fit(X, np.eye(4, 3, dtype=int), verbose=0), r"Labels must be .*shape=\(4, 3\)"),
    (lambda: MODELS.labels.fit(X, np.zeros((4, 1), int), verbose=0), r"Labels must be .*shape=\(4, 1\)"),
    (lambda: MODELS.labels.fit({"pixel_values": X}, verbose=0), r"A batch must be x_0, `\(x_0, condition\)`"),
    (lambda: MODELS.images.fit(np.zeros((4, 1, 8, 8)), verbose=0), r"Expected .*\('batch', 8, 8, 1\), channels last"),
    (lambda: MODELS.images.fit(np.full((4, 8, 8, 1), 200, "uint8"), verbose=0), r".*0\.\.255.*`images\.from_uint8`"),
    (lambda: fit(X, callbacks="checkpoints"), "`callbacks` must be a list of callbacks"),
    (lambda: fit(X, callbacks=[keras.callbacks.CSVLogger]), "`callbacks` must be a list of callbacks"),
    (lambda: MODELS.vectors.fit(X, np.zeros((4, 3)), verbose=0), "Expected finite conditions, of shape"),
    (lambda: MODELS.vectors.fit(X, np.full((4, 2), NAN), verbose=0), "Expected finite conditions, of shape"),
    # Sampling
    (lambda: sample(0), "`num_samples` must be an integer of at least 1"),
    (lambda: sample(2.0), "`num_samples` must be an integer of at least 1"),
    (lambda: sample(2, "ddim"), "`sampler` must be a sampler, such as"),
    (lambda: sample(2, kd.samplers.DDIM(51)), "The schedule has only 50 steps"),
    (lambda: sample(2, seed=-1), "`seed` must be an integer"),
    (lambda: sample(2, seed="0"), "`seed` must be an integer"),
    (lambda: sample(2, seed=1.5), "`seed` must be an integer"),
    (lambda: sample(True), "`num_samples` must be an integer of at least 1"),
    (lambda: sample(2, return_trajectory=0), r"`return_trajectory` must be an integer in 1\.\.10"),
    (lambda: sample(2, return_trajectory=21), r"`return_trajectory` must be an integer in 1\.\.10"),
    (lambda: sample(2, batch_size=0), "`batch_size` must be an integer of at least 1"),
    (lambda: sample(2, use_ema="no"), "`use_ema` must be True or False"),
    (lambda: sample(2, labels=0), "The network has no condition"),
    (lambda: sample(2, guidance_scale=2), "Guidance needs labels"),
    (lambda: kd.guidance.Guidance(dynamic_threshold=1.5), r"`dynamic_threshold` must be in \(0, 1\)"),
    (lambda: ask(labels=3), r"Labels must be integers in 0\.\.2"),
    (lambda: ask(labels=-1), r"Labels must be integers in 0\.\.2"),
    (lambda: ask(labels=[0, 1, 2]), r"Labels must be integers in 0\.\.2, of shape \(2,\)"),
    (lambda: ask(labels=0, guidance_scale=-1), r"`guidance_scale` must be in \[0, 1000\]"),
    (lambda: ask(labels=0, guidance_scale=1e38), r"`guidance_scale` must be in \[0, 1000\]"),
    (lambda: ask(labels=0, guidance_scale=NAN), r"`guidance_scale` must be in \[0, 1000\]"),
    (lambda: kd.guidance.Guidance(rescale=2), r"`rescale` must be in \[0, 1\]"),
    (lambda: kd.guidance.Guidance(interval=(3, 1)), r"`interval` must be \(low, high\)"),
    (lambda: kd.guidance.Guidance(interval=5), r"`interval` must be \(low, high\)"),
    (lambda: MODELS.points.denoise(X, 0), r"`t` must be an integer in 1\.\.50"),
    (lambda: MODELS.points.denoise(X, 51), r"`t` must be an integer in 1\.\.50"),
    (lambda: MODELS.points.denoise(IMAGES, 1), r"Expected `x_t` of shape \('batch', 2\)"),
    (lambda: kd.samplers.DDIM(0), "`num_steps` must be an integer of at least 1"),
    (lambda: kd.samplers.DDIM(5, spacing="even"), "`spacing` must be one of"),
    (lambda: kd.samplers.DDIM(5, eta=2), r"`eta` must be in \[0, 1\]"),
    (lambda: kd.samplers.DDPM(variance="huge"), "`variance` must be 'small', 'large' or a number"),
    (lambda: kd.samplers.DDPM(variance=1.5), "`variance` must be 'small', 'large' or a number"),
    (lambda: kd.samplers.Heun(5, churn=-1), "`churn` must be 0 or more"),
    (lambda: kd.samplers.Langevin(step_size=0), r"`step_size` must be in \(0, 1\]"),
    (lambda: kd.samplers.Langevin(num_updates=0), "`num_updates` must be an integer of at least 1"),
    # Editing
    (lambda: kd.editing.cascade([], 2), "`models` must be a model of small images, and upscalers"),
    (lambda: kd.editing.inpaint(MODELS.images, IMAGES, IMAGES[..., 0]), "`masks` must have the shape"),
    (lambda: kd.editing.inpaint(MODELS.images, IMAGES, IMAGES + 0.5), "`masks` must hold nothing but 0 and 1"),
    (lambda: kd.editing.inpaint(MODELS.images, IMAGES + 9, IMAGES + 1), r"Expected `images` in \[-1.0, 1.0\]"),
    (lambda: kd.editing.inpaint(MODELS.images, IMAGES, IMAGES, num_resamples=0), "`num_resamples` must be an integer"),
    (lambda: kd.editing.variations(MODELS.images, IMAGES, 2), r"`strength` must be in \[0, 1\]"),
    (lambda: kd.editing.variations(MODELS.images, X, 0.5), r"Expected `images` of shape"),
    (lambda: kd.editing.encode(MODELS.images, IMAGES + NAN), "`images` contains NaN or infinite values"),
    (lambda: kd.editing.encode(MODELS.images, IMAGES, num_steps=51), "The schedule has only 50 steps"),
    (lambda: kd.editing.decode(MODELS.images, X), "Expected `noise` of shape"),
    (lambda: kd.editing.interpolate(MODELS.images, IMAGES, IMAGES[:1], 3), "Expected images of the same shape"),
    (lambda: kd.editing.interpolate(MODELS.images, IMAGES, IMAGES, 1), "`num` must be an integer of at least 2"),
    # Data
    (lambda: batches(batch_size=5), r"`batch_size` must be an integer in 1\.\.4"),
    (lambda: batches(batch_size=0), r"`batch_size` must be an integer in 1\.\.4"),
    (lambda: batches(batch_size=2.0), r"`batch_size` must be an integer in 1\.\.4"),
    (lambda: batches(shuffle="no"), "Expected True or False"),
    (lambda: batches(IMAGES, flip="no"), "Expected True or False"),
    (lambda: batches(flip=True), "Only images can be flipped"),
    (lambda: batches(steps_per_epoch=0), "`steps_per_epoch` must be an integer of at least 1"),
    (lambda: batches(seed=-1), "`seed` must be an integer of at least 0"),
    (lambda: batches(X + INF), "The data hold NaN or infinite values"),
    (lambda: batches(labels=[0]), "Expected 4 labels"),
    (lambda: kd.datasets.from_arrays(np.zeros((4, 2), "int32")), "Expected uint8 images or floats"),
    (lambda: kd.datasets.from_arrays(X, image_size=8), "Only uint8 images can be resized"),
    (lambda: kd.datasets.from_folder("nowhere"), "There is no folder nowhere"),
    (lambda: kd.datasets.from_folder(ROOT / "tests", channels=2), "`channels` must be 1 or 3"),
    (lambda: kd.datasets.from_folder(ROOT / "keras_ddpm"), "There is no readable image in"),
    (lambda: kd.datasets.moons(0), "`num` must be an integer of at least 1"),
    (lambda: kd.datasets.moons(2, noise=-1), "`noise` must be 0 or more"),
    (lambda: kd.datasets.procedural_flowers(0, 8), "`num_images` must be an integer of at least 1"),
    # Images
    (lambda: kd.images.from_uint8(X), r"Expected integers in 0\.\.255"),
    (lambda: kd.images.from_uint8([256]), r"Expected integers in 0\.\.255"),
    (lambda: kd.images.to_uint8(np.zeros((2, 2), "uint8")), r"Expected floats in \[-1, 1\]: see"),
    (lambda: kd.images.to_uint8([NAN]), "The images hold NaN or infinite values"),
    (lambda: kd.images.grid(IMAGES[:0]), "Expected images"),
    (lambda: kd.images.grid(IMAGES[0]), "Expected images"),
    (lambda: kd.images.grid(IMAGES, columns=0), "`columns` must be an integer of at least 1"),
    (lambda: kd.images.grid(IMAGES, padding=-1), "`padding` must be an integer of at least 0"),
    (lambda: kd.images.save("x.png", np.zeros((8, 8, 3), "uint8")), r"Expected floats in \[-1, 1\]: see"),
    (lambda: kd.images.save("x.png", IMAGES + NAN), "The images hold NaN or infinite values"),
    (lambda: kd.images.save("x.png", np.zeros((8, 8, 2))), "Expected one or several images of 1 or 3 channels"),
    (lambda: kd.images.save("x.png", np.zeros((8, 8))), "Expected one or several images of 1 or 3 channels"),
    (lambda: kd.images.save("x.png", IMAGES[:0]), "Expected images"),
    (lambda: kd.images.save("x.png", IMAGES, scale=0), "`scale` must be an integer of at least 1"),
    (lambda: kd.images.save("x.rose", IMAGES), "unknown file extension: .rose"),
    (lambda: kd.images.save_gif("x.gif", []), "There is no frame"),
    (lambda: kd.images.load(ROOT / "setup.cfg", 8), "cannot identify image file"),
    (lambda: kd.images.load(ROOT / "tests", 8), ".*tests is not a regular file"),
    (lambda: kd.images.load(ROOT / "docs/denoising.gif", 8), r"The file holds \d+ images"),
    (lambda: kd.images.load(ROOT / "docs/procedural.png", 0), "`size` must be an integer of at least 1"),
    (lambda: kd.images.load(ROOT / "docs/procedural.png", 8, channels=2), "`channels` must be 1 or 3"),
    # Metrics
    (lambda: kid(subset_size=1), "`subset_size` must be an integer of at least 2"),
    (lambda: kid(extractor=mlp()), "An extractor must have one input and one vector as output"),
    (lambda: kid().result(), "`num_real` must be an integer of at least 2"),
    (lambda: measured(generated=None).result(), "`num_generated` must be an integer of at least 2"),
    (lambda: measured(np.zeros((4, 8, 8, 1), "uint8")), r"Expected floats in \[-1, 1\]: see"),
    (lambda: measured(IMAGES + 255), r"The images lie in 0\.\.255\. Expected \[-1, 1\]"),
    (lambda: measured(IMAGES + NAN), "The images hold NaN or infinite values"),
    (lambda: measured(np.zeros((4, 9, 9, 1))), r"The extractor \w+ takes images"),
    (lambda: measured(X), r"Expected \(num, height, width, channels\)"),
    (lambda: measured(IMAGES[:0]), r"Expected \(num, height, width, channels\)"),
    (lambda: measured().floor(IMAGES, 5), r"`num` must be an integer in 1\.\.4"),
    (lambda: measured().p_value(0), "`num_permutations` must be an integer of at least 1"),
    (lambda: measured().load_real("nowhere.npz"), r".*No such file"),
    (lambda: kd.metrics.PrecisionRecall(pixels(), k=0), "`k` must be an integer of at least 1"),
    (lambda: kd.metrics.train_classifier(np.zeros((4, 8, 8, 1), "uint8"), [0] * 4), "Expected floats"),
    (lambda: kd.metrics.train_classifier(IMAGES, [0]), "Expected images of at least 6x6 and a label for each"),
    (lambda: kd.likelihood.bits_per_dimension(MODELS.images, IMAGES + 0.501), "`x` must hold 8-bit levels"),
    # Callbacks
    (lambda: kd.callbacks.SampleGrid("x.png", every=0), "`every` must be an integer of at least 1"),
    (lambda: kd.callbacks.SampleGrid("x.png", num_samples=0), "`num_samples` must be an integer of at least 1"),
    (lambda: kd.callbacks.SampleGrid("x.png", scale=0.5), "`scale` must be an integer of at least 1"),
    (lambda: kd.callbacks.SampleGrid("x.png", seed=-1), "`seed` must be an integer"),
    (lambda: fit(X, callbacks=[kd.callbacks.SampleGrid("x.png")]), "Only images of 1 or 3 channels can be drawn"),
    (lambda: kd.callbacks.SampleMetrics(kid(), every=1.5), "`every` must be an integer of at least 1"),
    (lambda: kd.callbacks.Checkpoint("x", every=-1), "`every` must be 0 seconds or more"),
    (lambda: kd.callbacks.Checkpoint("x", keep=0), "`keep` must be an integer of at least 1"),
    # Files
    (lambda: kd.saving.load_model("nowhere.keras"), "There is no file nowhere.keras"),
    (
        lambda: kd.saving.load_model(ROOT / "setup.cfg"),
        ".*setup.cfg cannot be loaded as a model. The file name must",
    ),
]


@pytest.mark.parametrize(("call", "message"), TABLE, ids=range(len(TABLE)))
def test_bad_input(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as raised:
        call()
    text = str(raised.value)
    assert re.match(message, text.removeprefix("[Errno 2] ")), f"{inspect.getsource(call).strip()}: {text}"
    assert len(text.splitlines()) == 1 and len(text) < 400
    assert not list(tmp_path.glob("x*"))


FLOWERS = (
    "flowers.py --preset cpu --dataset procedural --num-images 40 --image-size 8 --width 8 --groups 4 "
    "--attention-resolutions 4"
)
COMMANDS = [
    (f"{FLOWERS} --epochs 0", 2, "At least 1 epoch and 0 warm-up steps"),
    (f"{FLOWERS} --epochs 1.5", 2, "argument --epochs: invalid int value"),
    (f"{FLOWERS} --warmup-steps -1", 2, "At least 1 epoch and 0 warm-up steps"),
    (f"{FLOWERS} --learning-rate nan", 2, "argument --learning-rate: invalid number value"),
    (f"{FLOWERS} --learning-rate 1e30", 2, r"The learning rate must be in \(0, 1\]"),
    (f"{FLOWERS} --width-multipliers", 1, "Expected one or more positive integers"),
    (f"{FLOWERS} --batch-size 0", 1, r"`batch_size` must be an integer in 1\.\."),
    (f"{FLOWERS} --grid-every 0", 1, "`every` must be an integer of at least 1"),
    (f"{FLOWERS} --ema-decay 2", 1, "`ema_decay` must be in"),
    (f"{FLOWERS} --loss rose", 1, ".*rose"),
    (f"{FLOWERS} --schedule rose", 2, "argument --schedule: invalid choice: 'rose'"),
    (f"{FLOWERS} --seed -1", 1, r"Seed must be between 0 and 2\*\*32 - 1"),
    (f"{FLOWERS} --resume --overwrite", 2, "--resume and --overwrite exclude each other"),
    ("flowers.py --preset cpu --init nowhere.keras", 1, "There is no model file nowhere.keras"),
    ("flowers.py --preset cpu --init .", 1, r"\. cannot be loaded as a model"),
    ("flowers.py --roses", 2, "unrecognized arguments: --roses"),
    ("your_images.py nowhere", 1, "There is no folder nowhere"),
    ("samplers.py --dataset roses", 1, ".*roses"),
    ("evaluate.py nowhere.keras", 1, "There is no model file nowhere.keras"),
    ("edit.py inpaint --num-flowers 0", 2, "At least 1 --num-flowers is needed"),
    ("edit.py dance", 2, "argument command: invalid choice: 'dance'"),
    ("moons.py --steps 0", 2, "At least 4 --steps"),
    ("guidance.py --model nowhere.keras", 1, "There is no model file nowhere.keras"),
]


@pytest.mark.host
@pytest.mark.parametrize(("line", "status", "message"), COMMANDS, ids=range(len(COMMANDS)))
def test_bad_command_lines(tmp_path, monkeypatch, command_line, line, status, message):
    monkeypatch.chdir(tmp_path)
    check_error(command_line(*line.split()), status, f"error: {message}" if status == 2 else rf"\.py: {message}")
