"""Faster implementations for PyTorch of functions that have a plain body elsewhere in the package.

`_devices.fast_on_torch` calls the function of the same name here. The plain body runs if that returns `NotImplemented`.
Nothing else in the package depends on this module. docs/benchmarks.md has what each function is worth.
"""

import keras
import numpy as np
import torch
from keras import ops

# Jobs with this many network calls are recorded. A recording takes as long as fifty calls, once for each batch size.
RECORDED_FROM = 20


def conv2d(x, kernel, bias, strides, padding, dilation, groups, training):
    """Without the copies between channels last and channels first that Keras makes around each convolution.

    Images whose channels come last in memory are what PyTorch's convolutions like best; only the view changes.
    """
    if not strides == dilation == (1, 1) or groups > 1:
        return NotImplemented
    if training and kernel.shape[:2] == (1, 1):
        return torch.nn.functional.linear(x, kernel[0, 0].T, bias)  # its gradient is faster
    interleaved = padding == "same" and kernel.shape[1] > 1 and all(size % 2 for size in kernel.shape[:2])
    several = batch_interleave(x) if interleaved else 1
    x, kernel = torch.permute(_interleave(x, several), (0, 3, 1, 2)), torch.permute(kernel, (3, 2, 0, 1))
    x = torch.nn.functional.conv2d(x, kernel, bias, 1, padding, (1, several))
    return _separate(torch.permute(x, (0, 2, 3, 1)), several)


