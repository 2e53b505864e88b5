"""Checkpoints: an interrupted run ends with the same bits as one that was not, and no kill or damage loses the last."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from conftest import EAGER, weights
from keras import ops

import keras_ddpm as kd
from keras_ddpm.callbacks import checkpoint as checkpoints

# A run with all that can go wrong in resuming: dropout, gradient accumulation, flips, a schedule of the learning rate,
# labels that are dropped, callbacks with a state, and an epoch that is no whole number of passes over the data.
SCRIPT = pathlib.Path(__file__).with_name("interrupted_run.py")
sys.path.append(str(SCRIPT.parent))
import interrupted_run  # noqa: E402


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return interrupted_run.run(tmp_path_factory.mktemp("uninterrupted"))


class Interrupt(keras.callbacks.Callback):
    """Raises an error before some batch of the run. It begins anew."""

    def __init__(self, batch=10**9):
        super().__init__()
        self.left = iter(range(batch))

    def on_train_batch_begin(self, batch, logs=None):
        if next(self.left, None) is None:
            raise InterruptedError

    def get_state(self):
        return {}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(got[name], value), name


@pytest.mark.parametrize(("batch", "every"), [(0, 0), (1, 0), (4, 0), (5, 0), (7, 0), (12, 0), (7, 1e9)])
def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path, uninterrupted, batch, every):
    """The file of the batch of the interruption is the newest; without one, the run starts afresh."""
    with pytest.raises(InterruptedError):
        interrupted_run.run(tmp_path, [Interrupt(batch)], every)
    files = sorted(tmp_path.glob("checkpoints/*.npz"))
    assert len(files) == (0 if every else min(batch + 1, 3))
    assert_same(interrupted_run.run(tmp_path, [Interrupt()], every), uninterrupted)


def test_data_of_an_earlier_fit_go_on(tmp_path, model, points):
    """A script that trains twice on the same `Batches` is interrupted in the second training, and run again."""

    class Seen(kd.datasets.Batches):
        def __getitem__(self, step):
            seen.append((self.epoch, step))
            return super().__getitem__(step)

    def script(folder, batch):
        data = Seen(points[:12], batch_size=4, seed=1)
        model.fit(data, epochs=2, verbose=0, shuffle=False)
        seen.clear()
        callbacks = [kd.callbacks.Checkpoint(folder, every=0), Interrupt(batch)]
        model.fit(data, epochs=3, verbose=0, callbacks=callbacks)
        return [epoch for epoch, _ in seen]

    seen = []
    expected = script(tmp_path / "a", 10**9)
    with pytest.raises(InterruptedError):
        script(tmp_path / "b", 4)
    epochs = script(tmp_path / "b", 10**9)
    assert set(expected) == {2, 3, 4} and set(epochs) - {2} == {3, 4}  # the first batch is looked at before


def test_the_last_files_are_kept(tmp_path):
    interrupted_run.run(tmp_path, every=0)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000002-00000003.npz", "000002-00000004.npz", "000003-00000000.npz"]


def test_a_finished_run_is_returned_and_can_go_on(tmp_path, uninterrupted, capsys):
    interrupted_run.run(tmp_path)
    assert "finished" not in capsys.readouterr().out
    assert_same(interrupted_run.run(tmp_path), uninterrupted)
    assert "checkpoints holds a finished run, so nothing was trained" in capsys.readouterr().out
    assert_same(interrupted_run.run(tmp_path, epochs=2), uninterrupted)
    longer = interrupted_run.run(tmp_path / "b", epochs=4)
    assert_same(interrupted_run.run(tmp_path, epochs=4), longer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, uninterrupted, number, capsys, monkeypatch):
    send = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: os.kill(os.getpid(), number))
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}[number]
    monkeypatch.setattr(signal, "getsignal", lambda asked: own)  # a shell may start jobs that ignore Ctrl-C
    before = signal.signal(number, own)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        interrupted_run.run(tmp_path, [send], every=1e9)
    assert signal.signal(number, before) == own
    assert "goes on from" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000-00000001.npz"]
    assert_same(interrupted_run.run(tmp_path, [keras.callbacks.Callback()]), uninterrupted)


def test_a_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, uninterrupted):
    interrupted_run.run(tmp_path, every=0)
    newest = max((tmp_path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        assert_same(interrupted_run.run(tmp_path, every=0), uninterrupted)


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_damage_is_never_overlooked(tmp_path, number):
    """Flipped bits and truncated files."""
    path = tmp_path / "x.npz"
    random = np.random.default_rng(0)
    values = [random.standard_normal((5, 7)), np.arange(6), np.float32(3.0), np.array(3, "int64")]
    checkpoints._write(path, {"variables": values, "position": [0, 1]})
    content = path.read_bytes()
    read = checkpoints._read(path)
    assert all(map(np.array_equal, read["variables"], values)) and read["position"] == [0, 1]
    for _ in range(number):
        damaged = bytearray(content)
        place = random.integers(len(content))
        if random.random() < 0.2:
            damaged = damaged[:place]
        else:
            damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            read = checkpoints._read(path)
        except ValueError as error:
            assert "is damaged" in str(error)
        else:  # a bit that means nothing, such as the time of a file in the archive
            assert all(map(np.array_equal, read["variables"], values)) and read["position"] == [0, 1]


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="nothing is read-only here")
def test_a_folder_that_is_read_only(tmp_path):
    (tmp_path / "checkpoints").mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="No checkpoint was written"):
        interrupted_run.run(tmp_path)


def test_a_disk_that_is_full(tmp_path, monkeypatch, uninterrupted):
    """Training goes on, and the last whole file stays."""
    interrupted_run.run(tmp_path, epochs=1)
    before = sorted((tmp_path / "checkpoints").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.warns(UserWarning, match="No checkpoint was written. .*No space left"):
            interrupted_run.run(tmp_path)
    assert sorted((tmp_path / "checkpoints").glob("*.npz")) == before
    assert_same(interrupted_run.run(tmp_path), uninterrupted)


def test_a_value_that_is_not_finite_is_not_written(tmp_path):
    def spoil(batch, logs):
        variable = run.model.network.trainable_variables[0]
        variable.assign(np.full(variable.shape, np.nan))

    run = keras.callbacks.LambdaCallback(on_train_batch_end=spoil)
    with (
        pytest.warns(UserWarning, match="NaN or infinite"),
        pytest.raises(ValueError, match="nan at step 2 of epoch 1"),
    ):
        interrupted_run.run(tmp_path, [run], every=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000-00000000.npz"]


def test_a_checkpoint_of_another_model(tmp_path, model, points):
    interrupted_run.run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="another model or optimizer"):
        model.fit(points, callbacks=[kd.callbacks.Checkpoint(tmp_path / "checkpoints")], verbose=0)
    with pytest.raises(ValueError, match="can be one"):
        model.fit(points, callbacks=[kd.callbacks.Checkpoint(tmp_path) for _ in range(2)], verbose=0)


def test_rows_of_a_log_are_not_repeated(tmp_path):
    """Not even those of an epoch that had ended after the checkpoint from which the run goes on."""
    expected = interrupted_run.run(tmp_path / "a", [keras.callbacks.CSVLogger(tmp_path / "a.csv")])
    logger = keras.callbacks.CSVLogger(tmp_path / "b.csv")
    with pytest.raises(InterruptedError):
        interrupted_run.run(tmp_path / "b", [logger, Interrupt(11)], every=0)
    logger.csv_file.close()
    for path in sorted((tmp_path / "b/checkpoints").iterdir())[1:]:
        path.unlink()
    (first,) = (tmp_path / "b/checkpoints").iterdir()
    assert first.name == "000001-00000004.npz"
    got = interrupted_run.run(tmp_path / "b", [keras.callbacks.CSVLogger(tmp_path / "b.csv"), Interrupt()])
    assert_same(got, expected)
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


@pytest.mark.fast
@pytest.mark.usefixtures("optimized_graphs")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_is_the_uninterrupted_one(popen, tmp_path, kills):
    """SIGKILL at random moments, in the middle of steps and of files."""
    epochs = max(6, kills)
    expected = interrupted_run.run(tmp_path / "a", epochs=epochs, run_eagerly=False)
    random = np.random.default_rng(kills)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "b"), str(epochs)]
    for _ in range(kills):
        process = popen(command, stderr=subprocess.DEVNULL)
        for _ in range(random.integers(2, 10)):  # on the way to the checkpoint, batches are skipped
            assert process.stdout.readline().startswith("Batch")
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        process.communicate()
    assert_same(interrupted_run.run(tmp_path / "b", epochs=epochs, run_eagerly=False), expected)


@pytest.mark.parametrize("arguments", [{"every": -1}, {"every": np.nan}, {"keep": 0}])
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        kd.callbacks.Checkpoint(tmp_path, **arguments)


def test_other_data_go_on_too(tmp_path, model, points):
    """An array, whose order Keras shuffles by Python's random numbers: the number of updates is right."""
    stop = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: 1 / (batch != 2))
    checkpoint = kd.callbacks.Checkpoint(tmp_path, every=0)
    with pytest.raises(ZeroDivisionError):
        model.fit(points, batch_size=64, callbacks=[stop, checkpoint], epochs=2, verbose=0)
    model.fit(points, batch_size=64, callbacks=[keras.callbacks.Callback(), checkpoint], epochs=2, verbose=0)
    assert int(model.optimizer.iterations) == 8
    assert np.all(np.isfinite(np.concatenate([w.ravel() for w in weights(model.weights)])))


