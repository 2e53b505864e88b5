"""The page of examples/demo.py in headless Chromium, with WebAssembly. Run with -m browser; needs npm and Chromium."""

import contextlib
import functools
import http.server
import importlib
import json
import shutil
import threading
import time

import keras
import numpy as np
import onnx_sampling
import pytest
from conftest import randomize
from test_export import SHAPE, make_model, unet

import keras_ddpm as kd
from keras_ddpm.networks import with_guidance_scale

pytestmark = pytest.mark.browser
SIZE = SHAPE[0]
TABLES = {"few": kd.samplers.UniPC(6), "earlier noise": kd.samplers.IPNDM(6), "noise": kd.samplers.DDPM(5)}
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the page and a small model with labels, which makes guidance up to 2.5 in one call."""
    folder = tmp_path_factory.mktemp("site")
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    demo = importlib.import_module("demo")
    model = make_model(num_classes=3, network=lambda *args, **kwargs: with_guidance_scale(unet(*args, **kwargs)))
    demo.build(kd.DiffusionModel.from_model(model, max_guidance_scale=2.5), folder, 2.0, TABLES)
    return folder


@pytest.fixture(scope="module")
def enlarging(site, tmp_path_factory):
    """The same folder with an upscaler to twice the size."""
    folder = tmp_path_factory.mktemp("enlarging")
    network = kd.networks.unet((2 * SIZE, 2 * SIZE, 3), 8, (1, 2), 1, (), 4, num_classes=3, image_channels=3)
    names = [f"kind {label}" for label in range(3)]
    upscaler = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(50), "x0"), class_names=names)
    randomize(network)
    for average, v in zip(upscaler.ema_weights, network.weights):
        average.assign(np.float16(keras.ops.convert_to_numpy(v)))
    demo, model = importlib.import_module("demo"), make_model(num_classes=3)
    assert demo.enlarges(upscaler, model) and not demo.enlarges(model, upscaler)
    demo.build(model, folder, 2.0, {"few": kd.samplers.UniPC(6)}, upscaler)
    return folder


@contextlib.contextmanager
def served(folder):
    """A context with the address of a folder."""
    handler = functools.partial(importlib.import_module("demo").Files, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        program = shutil.which("chromium") or pytest.skip("Chromium is not installed")
        browser = started.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site):
    """An open page, and the address. It may not complain, and may not ask another host."""
    with served(site) as address, opened(browser, address) as page:
        yield page


@contextlib.contextmanager
def opened(browser, address, **options):
    context = browser.new_context(**options)
    page, heard, hosts = context.new_page(), [], []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: hosts.append(request.url))
    page.goto(address)
    settled = "!document.getElementById('draw').disabled || document.querySelector('#status.wrong')"
    until(page, settled)
    yield page
    context.close()
    own = address.partition("#")[0]
    assert all(url.startswith((own, "blob:", "data:")) for url in hosts), hosts
    assert not heard, heard


def until(page, condition, seconds=30):
    """Waits for a condition. The page's policy forbids `wait_for_function`, which the page itself evaluates."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def wait(page):
    until(page, "document.getElementById('stop').disabled")
    return page.inner_text("#status")


def pixels(page, size=SIZE):
    """The pictures, `(num, size, size, 3)` integers."""
    script = """() => {
        const canvas = document.getElementById("picture");
        const {width, height} = canvas;
        return [height, width, [...canvas.getContext("2d").getImageData(0, 0, width, height).data]];
    }"""
    height, width, values = page.evaluate(script)
    x = np.array(values).reshape(height // size, size, width // size, size, 4)
    assert np.all(x[..., 3] == 255)
    return x[..., :3].swapaxes(1, 2).reshape(-1, size, size, 3)


def draws(seed, num=4, size=SIZE):
    """The noise of the page, by the count of draws. The first is x_T."""
    keys = np.array([[seed, index] for index in range(num)], "int32")
    shape = (num, size, size, 3)
    return lambda number: keras.ops.convert_to_numpy(kd.samplers.loop.counted_noise(shape, keys, number))


def distance(page, x):
    return np.abs(pixels(page) - 255 * (x + 1) / 2).max()


@pytest.mark.parametrize("sampler, scale", [("few", 2), *((sampler, 3) for sampler in TABLES)])
def test_the_page_draws_what_python_draws(page, site, sampler, scale):
    """With labels and guidance in one call or two, from the same noise, to 2 of 255."""
    page.select_option("[name=label]", label="kind 1")
    page.select_option("[name=sampler]", label=sampler)
    page.fill("[name=seed]", "7")
    page.fill("[name=guidance]", str(scale))
    page.press("[name=seed]", "Enter")
    said, rows = wait(page), json.loads((site / "model/samplers.json").read_text())["sample"][sampler]
    assert "4 pictures in " in said and f"{len(rows) * (1 if scale == 2 else 2)} network calls each" in said
    draw = draws(7)
    x = onnx_sampling.sample(site / "model", "sample", sampler, draw(-1), np.ones(4, "int32"), scale, draw)
    assert distance(page, x) <= 2
    assert len(np.unique(pixels(page))) > 50


def test_the_mask_is_filled(page, site):
    page.click("#draw")
    wait(page)
    before = pixels(page)
    assert page.is_disabled("#fill")
    page.click("#middle")
    page.click("#fill")
    wait(page)
    quarter = SIZE // 4
    known = np.ones((4, SIZE, SIZE, 1), bool)
    known[:, quarter:-quarter, quarter:-quarter] = False
    changed = np.abs(pixels(page) - before)
    assert np.all(changed[np.broadcast_to(known, changed.shape)] <= 1) and changed.max() > 20
    draw, labels = draws(0), np.floor(np.arange(4) * 0.618034 % 1 * 3).astype("int32")
    x_0 = onnx_sampling.sample(site / "model", "sample", "few", draw(-1), labels, 2)
    model = json.loads((site / "model/model.json").read_text())
    alpha, sigma = (model["schedule"][name][-1] for name in ("alpha", "sigma"))
    start = np.where(known, alpha * x_0 + sigma * draw(-1), draw(-1)).astype("float32")
    x = onnx_sampling.sample(site / "model", "inpaint", "few", start, labels, 2, draw, (x_0, known))
    assert distance(page, x) <= 2


def test_an_upscaler_enlarges_the_pictures(browser, enlarging):
    """It draws what Python draws, and a mask keeps the rest of the large pictures."""
    size = 2 * SIZE
    with served(enlarging) as address, opened(browser, address + "#seed=7&label=kind 1") as page:
        (first,) = json.loads((enlarging / "upscaler/samplers.json").read_text())["sample"]
        draw, labels = [draws(7), draws(8, size=size)], np.ones(4, "int32")
        small = onnx_sampling.sample(enlarging / "model", "sample", "few", draw[0](-1), labels)
        image = keras.ops.convert_to_numpy(kd.conditions.seen(small, None, None, (size, size)))
        x = onnx_sampling.sample(
            enlarging / "upscaler", "sample", first, draw[1](-1), labels, draw=draw[1], image=image
        )
        assert "4 pictures in " in wait(page)
        before = pixels(page, size)
        assert np.abs(before - 255 * (x + 1) / 2).max() <= 2
        page.click("#middle")
        page.click("#fill")
        wait(page)
        quarter = size // 4
        change = np.abs(pixels(page, size) - before).max(axis=-1)
        inside = change[:, quarter:-quarter, quarter:-quarter]
        assert inside.max() > 20 and np.sum(change > 1) == np.sum(inside > 1)
        page.click("#draw")
        until(page, "document.getElementById('progress').value > 0")
        page.click("#stop")
        wait(page)


def test_the_mouse_marks(page):
    page.click("#draw")
    wait(page)
    before = pixels(page)
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.25 * box["height"], steps=5)
    page.mouse.up()
    page.click("#fill")
    wait(page)
    changed = np.any(pixels(page) != before, axis=(1, 2, 3))
    assert changed.tolist() == [True, False, False, False]


