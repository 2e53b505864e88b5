"""Inpainting, variations, encoding and interpolation, compared with closed forms.

The data are images of two pixels, x_0 ~ N(0, [[1, 0.8], [0.8, 1]]). Their best prediction is linear in x_t.
"""

import functools

import keras
import numpy as np
import pytest
from conftest import image_network
from keras import ops

import keras_ddpm as kd
from keras_ddpm import editing, samplers

COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])
LINEAR = kd.schedules.linear(1000)


def gain(schedule, t, covariance=COVARIANCE):
    """The matrix that takes x_t to E[x_0 | x_t]."""
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    return alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(2))


class BestPrediction(keras.layers.Layer):
    def __init__(self, schedule):
        super().__init__()
        self.gains = np.stack([gain(schedule, max(t, 1)) for t in range(schedule.timesteps + 1)])

    def call(self, x_t, t):
        pairs = ops.reshape(x_t, (-1, 1, 2))
        gains = ops.take(ops.convert_to_tensor(self.gains, "float32"), t, axis=0)
        return ops.reshape(ops.matmul(pairs, ops.transpose(gains, (0, 2, 1))), (-1, 1, 2, 1))


@functools.cache
def pixels(timesteps=1000):
    schedule = kd.schedules.linear(timesteps)
    x_t, t = keras.Input((1, 2, 1)), keras.Input((), dtype="int32")
    network = keras.Model([x_t, t], BestPrediction(schedule)(x_t, t))
    return kd.DiffusionModel(network, kd.GaussianDiffusion(schedule, "x0", clip_range=None))


def draw(num, seed=0):
    x = np.random.default_rng(seed).multivariate_normal(np.zeros(2), COVARIANCE, num)
    return x.reshape(num, 1, 2, 1).astype("float32")


def exact_inpainting(sampler, known, num_resamples, schedule=LINEAR, covariance=COVARIANCE):
    """Mean and variance of the unknown pixel, by a recursion over all steps and resamplings in float64."""
    times = sampler.timesteps(schedule)
    mean, variance = 0.0, 1.0  # of the unknown pixel of x_t
    alpha, sigma = schedule.alpha, schedule.sigma
    # The known pixel of x_t is alpha_t known + sigma_t noise, fresh at each arrival.
    for row, s in zip(sampler.table(schedule), times[1:]):
        t, from_x, from_x_0, std = int(row["t"]), row["from_x"], row["from_x_0"], row["std"]
        from_known, from_unknown = gain(schedule, t, covariance)[1]
        for resample in range(num_resamples):
            mean_s = (from_x + from_x_0 * from_unknown) * mean + from_x_0 * from_known * alpha[t] * known
            variance_s = (from_x + from_x_0 * from_unknown) ** 2 * variance
            variance_s += (from_x_0 * from_known * sigma[t]) ** 2 + std**2
            if s == 0:
                break
            if resample < num_resamples - 1:
                ratio = alpha[t] / alpha[s]
                mean = ratio * mean_s
                variance = ratio**2 * variance_s + sigma[t] ** 2 - ratio**2 * sigma[s] ** 2
        mean, variance = mean_s, variance_s
    return mean, variance


LARGE, SMALL = samplers.DDPM(variance="large"), samplers.DDPM(variance="small")
TRUE_VARIANCE = 1 - 0.8**2


@pytest.mark.parametrize(("num_resamples", "tolerance"), [(20, 0.025), (100, 0.005)])
def test_inpainting_tends_to_the_conditional_distribution(num_resamples, tolerance):
    mean, variance = exact_inpainting(LARGE, 0.4, num_resamples)
    assert abs(mean / (0.8 * 0.4) - 1) < tolerance and abs(variance / TRUE_VARIANCE - 1) < tolerance


@pytest.mark.parametrize(("deviation", "share"), [(1.0, 0.9), (0.2, 0.75)])
def test_inpainting_with_small_variance_varies_too_little(deviation, share):
    _, variance = exact_inpainting(SMALL, 0.4 * deviation, 100, covariance=deviation**2 * COVARIANCE)
    assert abs(variance / (deviation**2 * TRUE_VARIANCE) - share) < 0.02


