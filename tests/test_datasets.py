"""Batches and the sources of data."""

import multiprocessing
import os
import re
import signal
import threading

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

import keras_ddpm as kd
from keras_ddpm import datasets, images, toys

ROWS = np.arange(10, dtype="float32")[:, None] / 10


def epoch(batches):
    batches.on_epoch_begin()
    rows = [batches[step] for step in range(len(batches))]
    batches.on_epoch_end()
    return rows


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings(
    "ignore:This process.*is multi-threaded:DeprecationWarning", "ignore:os.fork:RuntimeWarning"
)
def test_workers_work_in_a_forked_process():
    batches = datasets.Batches(ROWS, batch_size=2, num_workers=1)
    expected = batches[1]
    child = os.fork()
    if not child:
        signal.alarm(10)  # ends a process that hangs
        os._exit(int(not np.array_equal(batches[1], expected)))
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(batches[1], expected)


def test_the_toy_data_are_exported():
    for name in ("FLOWER_KINDS", "moons", "procedural_flowers"):
        assert getattr(datasets, name) is getattr(toys, name)


def test_shuffled_batches_are_full_and_use_every_example():
    batches = datasets.from_arrays(ROWS, batch_size=4, seed=1)
    seen = [epoch(batches) for _ in range(5)]
    assert all(len(batch) == 4 for batches in seen for batch in batches)
    row = np.concatenate([batch for batches in seen for batch in batches])[:, 0]
    assert len(row) == 40
    for start in range(0, 40, 10):  # each pass is a permutation
        assert sorted(row[start : start + 10]) == sorted(ROWS[:, 0])
    assert not np.array_equal(row[:10], row[10:20])
    again = datasets.from_arrays(ROWS, batch_size=4, seed=1)
    assert np.array_equal(again[1], seen[0][1]) and np.array_equal(
        again[0], seen[0][0]
    )  # steps may be read in any order
    assert not np.array_equal(datasets.from_arrays(ROWS, batch_size=4, seed=2)[0], seen[0][0])


def test_fit_goes_from_epoch_to_epoch(model):
    asked = set()

    class Recorded(datasets.Batches):
        def __getitem__(self, step):
            asked.add((self.epoch, step))
            return super().__getitem__(step)

    batches = Recorded(np.zeros((10, 2), "float32"), batch_size=4)
    model.fit(batches, epochs=2, verbose=0)
    model.evaluate(datasets.from_arrays(np.zeros((10, 2)), batch_size=4, shuffle=False), verbose=0)
    model.fit(batches, epochs=1, verbose=0)
    assert asked == {(epoch, step) for epoch in range(3) for step in range(2)}


def test_batches_in_order():
    batches = datasets.from_arrays(ROWS, batch_size=4, shuffle=False)
    for _ in range(2):
        assert [len(batch) for batch in epoch(batches)] == [4, 4, 2]
    assert np.array_equal(np.concatenate(epoch(batches)), ROWS)


def test_labels_stay_with_their_examples():
    batches = datasets.from_arrays(ROWS, labels=list(range(10)), batch_size=5)
    for x, label in epoch(batches) + epoch(batches):
        assert np.array_equal(x[:, 0], (label / 10).astype("float32"))


def test_flip_mirrors_half_of_the_images():
    x = np.zeros((100, 2, 2, 1), "uint8")
    x[:, :, 0] = 255
    batches = datasets.from_arrays(x, batch_size=100, flip=True)
    first, second = epoch(batches)[0], epoch(batches)[0]
    mirrored = first[:, 0, 0, 0] == -1
    assert 30 < mirrored.sum() < 70 and np.array_equal(first[mirrored], -first[~mirrored][:1].repeat(mirrored.sum(), 0))
    assert not np.array_equal(first, second)  # drawn again in each epoch
    assert np.all(x[:, :, 0] == 255)  # the data are not modified


