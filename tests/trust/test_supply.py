"""What is installed, imported and opened: few packages, pinned with hashes, none of them unasked."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FLOORS = {"pillow": (13, 0), "torch": (2, 10), "onnx": (1, 21), "safetensors": (0, 4)}  # older ones have known holes
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)")


def pins(name: str) -> dict[str, str]:
    found = (PIN.match(line) for line in (ROOT / name).read_text().splitlines())
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def requirements() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_every_package_of_the_lock_is_pinned_with_hashes():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[A-Za-z0-9])", text[text.index("\nannotated") :].strip())
    for entry in entries:
        assert PIN.match(entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
    assert len(entries) == len(pins("requirements.lock"))


def test_the_lock_and_the_constraints_agree_and_cover_what_the_project_needs():
    lock, tested = pins("requirements.lock"), pins("constraints.txt")
    needed = names(requirements()[""] + requirements()["onnx"])
    assert needed <= lock.keys()
    assert needed | names(requirements()["dev"]) <= tested.keys()
    assert {name: lock[name] for name in lock.keys() & tested.keys()} == {
        name: tested[name] for name in lock.keys() & tested.keys()
    }


def test_every_pinned_version_is_one_that_the_project_allows():
    """Of every extra; and nothing is pinned that the project does not ask for."""
    declared = [Requirement(line) for lines in requirements().values() for line in lines]
    lock, tested = pins("requirements.lock"), pins("constraints.txt")
    assert tested.keys() == {canonicalize_name(one.name) for one in declared}
    for one in declared:
        name = canonicalize_name(one.name)
        assert tested[name] in one.specifier, one
        assert lock.get(name, tested[name]) in one.specifier, one


def test_the_lock_is_made_for_the_oldest_python_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = re.findall(r"--python-version (\S+)", (ROOT / "requirements.lock").read_text())
    assert project["requires-python"] == f">={oldest}"


def test_versions_with_known_holes_cannot_be_installed():
    declared = {re.split(r">=", line)[0]: line for line in requirements()[""] + requirements()["onnx"]}
    for name, floor in FLOORS.items():
        least = tuple(int(part) for part in declared[name].split(">=")[1].split(".")[:2])
        assert least >= floor
        assert tuple(int(part) for part in pins("constraints.txt")[name].split(".")[:2]) >= floor


def test_importing_opens_no_socket_and_loads_no_extra():
    """The package itself, and the whole command line up to the work."""
    code = """
import socket, sys
def refuse(*_, **__): raise SystemExit("a socket")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
import mvcr_cli, mvcr_cli.cli
heavy = {"torch", "torchvision", "onnx", "onnxruntime", "huggingface_hub", "httpx", "sklearn"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_there_are_few_direct_dependencies():
    assert len(requirements()[""]) <= 9
