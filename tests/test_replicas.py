"""Several devices and several processes do what one device does."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from conftest import image_network

import keras_ddpm as kd
from keras_ddpm._backend import replicas

BACKEND = keras.backend.backend()
distributed = pytest.mark.skipif(BACKEND == "torch", reason="Keras 3.15 has no distribution on PyTorch")
ROOT = pathlib.Path(__file__).parent.parent
FILES = {"1.png", "2.png", "history.csv", "best.keras", "model.keras", "checkpoints"}


@pytest.fixture
def start(popen):
    """A function that starts a training run in another process."""

    def start(folder, *arguments):
        command = [sys.executable, ROOT / "tests/distributed_run.py", folder, *map(str, arguments)]
        return popen(command, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    return start


def ended(folder, processes):
    """What the processes found and printed, after they have ended."""
    printed = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(printed)
    return [dict(np.load(folder / f"process_{i}.npz")) for i in range(len(processes))], printed


def assert_same(found, expected):
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=2e-6, err_msg=name)


@distributed
def test_two_devices_are_one(start, tmp_path):
    """Losses, gradients (as the weights after SGD), averages, samples and features are those of one device."""
    folders = [tmp_path / f"{devices}" for devices in (1, 2)]
    runs = [start(folder, "--devices", folder.name, "--same-draws") for folder in folders]
    ((one,), _), ((two,), _) = (ended(folder, [run]) for folder, run in zip(folders, runs))
    assert_same(two, one)
    assert {path.name for path in folders[1].iterdir()} == {*FILES, "process_0.npz"}
    if BACKEND == "tensorflow":
        # Each replica draws its own numbers, and the same in every run.
        draws = np.stack([two["draw_0"], two["draw_1"]])  # (call, 2, replica, ...)
        for replica in range(2):
            seeds = keras.random.SeedGenerator(replica * 0x9E3779B9)
            for drawn in draws.reshape(4, 2, 4, 3)[:, replica]:
                np.testing.assert_array_equal(drawn, keras.random.normal((4, 3), seed=seeds))


@distributed
@pytest.mark.slow
@pytest.mark.parametrize("options", [("--same-draws",), ()], ids=["same draws", "own draws"])
def test_two_processes_are_one(start, tmp_path, options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "two"
    arguments = ["--processes", 2, "--port", port, *options]
    found, printed = ended(folder, [start(folder, *arguments, "--process", i) for i in range(2)])
    assert_same(found[1], found[0])
    assert {path.name for path in folder.iterdir()} == {*FILES, "process_0.npz", "process_1.npz"}
    assert "Epoch 2/2" in printed[0] and "Epoch" not in printed[1]
    assert [text.splitlines()[-1] for text in printed] == ["chief", "not the chief"]
    (one,), _ = ended(tmp_path / "one", [start(tmp_path / "one", *options)])
    if options:
        assert_same(found[0], one)
    elif BACKEND == "jax":  # draws of a last batch that is filled up differ
        assert_same(found[0], {name: one[name] for name in one if "val" not in name})
    else:
        assert np.all(found[0]["loss"] != one["loss"])


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="Only JAX has it")
def test_weights_over_two_devices(start, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    runs = [start(folders[0], "--same-draws"), start(folders[1], "--devices", 2, "--model-parallel", "--same-draws")]
    ((one,), _), ((two,), _) = (ended(folder, [run]) for folder, run in zip(folders, runs))
    assert_same(two, one)


def shares(monkeypatch, data, count):
    """The batches that each of several processes gets in one epoch, as arrays `(process, step, share, ...)`."""
    found = []
    for process in range(count):
        monkeypatch.setattr(replicas, "data_parts", lambda process=process: (2 * count, process, count))
        found.append([data[step] for step in range(len(data))])
    return found


def test_each_example_is_in_one_share(monkeypatch):
    x = np.arange(24.0).reshape(24, 1)
    data = kd.datasets.Batches(x, batch_size=8)
    whole = np.stack([data[step] for step in range(3)])
    found = np.array(shares(monkeypatch, data, 2))
    assert np.array_equal(np.concatenate(found, axis=1), whole)
    assert sorted(found.ravel()) == list(range(24))
    with pytest.raises(ValueError, match=r"4 devices need a multiple. Received: batch_size=6"):
        kd.datasets.Batches(x, batch_size=6)[0]


def test_flips_do_not_depend_on_the_shares(monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), "uint8")
    data = kd.datasets.Batches(x, np.arange(16), batch_size=8, flip=True)
    whole = [data[step] for step in range(2)]
    found = shares(monkeypatch, data, 2)
    for step, (images, labels) in enumerate(whole):
        assert np.array_equal(images, np.concatenate([found[process][step][0] for process in range(2)]))
        assert np.array_equal(labels, np.concatenate([found[process][step][1] for process in range(2)]))


def test_a_last_batch_is_filled_up_without_a_change_of_the_mean(monkeypatch):
    x = np.arange(11.0).reshape(11, 1)
    data = kd.datasets.Batches(x, batch_size=8, shuffle=False)
    found = shares(monkeypatch, data, 2)
    assert [batch[0].shape[0] for batch in found[1]] == [4, 2]
    values, weights = (np.concatenate([np.ravel(batch[i]) for share in found for batch in share]) for i in (0, 2))
    assert len(values) == 12 and np.mean(values * weights) == pytest.approx(np.mean(x))
    assert all(batch[1] is None for batch in found[0])


def test_weights_of_examples(model, points):
    """They multiply the loss. So examples of weight 0 do not count."""
    whole = model.evaluate(points, verbose=0)
    tripled = model.evaluate(points, sample_weight=np.full(len(points), 3.0), verbose=0)  # Keras would drop them
    assert tripled == pytest.approx(3 * whole, rel=1e-5)
    three = np.full(len(points), 3.0)
    model.optimizer.learning_rate = 1e-9
    ends = model.fit(points, sample_weight=three, validation_data=(points, None, three), epochs=1, verbose=0).history
    assert ends["val_loss"][0] == pytest.approx(tripled, rel=1e-4)
    assert ends["loss"][0] == pytest.approx(tripled, rel=0.2)
    weight = (np.arange(len(points)) % 2).astype("float32")
    spoiled = np.where(weight[:, None] > 0, points, np.float32(-1))
    losses = [model.evaluate(x, sample_weight=weight, verbose=0) for x in (points, spoiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] < whole


def test_a_process_that_is_not_the_chief_writes_nothing(monkeypatch, tmp_path, capsys):
    images = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)).astype("float32")
    written = {}
    for number in (1, 0):
        monkeypatch.setattr(replicas, "_process", lambda number=number: (number, 2))
        folder = tmp_path / f"{number}"
        model = kd.DiffusionModel(image_network((8, 8, 1)), seed=0)
        model.compile(loss="mse", optimizer="sgd", run_eagerly=True)
        callbacks = [
            kd.callbacks.SampleGrid(folder / "grid.png", num_samples=1, sampler=kd.samplers.DDIM(1)),
            kd.callbacks.Checkpoint(folder / "checkpoints"),
            keras.callbacks.ModelCheckpoint(folder / "best.keras"),
            keras.callbacks.CSVLogger(tmp_path / f"{number}.csv"),
        ]
        model.fit(images, epochs=1, verbose=2, callbacks=callbacks)
        model.sample(1, seed=0, verbose=1)
        model.evaluate(images, verbose=2)
        model.save(folder / "model.keras")
        model.save_compact(folder / "compact.keras")
        model.save_weights(folder / "model.weights.h5")
        written[number] = {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert kd.is_chief() == (number == 0)
        printed = capsys.readouterr().out
        assert ("step - loss" in printed) == (number == 0) and (number == 0 or not printed)
    names = {"grid.png", "checkpoints", "best.keras", "model.keras", "compact.keras", "model.weights.h5"}
    assert written == {1: set(), 0: names}
    assert not (tmp_path / "1.csv").exists() and (tmp_path / "0.csv").exists()


def test_a_process_that_is_not_the_chief_reads_the_checkpoint(model, points, monkeypatch, tmp_path):
    """It goes on from it, leaves the chief's table as it is, and leaves signals to Python."""
    logger, handlers = keras.callbacks.CSVLogger(tmp_path / "history.csv"), []
    seen = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: handlers.append(signal.getsignal(signal.SIGTERM))
    )
    options = {"callbacks": [kd.callbacks.Checkpoint(tmp_path / "checkpoints"), logger, seen], "verbose": 0}
    model.fit(points, epochs=1, **options)
    assert signal.SIG_DFL not in handlers
    table = (tmp_path / "history.csv").read_bytes() + b"1,0.5\n"  # of the chief's next epoch
    (tmp_path / "history.csv").write_bytes(table)
    handlers.clear()
    monkeypatch.setattr(replicas, "_process", lambda: (1, 2))
    assert model.fit(points, epochs=2, **options).epoch == [0, 1]
    assert (tmp_path / "history.csv").read_bytes() == table and set(handlers) == {signal.SIG_DFL}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's strategy")