def test_steps_per_epoch():
    batches = datasets.from_arrays(ROWS, batch_size=4, steps_per_epoch=5)
    assert len(batches) == 5
    assert sorted(np.concatenate(epoch(batches))[:, 0].tolist()) == sorted(ROWS[:, 0].tolist() * 2)


def test_arrays_from_files(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype("uint8")
    np.save(tmp_path / "x.npy", x)
    batch = datasets.from_arrays(tmp_path / "x.npy", batch_size=6, shuffle=False)[0]
    assert batch.dtype == "float32" and np.array_equal(images.to_uint8(batch), x)
    np.savez(tmp_path / "x.npz", x=x, labels=np.arange(6))
    batch, labels = datasets.from_arrays(str(tmp_path / "x.npz"), image_size=4, batch_size=6, shuffle=False)[0]
    assert batch.shape == (6, 4, 4, 3) and np.array_equal(labels, np.arange(6))
    np.savez(tmp_path / "y.npz", y=x)
    with pytest.raises(ValueError, match=r"'x'.*\['y'\]"):
        datasets.from_arrays(tmp_path / "y.npz")


def test_folder(tmp_path):
    for name, color in [("b/1.png", "red"), ("a/2.JPG", "blue"), ("a/deep/3.bmp", "green")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), color).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    batches = datasets.from_folder(tmp_path, 8, labels=True, batch_size=3, shuffle=False)
    x, labels = batches[0]
    assert x.shape == (3, 8, 8, 3) and labels.tolist() == [0, 0, 1] and batches.class_names == ["a", "b"]
    assert x[2, 0, 0].tolist() == [1, -1, -1]
    assert datasets.from_folder(tmp_path, 8, channels=1, batch_size=3)[0].shape == (3, 8, 8, 1)

    (tmp_path / "a/broken.png").write_bytes(b"\x89PNG nonsense")
    with pytest.warns(UserWarning, match="Skipped.*broken.png"):
        assert datasets.from_folder(tmp_path, 8, batch_size=3).num_examples == 3
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        datasets.from_folder(tmp_path, 8, strict=True)


def test_formats_that_are_not_read_are_named(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    for name in ("b.heic", "c.SVG", "d.txt"):
        (tmp_path / name).write_text("")
    with pytest.warns(UserWarning, match=r"Files ending in \.SVG, \.heic are skipped"):
        assert datasets.from_folder(tmp_path, 8, batch_size=1).num_examples == 1


def test_what_is_no_image_of_a_folder(tmp_path):
    """Hidden files and those of archives are ignored; folders without an image are no class; links are followed."""
    picture = Image.new("RGB", (8, 8), "red")
    names = ["cat/a.png", "cat/._a.png", "dog/a.png", ".ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", "dog/.x/a.png"]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "data" / name)
    (tmp_path / "data/ant").mkdir()
    (tmp_path / "data/bee").mkdir()
    (tmp_path / "data/bee/a.png").write_text("no picture")
    (tmp_path / "elsewhere").mkdir()
    picture.save(tmp_path / "elsewhere/a.png")
    (tmp_path / "data/elk").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/dog/loop").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / "data/dog/pipe.png")
    with pytest.warns(UserWarning) as caught:
        batches = datasets.from_folder(tmp_path / "data", 8, labels=True, batch_size=1)
    assert sorted(re.search(r"(\w+/\w+\.png)", str(warning.message))[1] for warning in caught) == [
        "bee/a.png",
        "dog/pipe.png",
    ]
    assert batches.labels.tolist() == [0, 1, 2] and batches.class_names == ["cat", "dog", "elk"]
    (tmp_path / "data/bee/a.png").unlink()
    (tmp_path / "data/dog/pipe.png").unlink()
    picture.save(tmp_path / "data/root.png")
    with pytest.raises(ValueError, match="root.png is in no subfolder"):
        datasets.from_folder(tmp_path / "data", 8, labels=True)


