"""Files that mean harm. Each function makes one. Its decorator names the reader and the expected error."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import tempfile
import types
import zipfile
import zlib

import h5py
import keras
import numpy as np
from PIL import Image

import keras_ddpm as kd

ATTACKS = {}
PARTS = ("metadata.json", "config.json", "model.weights.h5")


def attack(read, message, name="x"):
    """Adds a function that writes a hostile file. `read` reads it. The error must match `message`."""

    def add(make):
        ATTACKS[make.__name__] = (make, read, message, name)
        return make

    return add


# Model files. Most are a good file in which one thing is changed.


def genuine():
    """The parts of a good file: its config and the bytes of the others."""
    if not hasattr(genuine, "parts"):
        model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), kd.GaussianDiffusion(kd.schedules.linear(25)), seed=0)
        model.compile(loss="mse", optimizer="adam")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "x.keras")
            model.save(path)
            with zipfile.ZipFile(path) as archive:
                genuine.parts = {name: archive.read(name) for name in PARTS}
    return dict(genuine.parts)


def write(path, parts, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in parts.items() if isinstance(parts, dict) else parts:
            archive.writestr(name, content)


def with_config(path, change, parts=None):
    parts = parts or genuine()
    config = json.loads(parts["config.json"])
    change(config)
    write(path, parts | {"config.json": json.dumps(config)})


def with_weights(path, change, method=zipfile.ZIP_DEFLATED):
    parts = genuine()
    stream = io.BytesIO(parts["model.weights.h5"])
    with h5py.File(stream, "r+") as file:
        change(file)
    write(path, parts | {"model.weights.h5": stream.getvalue()}, method)


def layers(config, kind):
    """The layers of the network with this class, in a config."""
    return [each for each in config["config"]["network"]["config"]["layers"] if each["class_name"] == kind]


def a_weight(file):
    """The name of a matrix among the weights, which is removed."""
    names = []
    file.visititems(
        lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) and item.ndim == 2 else None
    )
    del file[names[0]]
    return names[0]


model = lambda message, name="x.keras": attack(kd.saving.load_model, message, name)


@model("is not a zip file")
def model_empty(path):
    path.write_bytes(b"")


@model("is not a zip file")
def model_text(path):
    path.write_text("import os")


@model("Bad CRC-32|damaged|Error -3|invalid")
def model_damaged(path):
    write(path, genuine())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@model("is not a zip file")
def model_truncated(path):
    write(path, genuine())
    path.write_bytes(path.read_bytes()[:-100])


@model("It has no file config.json")
def model_folder(path):
    path.mkdir()


@model("x.keras is not a regular file")
def model_pipe(path):
    os.mkfifo(path)


@model(r"The file name must end in \.keras", "x.h5")
def model_of_two_formats(path):
    """Keras would read this zip file as HDF5, by its name."""
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = "{}"
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in genuine().items():
            archive.writestr(name, content)


@model("It must hold config.json, metadata.json, model.weights.h5 and nothing else")
def model_without_config(path):
    write(path, {"model.weights.h5": genuine()["model.weights.h5"]})


@model("nothing else")
def model_with_a_hidden_part(path):
    write(path, genuine() | {"hidden": bytes(10**8)})


@model("nothing else")
def model_with_an_absolute_name(path):
    write(path, genuine() | {"/tmp/x": "x"})


@model("nothing else")
def model_with_a_name_above(path):
    write(path, genuine() | {"../../x": "x"})


@model("nothing else")
def model_with_assets(path):
    write(path, genuine() | {"assets/../../x": "x"})


@model("nothing else")
def model_with_two_configs(path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile
        write(path, [*genuine().items(), ("config.json", "{}")])


@model("encrypted")
def model_encrypted(path):
    write(path, genuine())
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := content.find(mark, start + 1)) >= 0:
            content[start + place] |= 1
    path.write_bytes(content)


@model("model.weights.h5 unpacks to too much")
def model_of_zeros(path):
    write(path, genuine() | {"model.weights.h5": bytes(10**8)})


@model("config.json unpacks to too much")
def model_with_a_long_config(path):
    write(path, genuine() | {"config.json": b" " * (2**24 + 1)})


@model("config is too large")
def model_with_a_long_stored_config(path):
    write(path, genuine() | {"config.json": b"[" * (2**24 + 1)}, zipfile.ZIP_STORED)


@model("recursion depth exceeded|too deep")
def model_with_endless_brackets(path):
    write(path, genuine() | {"config.json": b"[" * 10**5})


@model("config is nested too deeply")
def model_with_a_deep_config(path):
    def change(config):
        for _ in range(200):
            config["config"]["network"] = [config["config"]["network"]]

    with_config(path, change)


@model("Expecting value|codec")
def model_with_binary_config(path):
    write(path, genuine() | {"config.json": bytes(range(256))})


@model("has no attribute 'get'")
def model_with_a_list_as_config(path):
    write(path, genuine() | {"config.json": "[]"})


@model("It is not a diffusion model of class DiffusionModel. Received: found='Sequential'")
def model_of_another_class(path):
    """Which Keras would build first: 40 GB of weights."""
    dense = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 10**5}}
    dense["build_config"] = {"input_shape": [None, 10**5]}
    config = {"module": "keras", "class_name": "Sequential", "config": {"layers": [dense]}}
    write(path, genuine() | {"config.json": json.dumps(config)})


@model("It is not a diffusion model")
def model_of_a_function(path):
    with_config(path, lambda config: config.update(module="os", class_name="system", registered_name="system"))


def network_with(layer):
    """A change of a config: the first dense layer is replaced."""

    def change(config):
        old = layers(config, "Dense")[0]
        new = layer | {"registered_name": None, "name": old["name"], "inbound_nodes": old["inbound_nodes"]}
        old.clear()
        old.update(new)

    return change


@model("lambda|Lambda")
def model_with_a_lambda(path):
    function = {"class_name": "__lambda__", "config": {"value": ["4wAAAAA=", None, None]}}
    layer = {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"function": function},
        "registered_name": None,
    }
    with_config(path, network_with(layer))


@model("TFSMLayer|safe")
def model_with_a_saved_model(path):
    layer = {
        "module": "keras.layers",
        "class_name": "TFSMLayer",
        "config": {"filepath": "/tmp"},
        "registered_name": None,
    }
    with_config(path, network_with(layer))


@model("torch|Torch|safe")
def model_with_a_pickle(path):
    config = {"module": {"class_name": "__bytes__", "config": {"value": "x"}}}
    layer = {"module": "keras.layers", "class_name": "TorchModuleWrapper", "config": config}
    with_config(path, network_with(layer))


@model("vocabulary|safe|StringLookup")
def model_that_reads_a_file(path):
    (path.parent / "secret.txt").write_text("secret")
    config = {"vocabulary": str(path.parent / "secret.txt")}
    layer = {"module": "keras.layers", "class_name": "StringLookup", "config": config}
    with_config(path, network_with(layer))


@model("get_file|not a modeling|Could not|deserialize")
def model_that_downloads(path):
    layer = {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "https://example.com/x"}}
    with_config(path, network_with(layer))


@model("Could not locate class|Could not")
def model_that_imports(path):
    layer = {"module": "subprocess", "class_name": "Popen", "config": {"args": ["true"]}, "registered_name": "Popen"}
    with_config(path, network_with(layer))


@model("asks for more weights than it stores")
def model_that_is_wide(path):
    """Matrices of up to 10¹⁰ numbers, in a file of a few kilobytes."""

    def change(config):
        for each in layers(config, "Dense"):
            each["config"]["units"] = 10**5

    with_config(path, change)


@model("asks for more weights than it stores")
def model_that_measures_much(path):
    """A table of 10¹⁰ numbers in a metric."""
    metric = {"module": "keras.metrics", "class_name": "MeanIoU", "config": {"num_classes": 10**5}}
    with_config(path, lambda config: config["compile_config"].update(metrics=[metric | {"registered_name": None}]))


@model("asks for more weights than it stores")
def model_whose_loss_is_wide(path):
    layer = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 10**5}, "registered_name": None}
    loss = layer | {"build_config": {"input_shape": [None, 10**5]}}
    with_config(path, lambda config: config["compile_config"].update(loss=loss))


@model("A number in its config is too large")
def model_with_a_large_number(path):
    with_config(path, lambda config: layers(config, "Dense")[0]["config"].update(units=10**10))


@model("An example has too many numbers")
def model_of_large_examples(path):
    with_config(path, lambda config: layers(config, "InputLayer")[0]["config"].update(batch_shape=[None, 10**5, 10**5]))


@model("signature|not open|HDF5|Unable")
def model_without_weights(path):
    write(path, genuine() | {"model.weights.h5": b"none"})


@model("refer to another place by a link")
def weights_by_an_external_link(path):
    with h5py.File(path.parent / "other.h5", "w") as file:
        file["x"] = np.zeros((2, 8), "float32")
    with_weights(path, lambda file: file.__setitem__(a_weight(file), h5py.ExternalLink(path.parent / "other.h5", "x")))


@model("refer to another place by a link")
def weights_by_a_soft_link(path):
    with_weights(path, lambda file: file.__setitem__(a_weight(file), h5py.SoftLink("/elsewhere")))


@model("not stored whole")
def weights_in_another_file(path):
    (path.parent / "secret.bin").write_bytes(bytes(64))

    def change(file):
        name = a_weight(file)
        file.create_dataset(name, (2, 8), "float32", external=[(str(path.parent / "secret.bin"), 0, 64)])

    with_weights(path, change)


@model("not stored whole")
def weights_that_are_virtual(path):
    def change(file):
        layout = h5py.VirtualLayout((2, 8), "float32")
        layout[...] = h5py.VirtualSource(str(path.parent / "other.h5"), "x", (2, 8))
        file.create_virtual_dataset(a_weight(file), layout)

    with_weights(path, change)


@model("not stored whole")
def weights_that_are_compressed(path):
    """10¹⁰ zeros, of which nothing is stored."""
    change = lambda file: file.create_dataset(a_weight(file), (10**5, 10**5), "float32", compression="gzip")
    with_weights(path, change)


@model("not stored whole")
def weights_that_are_not_there(path):
    with_weights(path, lambda file: file.create_dataset(a_weight(file), (10**5, 10**5), "float32"))


@model("do not form a tree")
def weights_in_a_circle(path):
    with_weights(path, lambda file: file.__setitem__("again", file["/"]))


@model("not an array of numbers")
def weights_that_are_texts(path):
    with_weights(path, lambda file: file.create_dataset(a_weight(file), data=["x"], dtype=h5py.string_dtype()))


@model("not an array of numbers")
def weights_that_are_records(path):
    with_weights(path, lambda file: file.create_dataset(a_weight(file), data=np.zeros(4, "f4,i8")))


@model("repeat each other too often")
def weights_that_repeat(path):
    """10¹⁰ numbers by links to 10⁵ of them."""

    def change(file):
        file["many"] = np.zeros(10**5, "float16")
        for number in range(1000):
            file[f"more/{number}"] = file["many"]

    with_weights(path, change)


@model("could not be loaded.*shape|could not be loaded.*variables")
def weights_of_another_shape(path):
    with_weights(path, lambda file: file.__setitem__(a_weight(file), np.zeros((3, 3), "float32")))


@model("could not be loaded")
def weights_that_are_missing(path):
    with_weights(path, lambda file: a_weight(file) and None)


@model("do not form a tree")
def weights_in_many_groups(path):
    with_weights(path, lambda file: [file.create_group(f"g/{number}") for number in range(2**14)], zipfile.ZIP_STORED)


@contextlib.contextmanager
def hub(folder):
    """A client of the hub that finds this folder."""
    client = types.SimpleNamespace(snapshot_download=lambda repository, allow_patterns: folder)
    before = sys.modules.get("huggingface_hub")
    sys.modules["huggingface_hub"] = client
    try:
        yield
    finally:
        if before is None:
            del sys.modules["huggingface_hub"]
        else:
            sys.modules["huggingface_hub"] = before


def from_hub(path):
    with hub(path):
        kd.DiffusionModel.from_preset("hf://someone/model")


@attack(from_hub, "asks for more weights than it stores", "x")
def address_of_a_wide_model(path):
    model_that_is_wide(path.with_suffix(".keras"))
    zipfile.ZipFile(path.with_suffix(".keras")).extractall(path)


@attack(from_hub, "refer to another place by a link", "x")
def address_of_links(path):
    weights_by_a_soft_link(path.with_suffix(".keras"))
    zipfile.ZipFile(path.with_suffix(".keras")).extractall(path)


@attack(from_hub, "config.json", "x")
def address_of_nothing(path):
    path.mkdir()


preset = lambda message: attack(kd.DiffusionModel.from_preset, message, "x")


@preset("asks for more weights than it stores")
def folder_of_a_wide_model(path):
    address_of_a_wide_model(path)


@preset("It has no file metadata.json")
def folder_with_a_pipe(path):
    address_of_a_wide_model(path)
    (path / "metadata.json").unlink()
    os.mkfifo(path / "metadata.json")


@preset("It has no file model.weights.h5")
def folder_that_leads_to_a_device(path):
    address_of_a_wide_model(path)
    (path / "model.weights.h5").unlink()
    (path / "model.weights.h5").symlink_to("/dev/zero")


# Arrays.

arrays = lambda message, name="x.npy": attack(kd.datasets.from_arrays, message, name)
pixels = lambda: keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten()], name="pixels")
measured = lambda path: kd.metrics.KernelInceptionDistance(pixels()).load_real(path)
statistics = lambda message: attack(measured, message, "x.npz")


class Harm:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


def header(shape, descr="|u1", version=1):
    """The beginning of an .npy file, and some of its bytes."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}) if not isinstance(shape, str) else shape
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text.encode() + bytes(100)