def test_the_link_brings_the_picture_back(browser, site, page):
    """Also a mix of two seeds, which is between them."""
    page.select_option("[name=label]", label="kind 2")
    page.fill("[name=share]", "0.5")
    page.click("#draw")
    wait(page)
    assert "mix=1%3A0.5" in page.url and "label=kind+2" in page.url
    with served(site) as address, opened(browser, address + "#" + page.url.partition("#")[2]) as other:
        assert "4 pictures" in wait(other)
        np.testing.assert_array_equal(pixels(other), pixels(page))
    with page.expect_download() as download:
        page.click("#save")
    saved = kd.images.load(download.value.path(), 2 * SIZE).reshape(2, SIZE, 2, SIZE, 3)
    np.testing.assert_array_equal(saved.swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3), pixels(page))


def test_stop(page):
    page.select_option("[name=num]", "16")
    page.select_option("[name=sampler]", label="noise")
    # In one call, as these pictures may be drawn before the next one.
    page.evaluate("for (const id of ['draw', 'stop']) document.getElementById(id).click()")
    assert wait(page) == "Stopped."
    page.click("#draw")
    assert "16 pictures" in wait(page)


@pytest.mark.parametrize(
    "link, message",
    [
        ("seed=1&num=1000000", "The link asks for 1000000 pictures."),
        ("seed=-1", "The seed in the link must be a number"),
        ("seed=1.5", "The seed in the link must be a number"),
        ("label=dragon", 'There is no label "dragon".'),
        ("sampler=DDIM, 5000 steps", 'There is no sampler "DDIM, 5000 steps".'),
        ("mix=1:2", "The share in the link must be a number from 0 to 1."),
        ("guidance=NaN", "The guidance in the link must be a number"),
        ("steps=3", 'The link has an unknown part "steps".'),
    ],
)
def test_bad_links(browser, site, link, message):
    with served(site) as address, opened(browser, f"{address}#{link}") as page:
        page.wait_for_selector("#status.wrong")
        assert message in page.inner_text("#status")


def changed(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


LATE = {"sample": {"late": [{"t": 51}]}, "inpaint": {"late": [{"t": 51}]}}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "denoiser.onnx").unlink(), "The file denoiser.onnx of the model is missing."),
        (lambda folder: (folder / "denoiser.onnx").write_bytes(b"no model"), "denoiser.onnx of the model is damaged"),
        (lambda folder: (folder / "samplers.json").write_text("{"), "The file samplers.json of the model is damaged."),
        (changed("model.json", shape=[9, 9, 3]), "The network takes images of 8x8x3, but model.json says 9x9x3."),
        (changed("model.json", shape=[2]), "model.json does not describe a model of images."),
        (changed("model.json", inputs=["x_t", "t", "context"]), "The network takes context"),
        (changed("samplers.json", **LATE), 'The sampler "late" has a time outside 1..50, the steps of the model.'),
    ],
)
def test_bad_models(browser, site, tmp_path, change, message):
    shutil.copytree(site, tmp_path / "site")
    change(tmp_path / "site/model")
    with served(tmp_path / "site") as address, opened(browser, address) as page:
        assert message in page.inner_text("#status")


def test_the_page_fits_a_phone(browser, site):
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}
    with served(site) as address, opened(browser, address, **options) as page:
        page.tap("#draw")
        wait(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
