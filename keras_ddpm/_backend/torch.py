"""Faster implementations for PyTorch of functions that have a plain body elsewhere in the package.

`devices.fast_on_torch` calls the function of the same name in this module. If it returns `NotImplemented`, the plain
body runs. Only `devices` imports this module. `tests/benchmarks/fast_functions.py` measures what each function saves.
"""

import threading
from typing import Any

import numpy as np
import torch
from keras import ops

# Jobs with at least this many network calls are recorded. A recording takes as long as fifty calls. Later jobs of the
# same batch size use it again.
RECORDED_FROM = 20
RECORDING = threading.RLock()  # PyTorch records one function at a time in a process


def conv2d(x, kernel, bias, strides, padding, dilation, groups, training):
    """Convolves without the copies between channels last and channels first that Keras makes.

    PyTorch's convolutions are fastest for images whose channels come last in memory. So only the view is permuted.
    """
    if not strides == dilation == (1, 1) or groups > 1:
        return NotImplemented
    if training and kernel.shape[:2] == (1, 1):
        return torch.nn.functional.linear(x, kernel[0, 0].T, bias)  # has a faster gradient
    interleaved = padding == "same" and kernel.shape[1] > 1 and all(size % 2 for size in kernel.shape[:2])
    several = batch_interleave(x) if interleaved else 1
    # The first column of each image, then the second column of each image, and so on.
    x = x if several == 1 else x.unflatten(0, (-1, several)).movedim(1, 3).flatten(2, 3)
    x, kernel = torch.permute(x, (0, 3, 1, 2)), torch.permute(kernel, (3, 2, 0, 1))
    if len(kernel) == 1:  # of a single image, PyTorch cannot compute the gradient of such a view
        kernel = kernel.contiguous()
    x = torch.permute(torch.nn.functional.conv2d(x, kernel, bias, 1, padding, (1, several)), (0, 2, 3, 1))
    return x if several == 1 else x.unflatten(2, (-1, several)).movedim(3, 1).flatten(0, 1)


