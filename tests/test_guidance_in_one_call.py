"""Guidance in one call: a network that is told the scale, against the guided denoiser and the paper's loss."""

import keras
import numpy as np
import pytest
from conftest import EAGER, TORCH, randomize
from keras import ops

import keras_ddpm as kd
from keras_ddpm import conditions, guidance
from keras_ddpm.networks import with_guidance_scale
from keras_ddpm.training.corruption import Corruption

MAKERS = {
    "unet": lambda: kd.networks.unet((8, 8, 1), 8, (1, 2), 1, (), 4, num_classes=3),
    "dit": lambda: kd.networks.dit((8, 8, 1), 4, 16, 1, 2, num_classes=3),
    "mlp": lambda: kd.networks.mlp(4, 8, 1, num_classes=3),
}
SAMPLER = kd.samplers.DDIM(3)


def pair(name, **options):
    network = MAKERS[name]()
    randomize(network)
    model = kd.DiffusionModel(network, seed=0)
    return model, kd.DiffusionModel.from_model(model, network=with_guidance_scale(network), **options)


@pytest.mark.parametrize("name", MAKERS)
def test_the_input_starts_without_effect(name, tmp_path, request):
    """Before training, every scale gives the old model: on PyTorch to the bit, elsewhere up to the order of sums."""
    if name != "mlp":
        request.getfixturevalue("uncompiled")
    model, copy = pair(name, max_guidance_scale=4.0)
    samples = model.sample(3, SAMPLER, 0, labels=1)
    for scale in (1.0, 2.0, 4.0):
        np.testing.assert_allclose(
            copy.sample(3, SAMPLER, 0, labels=1, guidance_scale=scale), samples, atol=0 if TORCH else 1e-4
        )
    for scale in (0.5, 6.0):  # outside of what it learns, guidance needs two calls
        options = {"labels": 1, "guidance_scale": scale}
        np.testing.assert_allclose(
            copy.sample(3, SAMPLER, 0, **options), model.sample(3, SAMPLER, 0, **options), atol=1e-4
        )
    if name == "mlp":
        randomize(copy.network)
        copy.compile(loss="mse", optimizer="sgd", run_eagerly=EAGER)
        copy.fit(np.zeros((2, 4)), np.array([0, 1]), verbose=0)
        copy.save(tmp_path / "m.keras")
        loaded = kd.saving.load_model(tmp_path / "m.keras")
        options = {"labels": 2, "guidance_scale": 3.0}
        np.testing.assert_allclose(*(m.sample(3, SAMPLER, 0, **options) for m in (copy, loaded)), atol=1e-6)
        assert loaded.corruption.max_guidance_scale == 4.0


def test_one_call_gets_the_inverse_of_the_scale_within_the_interval():
    """A network that returns 1 / w shows what it was told at each call."""
    inputs = [keras.Input((1,), name="x_t"), keras.Input((), dtype="int32", name="t")]
    inputs += [keras.Input((), dtype="int32", name="label"), keras.Input((), name="scale")]
    zeros = keras.layers.Embedding(4, 1, embeddings_initializer="zeros", name="label_embedding")(inputs[2])
    network = keras.Model(inputs, 0 * inputs[0] + zeros + ops.expand_dims(inputs[3], -1))
    process = kd.GaussianDiffusion(prediction="x0", clip_range=None)
    model = kd.DiffusionModel(network, process, max_guidance_scale=5.0)
    x = np.zeros((2, 1), "float32")
    denoise = lambda t, scale, **options: model.denoise(x, t, False, labels=1, guidance_scale=scale, **options)
    np.testing.assert_allclose(denoise(500, 4.0), 0.25)
    np.testing.assert_allclose(denoise(500, 1.0), 1.0)
    inside = {"guidance": guidance.Guidance(interval=(300, 700))}
    np.testing.assert_allclose([denoise(t, 4.0, **inside)[0, 0] for t in (200, 500, 800)], [1, 0.25, 1])
    np.testing.assert_allclose(denoise(500, 8.0), 1.0)  # two calls, both told 1


@pytest.mark.parametrize("label_dropout", [0.1, 0.4])
def test_the_loss_is_the_papers(label_dropout):
    """The target is compared with β y(x_t, t, c, β) + (1 − β) sg[y(x_t, t, no condition, 1)]. Dropped labels: β = 1."""
    network = with_guidance_scale(MAKERS["mlp"]())
    randomize(network)
    model = kd.DiffusionModel(network, label_dropout=label_dropout, max_guidance_scale=4.0)
    randomize(network)  # unlike the average, which computes the second call
    x_0 = ops.convert_to_tensor(np.random.default_rng(0).uniform(-1, 1, (400, 4)), "float32")
    inputs, _, weight = model.corruption(x_0, ops.ones((400,), "int32"), None, keras.random.SeedGenerator(0))
    x_t, t, label, scale = map(ops.convert_to_numpy, inputs)
    y = ops.convert_to_numpy(network(list(inputs)))
    worse = ops.convert_to_numpy(model.average.predict(x_t, t, np.full_like(label, 3), np.ones_like(scale)))
    expected = scale[:, None] * y + (1 - scale[:, None]) * worse
    np.testing.assert_allclose(ops.convert_to_numpy(model(inputs, training=True)), expected, atol=1e-4)
    assert weight is None and np.all(scale[label == 3] == 1) and abs(np.mean(label == 3) - label_dropout) < 0.1
    w = 1 / scale[label != 3]
    assert 1 <= w.min() < 1.1 and 3.9 < w.max() <= 4 and abs(w.mean() - 2.5) < 0.2


