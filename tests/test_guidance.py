"""Labels, vectors and guidance, compared with closed forms. The classes are the components of a mixture."""

import dataclasses

import keras
import numpy as np
import pytest
from closed_form import TWO, Mixture
from conftest import EAGER, TORCH, randomize
from keras import ops

import keras_ddpm as kd
from keras_ddpm import conditions, guidance
from keras_ddpm.guidance import Guidance
from keras_ddpm.samplers import loop as sampling

LINEAR = kd.schedules.linear(1000)
SAMPLER = kd.samplers.DPMSolver(60, spacing="logsnr")


@pytest.fixture(scope="module")
def mixture():
    return TWO.model(LINEAR, conditional=True)


def denoise(x, t, label=None):
    """E[x_0 | x_t] in float64: of a component, or of the whole mixture."""
    return TWO.denoise(x, LINEAR.alpha[int(t)], LINEAR.sigma[int(t)], label)


def integrate(sampler, predict, x):
    """The sampler's steps in float64."""
    previous = (np.zeros_like(x),) * kd.samplers.NUM_PREVIOUS
    for row in sampler.table(LINEAR):
        x, previous = kd.samplers.step(row, predict, x, None, previous)
    return x


@pytest.mark.parametrize("sampler", [SAMPLER, kd.samplers.DDPM(300, spacing="logsnr")])
def test_conditional_samples_fall_in_their_class(mixture, sampler):
    labels = np.arange(4000) % 2
    x = mixture.sample(4000, sampler, seed=0, labels=labels, batch_size=1000)[:, 0]
    for label, mean in enumerate(TWO.means):
        assert abs(x[labels == label].mean() - mean) < 5 * TWO.std / 2000**0.5
        assert abs(x[labels == label].std() / TWO.std - 1) < 0.06
    x = mixture.sample(4000, sampler, seed=0)[:, 0]  # no label: the whole mixture
    assert abs(np.mean(x > 0) - 0.6) < 0.04


@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("sampler", [SAMPLER, kd.samplers.DDIM(50), kd.samplers.Heun(20)])
def test_guidance_is_that_of_the_same_steps_in_float64(mixture, sampler, scale):
    """(1 - w) times the prediction without a label plus w times that with it."""
    labels = np.arange(200) % 2
    x = sampling.noise((1,), 0, range(200))[:, 0].astype("float64")

    def guided(x, t):
        given = np.where(labels == 0, denoise(x, t, 0), denoise(x, t, 1))
        return (1 - scale) * denoise(x, t) + scale * given

    got = mixture.sample(200, sampler, seed=0, labels=labels, guidance_scale=scale)[:, 0]
    np.testing.assert_allclose(got, integrate(sampler, guided, x), atol=2e-3)


def test_guidance_converges_to_its_own_differential_equation(mixture):
    """Integrated in float64 by Heun's method over all 1000 steps."""
    x = sampling.noise((1,), 0, range(100))[:, 0].astype("float64")

    def guided(x, t):
        return -1.0 * denoise(x, t) + 2.0 * denoise(x, t, 1)

    got = mixture.sample(100, SAMPLER, seed=0, labels=1, guidance_scale=2.0)[:, 0]
    np.testing.assert_allclose(got, integrate(kd.samplers.Heun(1000), guided, x), atol=5e-3)


def test_denoise_is_what_samplers_see(mixture):
    x = np.linspace(-2, 2, 9, dtype="float32")[:, None]
    for t in (1, 40, mixture.diffusion.timesteps):
        np.testing.assert_allclose(mixture.denoise(x, t), denoise(x, t), atol=1e-4)
        for scale in (1.0, 3.0):
            expected = (1 - scale) * denoise(x, t) + scale * denoise(x, t, 1)
            np.testing.assert_allclose(mixture.denoise(x, t, labels=1, guidance_scale=scale), expected, atol=3e-4)
    for t in (0, mixture.diffusion.timesteps + 1, 1.0):
        with pytest.raises(ValueError, match=f"integer in 1..1000. Received: t={t}"):
            mixture.denoise(x, t)
    with pytest.raises(ValueError, match="Expected `x_t` of shape"):
        mixture.denoise(x[:, 0], 1)