@pytest.mark.parametrize("sampler", [samplers.DDPM(40, "large"), samplers.DDPM(40), samplers.DDIM(40)], ids=str)
def test_inpainting_is_the_exact_recursion(sampler):
    num = 4000
    images = np.full((num, 1, 2, 1), 0.4, "float32")
    mask = np.broadcast_to(np.array([1, 0]).reshape(1, 1, 2, 1), images.shape)
    x = editing.inpaint(pixels(), images, mask, seed=0, sampler=sampler, num_resamples=4, batch_size=num)
    assert np.array_equal(x[:, 0, 0], images[:, 0, 0])  # bit for bit
    mean, variance = exact_inpainting(sampler, np.float32(0.4), 4)
    unknown = x[:, 0, 1, 0]
    assert abs(unknown.mean() - mean) < 5 * np.sqrt(variance / num)
    assert abs(unknown.var() / variance - 1) < 5 * np.sqrt(2 / num)


def test_inpainting_with_second_order_samplers():
    """Resampling would make the extrapolation of 2M unstable: the variance would grow without bounds."""
    images = np.full((500, 1, 2, 1), 0.4, "float32")
    mask = np.broadcast_to(np.array([0, 1]).reshape(1, 1, 2, 1), images.shape)
    for sampler in (samplers.DPMSolver(30), samplers.Heun(30), samplers.DPMSolver(30, eta=1.0), samplers.IPNDM(30)):
        x = editing.inpaint(pixels(), images, mask, seed=0, sampler=sampler)
        assert np.array_equal(x[:, 0, 1], images[:, 0, 1])
        assert abs(x[:, 0, 0].mean() - 0.32) < 0.1 and abs(x[:, 0, 0].std() - 0.6) < 0.15


def test_every_image_has_its_own_mask():
    images, masks = draw(7), np.zeros((7, 1, 2, 1))
    masks[np.arange(7), 0, np.arange(7) % 2] = 1
    hidden = np.where(masks == 1, images, np.nan)  # what is unknown does not matter
    sampler = samplers.DDIM(5)
    x = editing.inpaint(pixels(), hidden, masks, seed=0, sampler=sampler, num_resamples=1, batch_size=3)
    assert np.array_equal(x[masks == 1], images[masks == 1])
    assert np.all(np.isfinite(x)) and not np.any(x[masks == 0] == images[masks == 0])


