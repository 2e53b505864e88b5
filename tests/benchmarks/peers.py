"""Training and sampling side by side with diffusers, and with what the machine can do at all.

    pip install torch diffusers jax     # and denoising-diffusion-pytorch for the contestant of this name
    python tests/benchmarks/peers.py                          # ours and diffusers' against diffusers as it comes
    python tests/benchmarks/peers.py --task sampling --against diffusers-tuned
    python tests/benchmarks/peers.py --contestants torch-bfloat16 --size 32 --width 32    # a smaller job
    python tests/benchmarks/peers.py --output figures.json --plot figures.png
    python tests/benchmarks/peers.py --before TREE --contestants torch-float32   # against another clone of this package

A contestant is this package on a backend in float32 or mixed bfloat16, or diffusers' UNet2DModel of the same widths: as
it comes, tuned (channels last, autocast to bfloat16), or compiled by `torch.compile` besides; or the U-Net of
denoising-diffusion-pytorch of the same widths, which is another, smaller network. Each runs in a process of its own;
two processes take turns, and the median of the ratios of neighbours is printed, as absolute times on a shared machine
mean little.

The limit of the machine, of its CPU, is the time that the network's convolutions and matrix products take alone, each
one timed by itself in PyTorch, forward and backward, in the dtype of the contestant and the fastest form known: either
layout, narrow images several at once, 1x1 convolutions as products. The share of it that a step reaches is that time
over the time of the step. It is measured between the turns.

The first step is counted from the start of the process; memory is the largest that the process had; the last column is
how many times as fast as the step the input pipeline makes its batch: decoded uint8 images, shuffled and flipped.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
OURS = [f"{backend}-{dtype}" for backend in ("tensorflow", "jax", "torch") for dtype in ("float32", "bfloat16")]
PEERS = ["diffusers", "diffusers-tuned", "diffusers-compiled", "denoising-diffusion-pytorch"]


def our_task(args, dtype):
    """A function from a number of steps that makes as many, and the network."""
    import keras

    import keras_ddpm as kd

    kd.keep_memory()
    if dtype == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    attention = (args.size // 4, args.size // 8)
    network = kd.networks.unet((args.size, args.size, 3), args.width, attention_resolutions=attention)
    model = kd.DiffusionModel(network, seed=0)
    if args.task == "sampling":
        return lambda steps: model.sample(args.batch_size, kd.samplers.DDPM(steps), seed=0), network
    model.compile(loss="mse", optimizer=kd.optimizers.Adam(1e-4, global_clipnorm=1.0))
    x = np.random.default_rng(0).integers(0, 256, (256, args.size, args.size, 3), dtype="uint8")

    def train(steps):
        data = kd.datasets.from_arrays(x, batch_size=args.batch_size, steps_per_epoch=steps)
        model.fit(data, verbose=0)

    return train, network


def pipeline_seconds(args, batches=200):
    """The time that the input pipeline takes for a batch."""
    import keras_ddpm as kd

    x = np.random.default_rng(0).integers(0, 256, (1024, args.size, args.size, 3), dtype="uint8")
    data = kd.datasets.from_arrays(x, batch_size=args.batch_size, steps_per_epoch=batches, flip=True)
    start = time.perf_counter()
    for step in range(batches):
        data[step]
    return (time.perf_counter() - start) / batches


def torch_device():
    """Where Keras would put the tensors of PyTorch."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def diffusers_task(args, form):
    """The same of diffusers, by its own training example: AdamW, clipped gradients; without an average of weights."""
    import contextlib

    import diffusers
    import torch

    device = torch_device()
    down = ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    widths = [args.width * multiplier for multiplier in (1, 2, 4, 8)]
    options = {"layers_per_block": 2, "norm_num_groups": 8, "attention_head_dim": None}
    network = diffusers.UNet2DModel(
        sample_size=args.size,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        **options,
    ).to(device)
    scheduler = diffusers.DDPMScheduler(1000)
    autocast = contextlib.nullcontext
    if form:
        network = network.to(memory_format=torch.channels_last)
        autocast = lambda: torch.autocast(device.type, torch.bfloat16)
    if form == "compiled":
        network.compile()
    if args.task == "sampling":
        pipeline = diffusers.DDPMPipeline(network.eval(), scheduler)
        pipeline.set_progress_bar_config(disable=True)

        def sample(steps):
            with autocast():
                pipeline(args.batch_size, num_inference_steps=steps, output_type="np")

        return sample, network
    x = torch.rand(args.batch_size, 3, args.size, args.size, device=device) * 2 - 1
    if form:
        x = x.to(memory_format=torch.channels_last)

    def loss():
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),), device=device)
        with autocast():
            predicted = network(scheduler.add_noise(x, noise, t), t).sample
        return torch.nn.functional.mse_loss(predicted.float(), noise)

    return training_task(network, torch.optim.AdamW(network.parameters(), 1e-4), loss), network


