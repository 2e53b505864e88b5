"""Samples with exported files, ONNX Runtime and NumPy alone."""

import json
import pathlib

import numpy as np


def sample(folder, kind, name, x, label=None, scale=None, draw=None, known=None, image=None):
    """Runs the rows of a sampler from x_T.

    Args:
        folder: the exported files.
        kind: "sample" or "inpaint".
        name: name of the sampler.
        x: x_T, `(num, ...)`.
        label: labels, `(num,)`, or `None`.
        scale: guidance scale, instead of that of the rows.
        draw: function from a count of draws to noise.
        known: pair of x_0 and a mask of known pixels.
        image: condition images of the network's size, without noise.
    """
    import onnxruntime

    folder = pathlib.Path(folder)
    model = json.loads((folder / "model.json").read_text())
    rows = json.loads((folder / "samplers.json").read_text())[kind][name]
    session = onnxruntime.InferenceSession(folder / "denoiser.onnx")

    def network(x, t, label, told=1.0):
        feeds = {"x_t": x, "t": np.full(len(x), t, "int32"), "label": label}
        feeds |= {"image": image, "image_noise": np.zeros(len(x), "float32")}
        feeds["scale"] = np.full(len(x), 1 / told, "float32")
        return session.run(["y"], {name: feeds[name] for name in model["inputs"]})[0]

    low, high = model["clip_range"] or (-np.inf, np.inf)
    previous = [np.zeros_like(x)] * len(rows[0]["from_previous"])
    for number, row in enumerate(rows):
        w = 1 if row["guidance_scale"] == 1 else scale or row["guidance_scale"]
        told = w if 1 <= w <= model["max_guidance_scale"] else 1  # the scale that one call of the network includes
        y = network(x, row["t"], label, told)
        if w != told:
            y = (1 - w) * network(x, row["t"], np.full_like(label, model["null_label"])) + w * y
        x_0 = np.clip(row["x_0_from_x"] * x + row["x_0_from_y"] * y, low, high).astype("float32")
        remembered = row["remember_x_0"] * x_0 + row["remember_x"] * x
        x = row["from_x"] * x + row["from_x_0"] * x_0 + sum(k * old for k, old in zip(row["from_previous"], previous))
        if row["std"]:
            x = x + row["std"] * draw(2 * number)
        if not row["keep"]:
            previous = [remembered, *previous[:-1]]
        if known:
            noise = draw(2 * number + 1) if row["sigma"] else 0
            x = np.where(known[1], row["alpha"] * known[0] + row["sigma"] * noise, x)
        x = x.astype("float32")
    return x