class AtOneTime(Corruption):
    def draw_timesteps(self, batch_size, generator):
        return ops.full((batch_size,), 30, "int32")


def test_the_regression_has_the_guided_denoiser_as_its_solution():
    """Of a Gaussian for each class, x_0 with guidance is linear in x_t and in w. Least squares find it."""
    means, std, num = np.array([-0.4, 0.5]), 0.2, 2_000_000
    schedule = kd.schedules.cosine(1000)
    alpha, sigma = schedule.alpha[30], schedule.sigma[30]

    def denoise(x, mean, variance):
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

    def worse(x):  # the best linear denoiser of both classes
        return denoise(x, means.mean(), std**2 + means.std() ** 2)

    condition = conditions.Condition((conditions.Part("label", (), 2), conditions.Part("scale", (), 1)))
    process = kd.GaussianDiffusion(schedule, "x0", clip_range=None)
    corruption = AtOneTime(process, condition, max_guidance_scale=4.0, label_dropout=0.01)
    labels = np.arange(num) % 2
    products = np.zeros((2, 4, 5))  # of the features with themselves and with the target, for each label
    for seed in range(8):
        x_0 = means[labels] + std * np.random.default_rng(seed).standard_normal(num)
        data = ops.convert_to_tensor(x_0[:, None], "float32"), ops.convert_to_tensor(labels)
        inputs, target, _ = corruption(*data, None, keras.random.SeedGenerator(seed))
        features = []  # what each of four outputs adds to what the loss compares with the target
        for output in (lambda x, w: x, lambda x, w: w / w, lambda x, w: w * x, lambda x, w: w):
            y = output(inputs[0], 1 / inputs[3][:, None])
            features.append(guidance.unguided(y, lambda x, *_: 0 * x, inputs, (2, 1), 1))
        rest = guidance.unguided(0 * inputs[0], lambda x, *_: worse(x), inputs, (2, 1), 1)
        rows = [ops.convert_to_numpy(row).astype("float64").ravel() for row in (*features, target - rest)]
        rows, kept = np.stack(rows), inputs[2]
        for label in (0, 1):
            of = ops.convert_to_numpy(kept) == label
            products[label] += rows[:4][:, of] @ rows[:, of].T
    points = np.linspace(-0.6, 0.7, 9)
    for mean, product in zip(means, products):
        found = np.linalg.solve(product[:, :4], product[:, 4])
        for scale in (1.0, 1.5, 2.0, 4.0):
            got = found @ np.stack([points, np.ones(9), scale * points, np.full(9, scale)])
            expected = (1 - scale) * worse(points) + scale * denoise(points, mean, std**2)
            np.testing.assert_allclose(got, expected, atol=1e-3)


def test_bad_scales():
    with pytest.raises(ValueError, match="a layer 'time_dense_2' that is not told the scale yet"):
        with_guidance_scale(with_guidance_scale(MAKERS["mlp"]()))
    for largest in (0.5, np.inf, "a"):
        with pytest.raises(ValueError, match="`max_guidance_scale` must be 1, or up to 1000"):
            kd.DiffusionModel(with_guidance_scale(MAKERS["mlp"]()), max_guidance_scale=largest)
    with pytest.raises(ValueError, match="`max_guidance_scale` must be 1, or up to 1000"):
        kd.DiffusionModel(MAKERS["mlp"](), max_guidance_scale=2.0)
    with pytest.raises(
        ValueError,
        match="above 0. Received: label_dropout=0.0, image_dropout=0.0",
    ):
        kd.DiffusionModel(with_guidance_scale(MAKERS["mlp"]()), max_guidance_scale=2.0, label_dropout=0.0)
    with pytest.raises(ValueError, match="Expected a conditional network"):
        with_guidance_scale(kd.networks.mlp(2, 8, 1))


def test_the_scale_is_exact_in_half_precision():
    """Mistake of ours: in bfloat16, 1 / w = 0.4 and 0.401 were the same number."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = with_guidance_scale(MAKERS["mlp"]())
    sinusoid = keras.Model(network.inputs, network.get_layer("scale_sinusoid").output)
    scales = np.array([0.4, 0.4005, 0.401], "float32")
    zeros = np.zeros(3, "int32")
    x = ops.convert_to_numpy(sinusoid([np.zeros((3, 4), "float32"), zeros, zeros, scales]))
    expected = kd.networks.layers.TimestepEmbedding(256)(1000 * scales)
    np.testing.assert_allclose(x, ops.convert_to_numpy(expected), atol=1e-4)