def denoising_diffusion_pytorch_task(args):
    """The same of denoising-diffusion-pytorch, as its Trainer does it; fewer than 1000 steps are of DDIM."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    device = torch_device()
    network = Unet(args.width)
    diffusion = GaussianDiffusion(network, image_size=args.size).to(device)
    if args.task == "sampling":

        def sample(steps):
            diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, steps < 1000
            diffusion.sample(args.batch_size).cpu()

        return sample, network
    x = torch.rand(args.batch_size, 3, args.size, args.size, device=device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    return training_task(network, optimizer, lambda: diffusion(x)), network


def training_task(network, optimizer, loss):
    """A function from a number of steps that makes as many in PyTorch, with clipped gradients."""
    import torch

    def train(steps):
        for _ in range(steps):
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        value.item()  # an accelerator is done by then

    return train


def products(network):
    """How often each convolution and matrix product occurs in a functional Keras network, by its sizes."""
    import keras

    import keras_ddpm as kd

    found = collections.Counter()
    for layer in network.operations:
        if isinstance(layer, keras.layers.Conv2D):
            kernel, channels = layer.kernel.shape[0], layer.input.shape[1:]
            found["conv", *channels, layer.filters, kernel, layer.strides[0]] += 1
        elif isinstance(layer, kd.layers.UpsampledConv2D):
            found["transposed", *layer.input.shape[1:], layer.filters, 4, 2] += 1
        elif isinstance(layer, keras.layers.Dense):
            rows = int(np.prod(layer.input.shape[1:-1]))
            found["dense", rows, *layer.kernel.shape] += 1
        elif isinstance(layer, kd.layers.Attention):
            _, height, width, channels = layer.output.shape
            tokens = height * width
            found["dense", tokens, channels, tokens] += 1
            found["dense", tokens, tokens, channels] += 1
    return [[*sizes, number] for sizes, number in found.items()]


def operations(entry):
    """Multiplications and additions of all of them in one forward pass of one example."""
    kind, *sizes, number = entry
    if kind == "dense":
        return 2 * number * int(np.prod(sizes))
    height, width, channels, filters, kernel, stride = sizes
    positions = height * width // (stride**2 if kind == "conv" else 1)
    return 2 * number * positions * channels * filters * kernel**2


def limit_task(args, dtype, entries):
    """A function that returns the seconds of the products alone, each in its fastest form."""
    import torch

    from keras_ddpm._backend import torch as fast

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    backward = args.task == "training"

    def prepare(entry, layout):
        kind, *sizes, _ = entry
        if kind == "dense":
            rows, inputs, outputs = sizes
            x, w = torch.randn(args.batch_size * rows, inputs, dtype=dtype), torch.randn(inputs, outputs, dtype=dtype)
            function = torch.matmul
        else:
            height, width, channels, filters, kernel, stride = sizes
            x = torch.randn(args.batch_size, channels, height, width, dtype=dtype).to(memory_format=layout)
            transposed = kind == "transposed"
            shape = (channels, filters) if transposed else (filters, channels)
            w = torch.randn(*shape, kernel, kernel, dtype=dtype).to(memory_format=layout)
            convolution = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
            padding, dilation = (kernel - 1) // 2, 1
            if (kernel, stride) == (3, 1):
                dilation = (1, fast.batch_interleave(x.permute(0, 2, 3, 1)))
                padding, x = dilation, x.reshape(len(x) // dilation[1], channels, height, -1).to(memory_format=layout)
            function = functools.partial(convolution, stride=stride, padding=padding, dilation=dilation)
        x.requires_grad_(backward)
        w.requires_grad_(backward)
        y = function(x, w)
        gradient = torch.randn_like(y)

        def run():
            start = time.perf_counter()
            y = function(x, w)
            if backward:
                torch.autograd.grad(y, (x, w), gradient)
            return time.perf_counter() - start

        return run

    def measure(_):
        total = 0.0
        with torch.set_grad_enabled(backward):
            for entry in entries:
                layouts = [torch.contiguous_format] + [torch.channels_last] * (entry[0] != "dense")
                forms = [(entry, layout) for layout in layouts]
                if entry[0] == "conv" and entry[-3:-1] == [1, 1]:
                    _, height, width, channels, filters, *_ = entry
                    forms.append((["dense", height * width, channels, filters, 1], None))
                total += entry[-1] * min(min(run() for _ in range(3)) for run in (prepare(*form) for form in forms))
        return total

    return measure, None


def work(args):
    """One contestant, in a process of its own: makes as many steps as a line of the input says, prints the seconds."""
    name = args.worker
    if name.startswith("limit"):
        task, network = limit_task(args, name.split("-")[1], json.loads(sys.stdin.readline()))
    elif name.startswith("diffusers"):
        task, network = diffusers_task(args, form=name.partition("-")[2])
    elif name == "denoising-diffusion-pytorch":
        task, network = denoising_diffusion_pytorch_task(args)
    else:
        task, network = our_task(args, name.split("-")[1])
    about = {}
    if hasattr(network, "count_params"):
        about = {"parameters": network.count_params(), "products": products(network)}
    elif network is not None:
        about = {"parameters": sum(weight.numel() for weight in network.parameters())}
    task(1)
    print("first", flush=True)
    if name in OURS and args.task == "training":
        about["pipeline"] = pipeline_seconds(args)
    task(50 if name in OURS and name.startswith("torch") else min(args.steps, 6))  # which is recorded by then
    print("ready", json.dumps(about), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        result = task(args.steps)
        seconds = result if name.startswith("limit") else (time.perf_counter() - start) / args.steps
        print("took", json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]), flush=True)


class Worker:
    def __init__(self, name, args, *lines, tree=ROOT):
        command = [sys.executable, "tests/benchmarks/peers.py", "--worker", name, "--task", args.task]
        for option in ("size", "width", "batch_size", "steps"):
            command += ["--" + option.replace("_", "-"), str(getattr(args, option))]
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "TQDM_DISABLE": "1", "PYTHONPATH": str(tree)}
        environment["KERAS_BACKEND"] = name.split("-")[0] if name in OURS else "torch"
        start = time.perf_counter()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=tree, env=environment, text=True, **pipes)
        for line in lines:
            self._write(line)
        self._answer("first")
        self.seconds_to_first_step = time.perf_counter() - start
        self.about = json.loads(self._answer("ready"))

    def turn(self):
        """The seconds of a step, and the largest memory so far in MiB."""
        self._write("again")
        return json.loads(self._answer("took"))

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _write(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _answer(self, word):
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise RuntimeError(self.process.stderr.read()[-2000:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["training", "sampling"], default="training")
    parser.add_argument("--contestants", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS[1:3]])
    parser.add_argument("--against", choices=[*OURS, *PEERS], default="diffusers")
    parser.add_argument("--before", help="another clone of this package, which takes the place of --against")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, help="(default: 8 to train, 16 to sample)")
    parser.add_argument("--steps", type=int, help="in a turn (default: 6 to train, 50 to sample)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--output", help="a .json file for the figures")
    parser.add_argument("--plot", help="a .png file for bars")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch_size = args.batch_size or {"training": 8, "sampling": 16}[args.task]
    args.steps = args.steps or {"training": 6, "sampling": 50}[args.task]
    if args.worker:
        return work(args)
    job = f"{args.task}, {args.size}x{args.size}, base {args.width}, batch {args.batch_size}"
    print(f"{job}; against {args.before or args.against}")
    print("contestant           first step, s  step, s  times as fast  share of limit  Gflop/s  memory, MiB  pipeline")
    found = {}
    for name in args.contestants:
        found[name] = row = compare(name, args)
        print(
            f"{name:20} {row['seconds_to_first_step']:13.1f} {row['seconds']:8.3f} {row['times_as_fast']:14.2f} "
            f"{row.get('share_of_limit', np.nan):15.2f} {row.get('gigaflops', np.nan):8.0f} {row['memory']:12.0f} "
            f"{row.get('pipeline', np.nan):9.0f}",
            flush=True,
        )
    if args.output:
        with open(args.output, "w") as file:
            json.dump({"arguments": vars(args), "found": found}, file, indent=2)
    if args.plot:
        draw(args, found)


def compare(name, args):
    """The figures of a contestant beside those of `args.against`."""
    before = Worker(name, args, tree=args.before) if args.before else Worker(args.against, args)
    workers = [before, Worker(name, args)]
    about = workers[1].about
    ours = "products" in about
    if ours:
        workers.append(Worker(f"limit-{name.split('-')[1]}", args, json.dumps(about["products"])))
    turns = np.array([[worker.turn() for worker in workers] for _ in range(args.rounds)])
    taken = turns[:, :, 0]
    for worker in workers:
        worker.close()
    row = {
        "parameters": about["parameters"],
        "seconds_to_first_step": workers[1].seconds_to_first_step,
        "seconds": np.median(taken[:, 1]),
        "times_as_fast": np.median(taken[:, 0] / taken[:, 1]),
        "memory": turns[-1, 1, 1],
    }
    if ours:
        flops = args.batch_size * {"training": 3, "sampling": 1}[args.task] * sum(map(operations, about["products"]))
        row["share_of_limit"] = np.median(taken[:, 2] / taken[:, 1])
        row["gigaflops"] = 1e-9 * flops / row["seconds"]
        if "pipeline" in about:
            row["pipeline"] = row["seconds"] / about["pipeline"]
    return row


def draw(args, found):
    import keras_ddpm as kd

    with kd.plots.figure(args.plot, size=(7, 0.5 + 0.35 * len(found))) as axes:
        names = list(found)[::-1]
        axes.barh(names, [found[name]["times_as_fast"] for name in names])
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlabel(f"{args.task}: times as fast as {args.against}")
        axes.bar_label(axes.containers[0], fmt="%.2f", padding=3, bbox={"facecolor": "white", "linewidth": 0, "pad": 1})
        axes.margins(x=0.1)


if __name__ == "__main__":
    main()