# Callbacks. They opt in to being restored.


def small_model():
    keras.utils.set_random_seed(0)
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), kd.GaussianDiffusion(kd.schedules.cosine(25), "x0"), seed=3)
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(1e-2), run_eagerly=EAGER)
    return model


def fit(folder, *callbacks, epochs=2, num=12, every=1e9, **options):
    """Trains, or goes on training, on batches of 4 examples."""
    data = kd.datasets.Batches(np.random.default_rng(0).uniform(-1, 1, (num, 2)), batch_size=4)
    callbacks = [kd.callbacks.Checkpoint(folder, every), *callbacks]
    model = small_model()
    model.fit(data, epochs=epochs, verbose=0, callbacks=callbacks, **options)
    return model


class StandsStill(Interrupt):
    """A validation loss that stands still up to 5e-5."""

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = 0.1 + (epoch == 0) * 1e-3 + 5e-5 * (epoch % 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.callbacks.ReduceLROnPlateau(patience=2),
        lambda: keras.callbacks.EarlyStopping(patience=3, min_delta=1e-4),
    ],
)
def test_the_sign_of_min_delta(tmp_path, make):
    """Keras turns it once in a run. The rate falls, and the run ends, when they do without an interruption."""

    def run(name, batch):
        model = fit(tmp_path / name, StandsStill(batch), make(), epochs=8, every=0)
        return float(ops.convert_to_numpy(model.optimizer.learning_rate)), len(model.history.epoch)

    expected = run("a", 10**9)
    assert expected[0] < 2e-3 or expected[1] == 5
    with pytest.raises(InterruptedError):
        run("b", 10)
    assert run("b", 10**9) == expected