def calls_of(model, **arguments):
    """The sizes of the batches that the network was called with, and the samples."""
    sizes = []
    layer = model.network.get_layer("label_embedding")
    call = layer.call

    def spy(x, *inputs):
        sizes.append(x.shape[0])
        return call(x, *inputs)

    layer.call = spy
    model._loop.programs.cache_clear()
    try:
        x = model.sample(6, kd.samplers.DDPM(5), seed=0, **arguments)
    finally:
        layer.call = call
        model._loop.programs.cache_clear()
    return set(sizes), x


def test_scales_0_and_1_call_the_network_once(mixture):
    for arguments, same in (
        ({"labels": 1, "guidance_scale": 1.0}, {"labels": 1}),
        ({"labels": 1, "guidance_scale": 0.0}, {}),
    ):
        sizes, x = calls_of(mixture, **arguments)
        assert sizes == {6}
        assert np.array_equal(x, calls_of(mixture, **same)[1])
    sizes, _ = calls_of(mixture, labels=1, guidance_scale=2.0)
    assert sizes == {12}
    sizes, _ = calls_of(mixture, labels=1, guidance_scale=2.0, guidance=Guidance(interval=(300, 700)))
    assert sizes == {6, 12}


def test_a_guide_is_extrapolated_from():
    """Against the same flow in float64, with both closed-form denoisers. The guide is a wider mixture."""
    good, bad = Mixture((0.3, 0.7), (-0.6, 0.4), 0.1), Mixture((0.3, 0.7), (-0.6, 0.4), 0.25)
    schedule, sampler = kd.schedules.cosine(200), kd.samplers.DPMSolver(20, spacing="logsnr")
    model, guide = good.model(schedule), bad.model(schedule)
    for interval in (None, (20, 120)):
        x = sampling.prior(model.diffusion, (1,), 0, range(50))[:, 0].astype("float64")
        previous = (np.zeros_like(x),) * kd.samplers.NUM_PREVIOUS
        low, high = interval or (0, 200)

        def denoise(x, t):
            scales = schedule.alpha[int(t)], schedule.sigma[int(t)]
            w = 2.0 if low <= t <= high else 1.0
            return (1 - w) * bad.denoise(x, *scales) + w * good.denoise(x, *scales)

        for row in sampler.table(schedule):
            x, previous = kd.samplers.step(row, denoise, x, None, previous)
        asked = Guidance(guide=guide, interval=interval)
        got = model.sample(50, sampler, seed=0, guidance_scale=2.0, guidance=asked)[:, 0]
        np.testing.assert_allclose(got, x, atol=2e-4)


def test_a_guide_joins_labels_and_rescaling(mixture):
    """A guide without labels takes the place of the network without its label. With scale 1 it is not called."""
    options = {"labels": 1, "guidance_scale": 2.0}
    whole = TWO.model(mixture.diffusion.schedule)  # what the network predicts without its label
    expected = mixture.sample(9, SAMPLER, seed=0, guidance=Guidance(rescale=0.5), **options)
    got = mixture.sample(9, SAMPLER, seed=0, guidance=Guidance(rescale=0.5, guide=whole), **options)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    sizes, x = calls_of(mixture, labels=1, guidance=Guidance(guide=whole))
    assert sizes == {6} and np.array_equal(x, calls_of(mixture, labels=1)[1])


def test_scale_1_does_not_call_the_guide(points):
    """Which predicts NaN. Its schedule may differ in the last bits, as those of another machine do."""
    schedule = kd.schedules.linear(25)
    near = kd.schedules.Schedule(schedule.alpha, schedule.sigma * (1 - 1e-15))
    model, guide, other = (
        kd.DiffusionModel(kd.networks.mlp(2, 8, 1), kd.GaussianDiffusion(kind, clip_range=None))
        for kind in (schedule, near, kd.schedules.cosine(25))
    )
    randomize(model.network)
    for v in guide.ema_weights:
        v.assign(np.full(v.shape, np.nan))
    sample = lambda **options: model.sample(3, kd.samplers.DDIM(4), seed=0, **options)
    expected = sample()
    assert np.array_equal(sample(guidance=Guidance(guide=guide), guidance_scale=1.0), expected)
    assert np.isnan(sample(guidance=Guidance(guide=guide), guidance_scale=1.5)).all()
    never = Guidance(guide=guide, interval=(24, 24))  # DDIM(4) does not visit 24
    assert np.array_equal(sample(guidance=never, guidance_scale=1.5), expected)
    with pytest.raises(ValueError, match="must have the data shape and the process"):
        sample(guidance=Guidance(guide=other), guidance_scale=1.5)


