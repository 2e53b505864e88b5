"""Labels and images together, compared with closed forms.

The data are images of two pixels, x_0 ~ N(m, C), whose mean m depends on the label. The condition image shows s = u·x_0
in both of its pixels. With noise, the mean of the image is cos s + sin n with n ~ N(0, 1/2), cos and sin of π/2 level.
"""

import keras
import numpy as np
import pytest
from conftest import BACKEND, EAGER, randomize, weights
from keras import ops

import keras_ddpm as kd
from keras_ddpm import conditions
from keras_ddpm.guidance import Guidance
from keras_ddpm.training.corruption import Corruption

SCHEDULE = kd.schedules.cosine(1000)
MEANS = np.array([[0.1, -0.1], [-0.2, 0.15], [0.0, 0.0]])  # of the labels 0, 1 and none
COVARIANCE = np.array([[0.04, 0.018], [0.018, 0.02]])
U = np.array([0.6, -0.3])
SAMPLER = kd.samplers.DPMSolver(60, spacing="logsnr")
LABEL = conditions.Part("label", (), 2)


def posterior(label, level=1.0, seen=0.0):
    """The mean and the covariance of x_0, and how far the mean moves with `seen`, the mean of the image with noise."""
    cos, gain = np.cos(np.pi / 2 * level), COVARIANCE @ U
    slope = cos * gain / (cos**2 * (U @ gain) + np.sin(np.pi / 2 * level) ** 2 / 2)
    mean = MEANS[label] + slope * (seen - cos * U @ MEANS[label])
    return mean, COVARIANCE - np.outer(slope, cos * gain), slope


@keras.saving.register_keras_serializable(package="tests")
class Denoiser(keras.layers.Layer):
    """E[x_0 | x_t, label, image, its noise]."""

    input_dim = 3  # as a model asks the layer "label_embedding"

    def call(self, x_t, t, label, image, level):
        convert = lambda array: ops.convert_to_tensor(array, "float32")
        alpha, sigma = (ops.take(convert(table), t)[:, None] for table in (SCHEDULE.alpha, SCHEDULE.sigma))
        cos, variance = ops.cos(np.pi / 2 * level)[:, None], ops.sin(np.pi / 2 * level)[:, None] ** 2 / 2
        mean, gain = ops.take(convert(MEANS), label, axis=0), convert(COVARIANCE @ U)
        slope = cos * gain / (cos**2 * float(U @ COVARIANCE @ U) + variance)
        seen = ops.mean(ops.reshape(image, (-1, 2)), axis=1)[:, None]
        mean = mean + slope * (seen - cos * ops.sum(mean * convert(U), axis=1)[:, None])
        covariance = convert(COVARIANCE) - slope[:, :, None] * (cos * gain)[:, None, :]
        noisy = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * convert(np.eye(2))
        x, y = ops.unstack(ops.reshape(x_t, (-1, 2)) - alpha * mean, axis=1)
        a, b, d = noisy[:, 0, 0], noisy[:, 0, 1], noisy[:, 1, 1]
        solved = ops.stack([d * x - b * y, a * y - b * x], axis=1) / (a * d - b**2)[:, None]
        x_0 = mean + alpha * ops.sum(covariance * solved[:, None, :], axis=2)
        return ops.reshape(x_0, (-1, 1, 2, 1))


@pytest.fixture(scope="module")
def exact():
    image = (1, 2, 1)
    inputs = [keras.Input(image, name="x_t"), keras.Input((), dtype="int32", name="t")]
    inputs += [keras.Input((), dtype="int32", name="label"), keras.Input(image, name="image")]
    inputs += [keras.Input((), name="image_noise")]
    network = keras.Model(inputs, Denoiser(name="label_embedding")(*inputs))
    return kd.DiffusionModel(network, kd.GaussianDiffusion(SCHEDULE, "x0", clip_range=None), image_dropout=0.1)


def image_of(s):
    return np.full((1, 2, 1), s, "float32")


