"""Hostile files get an error in one line, soon, within bounds, and reach nothing outside of their folder."""

import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

import hostile
import pytest
from conftest import ROOT

NOTED = []
REACHING = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "pickle.find_class")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def note(event, arguments):
    """An audit hook: notes what reaches out of the process, and which files it opens for writing, moves or makes."""
    if event in REACHING:
        NOTED.append(event)
    elif event == "open" and isinstance(arguments[0], (str, os.PathLike)) and (arguments[2] or 0) & WRITING:
        NOTED.append(os.path.abspath(arguments[0]))
    elif event == "open" and str(arguments[0]).endswith(("secret.txt", "secret.bin")):
        NOTED.append(event)
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.symlink", "shutil.rmtree"):
        NOTED.append(os.path.abspath(arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def _noting():
    sys.addaudithook(note)  # which stays


@pytest.fixture
def _bounds():
    """At most 1 GiB more memory than before, and ten seconds."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, limits[1]))
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("ten seconds")))
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.filterwarnings("ignore:Skipping nested container")  # of Keras, before the error
@pytest.mark.skipif(sys.platform != "linux", reason="of which the bounds are")
@pytest.mark.parametrize("name", hostile.ATTACKS)
def test_hostile_files(tmp_path, monkeypatch, request, name):
    make, read, message, ending = hostile.ATTACKS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make(tmp_path / ending)
    request.getfixturevalue("_bounds")
    NOTED.clear()
    with pytest.raises(ValueError) as raised:
        read(tmp_path / ending)
    allowed = str(tmp_path), os.devnull, os.environ["JAX_COMPILATION_CACHE_DIR"]  # which conftest.py sets
    text, outside = str(raised.value), [entry for entry in NOTED if not entry.startswith(allowed)]
    assert re.search(message, text) and "\n" not in text and len(text) < 500, text
    assert not outside and not (tmp_path / "harmed").exists()


def test_there_are_many():
    assert len(hostile.ATTACKS) >= 40


@pytest.mark.slow
def test_mutated_files():
    """In a process of its own, which a crash would end. `fuzz.py 2000` tries more."""
    command = [sys.executable, ROOT / "tests/attacks/fuzz.py", "200"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
