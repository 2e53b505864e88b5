"""A web page on which a trained model draws in the visitor's browser.

    python examples/demo.py                             # flowers, on a page at 127.0.0.1
    python examples/demo.py runs/flowers/model.keras    # your own model
    python examples/demo.py runs/flowers/model.keras --upscaler runs/translate/upscale/model.keras
    python examples/demo.py --output site               # a folder for any web host, instead

An upscaler, which for the flowers is flowers128, enlarges what the model draws.

The model is exported to ONNX and JSON (`keras_ddpm.export`). The page runs it with ONNX Runtime Web, on the graphics
card if the browser has WebGPU, and otherwise on the processor. It needs no server but one that hands out files, and
the pictures stay in the browser. The page itself is in the folder `demo`.

The first run needs npm, which fetches ONNX Runtime Web. `pip install ".[export]"` installs what exporting needs.

Output files in --output, by default runs/demo:

    index.html, ...    the page and ONNX Runtime Web
    model/             the network, the process and the samplers
    upscaler/          those of the upscaler
"""

import functools
import http.server
import json
import pathlib
import shutil
import subprocess

import common

import keras_ddpm as kd

DEMO = pathlib.Path(__file__).parents[1] / "demo"
PAGE = ["index.html", "style.css", "page.js", "worker.js", "diffusion.js"]
RUNTIME = [  # with WebAssembly, and with WebGPU
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
]


def build(model, out, guidance_scale, tables=None, upscaler=None):
    """Writes the site into a folder. `guidance_scale` and `tables` are of the model, as those of `kd.export.onnx`."""
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    guidance_scale = guidance_scale if model.condition else 1.0
    models = {"model": (model, tables, guidance_scale)}
    if upscaler:
        models["upscaler"] = (upscaler, {"default": upscaler.default_sampler}, upscaler.guidance_scale)
    try:
        with common.quiet():
            for folder, (some, wanted, scale) in models.items():
                kd.export.onnx(some, out / folder, wanted, guidance_scale=scale)
    except ImportError as error:
        raise ValueError(error) from error
    runtime = DEMO / "node_modules/onnxruntime-web/dist"
    if not runtime.exists():
        install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        try:
            subprocess.run(install, cwd=DEMO, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise OSError(f"ONNX Runtime Web could not be installed by `npm ci` in {DEMO}: {error}") from error
    (out / "models.json").write_text(json.dumps([*models]))
    (out / "ort").mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copy(DEMO / name, out / name)
    for name in RUNTIME:
        shutil.copy(runtime / name, out / "ort" / name)


def enlarges(upscaler, model):
    """Whether a model enlarges what another one draws. It may take the same labels."""
    sizes, condition = list(zip(upscaler.data_shape, model.data_shape)), upscaler.condition
    valid = condition is not None and "image" in condition and condition["image"].shape == upscaler.data_shape
    valid = valid and all(new % old == 0 for new, old in sizes) and len({*sizes[2]}) == 1
    if not valid or condition.given == ("image",):
        return valid and upscaler.guidance_scale == 1  # the page drops labels alone
    labels = [(some.num_classes, some.class_names) for some in (condition, model.condition) if some]
    return "label" in condition and len(labels) == 2 and labels[0] == labels[1]


class Files(http.server.SimpleHTTPRequestHandler):
    """Hands out files, in a way that lets the page use several threads."""

    extensions_map = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args):
        pass


def main(
    model="flowers64",
    *,
    upscaler: str | None = None,
    output: str | None = None,
    port=0,
    guidance_scale: float | None = None,
):
    """Exports a model and serves a page that samples with it.

    Args:
        model: trained .keras file of images, or a preset of the package.
        upscaler: another one, which enlarges the pictures. By default flowers128 for flowers64, and else none.
        output: folder for the site. It is written, and nothing is served.
        port: port of the page. 0 is a free one.
        guidance_scale: guidance scale at which the page starts, if the model has labels. By default the model's own.
    """
    if not 0 <= port < 65536:
        raise common.UsageError(f"--port must be in 0..65535. Received: {port}")
    if guidance_scale is not None and not 0 <= guidance_scale <= 5:
        raise common.UsageError(f"--guidance-scale must be in 0..5, as on the page. Received: {guidance_scale}")
    trained = common.load_model(model)
    if trained.data_shape[-1] not in (1, 3):
        raise ValueError(f"{model} is not a model of gray or color images.")
    upscaler = upscaler or ("flowers128" if model == "flowers64" else None)
    larger = common.load_model(upscaler, ("label", "image")) if upscaler else None
    if larger and not enlarges(larger, trained):
        raise ValueError(f"{upscaler} does not enlarge pictures of {model}, or has other labels.")
    out = pathlib.Path(output or "runs/demo")
    print("Exporting the model. This takes about half a minute.", flush=True)
    build(trained, out, guidance_scale, upscaler=larger)
    folders = json.loads((out / "models.json").read_text())
    loaded = [path for folder in folders for path in out.glob(f"{folder}/*")]
    loaded += [out / "ort" / name for name in RUNTIME[:3]]
    megabytes = sum(path.stat().st_size for path in loaded) / 2**20
    print(f"A visitor without WebGPU loads {megabytes:.0f} MB.")
    if output:
        print(f"Wrote {out}. Any web host can serve it.")
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Files, directory=out)) as server:
        print(f"Open http://127.0.0.1:{server.server_port}/ in a browser. Ctrl-C ends.", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    common.run(main)
