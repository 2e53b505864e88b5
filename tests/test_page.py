"""The source of the page of examples/demo.py, without a browser. `test_demo.py` opens it in one."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from keras import ops

import keras_ddpm as kd

DEMO = ROOT / "demo"


def node(script):
    """What a script prints, as JSON."""
    command = ["node", "--input-type=module", "--no-warnings", "-e", script]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_names_are_text_and_the_page_runs_its_own_scripts_alone():
    """A name of a class may look like HTML. The policy forbids scripts in the page and of other hosts."""
    source = "".join((DEMO / name).read_text() for name in ("page.js", "worker.js", "diffusion.js"))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|eval\(", source
    )
    page = (DEMO / "index.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy"\s+content="(.*?)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'self'" and "unsafe-inline" not in policy and "*" not in policy
    assert rules["script-src"] == "'self' 'wasm-unsafe-eval'"
    assert not re.search(r"<script(?! [^>]*src=)|<style| style=| on\w+=", page)


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_various_pictures_and_links_to_classes():
    """Pictures of different kinds for any number of classes, and links that tell "A" from "a"."""
    source = (DEMO / "page.js").read_text()
    various = re.search(r"const various = (.*);", source).group(1)
    find = re.search(r"const options = .*\n((?:.*\n){2})", source).group(1)
    script = f"""
    const kinds = [];
    for (const num_classes of [2, 3, 5, 10, 37, 74, 102, 1000]) {{
      for (const seed of [0, 3, 12345, 4294967295]) {{
        const model = {{ num_classes }}, various = {various};
        const sixteen = Array.from({{ length: 16 }}, (_, index) => various(index));
        kinds.push([num_classes, new Set(sixteen.slice(0, 4)).size, new Set(sixteen).size, Math.max(...sixteen)]);
      }}
    }}
    const found = ["A", "a", "ROSE"].map((value) => {{
      const options = ["a", "A", "rose"].map((text) => ({{ text }}));
      {find}
      return option.text;
    }});
    console.log(JSON.stringify([kinds, found]));
    """
    kinds, found = node(script)
    for num_classes, of_four, of_sixteen, largest in kinds:
        assert of_four >= (2 if num_classes < 5 else 3) and of_sixteen >= min(num_classes, 14) and largest < num_classes
    assert found == ["A", "a", "rose"]


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_guidance_in_one_call():
    """What the network is called with, by guidance scale: labels, and the scale that it is told."""
    script = f"""
    import {{ sample }} from {json.dumps((DEMO / "diffusion.js").as_uri())};
    const row = {{ t: 1, guidance_scale: 2, from_previous: [], x_0_from_x: 0, x_0_from_y: 1, from_x: 0, from_x_0: 1 }};
    const found = [];
    for (const max_guidance_scale of [undefined, 3]) {{
      const model = {{ shape: [1], prior_std: 1, null_label: 9, max_guidance_scale }};
      for (const scale of [0, 1, 2, 3, 4]) {{
        const network = (x, t, labels, told) => (found.push([labels, told]), x);
        for await (const _ of sample({{ model, rows: [row], network, seed: 0, indices: [0], labels: [7], scale }}));
      }}
    }}
    console.log(JSON.stringify(found));
    """
    two = [[9, 7], 1]
    plain, told = [[[9], 1], [[7], 1], two, two, two], [[[9], 1], [[7], 1], [[7], 2], [[7], 3], two]
    assert node(script) == plain + told


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_images_of_another_size():
    """Enlarged as by `seen`, and reduced to the means of blocks."""
    small = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 2))
    large = ops.convert_to_numpy(kd.conditions.seen(small.astype("float32"), None, None, (9, 8)))
    means = large.reshape(2, 3, 3, 4, 2, 2).mean(axis=(2, 4))
    for x, expected in [(small, large), (large, means), (small, small)]:
        sizes = [[*of.shape[1:]] for of in (x, expected)]
        script = f"""
        import {{ resized }} from {json.dumps((DEMO / "diffusion.js").as_uri())};
        console.log(JSON.stringify([...resized({x.ravel().tolist()}, ...{json.dumps(sizes)})]));
        """
        np.testing.assert_allclose(node(script), expected.ravel(), atol=1e-5)


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_what_is_known_in_another_size():
    """A pixel whose four old ones are known. Nothing is known of pictures that were not enlarged yet."""
    mask = np.ones((4, 4, 1), "int32")
    mask[1, 1] = mask[2:, 2:] = 0
    fill = {"x_0": mask.ravel().tolist(), "mask": mask.ravel().tolist(), "shape": [4, 4, 1]}
    script = f"""
    import {{ inSize }} from {json.dumps((DEMO / "diffusion.js").as_uri())};
    const fill = {json.dumps(fill)};
    const found = [[2, 2, 1], [4, 4, 1], [8, 8, 1]].map((shape) => inSize(fill, shape));
    console.log(JSON.stringify(found.map((known) => known && [[...known.x_0], [...known.mask]])));
    """
    small, same, large = node(script)
    assert small == [[0.75, 1, 1, 0], [0, 1, 1, 0]] and same == [fill["x_0"], fill["mask"]] and large is None