def check(samples, mean, covariance):
    x = samples.reshape(-1, 2).astype("float64")
    error = np.sqrt(np.diag(covariance) / len(x)) + 1e-3
    assert np.all(abs(x.mean(axis=0) - mean) < 5 * error), (x.mean(axis=0), mean)
    np.testing.assert_allclose(np.cov(x.T), covariance, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("label", [0, 1, None])
def test_samples_have_the_moments_of_the_posterior(exact, label):
    index = 2 if label is None else label
    sample = lambda **options: exact.sample(4000, SAMPLER, 0, labels=label, batch_size=1000, **options)
    check(sample(images=image_of(0.1)), *posterior(index, 0.0, 0.1)[:2])
    check(sample(), *posterior(index)[:2])


def test_noise_in_the_image_widens_the_samples(exact):
    """The model is told the level of the noise, so each sample trusts its own noisy image as far as it should."""
    for level in (0.2, 0.6):
        x = exact.sample(4000, SAMPLER, 0, labels=1, images=image_of(0.1), image_noise=level, batch_size=1000)
        mean, covariance, slope = posterior(1, level, np.cos(np.pi / 2 * level) * 0.1)
        check(x, mean, covariance + np.outer(slope, slope) * np.sin(np.pi / 2 * level) ** 2 / 2)


@pytest.mark.parametrize("drop", [("label",), ("image",), ("label", "image"), None])
def test_guidance_drops_parts(exact, drop):
    """(1 - w) times the prediction without the parts plus w times the prediction with all of them."""
    x_t = np.random.default_rng(0).standard_normal((6, 1, 2, 1)).astype("float32")
    both = {"labels": 1, "images": image_of(0.1)}
    without = {"label": {"images": both["images"]}, "image": {"labels": 1}}
    worse = {} if drop == ("label", "image") else without[drop[0] if drop else "label"]
    denoise = lambda scale=1.0, guidance=None, **given: exact.denoise(
        x_t, 400, False, guidance_scale=scale, guidance=guidance, **given
    )
    expected = -1.5 * denoise(**worse) + 2.5 * denoise(**both)
    np.testing.assert_allclose(denoise(2.5, Guidance(drop=drop), **both), expected, atol=1e-5)
    np.testing.assert_allclose(denoise(0.0, Guidance(drop=drop), **both), denoise(**worse), atol=1e-5)
    only_image = {"images": both["images"]}
    expected = -1.5 * denoise() + 2.5 * denoise(**only_image)
    np.testing.assert_allclose(denoise(2.5, **only_image), expected, atol=1e-5)


def test_a_condition_by_name_and_for_each_sample(exact):
    """Sample i is the same for any number, batch size and form of the condition."""
    labels, images = [0, 1, 1, 0, 1], np.linspace(-0.2, 0.2, 5, dtype="float32")[:, None, None, None] * image_of(1)
    sampler, options = kd.samplers.DDPM(5), {"image_noise": 0.3, "guidance_scale": 2.0}
    x = exact.sample(5, sampler, 3, labels=labels, images=images, **options)
    by_name = exact.sample(5, sampler, 3, labels={"label": labels, "image": images}, batch_size=2, **options)
    np.testing.assert_allclose(by_name, x, atol=1e-5)
    some = exact.sample(2, sampler, 3, labels=labels[3:], images=images[3:], first=3, **options)
    np.testing.assert_allclose(some, x[3:], atol=1e-5)


CONDITION = conditions.Condition((LABEL, conditions.Part("image", (4, 6, 1)), conditions.Part("image_noise", (), 1)))


def test_corruption_drops_and_noises_parts():
    """Labels and images are lost independently, and the network is told the true level of the noise."""
    num = 4000
    corruption = Corruption(
        kd.GaussianDiffusion(SCHEDULE), CONDITION, label_dropout=0.3, image_dropout=0.2, image_noise=0.8
    )
    ones = ops.ones((num, 4, 6, 1))
    (_, _, label, image, level), _, _ = corruption(
        ones, {"image": ones, "label": ops.zeros((num,), "int32")}, None, keras.random.SeedGenerator(0)
    )
    label, image, level = map(ops.convert_to_numpy, (label, image, level))
    lost_label, lost_image = label == 2, level == 1
    assert set(label) == {0, 2} and np.all(image[lost_image] == 0)
    for lost, share in [(lost_label, 0.3), (lost_image, 0.2), (lost_label & lost_image, 0.06)]:
        assert abs(lost.mean() - share) < 5 * (share / num) ** 0.5
    image, level = image[~lost_image], level[~lost_image]
    assert level.min() >= 0 and level.max() < 0.8 and abs(level.mean() - 0.4) < 0.02
    noise = (image - np.cos(np.pi / 2 * level)[:, None, None, None]) / np.sin(np.pi / 2 * level)[:, None, None, None]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_small_images_are_enlarged_alike_in_training_and_sampling():
    """By the cubic of Keys with a = -1/2, as Pillow enlarges."""
    from PIL import Image

    low = np.random.default_rng(0).uniform(-1, 1, (1, 2, 3, 1)).astype("float32")
    expected = np.array(Image.fromarray(low[0, :, :, 0]).resize((6, 4), Image.Resampling.BICUBIC))
    corruption = Corruption(kd.GaussianDiffusion(SCHEDULE), CONDITION)
    batch = {"label": ops.zeros((1,), "int32"), "image": ops.convert_to_tensor(low)}
    (_, _, _, image, level), _, _ = corruption(ops.zeros((1, 4, 6, 1)), batch, None, keras.random.SeedGenerator(0))
    for got in (ops.convert_to_numpy(image), CONDITION.network_inputs({"image": low}, 1)[1]):
        np.testing.assert_allclose(got[0, :, :, 0], expected, atol=1e-5)
    assert ops.convert_to_numpy(level) == 0


def tiny(network=kd.networks.unet, **options):
    arguments = ((8, 8, 1), 8, (1,), 1, (), 4) if network is kd.networks.unet else ((8, 8, 1), 4, 16, 1, 2)
    network = network(*arguments, num_classes=3, image_channels=2)
    randomize(network)
    return kd.DiffusionModel(network, seed=0, **options)


@pytest.mark.parametrize("network", [kd.networks.unet, kd.networks.dit])
def test_networks_see_the_image_and_its_noise(network):
    model, x = tiny(network), np.zeros((2, 8, 8, 1), "float32")
    image = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 2)).astype("float32")
    outputs = [
        model.denoise(x, 500, False, **given)
        for given in (
            {},
            {"images": image},
            {"images": image / 2},
            {"images": image, "image_noise": 0.5},
            {"labels": 1},
        )
    ]
    for index, output in enumerate(outputs):
        assert output.shape == x.shape
        assert all(np.abs(output - other).max() > 1e-4 for other in outputs[:index])