class Counts(keras.callbacks.Callback):
    """Has a state, and a large attribute that is none."""

    def __init__(self, more=None):
        super().__init__()
        self.state, self.large = {"batches": 0, "more": more}, np.zeros(10**5)

    def on_train_batch_end(self, batch, logs=None):
        self.state["batches"] += 1

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def test_states_follow_callbacks_that_change_places(tmp_path):
    def callbacks():
        best = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "loss", save_best_only=True)
        return [Counts("first"), best, Counts("second"), keras.callbacks.EarlyStopping("loss", patience=9)]

    before, after = callbacks(), callbacks()
    fit(tmp_path / "a", *before)
    first, best, second, stopping = after
    first.state = second.state = best.best = None
    fit(tmp_path / "a", stopping, first, best, second)
    assert first.state == {"batches": 6, "more": "first"} and second.state == {"batches": 6, "more": "second"}
    assert best.best == before[1].best == min(before[1].model.history.history["loss"])
    assert stopping.best_epoch == before[3].best_epoch
    fit(tmp_path / "a", epochs=3)  # without them


class Lazy(keras.callbacks.Callback):
    """Does not say which of its attributes are its state."""

    def __init__(self):
        super().__init__()
        self.count = 0


BFLOAT16 = keras.ops.convert_to_numpy(keras.ops.cast([1.5, -2.0], "bfloat16"))