def batch_interleave(x):
    """How many narrow images are convolved fastest as one, with interleaved columns and a dilated kernel.

    On a CPU, oneDNN multiplies tiles of 16 pixels of a row. An image 8 pixels wide fills half of each tile. An image 16
    pixels wide gains nothing.
    """
    batch, _, width, _ = x.shape
    if x.device.type != "cpu" or width >= 16:
        return 1
    return max(number for number in range(1, 32 // width + 1) if batch % number == 0)


def _interleave(x, several):
    """Joins `several` images at a time: first the first column of each, then the second of each, and so on."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch // several, several, height, width, channels).permute(0, 2, 3, 1, 4)
    return x.reshape(batch // several, height, several * width, channels)


def _separate(x, several):
    """The inverse of `_interleave`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width // several, several, channels).permute(0, 3, 1, 2, 4)
    return x.reshape(batch * several, height, width // several, channels)


def upsampled_conv2d(x, kernel, bias):
    """One transposed convolution of stride two, with 4/9 of the multiplications.

    Several entries of the 3x3 kernel meet copies of the same pixel, and are added up beforehand. The sum is a 4x4
    kernel, the 3x3 one convolved with 2x2 ones.
    """
    sums = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # along one axis, mirrored as a transposed kernel is
    channels, filters = kernel.shape[2:]
    kernel = torch.permute(kernel, (3, 0, 1, 2)).reshape(filters, 9, channels)  # as `arrange` has laid it out
    kernel = torch.matmul(ops.cast(np.kron(sums, sums), kernel.dtype), kernel)
    kernel = torch.permute(kernel.reshape(filters, 4, 4, channels), (3, 0, 1, 2))
    x = torch.nn.functional.conv_transpose2d(torch.permute(x, (0, 3, 1, 2)), kernel, bias, stride=2, padding=1)
    return torch.permute(x, (0, 2, 3, 1))


def group_norm(x, gamma, beta, groups, epsilon):
    """PyTorch's own for bfloat16, which Keras does not call.

    It sums in float32, but takes a difference of squares, which is too coarse for images in float32.
    """
    if x.dtype != torch.bfloat16:
        return NotImplemented
    x = torch.nn.functional.group_norm(torch.permute(x, (0, 3, 1, 2)), groups, gamma, beta, epsilon)
    return torch.permute(x, (0, 2, 3, 1))


def attention(query, key, value, max_dense):
    """PyTorch's fused kernel if the scores would take much memory; below, two products are three times as fast."""
    if query.shape[1] <= max_dense:
        return NotImplemented
    return ops.dot_product_attention(query[:, :, None], key[:, :, None], value[:, :, None])[:, :, 0]


def arrange(variables):
    """Lays the kernels of convolutions out in memory as PyTorch's convolutions read them."""
    for variable in variables:
        if len(variable.shape) == 4:
            variable.value.data = variable.value.data.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def move_averages(averages, variables, decay):
    """One pass over memory for each variable."""
    for average, v in zip(averages, variables):
        if keras.backend.is_float_dtype(v.dtype):
            average.value.data.lerp_(v.value.data, 1.0 - decay)
        else:
            average.assign(v)


def adam_step(optimizer, gradient, variable, learning_rate):
    """PyTorch's fused Adam, on a CPU, if all tensors have one layout in memory."""
    from torch.optim.adam import adam

    index = optimizer._get_variable_index(variable)
    slots = optimizer._momentums[index].value, optimizer._velocities[index].value
    tensors = [variable.value, gradient, *slots]
    layouts = {(x.dtype, *(stride for stride, size in zip(x.stride(), x.shape) if size > 1)) for x in tensors}
    if optimizer.amsgrad or gradient.device.type != "cpu" or len(layouts) > 1:
        return NotImplemented
    # As PyTorch's is slow if the order in memory is not that of the axes.
    value, gradient, momentum, velocity = (x.detach().as_strided((x.numel(),), (1,)) for x in tensors)
    steps = int(optimizer.iterations)
    lists = [value], [gradient], [momentum], [velocity], [], [torch.tensor(float(steps))]
    # Keras adds epsilon before the correction of the bias, and has applied the weight decay.
    numbers = {
        "eps": optimizer.epsilon / (1 - optimizer.beta_2 ** (steps + 1)) ** 0.5,
        "beta1": optimizer.beta_1,
        "beta2": optimizer.beta_2,
        "lr": float(learning_rate),
        "weight_decay": 0.0,
    }
    adam(*lists, fused=True, amsgrad=False, maximize=False, **numbers)


# Recordings: a network as a graph of PyTorch's operations, run without the Python that led to them.


def recorded(function, recordings, calls):
    """A recording for each shape of the arguments, in which what depends on weights alone is computed once.

    Examples are the conversion of weights to bfloat16, and kernels in the order in which oneDNN reads them. Residual
    blocks add their input as their last convolution writes. Results differ from the function's in the last digits.
    """
    if int(calls) < RECORDED_FROM:
        return NotImplemented
    constants = {}

    def run(*arguments):
        arguments = [x.contiguous() for x in arguments]  # the recording depends on the layout in memory
        shapes = tuple((tuple(x.shape), x.dtype) for x in arguments)
        if shapes not in recordings:
            recordings[shapes] = _record(function, arguments)
        prepare, compute = recordings[shapes]
        if shapes not in constants:
            constants[shapes] = prepare()
        return compute(*constants[shapes], *arguments)

    return run


def _record(function, arguments):
    """Two functions: from nothing to constants, and from constants and arguments to the result.

    Everything here that is private to PyTorch may be missing in another release. Then the function itself is returned,
    and so it is if the function looks at values of tensors, which cannot be recorded.
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
    """The graph in two parts: from weights to constants, and from constants and arguments to the result."""
    graph = module.graph
    fixed = _fixed(graph)
    copies, first = torch.fx.Graph(), next(iter(graph.nodes))
    originals = {}
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
    fixed = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if node.op == "get_attr" or inputs and node.op == "call_function" and all(n in fixed for n in inputs):
            fixed[node] = None
    return list(fixed)


def _changes_constants(graph):
    """Whether an operation that depends on arguments changes in place what depends on weights alone."""
    fixed = set(_fixed(graph))
    for node in set(graph.nodes) - fixed:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and not fixed.isdisjoint(node.all_input_nodes):
            return True
    return False


def _fuse_convolutions(graph):
    """Convolutions of images as PyTorch's inductor writes them for inference on a CPU, where it has oneDNN."""
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
    """Whether oneDNN has this convolution, with a result that lies in memory as the next operation expects."""
    x, *_, stride, _, _, transposed, output_padding, groups = convolution.args
    images = x.meta.get("val")  # older versions have none for weights
    dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if images is None or images.device.type != "cpu" or images.dtype not in dtypes or images.ndim != 4 or groups != 1:
        return False
    if transposed and any(p >= s for p, s in zip(output_padding, stride)):
        return False
    return images.is_contiguous(memory_format=torch.channels_last)


def _residual_addition(convolution):
    """The node that adds images of the same kind to this convolution's, and the node of these images.

    The convolution itself and `None`, if there is no such addition or something else needs the convolution's result.
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