def test_training_on_all_containers(tmp_path):
    """Arrays, batches, generators and loaders hold the same conditions, so they give the same weights."""
    x = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype("float32")
    parts = {"label": np.arange(4) % 3, "image": x[:, ::2, ::2].repeat(2, axis=-1)}
    batches = kd.datasets.Batches(x, parts, 4, shuffle=False)
    sources = [{"x": x, "y": parts}, {"x": batches}, {"x": (batch for batch in [(x, parts)]), "steps_per_epoch": 1}]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        sources.append({"x": tf.data.Dataset.from_tensor_slices((x, parts)).batch(4)})
    model = tiny(image_dropout=0.1, image_noise=0.5)
    model.compile(loss="mse", optimizer="sgd", run_eagerly=EAGER)
    variables, trained = [*model.variables, *model.optimizer.variables, model._fit_random.state], []
    start = weights(variables)
    for data in sources:
        for v, value in zip(variables, start):
            v.assign(value)
        model.fit(**data, shuffle=False, verbose=0)
        trained.append(ops.convert_to_numpy(model.network.weights[0]))
    for other in trained[1:]:
        np.testing.assert_allclose(other, trained[0], atol=1e-6)
    assert np.abs(trained[0] - start[0]).max() > 1e-6
    assert np.isfinite(model.evaluate(x, parts, verbose=0))
    model.save(tmp_path / "m.keras")
    loaded = kd.saving.load_model(tmp_path / "m.keras")
    assert (loaded.corruption.image_dropout, loaded.corruption.image_noise) == (0.1, 0.5)
    options = {"labels": parts["label"], "images": parts["image"], "image_noise": 0.2}
    samples = [m.sample(4, kd.samplers.DDIM(2), 0, **options) for m in (model, loaded)]
    np.testing.assert_allclose(*samples, atol=1e-6)


def test_batches_mirror_the_condition_with_the_image():
    x = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), "uint8")
    images, parts = kd.datasets.Batches(x, {"image": x, "label": np.arange(16)}, 8, flip=True)[0]
    np.testing.assert_array_equal(images, parts["image"])
    plain = kd.images.from_uint8(x[parts["label"]])
    mirrored = np.any(images != plain, axis=(1, 2, 3))
    assert mirrored.any() and not mirrored.all()
    np.testing.assert_array_equal(images[mirrored], plain[mirrored, :, ::-1])
    with pytest.raises(ValueError, match=r"Expected 16 image. Received: shape=\(3"):
        kd.datasets.Batches(x, {"image": x[:3]}, 8)
    with pytest.raises(ValueError, match=r"Expected 16 image. Received: shape=\(\)"):
        kd.datasets.Batches(x, {"image": None}, 8)