STORED = [BFLOAT16, np.float32(0.1), [1, {"a": np.arange(3)}]]
NOT_STORED = [np.array(["a", None], object), np.zeros(2, "i4,i4"), np.array(["a"]), {1, 2}, {(1, 2): 3}]


@pytest.mark.parametrize(("value", "stored"), [*((v, True) for v in STORED), *((v, False) for v in NOT_STORED)])
def test_states_that_cannot_be_stored_are_named(tmp_path, value, stored):
    """They damage no file, and what can be stored comes back as it was."""
    fit(tmp_path, Counts(value), Lazy(), Counts())
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 10**5
    names = r"\['Lazy 0'\]" if stored else r"\['Counts 0', 'Lazy 0'\]"
    counts = [Counts(), Counts()]
    with pytest.warns(UserWarning, match=f"no state of these callbacks, which begin anew: {names}"):
        fit(tmp_path, counts[0], Lazy(), counts[1], epochs=3)
    assert [count.state["batches"] for count in counts] == ([9, 9] if stored else [3, 9])
    if stored:
        keras.tree.map_structure(np.testing.assert_array_equal, counts[0].state["more"], value)
        assert getattr(counts[0].state["more"], "dtype", None) == getattr(value, "dtype", None)


def test_best_weights_of_bfloat16(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    stopping = [keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True) for _ in range(2)]
    for callback in stopping:
        model = fit(tmp_path, callback, validation_data=np.zeros((4, 2)))
    assert any(v.dtype == "bfloat16" for v in model.weights)
    for got, expected in zip(stopping[1].best_weights, stopping[0].best_weights, strict=True):
        assert got.dtype == expected.dtype and np.array_equal(got, expected)


def test_a_list_of_keras(tmp_path):
    inside = keras.callbacks.CallbackList([kd.callbacks.Checkpoint(tmp_path), keras.callbacks.Callback()])
    small_model().fit(np.zeros((4, 2)), verbose=0, callbacks=[[inside]])
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_a_run_that_early_stopping_ended_is_finished(tmp_path, capsys):
    def run(patience, epochs=20):
        return fit(
            tmp_path, StandsStill(), keras.callbacks.EarlyStopping(patience=patience, min_delta=1), epochs=epochs
        )

    assert len(run(2).history.epoch) == 3
    for _ in range(2):
        model = run(2)
        assert len(model.history.epoch) == 3 and int(model.optimizer.iterations) == 9
        assert "holds a finished run" in capsys.readouterr().out
    assert len(run(4).history.epoch) == 5
    assert len(fit(tmp_path, epochs=6).history.epoch) == 6  # without the callback


def found(model):
    """All that an interruption could change."""
    values = {f"variable_{i}": value for i, value in enumerate(weights(checkpoints.variables_of(model)))}
    return values | model.history.history | {"epoch": model.history.epoch}


def test_the_rest_of_an_epoch_is_left_for_the_next_call(tmp_path):
    """A callback that looks at the clock stops the run inside an epoch, and in the last batch of one."""

    class Stops(Interrupt):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.stop_training = next(self.left, None) is None

    options = {"num": 20, "epochs": 3, "validation_data": np.zeros((4, 2))}
    expected = found(fit(tmp_path / "a", **options))
    for batch, name in ((7, "000001-00000003"), (9, "000002-00000005"), (10**9, "000003-00000000")):
        model = fit(tmp_path / "b", Stops(batch), **options)
        assert max(tmp_path.glob("b/*")).stem == name
    assert_same(found(model), expected)


def test_data_that_have_become_fewer(tmp_path):
    """At the end of the epoch, callbacks see the restored model, and the next epoch is trained."""
    seen = []

    class Looks(Interrupt):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((epoch, int(self.model.optimizer.iterations), logs["loss"] > 0))

    with pytest.raises(InterruptedError):
        fit(tmp_path, Interrupt(17), num=40, every=0)
    fit(tmp_path, Looks(), num=20, epochs=3)
    assert seen == [(1, 17, True), (2, 22, True)]


