"""The fast functions for PyTorch: that they are used, and what runs if PyTorch lacks an operator that they need.

`test_layers.py`, `test_optimizers.py` and `test_ema.py` compare their results.
"""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, TORCH, randomize
from keras import ops

import keras_ddpm as kd
from keras_ddpm import layers
from keras_ddpm.samplers import loop as sampling

torch = pytest.importorskip("torch")
if not TORCH:
    pytest.skip("only on PyTorch", allow_module_level=True)

from keras_ddpm._backend import torch as fast  # noqa: E402


@pytest.fixture(autouse=True)
def _fast(request):
    if request.config.getoption("--plain"):
        pytest.skip("these are of the fast functions")


def small_network():
    """A network with every kind of layer, no weight at zero, and inputs for it."""
    network = kd.networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4, num_classes=2)
    randomize(network, 0.1)
    random = np.random.default_rng(0)
    inputs = random.normal(size=(2, 8, 8, 1)).astype("float32"), np.array([5, 9]), np.array([0, 2])
    return network, [ops.convert_to_tensor(value) for value in inputs]


def record(function, *arguments):
    """The result of the recorded function, and its recording; `None` if there is none."""
    recordings = {}
    with torch.no_grad():
        result = fast.recorded(function, recordings, fast.RECORDED_FROM)(*arguments)
    ((_, compute),) = recordings.values()
    return result, compute if isinstance(compute, torch.fx.GraphModule) else None


