"""Conversions, files and figures of images."""

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from keras_ddpm import images, plots

pytestmark = pytest.mark.host


def read(path):
    with Image.open(path) as file:
        return np.asarray(file)


def test_eight_bits_and_back():
    levels = np.arange(256, dtype="uint8")
    x = images.from_uint8(levels)
    assert x.dtype == "float32" and x[0] == -1 and x[-1] == 1
    assert np.array_equal(images.to_uint8(x), levels)
    assert np.array_equal(images.to_uint8([-7.0, 7.0]), [0, 255])


def test_resize_crops_the_center_and_does_not_alias():
    stripes = np.zeros((90, 150, 3), "uint8")
    stripes[:, 30:120:2] = 200  # stripes of one pixel in the center square
    stripes[:, :30] = stripes[:, 120:] = 255
    small = images.resize(stripes, 30)
    assert small.shape == (30, 30, 3)
    assert np.all(np.abs(small[:, 2:-2].astype(int) - 100) <= 2)
    gray = images.resize(np.full((28, 28, 1), 7, "uint8"), 14)
    assert gray.shape == (14, 14, 1) and np.all(gray == 7)


def test_load_turns_upright(tmp_path):
    pixels = np.zeros((4, 8, 3), "uint8")
    pixels[:, :4] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # means a clockwise rotation, which puts the left side on top
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    x = images.load(tmp_path / "x.png", 4)
    assert np.all(x[:2] == 255) and np.all(x[2:] == 0)


def test_load_other_modes(tmp_path):
    gray16 = np.full((4, 4), 40_000, "uint16")
    Image.fromarray(gray16).save(tmp_path / "gray16.png")
    assert np.all(images.load(tmp_path / "gray16.png", 4) == 40_000 // 256)
    assert images.load(tmp_path / "gray16.png", 4, channels=1).shape == (4, 4, 1)
    for number, expected in [(200, 200), (40_000, 156)]:
        Image.fromarray(np.full((4, 4), number, "int32")).save(tmp_path / "gray32.tif")
        assert np.all(images.load(tmp_path / "gray32.tif", 4) == expected)
    for pixels in (np.full((4, 4), 2**20, "int32"), np.full((4, 4), 0.5, "float32")):
        Image.fromarray(pixels).save(tmp_path / "much.tif")
        with pytest.raises(ValueError, match="must be integers of at most 16 bits. Received: mode"):
            images.load(tmp_path / "much.tif", 4)
    Image.new("L", (4, 4), 90).save(tmp_path / "gray.png")
    assert np.all(images.load(tmp_path / "gray.png", 4) == 90)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "alpha.png")
    assert np.all(images.load(tmp_path / "alpha.png", 4) == 255)
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    half.convert("RGBA").save(tmp_path / "half.png")
    assert np.allclose(images.load(tmp_path / "half.png", 4)[0, 0], [255, 127, 127], atol=1)
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.gif", transparency=0)
    assert np.all(images.load(tmp_path / "palette.gif", 4) == 255)