def test_keras_may_rename_its_function(tmp_path, monkeypatch):
    """Then batches that were seen are trained again, and the state is restored after them."""

    def renamed(value, name, default):
        return default if name == "train_function" else getattr(value, name, default)

    expected, trained = found(fit(tmp_path / "a", num=20)), []
    with pytest.raises(InterruptedError):
        fit(tmp_path / "b", Interrupt(8), num=20, every=0)
    monkeypatch.setattr(checkpoints, "getattr", renamed, raising=False)
    monkeypatch.setattr(checkpoints, "_skip", None)
    step = kd.DiffusionModel.train_step
    monkeypatch.setattr(kd.DiffusionModel, "train_step", lambda self, *args: trained.append(0) or step(self, *args))
    assert_same(found(fit(tmp_path / "b", Interrupt(), num=20)), expected)
    # The epoch, also the three batches that were seen. JAX calls the step once, to compile it.
    assert len(trained) == (5 if EAGER else 1)


@pytest.mark.skipif(os.name == "nt", reason="no locks")
def test_a_folder_belongs_to_one_run(tmp_path):
    """Another run would write files of the same names, and delete those of this one."""

    def another(epoch, logs):
        with pytest.raises(ValueError, match=f"Another run uses the folder {tmp_path}"):
            fit(tmp_path)

    fit(tmp_path, keras.callbacks.LambdaCallback(on_epoch_begin=another))
    fit(tmp_path, epochs=3)
    with pytest.raises(ValueError, match="each sets the first epoch"):
        fit(tmp_path, keras.callbacks.BackupAndRestore(tmp_path / "backup"))


def test_the_last_measurement_is_repeated(tmp_path, uncompiled):
    """`SampleMetrics` measures in the first epoch and in every fifth."""

    class Numbers:
        num_real, name, number = 1, "numbers", 0

        def compare(self, x):
            self.number += 1

        def values(self):
            return {"number": self.number}

    def run(epochs):
        metrics = kd.callbacks.SampleMetrics(Numbers(), 1, every=5, sampler=kd.samplers.DDIM(1))
        return fit(tmp_path, metrics, epochs=epochs).history.history["val_number"]

    run(2)
    assert run(5) == [2] * 5  # and 3 in the last epoch if it had measured in the third


# Files of strangers.


def test_files_of_strangers(tmp_path):
    """They hold numbers alone, no more than their size, and set no attributes but the state."""
    path = tmp_path / "x.npz"
    state = np.frombuffer(json.dumps({"a": {checkpoints.ARRAY: ["a", "uint32"]}}).encode(), "uint8")
    for value in (np.zeros(2, "i4,i4"), np.array(["a"]), np.zeros(2, "V8")):
        np.savez(path, a=value, state=state)
        assert checkpoints._read(path)["a"].dtype == "uint32"  # their bytes
    np.savez(path, a=np.array(["a", None], object), state=state)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints._read(path)
    np.savez(path, a=np.zeros(10**6, "uint8"), state=state)
    assert checkpoints._read(path)["a"].nbytes == 10**6
    np.savez_compressed(path, a=np.zeros(10**6, "uint8"), state=state)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints._read(path)


def test_other_attributes_stay(tmp_path):
    fit(tmp_path, keras.callbacks.EarlyStopping("loss", patience=9))
    (path,) = tmp_path.iterdir()
    state = checkpoints._read(path)
    state["callbacks"]["EarlyStopping 0"] |= {"patience": 0, "min_delta": 5.0}
    checkpoints._write(path, state)
    stopping = keras.callbacks.EarlyStopping("loss", patience=9)
    fit(tmp_path, stopping)
    assert stopping.patience == 9 and stopping.min_delta == 0 and stopping.best is not None
    checkpoints._write(path, state | {"variables": [{"array": "0"} for _ in state["variables"]]})
    with pytest.raises(ValueError, match="or of another version"):
        fit(tmp_path, stopping)