@pytest.mark.parametrize("num_steps", [4] + [20] * TORCH)  # PyTorch records the networks from 20 calls on
def test_a_guide_may_learn_between_samples(num_steps):
    """Its average is read in each call, and the guided model's own choice of weights remains."""
    diffusion = kd.GaussianDiffusion(kd.schedules.linear(25), clip_range=None)
    model, guide = (kd.DiffusionModel(kd.networks.mlp(2, 8, 1), diffusion) for _ in range(2))
    randomize(model.network)
    sample = lambda **options: model.sample(3, kd.samplers.DDIM(num_steps), seed=0, **options)
    first = sample(guidance=Guidance(guide=guide), guidance_scale=3.0)
    for v in guide.ema_weights:
        v.assign(v + 0.3)
    second = sample(guidance=Guidance(guide=guide), guidance_scale=3.0)
    assert not np.allclose(first, second, atol=1e-3)
    copy = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), diffusion)
    for v, value in zip(copy.ema_weights, guide.ema_weights):
        v.assign(ops.convert_to_numpy(value))
    assert np.array_equal(sample(guidance=Guidance(guide=copy), guidance_scale=3.0), second)
    raw = [sample(guidance=Guidance(guide=guide), guidance_scale=w, use_ema=False) for w in (1.0, 3.0)]
    assert np.array_equal(raw[0], sample(use_ema=False)) and not np.allclose(raw[1], second, atol=1e-3)


def test_guides_that_do_not_fit(mixture):
    schedule = mixture.diffusion.schedule
    for guide, message in [
        ("bad", "must be a `DiffusionModel`. Received: guide='bad'"),
        (TWO.model(kd.schedules.cosine(1000)), "the data shape and the process"),
        (kd.DiffusionModel(kd.networks.mlp(2), mixture.diffusion), "the data shape and the process"),
        (kd.DiffusionModel(kd.networks.mlp(1, 8, 1, num_classes=7), mixture.diffusion), "conditions of the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixture.sample(1, guidance=Guidance(guide=guide), guidance_scale=2.0)
    with pytest.raises(ValueError, match="conditions of the model, or none"):
        TWO.model(schedule).sample(1, guidance=Guidance(guide=mixture), guidance_scale=2.0)


def test_guidance_interval(mixture):
    """Outside it nothing is guided; the whole of 1..T is no restriction."""
    sampler = kd.samplers.DPMSolver(10)
    plain, guided = (mixture.sample(8, sampler, seed=0, labels=0, guidance_scale=w) for w in (1.0, 3.0))
    sample = lambda *interval: mixture.sample(
        8, sampler, seed=0, labels=0, guidance_scale=3.0, guidance=Guidance(interval=interval)
    )
    np.testing.assert_allclose(sample(1, 1000), guided, atol=1e-6)
    np.testing.assert_allclose(sample(2000, 3000), plain, atol=1e-6)
    some = sample(300, 700)
    assert not np.allclose(some, plain, atol=1e-3) and not np.allclose(some, guided, atol=1e-3)


def unet(**kwargs):
    return kd.networks.unet((8, 8, 1), 8, (1, 2), 1, (), 4, **kwargs)


def test_rescale_keeps_the_deviation_of_the_conditional_output():
    network = kd.networks.mlp(64, 16, 1, num_classes=3)
    randomize(network)
    call = lambda *inputs: network(list(inputs))
    predict = guidance.guided(call, guidance.without_condition(call, nulls=(3,)), sometimes=False)
    x = ops.convert_to_tensor(np.random.default_rng(0).standard_normal((4, 64)), "float32")
    t, label = ops.full((4,), 300, dtype="int32"), ops.convert_to_tensor([0, 1, 2, 0], "int32")
    got = ops.convert_to_numpy(predict(x, t, label, 4.0, 1.0))
    conditional, null = (ops.convert_to_numpy(network([x, t, v])) for v in (label, ops.full_like(label, 3)))
    std = got.std(axis=1)
    np.testing.assert_allclose(std, conditional.std(axis=1), rtol=1e-4)
    guided = 4 * conditional - 3 * null
    np.testing.assert_allclose(got / std[:, None], guided / guided.std(axis=1, keepdims=True), rtol=1e-3, atol=1e-4)


def test_rescale_of_a_network_that_outputs_zeros():
    """Mistake of others: the deviation of zeros is divided by itself, and the samples are NaN."""
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1, num_classes=3), seed=0)
    x = model.sample(4, kd.samplers.DDIM(5), seed=0, labels=1, guidance_scale=3.0, guidance=Guidance(rescale=0.7))
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize(
    "make", [lambda **k: kd.networks.mlp(2, 16, 1, **k), unet, lambda **k: kd.networks.dit((4, 4, 1), 2, 16, 1, 2, **k)]
)
@pytest.mark.parametrize("kind", [{"num_classes": 3}, {"context_dim": 5}])
def test_networks_listen_to_their_condition(make, kind):
    network = make(**kind)
    assert np.all(ops.convert_to_numpy(network([np.zeros((2, *v.shape[1:])) for v in network.inputs])) == 0)
    randomize(network)
    x, t = np.ones((3, *network.inputs[0].shape[1:])), np.full(3, 10)
    conditions = np.arange(3) if "num_classes" in kind else np.random.default_rng(0).normal(size=(3, 5))
    y = ops.convert_to_numpy(network([x, t, conditions]))
    assert not np.allclose(y[0], y[1], atol=1e-3) and not np.allclose(y[1], y[2], atol=1e-3)
    for wrong in ({"num_classes": 3, "context_dim": 5}, {"num_classes": 0}, {"context_dim": 2.5}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            make(**wrong)


def points(num=512):
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, num)
    return (np.where(labels == 0, -0.6, 0.6)[:, None] + 0.05 * random.standard_normal((num, 2))).astype(
        "float32"
    ), labels


