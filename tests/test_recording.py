import contextlib
import resource

import keras
import numpy as np
import pytest
from keras import ops

import keras_ddpm as kd
from keras_ddpm import hardware
from keras_ddpm import networks
from keras_ddpm import recording

torch_alone = pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch alone records")


def small_network():
    """With every kind of layer, no weight at zero, and inputs for it."""
    network = networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4, num_classes=2)
    random = np.random.default_rng(0)
    network.set_weights([random.normal(0, 0.1, w.shape) for w in network.get_weights()])
    inputs = random.normal(size=(2, 8, 8, 1)).astype("float32"), np.array([5, 9]), np.array([0, 2])
    return network, [ops.convert_to_tensor(value) for value in inputs]


@pytest.mark.parametrize("make", [recording.Recording, recording.InferenceRecording])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_recorded_network_reads_its_variables(make, policy):
    keras.config.set_dtype_policy(policy)
    network, inputs = small_network()
    recorded = make(lambda *inputs: ops.stop_gradient(network(list(inputs))), after=3)
    fixed = getattr(recorded, "fixed_weights", contextlib.nullcontext)
    for _ in range(5):
        with fixed():
            before = ops.convert_to_numpy(recorded(*inputs))
    assert len(recorded.recorded) == (keras.backend.backend() == "torch")
    for variable in network.weights:
        variable.assign(0.5 * variable)
    expected = ops.convert_to_numpy(network(inputs))
    assert np.abs(expected - before).max() > 0.1
    with fixed():
        result = ops.convert_to_numpy(recorded(*inputs))
    # In bfloat16 a sum of residuals is rounded once where it was rounded twice.
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 0.02 if make is recording.InferenceRecording else 0}[policy]
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@torch_alone
def test_inference_computes_once_what_depends_on_weights_alone(monkeypatch):
    """No weight is converted, and convolutions add residuals themselves, where their images are not interleaved."""
    import torch

    monkeypatch.setattr(hardware, "images_at_once", lambda x: 1)
    keras.config.set_dtype_policy("mixed_bfloat16")
    network, inputs = small_network()
    recorded = recording.InferenceRecording(lambda *inputs: network(list(inputs)), after=1)
    with torch.no_grad(), recorded.fixed_weights():
        recorded(*inputs)
        (divided,) = recorded.recorded.values()
        assert all(value is not None for value in divided.constants)
    assert divided.constants is None
    assert "room_2047" in divided.run.code
    nodes = list(divided.run.graph.nodes)
    assert not [node for node in nodes if node.op == "get_attr"]
    targets = [str(node.target) for node in nodes]
    assert "aten.convolution.default" not in targets
    blocks = [layer for layer in network.layers if layer.name.endswith("_add")]
    assert targets.count("mkldnn._convolution_pointwise.binary") == len(blocks)


@torch_alone
@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_of_every_kind(channels_last):
    """Additions of another shape, to themselves, scaled, or in another order of axes stay as they are."""
    import torch

    make = lambda *shape: torch.nn.Parameter(torch.randn(shape))  # noqa: E731
    kernel, grouped, bias, in_1d = make(4, 4, 3, 3), make(4, 2, 3, 3), make(4), make(4, 4, 3)
    f = torch.nn.functional

    def function(x):
        x = torch.permute(x, (0, 3, 1, 2))
        x = x if channels_last else x.contiguous()
        convolutions = [
            f.conv2d(x, kernel, bias, padding=1),
            f.conv2d(x, kernel, None, 1, 2, 2),
            f.conv2d(x, grouped, bias, padding=1, groups=2),
            f.conv_transpose2d(x, kernel, bias, padding=1),
            f.conv1d(x[:, :, 0], in_1d, padding=1)[:, :, None].expand(x.shape),
        ]
        h = torch.permute(x, (0, 2, 3, 1))
        for y in convolutions:
            h = h + torch.permute(y, (0, 2, 3, 1))
            h = torch.permute(y, (0, 2, 3, 1)) + h
        last = [torch.permute(f.conv2d(x, kernel, padding=1), (0, 2, 3, 1)) for _ in range(4)]
        turned = torch.permute(f.conv2d(x, kernel, padding=1), (0, 3, 2, 1)) + torch.permute(x, (0, 3, 2, 1))
        h = h + (last[0] + 1.0) + (last[1] + last[1]) + (last[2] + h[0]) * torch.add(last[3], h, alpha=2)
        f.conv2d(x, kernel)  # which nobody wants
        y = torch.permute(f.conv2d(x, kernel, padding=1), (0, 2, 3, 1))
        other = torch.permute(x.contiguous(), (0, 2, 3, 1)) + y
        h = h + torch.permute(torch.permute(other, (0, 3, 1, 2)).view(3, 4, 36).view(x.shape), (0, 2, 3, 1))
        only = torch.permute(f.conv2d(x, kernel, bias, padding=1), (0, 2, 3, 1)) + h
        upsampled = torch.permute(f.conv_transpose2d(x, kernel, padding=1), (0, 2, 3, 1)) + only
        return torch.cat([upsampled.reshape(-1), turned.reshape(-1), f.conv2d(x, kernel, stride=2).reshape(-1)])

    x = torch.randn(3, 6, 6, 4)
    recorded = recording.InferenceRecording(function, after=1)
    with torch.no_grad():
        np.testing.assert_allclose(recorded(x), function(x), rtol=1e-4, atol=1e-3)
    (divided,) = recorded.recorded.values()
    assert divided.run.code.count("_convolution_pointwise.binary(") == channels_last
    assert divided.run.code.count("_convolution_transpose_pointwise.default(") == 2 * channels_last
    assert divided.run.code.count("aten.convolution.default(") == (2 if channels_last else 14)


