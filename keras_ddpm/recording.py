"""Networks on PyTorch as recordings of their operations, which run without the Python that led to them.

What Keras does in Python at each call is some 5 % of a training step of a large network and more of a small one's. The
other backends compile and record nothing.
"""

import collections
import contextlib

import keras


class Recording:
    """A function of tensors, such as a network; on PyTorch it is recorded after some calls.

    Recording takes as long as some fifty calls. It is done for each shape of the arguments. Variables that the function
    reads are read at each call, and gradients flow to them; a function that asks for the values of tensors by `float`,
    `int` or `bool` is not recorded, and one that asks for them as arrays must not be. Gradients of the function's own
    are lost, and so is memory saved by computing activations again.

    Where gradients are wanted, nothing but a CPU runs a recording: PyTorch chooses the kernel of attention by whether
    they are, and those of other devices that a recording would hold have none.

    Args:
        function: returns a tensor.
        after: the number of the call that is recorded; it is made once more, as its result is that of the recording.
        has_effects: function without arguments: whether the last call did more than return a tensor, such as to
            update a moving average; then it is not recorded.
    """

    def __init__(self, function, *, after=50, has_effects=lambda: False):
        self.function = function
        self.after = after
        self.has_effects = has_effects
        self.calls = collections.Counter()
        self.recorded = {}

    def __call__(self, *arguments):
        if keras.backend.backend() != "torch" or not _is_recordable(arguments):
            return self.function(*arguments)
        arguments = [x.contiguous() for x in arguments]  # what is recorded depends on how they lie in memory
        shapes = tuple((tuple(x.shape), x.dtype) for x in arguments)
        if shapes not in self.recorded:
            result = self.function(*arguments)
            self.calls[shapes] += 1
            if self.calls[shapes] != self.after or self.has_effects():
                return result
            del result  # with all that its gradient needs
            self.recorded[shapes] = self._record(*arguments)
        return self.recorded[shapes](*arguments)

    def _record(self, *arguments):
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            with torch.no_grad():
                return _roomy(make_fx(self.function)(*arguments))
        except RuntimeError:
            return self.function


class InferenceRecording(Recording):
    """A recording for many calls with the same weights and without gradients, all inside of `fixed_weights`.

    What depends on weights alone, such as their conversion to bfloat16, is computed once. On a CPU convolutions have
    their kernels in the order in which oneDNN walks through them, and those of residual blocks add to their input as
    they write. So results are not those of the function to the last digit.
    """

    @contextlib.contextmanager
    def fixed_weights(self):
        """A time in which no variable changes."""
        try:
            yield
        finally:
            for network in self.recorded.values():
                if isinstance(network, _Divided):
                    network.constants = None

    def _record(self, *arguments):
        function = super()._record(*arguments)
        return function if function is self.function or _changes_fixed(function.graph) else _Divided(function)


class _Divided:
    """A recording in two parts: from weights to constants, and from those and the arguments to the result."""

    def __init__(self, module):
        from torch import fx

        graph = module.graph
        _fuse_convolutions(graph)
        fixed = _fixed(graph)
        copies, first = fx.Graph(), next(iter(graph.nodes))
        originals = {}
        for node in fixed:
            originals[node] = copies.node_copy(node, originals.get)
        needed = [node for node in fixed if any(user not in originals for user in node.users)]
        copies.output([originals[node] for node in needed])
        with graph.inserting_before(first):
            for index, node in enumerate(needed):
                node.replace_all_uses_with(graph.placeholder(f"constant_{index}"))
        graph.eliminate_dead_code()
        self.prepare = fx.GraphModule(module, copies)
        self.run = fx.GraphModule(module, graph)
        self.constants = None

    def __call__(self, *arguments):
        constants = self.constants  # which another thread may take away
        if constants is None:
            constants = self.constants = self.prepare()
        return self.run(*constants, *arguments)


def _roomy(module):
    """The recording as a function of more than 2048 local variables.

    CPython takes memory for the variables of functions in chunks of 2048, or larger ones with room for 1000 more where
    a function needs them. Where the recording's own happened to fill a chunk, each operation that it calls took another
    one from the system and gave it back, which is slow by a sixth.
    """
    names = " = ".join(f"room_{index}" for index in range(2048))
    module.graph.on_generate_code(lambda _: lambda body: [f"if False:\n    {names} = None\n", *body])
    module.recompile()
    return module


def _fixed(graph):
    """The nodes that depend on weights alone, in order."""
    import torch

    fixed = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if node.op == "get_attr" or inputs and node.op == "call_function" and all(n in fixed for n in inputs):
            fixed[node] = None
    return list(fixed)


def _changes_fixed(graph):
    """Whether something that depends on weights alone is changed in place by what does not."""
    fixed = set(_fixed(graph))
    for node in set(graph.nodes) - fixed:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and not fixed.isdisjoint(node.all_input_nodes):
            return True
    return False


def _fuse_convolutions(graph):
    """Convolutions of images as PyTorch's inductor writes them for inference on a CPU, where it has oneDNN."""
    import torch

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
    """Whether oneDNN has it, for images, and the result lies in memory as what was recorded after it expects."""
    import torch

    x, *_, stride, _, _, transposed, output_padding, groups = convolution.args
    images = x.meta.get("val")  # older versions do not say it of weights
    dtypes = [torch.float32] + [torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if images is None or images.device.type != "cpu" or images.dtype not in dtypes or images.ndim != 4 or groups != 1:
        return False
    if transposed and any(p >= s for p, s in zip(output_padding, stride)):
        return False
    return images.is_contiguous(memory_format=torch.channels_last)


def _residual_addition(convolution):
    """The addition of images of the same kind to a convolution's, if nothing else needs these, and the others' node.

    Otherwise the convolution itself and `None`.
    """
    import torch

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


def _is_recordable(arguments):
    import torch

    on_cpu = all(x.device.type == "cpu" for x in arguments)
    return not torch.compiler.is_compiling() and (on_cpu or not torch.is_grad_enabled())