def test_files_that_are_too_much(tmp_path):
    Image.new("1", (2000, 1000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="2000000 pixels, more than `max_pixels`"):
        datasets.from_folder(tmp_path, 8, strict=True, max_pixels=1_999_999)
    assert datasets.from_folder(tmp_path, 8, max_pixels=2_000_000, batch_size=1).num_examples == 1
    frames = [Image.new("L", (8, 8), 40 * i) for i in range(3)]
    for name in ("pages.tif", "animation.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match="holds 3 images"):
            images.load(tmp_path / name, 8)


def run_epochs(data, epochs, **options):
    """The rows of each batch that a model sees."""
    rows = []

    class Model(kd.DiffusionModel):
        def _corrupted(self, data, *args):
            x = data[0] if isinstance(data, (tuple, list)) else data
            rows.append(ops.convert_to_numpy(x)[:, 0].astype(int).tolist())
            return super()._corrupted(data, *args)

    x, t = keras.Input((1,)), keras.Input((), dtype="int32")
    model = Model(keras.Model([x, t], keras.layers.Dense(1)(x)), kd.GaussianDiffusion(clip_range=None))
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.0), run_eagerly=True)
    model.fit(data, epochs=epochs, verbose=0, **options)
    return rows


def numbered(**options):
    return datasets.Batches(np.arange(24, dtype="float32")[:, None], batch_size=4, seed=1, **options)


def expected_rows(epochs):
    data, rows = numbered(), []
    for data.epoch in epochs:
        rows += [data[step][:, 0].astype(int).tolist() for step in range(len(data))]
    return rows


@pytest.mark.parametrize(("workers", "processes"), [(1, False), (2, False), (8, False), (2, True)])
def test_workers_see_the_same_batches(workers, processes):
    if processes and keras.backend.backend() == "jax":
        pytest.skip("JAX warns of the fork by which Keras makes processes")
    data = numbered()
    data.workers, data.use_multiprocessing = workers, processes
    assert run_epochs(data, 4) == expected_rows(range(4))


def test_the_order_does_not_depend_on_python_s_random_numbers():
    assert run_epochs(numbered(), 2) == run_epochs(numbered(), 2, shuffle=True) == expected_rows([0, 1])