def batch_interleave(x):
    """The number of narrow images to convolve as one, with interleaved columns and a dilated kernel.

    On a CPU, oneDNN multiplies tiles of 16 pixels of a row. An image 8 pixels wide fills half of each tile. Images at
    least 16 pixels wide gain nothing.
    """
    batch, _, width, _ = x.shape
    if x.device.type != "cpu" or width >= 16:
        return 1
    return max(number for number in range(1, 32 // width + 1) if batch % number == 0)


def upsampled_conv2d(x, kernel, bias):
    """Computes one transposed convolution of stride two, with 4/9 of the multiplications.

    Several entries of the 3x3 kernel are multiplied by copies of the same pixel, so they are added up first. The result
    is a 4x4 kernel: the 3x3 kernel convolved with a 2x2 kernel of ones.
    """
    sums = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # along one axis, mirrored for the transposition
    channels, filters = kernel.shape[2:]
    kernel = torch.mm(ops.cast(np.kron(sums, sums), kernel.dtype), kernel.reshape(9, channels * filters))
    kernel = torch.permute(kernel.reshape(4, 4, channels, filters), (2, 3, 0, 1))
    x = torch.nn.functional.conv_transpose2d(torch.permute(x, (0, 3, 1, 2)), kernel, bias, stride=2, padding=1)
    return torch.permute(x, (0, 2, 3, 1))


def group_norm(x, gamma, beta, groups, epsilon):
    """Uses PyTorch's group normalization for bfloat16. Keras does not call it.

    PyTorch sums in float32 but computes the variance as E[x²] − E[x]². For float32 images this loses too many digits.
    If gamma or beta need a gradient and x does not, PyTorch 2.13 ends the process.
    """
    if x.dtype != torch.bfloat16 or (torch.is_grad_enabled() and not x.requires_grad):
        return NotImplemented
    x = torch.nn.functional.group_norm(torch.permute(x, (0, 3, 1, 2)), groups, gamma, beta, epsilon)
    return torch.permute(x, (0, 2, 3, 1))


def attention(query, key, value, max_dense):
    """Uses PyTorch's fused kernel for more than `max_dense` queries. For fewer, two products are faster."""
    if query.shape[1] <= max_dense:
        return NotImplemented
    return ops.dot_product_attention(query[:, :, None], key[:, :, None], value[:, :, None])[:, :, 0]


def arrange(variables):
    """Arranges the kernels of convolutions in memory as PyTorch's convolutions read them."""
    for variable in variables:
        if len(variable.shape) == 4:
            variable.value.data = variable.value.data.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def adam_step(optimizer, gradient, variable, learning_rate):
    """Uses PyTorch's fused Adam on a CPU if all tensors have the same layout in memory."""
    from torch.optim.adam import adam

    try:
        index = optimizer._get_variable_index(variable)
        slots = optimizer._momentums[index].value, optimizer._velocities[index].value
    except AttributeError:  # another version of Keras names them otherwise
        return NotImplemented
    tensors = [variable.value, gradient, *slots]
    layouts = {(x.dtype, *(stride for stride, size in zip(x.stride(), x.shape) if size > 1)) for x in tensors}
    if optimizer.amsgrad or gradient.device.type != "cpu" or len(layouts) > 1:
        return NotImplemented
    # PyTorch's Adam is slow if the order in memory is not the order of the axes. So it gets flat views.
    value, gradient, momentum, velocity = (x.detach().as_strided((x.numel(),), (1,)) for x in tensors)
    steps = int(optimizer.iterations)
    lists: Any = [value], [gradient], [momentum], [velocity], [], [torch.tensor(float(steps))]
    # Keras adds epsilon before it corrects the bias, and it has already applied the weight decay.
    numbers = {
        "eps": optimizer.epsilon / (1 - optimizer.beta_2 ** (steps + 1)) ** 0.5,
        "beta1": optimizer.beta_1,
        "beta2": optimizer.beta_2,
        "lr": float(learning_rate),
        "weight_decay": 0.0,
    }
    adam(*lists, fused=True, amsgrad=False, maximize=False, **numbers)  # type: ignore[misc]


def random_state():
    """Returns the state of the CPU, then of each CUDA device. Keras' `Dropout` without a seed uses them."""
    return [state.numpy() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())]


def set_random_state(states):
    states = [torch.from_numpy(state) for state in states]
    if states:
        torch.set_rng_state(states[0])
    if len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])


# Recordings: a recording is the graph of PyTorch operations of a network. It runs without the network's Python code.