def test_fast_functions_are_called_where_they_belong(monkeypatch):
    """A training step and a job of sampling call each of them. It is counted, as the plain ones compute the same."""
    calls = dict.fromkeys(["conv2d", "upsampled_conv2d", "group_norm", "adam_step", "recorded"], 0)

    def counted(name, function):
        def count(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return count

    for name in calls:
        monkeypatch.setattr(fast, name, counted(name, getattr(fast, name)))
    network, _ = small_network()
    counts = {kind: sum(isinstance(layer, kind) for layer in network.layers) for kind in (layers.Conv2D,)}
    model = kd.DiffusionModel(network, seed=0)
    model.compile(loss="mse", optimizer=kd.optimizers.Adam(1e-3))
    for name in calls:
        calls[name] = 0
    model.train_on_batch(np.zeros((2, 8, 8, 1), "float32"), np.zeros(2, "int32"))
    assert calls["conv2d"] == counts[layers.Conv2D] and calls["upsampled_conv2d"] == 1 and calls["group_norm"]
    assert calls["adam_step"] == len(network.trainable_variables)
    model.sample(2, kd.samplers.DDIM(2), labels=0)
    assert calls["recorded"] == 1


def test_gradients_are_those_of_the_plain_functions():
    """In a process of its own, as PyTorch 2.13 ends the process in the gradient of some group normalizations."""
    script = [sys.executable, "-X", "faulthandler", ROOT / "tests" / "gradients_on_torch.py"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode and re.fullmatch(r"\s*\d{4} cases, 0 differ\s*", done.stdout), done.stdout + done.stderr


def test_variables_are_arranged():
    """Kernels, their averages and the optimizer's slots; their values stay."""
    network, _ = small_network()
    before = network.get_weights()
    model = kd.DiffusionModel(network, seed=0)
    model.compile(loss="mse", optimizer="adam")
    assert all(map(np.array_equal, before, network.get_weights()))
    for variable in [*model.network.weights, *model.ema_weights, *model.optimizer.variables]:
        if len(variable.shape) == 4:
            assert variable.value.permute(3, 2, 0, 1).is_contiguous(memory_format=torch.channels_last)


def test_attention_is_left_to_pytorch_if_its_scores_are_large(monkeypatch):
    calls = []
    attend = ops.dot_product_attention
    monkeypatch.setattr(ops, "dot_product_attention", lambda *args: calls.append(tuple(args[0].shape)) or attend(*args))
    for largest, expected in ((64, []), (63, [(1, 64, 1, 4)])):
        layer = layers.Attention()
        layer.max_dense_attention = largest
        layer(torch.randn(1, 8, 8, 12))
        assert calls == expected


# Recordings.


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_recordings_read_variables_anew_in_each_job(policy):
    keras.config.set_dtype_policy(policy)
    network, inputs = small_network()
    predict, recordings = lambda *inputs: network(list(inputs)), {}
    for _ in range(2):
        with torch.no_grad():
            expected = ops.convert_to_numpy(network(inputs))
            result = ops.convert_to_numpy(sampling.recorded(predict, recordings, 100)(*inputs))
        # In bfloat16 a sum of residuals is rounded once instead of twice.
        tolerance = {"float32": 1e-5, "mixed_bfloat16": 0.02}[policy]
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
        for variable in network.weights:
            variable.assign(0.5 * variable)
    assert len(recordings) == 1


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_what_depends_on_weights_alone_is_computed_once(monkeypatch, policy):
    """No weight is converted, and convolutions add residuals themselves, unless their images are interleaved."""
    monkeypatch.setattr(fast, "batch_interleave", lambda x: 1)
    keras.config.set_dtype_policy(policy)
    network, inputs = small_network()
    _, recording = record(lambda *inputs: network(list(inputs)), *inputs)
    nodes = list(recording.graph.nodes)
    assert not [node for node in nodes if node.op == "get_attr"]
    if policy == "mixed_bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return  # oneDNN has no such convolutions on this CPU
    targets = [str(node.target) for node in nodes]
    assert "aten.convolution.default" not in targets
    blocks = [layer for layer in network.layers if layer.name.endswith("_add")]
    assert targets.count("mkldnn._convolution_pointwise.binary") == len(blocks)


PRIVATE = [
    "_convolution_pointwise",
    "_convolution_transpose_pointwise",
    "_reorder_convolution_weight",
    "_reorder_convolution_transpose_weight",
    "_is_mkldnn_acl_supported",
    "_is_mkldnn_bf16_supported",
]


@pytest.mark.parametrize("missing", PRIVATE)
@pytest.mark.parametrize("renamed", [False, True])
def test_without_a_private_operator_the_function_itself_runs(monkeypatch, missing, renamed):
    """Whether a release of PyTorch lacks the operator, or has one that takes other arguments."""
    real = torch.ops.mkldnn

    class Mkldnn:
        def __getattr__(self, name):
            if name != missing:
                return getattr(real, name)
            if renamed:
                return torch.ops.aten.relu
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Mkldnn())
    network, inputs = small_network()
    result, recording = record(lambda *inputs: network(list(inputs)), *inputs)
    assert recording is None
    with torch.no_grad():
        assert torch.equal(result, network(inputs))


def test_without_make_fx_the_function_itself_runs(monkeypatch):
    from torch.fx.experimental import proxy_tensor

    monkeypatch.delattr(proxy_tensor, "make_fx")
    result, recording = record(lambda x: 2 * x, torch.ones(3))
    assert recording is None and result.tolist() == [2, 2, 2]


def test_what_looks_at_values_is_not_recorded():
    for largest in (1, 2, 3):
        result, recording = record(lambda x: x / float(ops.max(x)), torch.tensor([0.5, 1.0]) * largest)
        assert recording is None and result.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_of_every_kind(channels_last):
    """Additions of another shape, to themselves, scaled, or in another order of axes stay as they are."""
    make = lambda *shape: torch.nn.Parameter(torch.randn(shape))
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
    result, recording = record(function, x)
    with torch.no_grad():
        np.testing.assert_allclose(result, function(x), rtol=1e-4, atol=1e-3)
    assert recording.code.count("_convolution_pointwise.binary(") == channels_last
    assert recording.code.count("_convolution_transpose_pointwise.default(") == 2 * channels_last
    assert recording.code.count("aten.convolution.default(") == (2 if channels_last else 14)


def test_recordings_are_those_of_the_autocast_around_them():
    network, inputs = small_network()
    predict, recordings = lambda *inputs: network(list(inputs)), {}
    for dtype in (torch.bfloat16, None, torch.bfloat16, None):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected, result = predict(*inputs), fast.recorded(predict, recordings, 100)(*inputs)
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(
            result.float(), expected.float(), rtol=1e-5 if dtype is None else 0.03, atol=1e-5 if dtype is None else 0.03
        )
    assert len(recordings) == 2


def test_samples_do_not_depend_on_what_was_sampled_before():
    """A long job is recorded from its first call on, a short one never is."""
    model = kd.DiffusionModel(small_network()[0], seed=0)
    samplers = [kd.samplers.DDIM(6), kd.samplers.DDIM(60)]
    first, again = ([model.sample(2, sampler, seed=0, labels=1) for sampler in samplers] for _ in range(2))
    assert all(map(np.array_equal, first, again))
    model.sample(3, samplers[0], labels=1)
    program = model._loop.programs(model._predictors(True, "none", None, ()), clips=True, draws_noise=False)
    assert model._loop.programs.cache_info().currsize == 1
    assert [shapes[0][0][0] for shapes in program.recordings] == [2]


def test_weights_that_are_changed_on_the_way_are_no_constants():
    """`ops.scatter_update` changes a copy of its argument in place. Noise shaped like a weight is drawn each time."""
    weight = torch.nn.Parameter(torch.zeros(3))

    def function(x):
        return torch.clone(weight).index_put_((torch.tensor([0, 1]),), x, accumulate=True)

    recordings = [{}, {}]
    for value in (1.0, 2.0, 3.0):
        with torch.no_grad():
            recorded = fast.recorded(function, recordings[0], 100)
            np.testing.assert_array_equal(recorded(torch.full((2,), value)), [value, value, 0.0])
    drawn = fast.recorded(lambda x: x + torch.rand_like(weight), recordings[1], 100)
    with torch.no_grad():
        assert not torch.equal(drawn(torch.zeros(3)), drawn(torch.zeros(3)))
    for recording in recordings:
        assert all(isinstance(compute, torch.fx.GraphModule) for _, compute in recording.values())