@pytest.mark.parametrize("vectors", [False] + [True] * TORCH)  # backends do not differ in what a condition is
def test_learns_its_classes(vectors, tmp_path):
    """A trained model samples the class asked for, also after it was saved."""
    x, labels = points()
    conditions = np.eye(2, dtype="float32")[labels] if vectors else labels
    network = kd.networks.mlp(2, 32, 2, **({"context_dim": 2} if vectors else {"num_classes": 2}))
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.linear(50), "v"), 0.9, seed=0)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(5e-3))
    model.fit(x, conditions, epochs=30, batch_size=64, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for label, side in ((0, -1), (1, 1)):
        condition = np.eye(2)[label] if vectors else label
        samples = model.sample(50, seed=0, labels=condition)
        assert np.mean(np.sign(samples) == side) > 0.95
        assert np.array_equal(loaded.sample(50, seed=0, labels=condition), samples)
        guided = model.sample(50, seed=0, labels=condition, guidance_scale=2.0)
        assert not np.array_equal(guided, samples) and np.mean(np.sign(guided) == side) > 0.95
    none = model.sample(50, seed=0)
    assert 0.2 < np.mean(none[:, 0] > 0) < 0.8


def test_the_share_of_labels_that_is_dropped():
    x, labels = points(4096)
    corruption = kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=2), label_dropout=0.3).corruption
    (_, _, got), _, _ = corruption(x, labels, None, keras.random.SeedGenerator(0))
    got = ops.convert_to_numpy(got)
    assert abs(np.mean(got == 2) - 0.3) < 5 * (0.3 * 0.7 / 4096) ** 0.5
    assert np.array_equal(got[got < 2], labels[got < 2])
    corruption = dataclasses.replace(corruption, label_dropout=0.0)
    (_, _, got), _, _ = corruption(x, labels, None, keras.random.SeedGenerator(0))
    assert np.array_equal(ops.convert_to_numpy(got), labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 2}, r"integers in 0..1, .*values=2"),
        ({"labels": -1}, "values=-1"),
        ({"labels": 0.5}, "values=0.5"),
        ({"labels": [0, 1]}, r"of shape \(3,\) or \(\). Received: shape=\(2,\)"),
        ({"labels": 0, "guidance_scale": -1}, "guidance_scale=-1"),
        ({"labels": 0, "guidance_scale": "2"}, "guidance_scale='2'"),
        ({"labels": 0, "guidance": Guidance(dynamic_threshold=0.9)}, "Nothing is clipped"),
        ({"labels": 0, "guidance": 0.7}, "must be a `guidance.Guidance`. Received: guidance=0.7"),
        ({"guidance_scale": 2.0}, "needs labels"),
    ],
)
def test_bad_labels_and_guidance(mixture, arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture.sample(3, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": 1.5}, "rescale=1.5"),
        ({"interval": (5, 3)}, r"interval=\(5, 3\)"),
        ({"interval": 5}, "interval=5"),
        ({"interval": ("a", "b")}, "interval.*'a'"),
        ({"dynamic_threshold": 1.0}, "dynamic_threshold=1.0"),
    ],
)
def test_bad_options_of_guidance(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


def test_options_reach_the_network():
    """And at initialisation, where the network outputs 0, a rescaled guidance is no 0/0."""
    network = kd.networks.mlp(16, 8, 1, num_classes=3)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(50), "v"))

    def sample(**options):
        return model.sample(2, kd.samplers.DDIM(5), seed=0, labels=1, guidance_scale=4.0, use_ema=False, **options)

    assert np.all(np.isfinite(sample(guidance=Guidance(rescale=0.7))))
    randomize(model.network)
    plain = sample()
    for options in ({"rescale": 0.7}, {"dynamic_threshold": 0.6}, {"interval": (10, 30)}):
        assert not np.allclose(sample(guidance=Guidance(**options)), plain, atol=1e-3), options