def test_resampled_steps(monkeypatch):
    tables = []
    monkeypatch.setattr(pixels(), "run", lambda job, **options: tables.append(job.steps))
    images, masks = draw(1), np.ones((1, 1, 2, 1))
    corrected = samplers.Langevin(predictor=samplers.DPMSolver(6))
    for sampler in (samplers.DPMSolver(6), samplers.IPNDM(6), samplers.Heun(6), corrected):
        editing.inpaint(pixels(), images, masks, sampler=sampler, num_resamples=3)
        steps = tables.pop()
        assert len(steps) == 5 * 3 + 1
        for index, rows in enumerate(steps[:-1]):
            # Where the rows end, the next ones begin.
            next_start = rows if index % 3 < 2 else steps[3 * (index // 3 + 1)]
            assert steps[index + 1]["t"][0] == next_start["t"][0]
            assert not np.any(rows["from_previous"][0])
    for make in (samplers.DPMSolver, samplers.UniPC, samplers.IPNDM):
        editing.inpaint(pixels(), images, masks, sampler=make(6, spacing="uniform"), num_resamples=2)
        rows, ddim = np.concatenate(tables.pop()[1::2]), samplers.DDIM(6).table(LINEAR)[:-1]
        for name in ("t", "from_x", "from_x_0", "from_previous", "std"):
            np.testing.assert_allclose(rows[name], ddim[name], atol=1e-12)
    editing.inpaint(pixels(), images, masks, sampler=samplers.DPMSolver(6), num_resamples=1)
    assert np.array_equal(np.concatenate(tables.pop()), samplers.DPMSolver(6).table(LINEAR))


def test_starts_on_schedules_whose_noise_is_not_1(monkeypatch):
    schedule = kd.schedules.Schedule(np.ones(101), np.linspace(0, 10, 101))
    model = kd.DiffusionModel(kd.networks.mlp(1, 8, 1), kd.GaussianDiffusion(schedule, clip_range=None))
    monkeypatch.setattr(model, "run", lambda job, **options: job.start(np.arange(job.num)))
    images = np.zeros((4000, 1))
    for start, std in (
        (editing.variations(model, images, 0.5, seed=0), 5.0),
        (editing.variations(model, images, 1.0, seed=0), np.sqrt(101)),
        (editing.inpaint(model, images, np.ones_like(images), seed=0), 10.0),
        (editing.inpaint(model, images, np.zeros_like(images), seed=0), np.sqrt(101)),
    ):
        assert abs(start.std() / std - 1) < 0.06


def test_masks_of_all_and_of_nothing():
    images = draw(500)
    known = editing.inpaint(pixels(), images, np.ones_like(images), seed=0)
    assert np.array_equal(known, images)
    free = editing.inpaint(pixels(), images, np.zeros_like(images), seed=0, sampler=samplers.DDPM(200), num_resamples=1)
    covariance = np.cov(free.reshape(-1, 2).T)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.2)
    assert abs(np.corrcoef(free[:, 0, 0, 0], images[:, 0, 0, 0])[0, 1]) < 0.2


def test_variations():
    model, images = pixels(), draw(300)
    sampler = samplers.DPMSolver(20)
    unchanged = editing.variations(model, images, 0.0, seed=1)
    assert np.array_equal(unchanged, images) and unchanged is not images
    corrected = samplers.Langevin(predictor=samplers.DDIM(10), step_size=0.01)
    assert editing.variations(model, images[:3], 0.5, seed=1, sampler=corrected).shape == (3, 1, 2, 1)
    assert corrected.shortened(0.5, 1000).predictor == samplers.DDIM(5)
    assert np.array_equal(editing.variations(model, images, 1.0, seed=1), model.sample(300, seed=1))
    for own in (samplers.DDPM(), corrected, samplers.DDIM(3, spacing=(1000, 500, 1))):  # of a model that carries one
        model.sampler = own
        expected = editing.variations(model, images[:3], 0.5, seed=1, sampler=own)
        assert np.array_equal(editing.variations(model, images[:3], 0.5, seed=1), expected)
    with pytest.raises(ValueError, match="`num_steps` falling times"):
        editing.variations(model, images[:3], 0.5, num_steps=2)
    model.sampler = None
    for all_steps in (sampler, samplers.DDPM()):
        full = editing.variations(model, images[:20], 1.0, seed=1, sampler=all_steps)
        assert np.array_equal(full, model.sample(20, all_steps, seed=1))
    # The stronger the further; all of them look like data.
    distances = []
    for strength in (0.1, 0.3, 0.6, 0.9):
        x = editing.variations(model, images, strength, seed=1, sampler=sampler)
        distances.append(np.mean((x - images) ** 2))
        np.testing.assert_allclose(np.cov(x.reshape(-1, 2).T), COVARIANCE, atol=0.25)
    assert np.all(np.diff(distances) > 0)


def test_encoding_and_decoding():
    """Noise is of unit variance, and the error falls with the number of steps."""
    model, images = pixels(), draw(400)
    errors = []
    for num_steps in (25, 100, 400):
        noise = editing.encode(model, images, num_steps=num_steps)
        errors.append(np.sqrt(np.mean((editing.decode(model, noise, num_steps=num_steps) - images) ** 2)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01, errors
    np.testing.assert_allclose(np.cov(noise.reshape(-1, 2).T), np.eye(2), atol=0.2)
    # The probability-flow map of Gaussian data keeps x_t in units of its deviation.
    values, vectors = np.linalg.eigh(COVARIANCE)
    alpha, sigma = LINEAR.alpha[-1], LINEAR.sigma[-1]
    scaled = images.reshape(-1, 2) @ vectors * np.sqrt((alpha**2 * values + sigma**2) / values)
    np.testing.assert_allclose(noise.reshape(-1, 2) @ vectors, scaled, atol=0.05)


def test_encoding_calls_the_network_with_times(monkeypatch):
    """Mistake of others: the index of a step instead of its time. Decoding visits the same times backward."""
    tables = []
    monkeypatch.setattr(pixels(), "run", lambda job, **options: tables.append(np.concatenate(job.steps)["t"]))
    editing.encode(pixels(), draw(2), num_steps=7)
    editing.decode(pixels(), draw(2), num_steps=7)
    visited = samplers.DDIM(7, spacing="logsnr").timesteps(LINEAR)[:-1]
    assert np.array_equal(tables[0], visited[::-1]) and np.array_equal(tables[1], visited)


def test_encoding_does_not_clip():
    network = keras.Model(*(lambda x, t: ([x, t], 3.0 * x))(keras.Input((2,)), keras.Input((), dtype="int32")))
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(LINEAR, "x0"))
    x = np.array([[0.9, -0.9]], "float32")
    assert np.abs(editing.decode(model, 5 * x, num_steps=3)).max() > 1
    noise = editing.encode(model, x, num_steps=1)
    # One step from s = 0 to T: x_T = alpha_T x + sigma_T ε, ε = (x - alpha_T x_0) / sigma_T, x_0 = 3 x.
    alpha = LINEAR.alpha[-1]
    np.testing.assert_allclose(noise, alpha * x + (x - alpha * 3 * x), rtol=1e-5)


def test_interpolation():
    model, a, b = pixels(), draw(5), draw(5, seed=1)
    x = editing.interpolate(model, a, b, 7, num_steps=100)
    assert x.shape == (7, 5, 1, 2, 1) and x.dtype == "float32"
    assert np.array_equal(x[0], a) and np.array_equal(x[-1], b)
    steps = np.linalg.norm(np.diff(x, axis=0).reshape(6, 5, 2), axis=2)
    whole = np.linalg.norm((b - a).reshape(5, 2), axis=1)
    assert np.all(steps < whole + 0.1)
    noise_a, noise_b = (editing.encode(model, images, num_steps=100) for images in (a, b))
    for index in (1, 4):
        noise = editing.encode(model, x[index], num_steps=100)
        np.testing.assert_allclose(noise, editing._slerp(noise_a, noise_b, index / 6), atol=0.15)
    same = editing.interpolate(model, a, a, 3, num_steps=100)
    np.testing.assert_allclose(same[1], a, atol=0.05)


def test_slerp_keeps_the_length():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 100)).astype("float32")
    for fraction in (0.25, 0.5):
        assert np.linalg.norm(editing._slerp(a, b, fraction)) == pytest.approx(
            (1 - fraction) * np.linalg.norm(a) + fraction * np.linalg.norm(b), rel=0.05
        )
    np.testing.assert_allclose(editing._slerp(a, a, 0.3), a, rtol=1e-6)
    opposite = editing._slerp(np.array([[1.0]]), np.array([[-1.2]]), 0.5)
    assert np.allclose(opposite, -0.1) and np.all(editing._slerp(0 * a, b, 0.5) == 0.5 * b)
    # [Shoemake, 1985]: equal angles for equal fractions.
    a, b = np.array([[1.0, 0.0]], "float32"), np.array([[0.0, 1.0]], "float32")
    np.testing.assert_allclose(editing._slerp(a, b, 1 / 3), [[np.cos(np.pi / 6), np.sin(np.pi / 6)]], rtol=1e-6)


