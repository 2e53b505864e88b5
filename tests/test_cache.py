"""Decoding into a file: once, by one of several processes, checked when it is opened."""

import concurrent.futures
import functools
import itertools
import os
import threading

import keras
import numpy as np
import pytest
from PIL import Image

import keras_ddpm as kd
from keras_ddpm import _files, datasets
from keras_ddpm.datasets import cache as _cache


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures of two classes, of which one cannot be read."""
    random = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (12, 9, 3), "uint8")).save(path)
    (tmp_path / "pictures/a/06.png").write_bytes(b"no image")
    return tmp_path / "pictures"


def read(folder, **options):
    with pytest.warns(UserWarning, match="Skipped.*06.png"):
        return datasets.from_folder(folder, 8, batch_size=19, shuffle=False, **options)


def test_a_file_holds_what_is_decoded_into_memory(folder, tmp_path, capsys):
    in_memory = read(folder, labels=True)
    cache = tmp_path / "new" / "pictures.npy"
    for _ in range(2):
        data = read(folder, labels=True, cache=cache)
        assert np.array_equal(data.x, in_memory.x) and np.array_equal(data.labels, in_memory.labels)
        assert data.class_names == ["a", "b"] and np.array_equal(data[0][0], in_memory[0][0])
    assert capsys.readouterr().out.count("Decoding 20 images") == 1
    assert np.array_equal(np.load(cache), in_memory.x)  # a plain file
    assert isinstance(data.x.base, np.memmap) and not isinstance(in_memory.x.base, np.memmap)
    with pytest.raises(ValueError, match="06.png cannot be read"):
        datasets.from_folder(folder, 8, strict=True, cache=cache)


def test_a_file_has_its_name_when_it_is_whole(folder, tmp_path, monkeypatch):
    """Decoding that was interrupted starts over, and leaves nothing. What a kill leaves is replaced at once."""
    expected, load, cache = read(folder).x, kd.images.load, tmp_path / "pictures.npy"

    def interrupted(path, *args):
        if path.name == "15.png":
            assert [file.name for file in tmp_path.glob("*.npy*")] == ["pictures.npy.tmp"]
            raise KeyboardInterrupt
        return load(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_cache, "BLOCK", 4)
        patch.setattr(kd.images, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            datasets.from_folder(folder, 8, cache=cache)
    assert not list(tmp_path.glob("*.npy*"))
    (tmp_path / "pictures.npy.tmp").write_bytes(b"of a run that was killed" * 1000)
    assert np.array_equal(read(folder, cache=cache).x, expected)
    assert [file.name for file in tmp_path.glob("*.npy*")] == ["pictures.npy"]


@pytest.mark.skipif(os.name == "nt", reason="no locks")
def test_two_runs_at_once(tmp_path, monkeypatch):
    """One decodes. The other waits for all images, and has the same."""
    waits, loaded, locked = threading.Event(), [], _files.locked

    def load(number):
        assert waits.wait(60)
        loaded.append(number)
        return np.full((4, 4, 1), number, "uint8"), number

    def second(folder, **options):
        if next(runs):  # the first run decodes by now, or is about to
            threading.Timer(0.1, waits.set).start()
        return locked(folder, **options)

    runs = itertools.count()
    monkeypatch.setattr(_cache._files, "locked", second)
    run = functools.partial(_cache.decoded, range(20), load, 20, ["numbers"], tmp_path / "x.npy")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for x, labels, skipped in pool.map(lambda _: run(), "ab"):
            assert x[:, 3, 3, 0].tolist() == labels == list(range(20)) and not skipped
    assert sorted(loaded) == list(range(20)) and next(runs) == 2


def test_strict(folder, tmp_path, monkeypatch):
    """The first file that cannot be read ends the reading, and its error is told."""
    monkeypatch.setattr(_cache, "BLOCK", 4)
    load, loaded = kd.images.load, []
    monkeypatch.setattr(kd.images, "load", lambda path, *args: loaded.append(path.name) or load(path, *args))
    with pytest.raises(ValueError, match="06.png cannot be read") as caught:
        datasets.from_folder(folder, 8, strict=True, cache=tmp_path / "pictures.npy")
    assert isinstance(caught.value.__cause__, OSError) and len(loaded) == 4


def test_a_file_is_checked_when_it_is_opened(folder, tmp_path):
    cache = tmp_path / "pictures.npy"
    with pytest.raises(ValueError, match="must end in .npy"):
        datasets.from_folder(folder, 8, cache=tmp_path / "pictures.bin")
    read(folder, cache=cache)
    with pytest.raises(ValueError, match=r"made of other data or with other settings. Delete .*pictures.npy to"):
        datasets.from_folder(folder, 16, cache=cache)
    whole = cache.read_bytes()
    for content in (whole[:-1], whole[:-100], whole[:-2000], whole[:100], b"", whole + b"0", b"no array"):
        cache.write_bytes(content)
        with pytest.raises(ValueError, match="pictures.npy is damaged, or was not made by this version"):
            datasets.from_folder(folder, 8, cache=cache)
    cache.unlink()
    read(folder, cache=cache)
    Image.new("RGB", (8, 8)).save(folder / "a/new.png")
    with pytest.raises(ValueError, match="made of other data"):
        datasets.from_folder(folder, 8, cache=cache)


def test_a_flipped_bit_is_noticed(tmp_path):
    """In the header, the images, the labels and the checksum, unless the header means the same."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 4, 4, 1), "uint8")
    run = functools.partial(_cache.decoded, range(20), lambda i: (images[i], i), 20, [], tmp_path / "x.npy")
    run()
    whole = (tmp_path / "x.npy").read_bytes()
    for place in random.choice(len(whole), 150, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.integers(8)
        (tmp_path / "x.npy").write_bytes(damaged)
        try:
            x, labels, _ = run()
        except ValueError as error:
            assert "is damaged" in str(error)
        else:
            assert np.array_equal(x, images) and labels == list(range(20)) and place < 128


def test_nothing_can_be_read(tmp_path):
    for _ in range(2):
        x, labels, skipped = _cache.decoded("ab", str, 2, [], tmp_path / "x.npy")
        assert len(x) == 0 and labels == [] and skipped == ["a", "b"]


def test_another_process_waits_for_the_chief(folder, tmp_path, monkeypatch):
    cache = tmp_path / "pictures.npy"
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        monkeypatch.setattr(kd._backend.replicas, "_process", lambda: (0, 2))
        read(folder, cache=cache)
        monkeypatch.setattr(kd._backend.replicas, "_process", lambda: (1, 2))

    monkeypatch.setattr(kd._backend.replicas, "_process", lambda: (1, 2))
    monkeypatch.setattr(_cache.time, "sleep", sleep)
    assert read(folder, cache=cache).num_examples == 19 and waited == [1]


def test_a_data_set_of_tensorflow(data_dir, tmp_path, monkeypatch):
    options = {"data_dir": data_dir, "labels": True, "batch_size": 10, "shuffle": False}
    name, cache = "fashion_mnist", tmp_path / "x.npy"
    expected = datasets.from_tfds(name, "test[:100]", 16, **options)
    monkeypatch.setattr(_cache, "BLOCK", 32)
    for _ in range(2):
        data = datasets.from_tfds(name, "test[:100]", 16, cache=cache, **options)
        assert np.array_equal(data.x, expected.x) and np.array_equal(data.labels, expected.labels)
    with pytest.raises(ValueError, match="made of other data"):
        datasets.from_tfds(name, "test[:99]", 16, cache=cache, **options)


def batches_seen(model, data, monkeypatch, **options):
    """The losses of every step, which tell batches apart."""
    losses = []
    tell = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"])))
    model.fit(data, verbose=0, callbacks=[tell], **options)
    return losses


@pytest.mark.parametrize("initial_epoch", [0, 2])
def test_workers_change_nothing(points, monkeypatch, initial_epoch):
    """The batches of `fit` are the same, in the same order, in all epochs."""
    seen = []
    for num_workers in (0, 3):
        model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(kd.schedules.linear(50)), seed=0)
        model.network.set_weights([np.full_like(w, 0.1) for w in model.network.get_weights()])
        model.compile(loss="mse", optimizer="sgd")
        data = datasets.Batches(points, batch_size=32, num_workers=num_workers)
        seen.append(batches_seen(model, data, monkeypatch, epochs=4, initial_epoch=initial_epoch))
    assert seen[0] == seen[1] and len(set(seen[0])) == 8 * (4 - initial_epoch)


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"num_workers": 2}, {"shuffle": False, "num_workers": 2}])
def test_no_batch_after_the_last(points, options):
    data = datasets.Batches(points, batch_size=32, **options)
    assert data[len(data) - 1].shape == (32, 2)
    for step in (len(data), -1):
        with pytest.raises(IndexError, match=f"There are {len(data)} batches. Received: {step}"):
            data[step]