LOW = np.zeros((4, 8, 8, 2), "float32")
BAD = [
    ({"labels": {"lable": 1}}, r"has the conditions \['label', 'image'\]. Received: received=\['lable'\]"),
    ({"images": LOW[:3]}, "condition images of shape"),
    ({"images": LOW[..., :1]}, "condition images of shape"),
    ({"images": LOW.repeat(2, axis=1)}, "condition images of shape"),
    ({"images": LOW + 2}, r"floats in \[-1, 1\]: see .* Received: dtype='float32', largest=2.0"),
    ({"images": LOW.astype("uint8")}, r"see `images.from_uint8`. Received: dtype='uint8'"),
    ({"images": LOW * np.nan}, r"floats in \[-1, 1\]"),
    ({"images": LOW.astype("str")}, "floats in .* Received: dtype='<U32'"),
    ({"images": [LOW[0], LOW[0, 1:]]}, "`image` must be an array of numbers"),
    ({"labels": LOW}, r"integers in 0..2, of shape .*, values=\[\[\[\[0.0"),
    ({"images": LOW, "image_noise": np.zeros(4)}, "`image_noise` must be in"),
    ({"image_noise": 0.1}, "`image_noise` is for images"),
    ({"images": LOW, "image_noise": 1.0}, "`image_noise` must be in"),
    ({"labels": 1, "guidance_scale": 2.0, "guidance": Guidance(drop=("image",))}, "Guidance needs"),
]


@pytest.fixture(scope="module")
def model():
    model = tiny()
    model.compile(loss="mse", optimizer="sgd", run_eagerly=EAGER)
    return model


@pytest.mark.parametrize("given, message", BAD)
def test_bad_conditions_of_samples(model, given, message):
    with pytest.raises(ValueError, match=message) as error:
        model.sample(4, kd.samplers.DDIM(2), 0, **given)
    assert "\n" not in str(error.value)


LABELS = np.zeros(4, "int32")


@pytest.mark.parametrize(
    "parts, message",
    [
        (None, "The network has a condition"),
        (LABELS, r"Received: received=\['label'\]"),
        ({"label": LABELS}, r"Received: received=\['label'\]"),
        ({"label": LABELS, "image": LOW, "x": LABELS}, "Received: received="),
        ({"label": LABELS, "image": LOW[..., :1]}, "condition images of shape"),
        ({"label": LABELS, "image": LOW + 2}, "floats in"),
        ({"label": LABELS + 3, "image": LOW}, "integers in 0..2"),
        ({"label": LABELS, "image": LOW[0, :4]}, "Expected an array with one image for each example"),
        ({"label": LABELS, "image": [*LOW]}, "Expected an array with one image for each example"),
    ],
)
def test_bad_conditions_in_training(model, parts, message):
    x = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype("float32")
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=message):
            call(x, parts, verbose=0)


def test_bad_networks():
    x, t = keras.Input((2,), name="x_t"), keras.Input((), dtype="int32", name="t")
    others = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    with pytest.raises(ValueError, match="are named label, context, image, image_noise, scale. Received: names"):
        kd.DiffusionModel(keras.Model([x, t, *others], x + others[0] + others[1]))
    with pytest.raises(ValueError, match="is not told the noise of images. Received: image_noise=0.5"):
        kd.DiffusionModel(kd.networks.mlp(2, 8, 1), image_noise=0.5)
    with pytest.raises(ValueError, match="`image_dropout` must be in"):
        kd.DiffusionModel(kd.networks.mlp(2, 8, 1), image_dropout=1)


def test_what_is_guided_does_not_depend_on_the_order_of_a_dict(exact):
    x_t = np.random.default_rng(0).standard_normal((2, 1, 2, 1)).astype("float32")
    parts = {"label": 1, "image": image_of(0.1)}
    orders = parts, {name: parts[name] for name in reversed(parts)}
    results = [exact.denoise(x_t, 400, False, labels=order, guidance_scale=3.0) for order in orders]
    np.testing.assert_array_equal(*results)
    given = {"label": None, "image": image_of(0.1)}  # which leaves the image to be guided by
    only_image = exact.denoise(x_t, 400, False, images=image_of(0.1), guidance_scale=3.0)
    np.testing.assert_array_equal(exact.denoise(x_t, 400, False, labels=given, guidance_scale=3.0), only_image)
    with pytest.raises(ValueError, match="Condition images are given twice"):
        exact.denoise(x_t, 400, labels={"image": image_of(0.1)}, images=image_of(0.1))