def test_the_initial_epoch_is_where_the_data_go_on():
    assert run_epochs(numbered(), 5, initial_epoch=3) == expected_rows([3, 4])
    data = numbered()
    assert [run_epochs(data, 1) for _ in range(3)] == [expected_rows([epoch]) for epoch in range(3)]
    assert run_epochs(data, 3, initial_epoch=2) == expected_rows([2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: datasets.from_folder(folder), "no readable image in"),
        (lambda folder: datasets.from_folder(folder / "nowhere"), "no folder .*nowhere"),
        (lambda folder: datasets.from_arrays(ROWS, batch_size=11), "integer in 1..10. Received: batch_size=11"),
        (lambda folder: datasets.from_arrays(ROWS, batch_size=0), "Received: batch_size=0"),
        (lambda folder: datasets.from_arrays(ROWS, labels=[1, 2], batch_size=2), "Expected 10 labels"),
        (lambda folder: datasets.from_arrays(np.append(ROWS, [[np.nan]], axis=0), batch_size=2), "NaN"),
        (lambda folder: datasets.from_arrays(ROWS, batch_size=2, flip=True), r"flipped. Received: shape=\(10, 1\)"),
        (lambda folder: datasets.from_folder(folder, channels=2), "channels=2"),
        (lambda folder: datasets.from_arrays(ROWS, batch_size=2, steps_per_epoch=0), "Received: steps_per_epoch=0"),
        (lambda folder: datasets.from_arrays(np.arange(10), batch_size=2), "int64"),
        (lambda folder: datasets.from_arrays(ROWS, image_size=8), "float32"),
    ],
)
def test_bad_input(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_data_set_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the cable is cut")

    monkeypatch.setattr("requests.head", refuse)
    with pytest.raises(ConnectionError, match="oxford_flowers102 is not in .*the cable is cut"):
        datasets.oxford_flowers(data_dir=tmp_path)


def test_a_network_that_never_answers(monkeypatch):
    end = threading.Event()

    def hang(*args, **kwargs):
        end.wait()
        raise OSError

    monkeypatch.setattr("requests.head", hang)
    with pytest.raises(multiprocessing.TimeoutError):
        datasets.sources._check_reachable("https://example.org", seconds=0.1)
    end.set()


@pytest.mark.host
def test_oxford_flowers(data_dir):
    """8189 photographs without four duplicates. A tenth of each split is held out, and no image is in both parts."""
    train, validation = datasets.oxford_flowers(16, 1000, data_dir, labels=True)
    assert (train.num_examples, validation.num_examples) == (7366, 819)
    every = np.concatenate([train.x, validation.x])
    assert every.shape == (8185, 16, 16, 3) and len(np.unique(every.reshape(8185, -1), axis=0)) == 8185
    assert set(train.labels) == set(range(102))
    assert len(train) == 7366 // 1000 and train.flip and not validation.flip
    (batch,) = epoch(validation)  # `batch_size` may be larger than the held-out part
    assert len(batch[0]) == 819


@pytest.mark.host
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_other_data_sets(data_dir, name):
    batches = datasets.from_tfds(name, "test[:100]", data_dir=data_dir, labels=True, batch_size=10)
    x, labels = batches[0]
    assert x.shape == (10, 28, 28, 1) and labels.shape == (10,) and batches.num_examples == 100
    with pytest.raises(ValueError, match="differ in size"):
        datasets.from_tfds("oxford_flowers102", "train[:10]", data_dir=data_dir)
    small = datasets.from_tfds(name, "test[:100]", 16, data_dir=data_dir, batch_size=10, shuffle=False)[0]
    assert small.shape == (10, 16, 16, 1) and -1 <= small.min() < -0.9 and small.max() <= 1


def test_names_configs_and_versions_are_those_of_tensorflow_datasets(tmp_path, monkeypatch):
    """What is prepared is read without network, the newest version first. Nothing else is taken in its place."""
    tf, tfds = pytest.importorskip("tensorflow"), pytest.importorskip("tensorflow_datasets")
    features = {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=9)}
    data = tf.data.Dataset.from_tensor_slices({"image": np.zeros((8, 8, 8, 1), "uint8"), "label": np.arange(8)})

    def store(name, version, num, **config):
        options = {"features": tfds.features.FeaturesDict(features), "data_dir": tmp_path, **config}
        tfds.dataset_builders.store_as_tfds_dataset(name, version, split_datasets={"train": data.take(num)}, **options)

    def refuse(*args, **kwargs):
        raise OSError("the cable is cut")

    monkeypatch.setattr("requests.head", refuse)
    for version, num in {"9.0.0": 7, "10.0.0": 6, "9.1.0": 5}.items():
        store("mine", version, num)
    store("emnist", "3.1.0", 8, config="byclass")  # the default config
    read = {"mine": 6, "mine:9.0.0": 7, "mine:9.*.*": 5, "emnist": 8, "emnist/byclass": 8, "emnist/byclass:3.1.0": 8}
    for name, num in read.items():
        assert datasets.from_tfds(name, data_dir=tmp_path, batch_size=2).num_examples == num, name
    for name in ("emnist/letters", "emnist/letters:3.1.0", "mnist:3.0.1"):
        with pytest.raises(ConnectionError, match=f"^{name} is not in .*the cable is cut$"):
            datasets.from_tfds(name, data_dir=tmp_path)
    for name, message in {
        "emnist/leters": "no config of this name. Received: name='emnist/leters'",
        "mnist/large": "no config of this name",
        "emnst": "no data set 'emnst'. Similar names: .*'emnist'",
    }.items():
        with pytest.raises(ValueError, match=message):
            datasets.from_tfds(name, data_dir=tmp_path)