@arrays("Python objects|allow_pickle")
def arrays_of_objects(path):
    np.save(path, np.array([Harm()]), allow_pickle=True)


@arrays("allow_pickle")
def arrays_in_a_pickle(path):
    path.write_bytes(pickle.dumps(Harm()))


@arrays("Expected uint8 images or floats")
def arrays_of_records(path):
    np.save(path, np.zeros(4, "f4,i8"))


@arrays("mmap length|beyond|too (large|big)")
def arrays_cut_short(path):
    np.save(path, np.zeros((100, 8, 8, 3), "uint8"))
    path.write_bytes(path.read_bytes()[:5000])


@arrays("mmap length|beyond|too (large|big)")
def arrays_of_a_large_shape(path):
    path.write_bytes(header((10**6, 10**6)))


@arrays("too (large|big)|cannot be read|overflow")
def arrays_of_an_overflowing_shape(path):
    path.write_bytes(header((2**33, 2**33)))


@arrays("cannot be read as arrays")
def arrays_of_a_negative_shape(path):
    path.write_bytes(header((-1, 8, 8, 3)))


@arrays("malformed|[Hh]eader|parse")
def arrays_with_code(path):
    path.write_bytes(header("{'descr': __import__('os').mkdir('harmed'), 'fortran_order': False, 'shape': (1,)}"))