def test_weights_of_examples_beside_conditions_by_name(model):
    """They are those of the same data in batches, of which Keras does not repeat the weights."""
    x = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype("float32")
    parts, weight = {"label": LABELS, "image": LOW}, np.array([1.0, 2.0, 0.0, 0.5], "float32")
    plain = model.evaluate(x, parts, verbose=0)
    weighted = model.evaluate(x, parts, sample_weight=weight, verbose=0)
    batches = model.evaluate((batch for batch in [(x, parts, weight)]), steps=1, verbose=0)
    assert abs(weighted - batches) < 1e-6 and abs(weighted - plain) > 1e-4
    unsigned = parts | {"label": LABELS.astype("uint64")}
    assert abs(model.evaluate(x, unsigned, verbose=0) - plain) < 1e-6
    with pytest.raises(ValueError, match="Give `sample_weight` beside images"):
        model.fit(x, parts, class_weight={0: 2.0}, verbose=0)


def test_images_alone_are_an_array():
    """Also of bytes, which `Batches` scales."""
    network = kd.networks.dit((8, 8, 1), 4, 16, 1, 2, image_channels=1)
    model = kd.DiffusionModel(network, seed=0)
    model.compile(loss="mse", optimizer="sgd", run_eagerly=EAGER)
    x = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), "uint8")
    model.fit(kd.datasets.Batches(x, x[:, ::2, ::2], 4), verbose=0)
    low = kd.images.from_uint8(x[:2, ::2, ::2])
    np.testing.assert_array_equal(*(model.sample(2, kd.samplers.DDIM(2), 0, **{k: low}) for k in ("labels", "images")))
    with pytest.raises(ValueError, match="Condition images are given twice"):
        model.sample(2, labels=[0, 1], images=low)
    pairs = kd.distillation.pairs(model, 4, kd.samplers.DDIM(2), images=kd.images.from_uint8(x[:4]), batch_size=2)
    assert pairs.labels.shape == (4, 8, 8, 1)
    with pytest.raises(ValueError, match=r"has the conditions \['image'\]"):
        kd.distillation.pairs(model, 4, kd.samplers.DDIM(2), batch_size=2)


def test_cascades_give_labels_to_the_models_that_take_them():
    base = kd.DiffusionModel(kd.networks.dit((4, 4, 1), 2, 16, 1, 2, num_classes=3), seed=0)
    options = {"num_classes": None, "image_channels": 1}
    upscalers = [
        kd.DiffusionModel(kd.networks.dit((8, 8, 1), 4, 16, 1, 2, **options | {"num_classes": k})) for k in (3, None)
    ]
    for upscaler, labels in zip(upscalers, ({"labels": [0, 2]}, {})):
        randomize(upscaler.network)
        got = kd.editing.cascade([base, upscaler], 2, 5, labels=[0, 2], image_noise=0.2)
        low = base.sample(2, seed=5, labels=[0, 2])
        np.testing.assert_allclose(got, kd.editing.upscale(upscaler, low, 6, image_noise=0.2, **labels), atol=1e-5)
    with pytest.raises(ValueError, match="The model is not an upscaler"):
        kd.editing.upscale(base, low)
    for wrong in (None, low[0], low[:, :0], low.astype("str"), low > 0):
        with pytest.raises(ValueError, match="Expected|must be floats"):
            kd.editing.upscale(upscalers[0], wrong)
    near = kd.editing.upscale(upscalers[0], low, 6, strength=0.02, labels=1)
    assert np.abs(near - ops.convert_to_numpy(conditions.seen(low, None, None, (8, 8)))).mean() < 0.2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_enlarges_images(compiled):
    network = kd.networks.dit((8, 8, 1), 4, 16, 1, 2, image_channels=1)
    model = kd.DiffusionModel(network, seed=0, image_noise=0.5)
    model.compile(loss="mse", optimizer="sgd", run_eagerly=not compiled, jit_compile=compiled and BACKEND != "torch")
    x = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype("float32")
    assert np.isfinite(model.fit(x, x[:, ::2, ::2], batch_size=4, verbose=0).history["loss"][0])


def test_guidance_by_what_was_never_dropped_warns():
    """Samples would move away from the output of an input that the network has never seen."""
    model = tiny()
    with pytest.warns(UserWarning, match=r"was never dropped in training.*: \['image'\]"):
        model.sample(2, kd.samplers.DDIM(2), 0, images=LOW[:2], guidance_scale=2.0)
    model.sample(2, kd.samplers.DDIM(2), 0, labels=1, images=LOW[:2], guidance_scale=2.0)
    assert model.class_names is None