def test_takes_generators_of_lists():
    x, labels = points(32)
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=2))
    model.compile(loss="mse")
    model.fit(([x, labels] for _ in range(2)), steps_per_epoch=2, epochs=1, verbose=0, shuffle=False)


def test_bad_conditions_in_training():
    x, labels = points(32)
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=2))
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="give `.x_0, label.` batches"):
        model.fit(x)
    with pytest.raises(ValueError, match="integers in 0..1"):
        model.fit(x, labels + 1)
    with pytest.raises(ValueError, match="integers in 0..1"):  # also where the first batch does not show it
        model.fit(kd.datasets.from_arrays(x, np.append(labels[:-1], 2), batch_size=4, shuffle=False))
    with pytest.raises(ValueError, match="label_dropout=1"):
        kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=2), label_dropout=1)
    inputs = keras.Input((2,)), keras.Input(()), keras.Input((), dtype="int32")
    with pytest.raises(ValueError, match="label_embedding"):
        kd.DiffusionModel(keras.Model(inputs, inputs[0] * ops.cast(inputs[2], "float32")[:, None]))
    with pytest.raises(ValueError, match="has no condition.* Received: labels=0"):
        kd.DiffusionModel(kd.networks.mlp(2, 8, 1)).sample(2, labels=0)


def test_names_of_classes(tmp_path):
    """A model takes the names of its data, keeps them in its file, and knows similar ones."""
    network = kd.networks.mlp(2, 8, 1, num_classes=3)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.linear(25)))
    model.compile(loss="mse", optimizer="adam")
    data = kd.datasets.Batches(np.zeros((6, 2)), np.arange(6) % 3, 3, class_names=np.array(["rose", "tulip", "lily"]))
    model.fit(data, verbose=0)
    model.save(tmp_path / "x.keras")
    model = kd.saving.load_model(tmp_path / "x.keras")
    assert model.condition.class_names == ("rose", "tulip", "lily")
    sampler = kd.samplers.DDIM(2)
    by_name = model.sample(2, sampler, seed=0, labels=["lily", "tulip"])
    assert np.array_equal(by_name, model.sample(2, sampler, seed=0, labels=[2, 1]))
    assert np.array_equal(model.sample(2, sampler, seed=0, labels="tulip"), model.sample(2, sampler, seed=0, labels=1))
    with pytest.raises(ValueError, match="There is no class 'tulips'. Similar names: tulip"):
        model.sample(1, labels="tulips")
    with pytest.raises(ValueError, match="There is no class 'x'. Similar names: rose, tulip, lily"):
        model.sample(1, labels="x")
    for names in (["a", "b"], ["a", "b", "b"], [1, 2, 3]):
        with pytest.raises(ValueError, match="must be 3 different names"):
            kd.DiffusionModel(network, class_names=names)
    for other in (kd.networks.mlp(2, 8, 1), kd.networks.mlp(2, 8, 1, context_dim=2)):
        with pytest.raises(ValueError, match="no labels to name"):
            kd.DiffusionModel(other, class_names=["a"])