def test_workers_that_fail(points):
    data = datasets.Batches(points, np.arange(len(points)), batch_size=32, num_workers=2)
    data.labels = data.labels[:3]
    with pytest.raises(IndexError):
        data[0]


def resident():
    """The bytes of files in the memory of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile"))


def test_the_pages_of_a_file_leave_the_memory(tmp_path):
    """After they were read: the resident memory of the file falls."""
    np.save(tmp_path / "x.npy", np.zeros((2**12, 128, 128, 1), "uint8"))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    before = resident()
    assert int(x.sum()) == 0 and resident() - before > 0.9 * x.nbytes
    _cache.forget(x)
    assert resident() - before < 0.1 * x.nbytes and int(x[5, 5, 5, 0]) == 0


def test_a_file_of_floats_is_checked_in_parts(tmp_path, monkeypatch):
    values = np.zeros((2**10, 128, 128, 1), "float32")
    np.save(tmp_path / "x.npy", values)
    before, most, forget = resident(), [], _cache.forget
    monkeypatch.setattr(_cache, "forget", lambda x: most.append(resident() - before) or forget(x))
    data = datasets.from_arrays(tmp_path / "x.npy", batch_size=4)
    assert len(most) == 4 and max(most) < 0.5 * values.nbytes and resident() - before < 0.1 * values.nbytes
    assert data[0].shape == (4, 128, 128, 1)
    values[-1, -1, -1] = np.inf
    np.save(tmp_path / "y.npy", values)
    with pytest.raises(ValueError, match="hold NaN or infinite"):
        datasets.from_arrays(tmp_path / "y.npy", batch_size=4)