def test_a_strategy_that_has_its_own_cluster(model, monkeypatch, tmp_path):
    """Files are written in the scope of the model, where its strategy tells which process this is."""
    import tensorflow as tf

    class Strategy:
        cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": ["a:1", "b:1"]}), task_type="worker", task_id=1
        )
        num_replicas_in_sync = 1

    @contextlib.contextmanager
    def scope():
        with monkeypatch.context() as patch:
            patch.setattr(tf.distribute, "get_strategy", Strategy)
            yield

    monkeypatch.setattr(type(model), "distribute_strategy", types.SimpleNamespace(scope=scope), raising=False)
    for write, name in [(model.save, "a.keras"), (model.save_compact, "b.keras"), (model.save_weights, "c.weights.h5")]:
        write(tmp_path / name)
    assert kd.is_chief() and not list(tmp_path.iterdir())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's variable")
def test_the_chief_of_tensorflow(monkeypatch):
    assert kd.is_chief()
    for cluster, task, number in [
        ({"worker": ["a", "b"]}, ("worker", 0), 0),
        ({"worker": ["a", "b"]}, ("worker", 1), 1),
        ({"chief": ["a"], "worker": ["b"]}, ("chief", 0), 0),
        ({"chief": ["a"], "worker": ["b"]}, ("worker", 0), 1),
    ]:
        task = {"type": task[0], "index": task[1]}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
        assert replicas._process() == (number, 2) and kd.is_chief() == (number == 0)


def test_without_a_private_method_of_keras(monkeypatch, points):
    """`fit` is the same without the override, but for several processes of TensorFlow."""
    losses = []
    for overridden in (True, False):
        if not overridden:
            monkeypatch.delattr(kd.DiffusionModel, "_maybe_symbolic_build")
        model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), seed=0)
        model.network.set_weights([np.full_like(w, 0.1) for w in model.network.get_weights()])
        model.compile(loss="mse", optimizer="sgd")
        losses.append(model.fit(points, epochs=2, shuffle=False, verbose=0).history["loss"])
    assert losses[0] == losses[1]


@pytest.mark.skipif(BACKEND != "torch", reason="what Keras has on PyTorch")
def test_keras_has_nothing_on_pytorch():
    """When this fails, Keras has something, and docs/guides/scaling.md should say so."""
    with pytest.raises(AttributeError):
        keras.distribution.DataParallel()
    assert kd.is_chief() and replicas.data_parts() == (1, 0, 1) and replicas.program_parts() == 1