def test_labels_and_seeds():
    network = image_network((8, 8, 1), num_classes=2)
    model = kd.DiffusionModel(network)
    network.set_weights([np.random.default_rng(0).normal(0, 0.2, w.shape) for w in network.get_weights()])
    for average, v in zip(model.ema_weights, network.weights):
        average.assign(ops.copy(v))
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype("float32")
    masks = np.zeros((3, 8, 8, 1))
    masks[:, :4] = 1
    for edit in (
        lambda **k: editing.inpaint(model, images, masks, num_steps=3, num_resamples=2, **k),
        lambda **k: editing.variations(model, images, 0.5, num_steps=4, **k),
    ):
        first = edit(seed=0, labels=1)
        assert first.shape == images.shape and np.array_equal(first, edit(seed=0, labels=1))
        assert not np.array_equal(first, edit(seed=1, labels=1))
        assert not np.array_equal(first, edit(seed=0, labels=[0, 0, 0]))
        assert not np.array_equal(first, edit(seed=0, labels=1, guidance_scale=3.0))
        assert (
            edit(
                seed=0, labels=1, guidance_scale=3.0, guidance=kd.guidance.Guidance(rescale=0.7, dynamic_threshold=0.9)
            ).max()
            <= 1
        )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m, x: editing.inpaint(m, x, np.ones((2, 1, 2))), r"shape \(2, 1, 2, 1\). Received: shape=\(2, 1, 2\)"),
        (lambda m, x: editing.inpaint(m, x, np.full((2, 1, 2, 1), 0.5)), "nothing but 0 and 1"),
        (lambda m, x: editing.inpaint(m, x, np.ones((2, 1, 2, 1)), num_resamples=0), "num_resamples=0"),
        (lambda m, x: editing.inpaint(m, x[..., 0], np.ones((2, 1, 2, 1))), "Expected `images` of shape"),
        (lambda m, x: editing.variations(m, x, 1.5), "strength=1.5"),
        (lambda m, x: editing.variations(m, x * np.nan, 0.5), "NaN"),
        (lambda m, x: editing.variations(m, x, 0.5, sampler="ddim"), "sampler='ddim'"),
        (lambda m, x: editing.variations(m, x, 0.5, sampler=samplers.DDIM(5), num_steps=5), "num_steps=5"),
        (lambda m, x: editing.variations(m, x, 0.5, seed=-1), "seed=-1"),
        (lambda m, x: editing.variations(m, x, 0.5, labels=1), "has no condition"),
        (lambda m, x: editing.variations(m, x, 0.0, labels=1), "has no condition"),
        (lambda m, x: editing.variations(m, x, 0.0, guidance_scale=2.0), "needs labels"),
        (lambda m, x: editing.variations(m, [x[0], x[0, :, :1]], 0.5), "`images` must be an array of numbers"),
        (lambda m, x: editing.inpaint(m, [x[0], x[0, :, :1]], np.ones((2, 1, 2, 1))), "`images` must be an array"),
        (lambda m, x: editing.variations(m, x, 0.5, num_steps=0), "num_steps=0"),
        (lambda m, x: editing.variations(m, x, 0.5, guidance_scale=2.0), "needs labels"),
        (lambda m, x: editing.decode(m, x, guidance=kd.guidance.Guidance(dynamic_threshold=0.9)), "Nothing is clipped"),
        (lambda m, x: editing.interpolate(m, x, x[:1], 3), r"shapes=\(\(2, 1, 2, 1\), \(1, 1, 2, 1\)\)"),
        (lambda m, x: editing.interpolate(m, x, np.zeros((2, 2, 2, 1)), 3), "Expected `images_b` of shape"),
        (lambda m, x: editing.interpolate(m, x, x, 1), "num=1"),
        (lambda m, x: editing.decode(m, x[0]), "Expected `noise` of shape"),
        (lambda m, x: editing.encode(m, x, num_steps=1001), "num_steps=1001"),
    ],
)
def test_bad_input(edit, message):
    with pytest.raises(ValueError, match=message):
        edit(pixels(), np.zeros((2, 1, 2, 1), "float32"))


def test_images_outside_the_range():
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1))
    with pytest.raises(ValueError, match=r"in \[-1.0, 1.0\]"):
        editing.variations(model, np.full((2, 2), 3.0), 0.5)