def recorded(function, recordings, calls):
    """Makes a recording for each shape of the arguments, with and without autocast.

    What depends on weights alone is computed once for each returned function, such as weights converted to bfloat16 and
    kernels in the order that oneDNN reads. The last convolution of a residual block also adds the block's input.
    Results equal the function's results up to rounding.
    """
    if int(calls) < RECORDED_FROM:
        return NotImplemented
    constants = {}

    def run(*arguments):
        arguments = tuple(x.contiguous() for x in arguments)  # a recording holds for one layout in memory
        device = arguments[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (*((tuple(x.shape), x.dtype) for x in arguments), autocast)
        with RECORDING:
            if key not in recordings:
                recordings[key] = _record(function, arguments)
        prepare, compute = recordings[key]
        if key not in constants:
            constants[key] = prepare()
        return compute(*constants[key], *arguments)

    return run


def _record(function, arguments):
    """Returns two functions: from nothing to constants, and from constants and arguments to the result.

    If the function cannot be recorded, the second is the function itself. This happens if it reads values of tensors,
    or if a release of PyTorch lacks one of the private operations that are used here.
    """
    try:
        from torch.fx.experimental.proxy_tensor import make_fx

        module = make_fx(function)(*arguments)
        if _changes_constants(module.graph):
            return (lambda: ()), module
        _fuse_convolutions(module.graph)
        prepare, compute = _divide(module)
        compute(*prepare(), *arguments)
        return prepare, compute
    except (AttributeError, ImportError, RuntimeError, TypeError):
        return (lambda: ()), function


def _divide(module):
    """Divides the graph in two: from weights to constants, and from constants and arguments to the result."""
    graph = module.graph
    fixed = _fixed(graph)
    copies, first = torch.fx.Graph(), next(iter(graph.nodes))
    originals: dict = {}
    for node in fixed:
        originals[node] = copies.node_copy(node, originals.get)
    needed = [node for node in fixed if any(user not in originals for user in node.users)]
    copies.output([originals[node] for node in needed])
    with graph.inserting_before(first):
        for index, node in enumerate(needed):
            node.replace_all_uses_with(graph.placeholder(f"constant_{index}"))
    graph.eliminate_dead_code()
    return torch.fx.GraphModule(module, copies), torch.fx.GraphModule(module, graph)


def _fixed(graph):
    """The nodes that depend on weights alone, in order."""
    fixed: dict = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if node.op == "get_attr" or inputs and node.op == "call_function" and all(n in fixed for n in inputs):
            fixed[node] = None
    return list(fixed)


def _changes_constants(graph):
    """Whether an operation on arguments changes a tensor in place that depends on weights alone."""
    fixed = set(_fixed(graph))
    schemas = {node: getattr(node.target, "_schema", None) for node in set(graph.nodes) - fixed}
    changing = [node for node, schema in schemas.items() if schema is not None and schema.is_mutable]
    return any(not fixed.isdisjoint(node.all_input_nodes) for node in changing)


def _fuse_convolutions(graph):
    """Replaces convolutions by the operations of oneDNN that PyTorch's inductor uses for inference on a CPU."""
    aten, mkldnn, backend = torch.ops.aten, torch.ops.mkldnn, torch.backends.mkldnn
    if not (backend.is_available() and backend.enabled) or mkldnn._is_mkldnn_acl_supported():
        return
    graph.eliminate_dead_code()
    fixed = set(_fixed(graph))
    for node in list(graph.nodes):
        if node.target is not aten.convolution.default or node.args[1] not in fixed or not _is_replaceable(node):
            continue
        x, kernel, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
        name, more = ("_transpose", [output_padding]) if transposed else ("", [])
        options = (padding, *more, stride, dilation, groups)
        reorder = getattr(mkldnn, f"_reorder_convolution{name}_weight").default
        convolve = getattr(mkldnn, f"_convolution{name}_pointwise")
        place, other = (node, None) if transposed else _residual_addition(node)
        with graph.inserting_before(place):
            kernel = graph.call_function(reorder, (kernel, *options, list(x.meta["val"].shape)))
            if other is None:
                new = graph.call_function(convolve.default, (x, kernel, bias, *options, "none", [], ""))
            else:
                other = graph.call_function(aten.permute.default, (other, [0, 3, 1, 2]))
                arguments = (x, other, kernel, bias, *options, "add", 1, None, [], None)
                new = graph.call_function(convolve.binary, arguments)
                new = graph.call_function(aten.permute.default, (new, [0, 2, 3, 1]))
        new.meta = dict(place.meta)
        place.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _is_replaceable(convolution):
    """Whether oneDNN has this convolution and its result has the memory layout that the next operation expects."""
    x, *_, stride, _, _, transposed, output_padding, groups = convolution.args
    images = x.meta.get("val")  # older versions of PyTorch do not set it for weights
    dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if images is None or images.device.type != "cpu" or images.dtype not in dtypes or images.ndim != 4 or groups != 1:
        return False
    if transposed and any(p >= s for p, s in zip(output_padding, stride)):
        return False
    return images.is_contiguous(memory_format=torch.channels_last)


def _residual_addition(convolution):
    """Finds the addition of the convolution's result to other images of the same shape and dtype.

    Returns the node of the addition and the node of the other images. If there is no such addition, or the result is
    used elsewhere, too, returns the convolution itself and `None`.
    """
    node = convolution
    for target in (torch.ops.aten.permute.default, torch.ops.aten.add.Tensor):
        summand, users = node, list(node.users)
        if len(users) != 1 or users[0].target is not target:
            return convolution, None
        node = users[0]
    others = [other for other in node.args if other is not summand]
    if list(summand.args[1]) != [0, 2, 3, 1] or node.kwargs or len(others) != 1:
        return convolution, None
    value, other = summand.meta["val"], getattr(others[0], "meta", {}).get("val")
    if other is None or (value.shape, value.dtype) != (other.shape, other.dtype):
        return convolution, None
    # The fused result is contiguous.
    return (node, others[0]) if node.meta["val"].is_contiguous() else (convolution, None)
