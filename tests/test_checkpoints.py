"""Checkpoints: an interrupted run ends with the same bits as one that was not, and no kill or damage loses the last."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from conftest import weights

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
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_run_is_the_uninterrupted_one(tmp_path, kills):
    """SIGKILL at random moments, in the middle of steps and of files."""
    epochs = max(6, kills)
    expected = interrupted_run.run(tmp_path / "a", epochs=epochs)
    random = np.random.default_rng(kills)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "b"), str(epochs)]
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(random.integers(2, 10)):  # on the way to the checkpoint, batches are skipped
            assert process.stdout.readline().startswith("Batch")
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        process.communicate()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    with np.load(tmp_path / "b/result.npz") as result:
        assert_same({name: result[name] for name in result.files}, expected)


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
