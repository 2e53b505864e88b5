"""Trains a small model on several devices or processes, and writes what came out.

    python tests/distributed_run.py FOLDER --devices 2 --processes 1 --process 0 --port 12345

Keras' backend is JAX or TensorFlow. The draws of `--same-draws` depend on the data alone.
"""

import argparse
import contextlib
import json
import os
import pathlib

import keras
import numpy as np
from keras import ops

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--process", type=int, default=0)
parser.add_argument("--port", type=int)
parser.add_argument("--same-draws", action="store_true")
parser.add_argument("--model-parallel", action="store_true")
args = parser.parse_args()
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
if keras.backend.backend() == "tensorflow":
    if args.processes > 1:
        workers = [f"localhost:{args.port + process}" for process in range(args.processes)]
        task = {"type": "worker", "index": args.process}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * args.devices)

strategy = contextlib.nullcontext()
if keras.backend.backend() == "jax":
    if args.processes > 1:
        keras.distribution.initialize(f"localhost:{args.port}", args.processes, args.process)
    if args.model_parallel:
        mesh = keras.distribution.DeviceMesh((1, args.devices), ("batch", "model"))
        layout = keras.distribution.LayoutMap(mesh)
        layout["block_.*dense.*kernel"] = (None, "model")
        keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout))
    elif args.devices * args.processes > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
elif args.processes > 1:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
elif args.devices > 1:
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(args.devices)])
if not hasattr(strategy, "scope"):
    strategy.scope = contextlib.nullcontext

import keras_ddpm as kd  # noqa: E402


class SameDraws(kd.training.corruption.Corruption):
    def draw_timesteps(self, batch_size, generator):
        return ops.full((batch_size,), 25, "int32")


folder = pathlib.Path(args.folder)
keras.utils.set_random_seed(0)
x = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), "uint8")
labels = np.arange(24, dtype="int32") % 3
data = kd.datasets.Batches(x, labels, batch_size=8, flip=True, num_workers=2)
held_out = kd.datasets.Batches(x[:11], labels[:11], batch_size=8, shuffle=False)
with strategy.scope():
    network = kd.networks.dit((8, 8, 1), patch_size=4, width=8, depth=1, num_heads=1, num_classes=3)
    diffusion = kd.GaussianDiffusion(kd.schedules.linear(50), "x0")
    options = {"seed": 0, "label_dropout": 0.0 if args.same_draws else 0.1}
    model = kd.DiffusionModel(network, diffusion, **options)
    if args.same_draws:
        noise = lambda x_0, generator: ops.sin(1000 * x_0)
        model.corruption = SameDraws(diffusion, model.condition, label_dropout=0.0, draw_noise=noise)
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
grid = kd.callbacks.SampleGrid(folder / "{epoch}.png", num_samples=5, sampler=kd.samplers.DDPM(3))
callbacks = [
    grid,
    kd.callbacks.EMAWeights(),
    kd.callbacks.LossByTimestep(kd.images.from_uint8(x[:3]), labels[:3], times=1),
    keras.callbacks.CSVLogger(folder / "history.csv"),
    keras.callbacks.ModelCheckpoint(folder / "best.keras"),
    kd.callbacks.Checkpoint(folder / "checkpoints"),
]
found = {}
if args.devices > 1 and keras.backend.backend() == "tensorflow":
    with strategy.scope():
        seeds = kd._backend.replicas.Seeds(0)

    @tf.function
    def draw():
        return strategy.run(lambda: keras.random.normal((4, 3), seed=seeds))

    found |= {f"draw_{i}": np.stack([strategy.experimental_local_results(draw()) for _ in range(2)]) for i in range(2)}
history = model.fit(data, epochs=2, validation_data=held_out, callbacks=callbacks, verbose=2).history
found |= {name: np.array(values) for name, values in history.items()}
found["evaluated"] = np.array(model.evaluate(held_out, verbose=0))
found["samples"] = model.sample(5, kd.samplers.DDPM(5), seed=0, labels=[0, 1, 2, 0, 1], guidance_scale=1.5)
found |= {f"weight_{i}": ops.convert_to_numpy(v) for i, v in enumerate(model.network.weights)}
found |= {f"average_{i}": ops.convert_to_numpy(v) for i, v in enumerate(model.ema_weights)}
classifier = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
found["features"] = kd.features.Extractor(classifier)(kd.images.from_uint8(x[:5]), batch_size=4)
model.save(folder / "model.keras")
np.savez(folder / f"process_{args.process}.npz", **found)
print("chief" if kd.is_chief() else "not the chief", flush=True)