@pytest.mark.parametrize("of_model, of_data", [(["a", "b", "c"], ["a", "c", "b"]), (None, ["a", "b"])])
def test_names_that_do_not_fit_are_said(of_model, of_data):
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=3), class_names=of_model)
    model.compile(loss="mse", optimizer="adam")
    data = kd.datasets.Batches(np.zeros((4, 2)), [0, 1, 1, 0], batch_size=4, class_names=of_data)
    with pytest.warns(UserWarning, match="check that they mean the same"):
        model.fit(data, verbose=0)
    assert model.condition.class_names == (of_model and tuple(of_model))


def test_names_are_no_labels_of_data():
    x, _ = points(4)
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=2), class_names=["a", "b"])
    model.compile(loss="mse", optimizer="adam")
    with pytest.raises(ValueError, match="Labels are integers: see `np.unique`"):
        model.fit(x, np.array(["a", "b", "b", "a"]))


INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_in_data_have_any_integer_dtype(dtype):
    """Also if there are more classes than the dtype can count."""
    x, labels = np.zeros((4, 2), "float32"), np.array([0, 1, 99, 3]).astype(dtype)
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=300), seed=0)
    model.compile("adam", "mse", run_eagerly=EAGER)
    for data in ((x, labels), (kd.datasets.Batches(x, labels, 4),)):
        assert np.isfinite(model.fit(*data, verbose=0).history["loss"][0])


COMPOSED, DECOMPOSED = ["café", "b", "Å"], ["cafe\u0301", "b", "A\u030a"]
LABEL = (conditions.Part("label", (), 3),)


@pytest.mark.parametrize("known, asked", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_have_any_dtype_and_normal_form(known, asked):
    condition = conditions.Condition(LABEL, known)
    assert condition.class_names == tuple(COMPOSED)
    forms = [list, tuple, np.array, lambda names: np.array(names, object), lambda names: [n.encode() for n in names]]
    if hasattr(np.dtypes, "StringDType"):
        forms.append(lambda names: np.array(names, np.dtypes.StringDType()))
    for form in forms:
        assert condition.encoded(form(asked), 3).tolist() == [0, 1, 2]
    assert condition.encoded(asked[2], 2).tolist() == [2, 2]
    assert condition.encoded(np.array([2, 0], object), 2).tolist() == [2, 0]
    for names in (
        [COMPOSED[0], DECOMPOSED[0], "b"],
        ["a", "b", "a "],
        ["a", "b", "\x1b[2J"],
        ["a", "b", " "],
        ["a", "b", 1],
    ):
        with pytest.raises(ValueError, match="`class_names` must be 3 different names without control characters"):
            conditions.Condition(LABEL, names)
    with pytest.raises(ValueError, match="`class_names` must be different names"):
        kd.datasets.Batches(np.zeros((4, 2)), np.zeros(4), 4, class_names=["a", "a"])
    assert conditions.Condition((conditions.Part("label", (), 2),), ["a\nb", "<b>&\u200c/.."]).class_names == (
        "a b",
        "<b>&\u200c/..",
    )
    with pytest.raises(ValueError, match="There is no class 'cafe'. Similar names: café"):
        condition.encoded(["cafe", "b"], 2)


def test_a_model_carries_its_scale(tmp_path):
    network = kd.networks.mlp(4, 8, 1, num_classes=3)
    randomize(network)
    process = kd.GaussianDiffusion(prediction="v", clip_range=None)
    model = kd.DiffusionModel(network, process, guidance_scale=3.0, sampler=kd.samplers.DDIM(3))
    model.save(tmp_path / "m.keras")
    loaded = kd.saving.load_model(tmp_path / "m.keras")
    expected = model.sample(2, seed=0, labels=1, guidance_scale=3.0)
    for other in (model, loaded, kd.DiffusionModel.from_model(loaded)):
        np.testing.assert_allclose(other.sample(2, seed=0, labels=1), expected, atol=1e-6)
    assert not np.allclose(model.sample(2, seed=0, labels=1, guidance_scale=1.0), expected, atol=1e-3)
    np.testing.assert_array_equal(model.sample(2, seed=0), model.sample(2, seed=0, guidance_scale=1.0))
    with pytest.raises(ValueError, match="`guidance_scale` must be in"):
        kd.DiffusionModel(network, guidance_scale=-1)