def test_grid():
    x = np.linspace(-1, 0.5, 5 * 2 * 3 * 1).reshape(5, 2, 3, 1)
    grid = images.grid(x)
    assert grid.shape == (2 * 4 + 2, 3 * 5 + 2, 1)
    for number, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        y, z = 2 + 4 * row, 2 + 5 * column
        np.testing.assert_allclose(grid[y : y + 2, z : z + 3], x[number], atol=1e-6)
    assert np.all(grid[6:8, 12:15] == 1) and np.all(grid[:2] == 1)
    assert images.grid(x, columns=5, padding=0).shape == (2, 15, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_files(tmp_path, channels):
    x = np.random.default_rng(0).uniform(-1, 1, (4, 5, 6, channels))
    images.save(tmp_path / "new/x.png", x, scale=3)
    pixels = read(tmp_path / "new/x.png").reshape(16 * 3, 18 * 3, channels)
    assert np.array_equal(pixels[::3, ::3], images.to_uint8(images.grid(x)))
    images.save(tmp_path / "one.png", x[0])
    assert read(tmp_path / "one.png").shape[:2] == (5, 6)
    images.save_gif(tmp_path / "x.gif", [x, -x, x], milliseconds=50)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (18, 16) and gif.info["loop"] == 0
        assert gif.info["duration"] == 50
        gif.seek(2)
        assert gif.info["duration"] == 2000


def test_one_file_per_image_and_rows_of_a_grid(tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 5, 6, 3))
    images.save(tmp_path / "new/a-{:03d}.png", x[0])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a-000.png", "a-001.png", "a-002.png"]
    assert np.array_equal(read(tmp_path / "new/a-002.png"), images.to_uint8(x[0, 2]))
    images.save(tmp_path / "{old}" / "{}" / "x.png", x[0])
    assert np.array_equal(read(tmp_path / "{old}/2/x.png"), images.to_uint8(x[0, 2]))
    with pytest.raises(ValueError, match="Expected one or several images"):
        images.save(tmp_path / "of-one-{}.png", x[0, 0])
    assert np.array_equal(images.grid(x), images.grid(x.reshape(6, 5, 6, 3), columns=3))
    assert np.array_equal(np.asarray(images.to_pil(x)), images.to_uint8(images.grid(x)))


def test_show_draws_on_the_current_axes():
    pyplot.switch_backend("agg")
    plots.show(np.zeros((4, 5, 6, 1)))
    assert pyplot.gca().images[0].get_size() == (2 * 7 + 2, 2 * 8 + 2)
    pyplot.close()


def test_loss_plot(tmp_path):
    plots.loss(tmp_path / "new/loss.png", {"loss": [1.0, 0.5], "val_loss": [0.9, 0.6], "lr": [1, 1]})
    pixels = read(tmp_path / "new/loss.png")[..., :3].astype("int32")
    colorful = np.sum(np.ptp(pixels, axis=-1) > 60)
    assert abs(pixels.shape[1] / pixels.shape[0] - 1.5) < 0.1 and 500 < colorful < 20_000  # two thin curves


def test_tables_of_images(tmp_path):
    """Every cell is a grid of its images, in its row and column. Missing folders are created."""
    gray = {name: np.full((3, 4, 4, 1), level) for name, level in {"a": -1.0, "b": -0.5, "c": 0.0, "d": 0.5}.items()}
    rows = {"first": {"left": gray["a"], "right": gray["b"]}, "second": {"left": gray["c"], "right": gray["d"]}}
    plots.table(tmp_path / "deep/table.png", rows, columns=2, size=1)
    with Image.open(tmp_path / "deep/table.png") as file:
        pixels = np.asarray(file.convert("L"))
    places = [np.argwhere(pixels == images.to_uint8(level)) for level in (-1.0, -0.5, 0.0, 0.5)]
    assert all(10_000 < len(place) for place in places)
    a, b, c, d = (np.median(place, axis=0) for place in places)
    assert b[1] > a[1] + 200 and d[1] > c[1] + 200 and c[0] > a[0] + 200 and d[0] > b[0] + 200
    plots.table(tmp_path / "text.png", {r"$\none$": {r"$\none$": gray["a"]}})  # which is no formula


def test_curves(tmp_path):
    with plots.figure(tmp_path / "deep/curves.png", 1, 2, (4, 2)) as (left, right):
        plots.curves(left, {"y": [1, 2, 4], "of x": ([0, 10], [3, 3])}, title="two", yscale="log")
        assert [line.get_xydata().tolist() for line in left.lines] == [[[0, 1], [1, 2], [2, 4]], [[0, 3], [10, 3]]]
        assert [text.get_text() for text in left.get_legend().texts] == ["y", "of x"]
        assert left.get_title() == "two" and left.get_yscale() == "log"
    with Image.open(tmp_path / "deep/curves.png") as file:
        assert file.width > 1.5 * file.height