@arrays("version|read as arrays")
def arrays_of_the_future(path):
    path.write_bytes(header((1,), version=9))


@arrays("cannot be read as arrays")
def arrays_empty(path):
    path.write_bytes(b"")


@arrays("x.npy is not a regular file")
def arrays_pipe(path):
    os.mkfifo(path)


def npz(path, **parts):
    write(path, {f"{name}.npy": content for name, content in parts.items()})


@arrays("allow_pickle", "x.npz")
def npz_of_objects(path):
    np.savez(path, x=np.array([Harm()]))


@arrays("Unable to allocate|EOF", "x.npz")
def npz_of_a_large_shape(path):
    npz(path, x=header((10**6, 10**6)))


@arrays("unpacks to too much", "x.npz")
def npz_that_declares_much(path):
    """The list of parts says 5 GiB, of which a few bytes are stored."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header((5 * 2**30, 1)))
        archive.filelist[0].file_size = 5 * 2**30


@arrays("magic|read as arrays", "x.npz")
def npz_of_texts(path):
    npz(path, x=b"text")


@arrays("must have an entry 'x'", "x.npz")
def npz_without_x(path):
    np.savez(path, y=np.zeros(4))


@arrays("encrypted", "x.npz")
def npz_encrypted(path):
    model_encrypted(path)


@arrays("Bad CRC-32|read as arrays", "x.npz")
def npz_damaged(path):
    np.savez(path, x=np.zeros((4, 8, 8, 3), "uint8"))
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)


def about(**arrays):
    """The entries of a file of statistics, with others in their place."""
    extractor = kd.metrics.KernelInceptionDistance(pixels()).extractor
    return {"metric": "KernelInceptionDistance", "extractor": extractor.name, "hash": extractor.hash, **arrays}


@statistics("allow_pickle")
def statistics_of_objects(path):
    np.savez(path, **about(features=np.array([Harm()])))


@statistics("must hold features")
def statistics_of_a_number(path):
    np.savez(path, **about(features=np.float32(1)))


@statistics("must hold features")
def statistics_without_features(path):
    np.savez(path, **about())


# Pictures, each in a folder.

read_pictures = lambda path: kd.datasets.from_folder(path, 8, strict=True)
pictures = lambda message: attack(read_pictures, message)


def chunk(kind, content):
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def png(path, width, height, *chunks):
    size = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(10**5)))
    path.mkdir()
    (path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + size + b"".join(chunks) + data + chunk(b"IEND", b""))


@pictures("bomb")
def picture_of_a_giant(path):
    png(path, 60_000, 60_000)


@pictures("more than `max_pixels`")
def picture_of_many_pixels(path):
    png(path, 8_000, 8_000)


@pictures("Too much memory used in text chunks")
def picture_with_a_long_text(path):
    png(path, 8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1))) for _ in range(80)])


@pictures("cannot identify image file|cannot be read as an image")
def picture_that_is_a_zip(path):
    path.mkdir()
    write(path / "a.png", {"a": "a"})


@pictures("cannot be read as an image")
def picture_that_is_a_program(path):
    path.mkdir()
    (path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n%%EOF\n")


@pictures("is not a regular file")
def picture_that_is_a_pipe(path):
    path.mkdir()
    os.mkfifo(path / "a.png")


@pictures("truncated|cannot be read as an image")
def picture_cut_short(path):
    path.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")).save(path / "a.png")
    (path / "a.png").write_bytes((path / "a.png").read_bytes()[:3000])


@pictures("cannot be read as an image")
def picture_that_is_empty(path):
    path.mkdir()
    (path / "a.jpg").touch()


@pictures("holds 50 images")
def picture_of_many(path):
    path.mkdir()
    frames = [Image.new("L", (8, 8), number) for number in range(50)]
    frames[0].save(path / "a.gif", save_all=True, append_images=frames[1:])


@pictures("cannot be read as an image")
def picture_in_a_circle(path):
    """A TIFF file whose next directory is the first one again, without an image."""
    path.mkdir()
    directory = struct.pack("<HHHLLL", 1, 256, 4, 1, 8, 8)
    (path / "a.tif").write_bytes(b"II*\0" + struct.pack("<L", 8) + directory)


@pictures("There is no readable image")
def folders_in_circles(path):
    """Sixteen folders with links to each other: more than 10¹³ ways through them."""
    for here in range(16):
        (path / str(here)).mkdir(parents=True)
        for there in range(16):
            (path / str(here) / f"to {there}").symlink_to(path / str(there))


@pictures("cannot be read as an image|There is no readable image")
def folder_of_broken_links(path):
    path.mkdir()
    (path / "a.png").symlink_to(path / "b.png")
    (path / "b.png").symlink_to(path / "a.png")