@torch_alone
def test_operations_find_room_for_their_variables(monkeypatch):
    """However deep the call is, no operation takes memory from the system."""
    import torch

    def deepen(depth, function):
        return deepen(depth - 1, function) if depth else function()

    def faults(recorded, depth):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        deepen(depth, recorded)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def function():
        x = torch.zeros(2)
        for _ in range(300):
            x = x + 1.0
        return x

    worst = []
    for roomy in (True, False):
        if not roomy:
            monkeypatch.setattr(recording, "_roomy", lambda module: module)
        recorded = recording.Recording(function, after=1)
        recorded()
        worst.append(max(min(faults(recorded, depth) for _ in range(2)) for depth in range(300)))
    assert worst[0] < 50 < 250 < worst[1], worst


@torch_alone
@pytest.mark.parametrize(("dropout", "written_out"), [(0.0, 1024), (0.0, 0), (0.1, 1024)])
def test_recorded_training_is_training(monkeypatch, dropout, written_out):
    """The weights after sixty steps, but for a network that draws random numbers, which is not recorded."""
    monkeypatch.setattr(hardware, "longest_written_out", lambda: written_out)
    trained = []
    for records in (True, False):
        keras.utils.set_random_seed(0)
        model = kd.DiffusionModel(networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4, dropout), seed=0)
        model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-3, global_clipnorm=0.1))
        if not records:
            monkeypatch.setattr(model._network_in_training, "has_effects", lambda: True)
        x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype="uint8")
        model.fit(kd.datasets.from_arrays(x, batch_size=4, steps_per_epoch=60), verbose=0)
        assert bool(model._network_in_training.recorded) == (records and not dropout)
        trained.append(model.network.get_weights())
    for recorded, plain in zip(*trained):
        np.testing.assert_allclose(recorded, plain, rtol=1e-4, atol=1e-6)


@torch_alone
def test_training_without_recordings():
    """Where it is run eagerly, and on accelerators, where nothing but inference is recorded."""
    import torch

    model = kd.DiffusionModel(networks.mlp(width=8), seed=0)
    model.compile(loss="mse", optimizer="adam", run_eagerly=True)
    model.fit(np.zeros((4, 2), "float32"), batch_size=4, epochs=51, verbose=0)
    assert not model._network_in_training.calls
    recorded = recording.Recording(lambda x: 2 * x, after=1)
    recorded(torch.ones(2, device="meta"))
    assert not recorded.recorded
    with torch.no_grad():
        recorded(torch.ones(2, device="meta"))
    assert recorded.recorded


@torch_alone
def test_networks_that_add_to_the_loss_are_not_recorded():
    x_t, t = keras.Input((8, 8, 1)), keras.Input((), dtype="int32")
    y = keras.layers.Conv2D(1, 3, padding="same", activity_regularizer="l2")(x_t)
    model = kd.DiffusionModel(keras.Model([x_t, t], y), seed=0)
    model.compile(loss="mse", optimizer="adam")
    model.fit(np.zeros((4, 8, 8, 1), "float32"), batch_size=4, epochs=51, verbose=0)
    assert sum(model._network_in_training.calls.values()) == 51
    assert not model._network_in_training.recorded


@pytest.mark.parametrize("make", [recording.Recording, recording.InferenceRecording])
def test_what_looks_at_values_is_not_recorded(make):
    recorded = make(lambda x: x / float(ops.max(x)))
    for largest in range(1, 60):
        x = ops.convert_to_tensor(np.array([0.5, 1.0]) * largest, "float32")
        np.testing.assert_allclose(ops.convert_to_numpy(recorded(x)), [0.5, 1.0], rtol=1e-6)


def test_samples_do_not_depend_on_what_was_sampled_before():
    """A long job is recorded from its first call on, a short one never is."""
    model = kd.DiffusionModel(small_network()[0], seed=0)
    samplers = [kd.samplers.DDIM(6), kd.samplers.DDIM(60)]
    first, again = ([model.sample(2, sampler, seed=0, labels=1) for sampler in samplers] for _ in range(2))
    assert all(map(np.array_equal, first, again))
    model.sample(3, samplers[0], labels=1)
    options = {"use_ema": True, "stochastic": False, "guided": False, "rescale": 0.0, "dynamic_threshold": None}
    program = model.programs(**options, clip=True, masked=False)
    sizes = [shapes[0][0][0] for shapes in program.network.recorded]
    assert model.programs.cache_info().currsize == 1
    assert sizes == ([2] if keras.backend.backend() == "torch" else [])


@torch_alone
def test_weights_that_are_changed_on_the_way_are_no_constants():
    """As `ops.scatter_update` changes a copy of its argument; and noise of the shape of a weight is drawn each time."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(3))

    def function(x):
        return torch.clone(weight).index_put_((torch.tensor([0, 1]),), x, accumulate=True)

    recorded = recording.InferenceRecording(function, after=1)
    drawn = recording.InferenceRecording(lambda x: x + torch.rand_like(weight), after=1)
    with torch.no_grad(), recorded.fixed_weights(), drawn.fixed_weights():
        for value in (1.0, 2.0, 3.0):
            np.testing.assert_array_equal(recorded(torch.full((2,), value)), [value, value, 0.0])
        assert recorded.recorded and not torch.equal(drawn(torch.zeros(3)), drawn(torch.zeros(3)))
