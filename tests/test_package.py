"""What the wheel and the source archive hold."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT

import keras_ddpm as kd

PACKAGE = pathlib.Path(kd.__file__).parent
FILES = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
ROOT_FILES = set("CHANGELOG.md LICENSE MANIFEST.in PKG-INFO README.md SECURITY.md pyproject.toml setup.cfg".split())


def test_every_folder_of_modules_is_a_package():
    """Others are not in the wheel."""
    folders = {path.parent for path in FILES if path.suffix == ".py"}
    assert all((folder / "__init__.py").exists() for folder in folders)


@pytest.mark.slow
def test_wheel_and_source_archive(tmp_path):
    """All files of the package and no others. The wheel has the same bytes each time; .ci/build sorts the archive."""
    pytest.importorskip("setuptools", "77")
    wheels, build = [], "from setuptools import build_meta; build_meta.build_wheel('.'), build_meta.build_sdist('.')"
    for copy in (tmp_path / "one", tmp_path / "two"):
        shutil.copytree(PACKAGE, copy / "keras_ddpm", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ROOT_FILES - {"PKG-INFO"}:
            shutil.copy(ROOT / name, copy)
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
        subprocess.run([sys.executable, "-c", build], cwd=copy, env=environment, check=True, capture_output=True)
        wheels += [path.read_bytes() for path in copy.glob("*.whl")]
    assert len(wheels) == 2 and wheels[0] == wheels[1]
    expected = {str(path.relative_to(PACKAGE.parent)) for path in FILES}
    (wheel,), (archive,) = copy.glob("*.whl"), copy.glob("*.tar.gz")
    about = f"keras_ddpm-{kd.__version__}.dist-info/"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(about)}
    assert names == expected and f"{about}licenses/LICENSE" in zipfile.ZipFile(wheel).namelist()
    with tarfile.open(archive) as opened:
        names = {entry.name.partition("/")[2] for entry in opened if entry.isfile()}
    assert {name for name in names if ".egg-info/" not in name} == expected | ROOT_FILES


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_trust_little(path):
    """Actions are pinned to a commit, the token can only read, and it is not left in the checkout."""
    text = path.read_text()
    used = re.findall(r"uses: \S+?@(\S+)  # v\d+\.\d+\.\d+$", text, re.MULTILINE)
    assert used and len(used) == text.count("uses: ") and all(re.fullmatch("[0-9a-f]{40}", commit) for commit in used)
    assert "\npermissions:\n  contents: read\n" in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
