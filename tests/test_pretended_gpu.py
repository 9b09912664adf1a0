"""The device of every tensor, without a GPU: what computes on one is the CPU, and what is forgotten there is refused.

Needs a C++ compiler (and torch's headers, which every wheel has); skipped without one.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "pretended"
CORE = ["apex", "resumed", "measured", "pruned by command", "shrunk with apex", "method lora"]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs Linux and a C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "gpu.so"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations and COMPILER
    torch = Path(spec.submodule_search_locations[0])
    headers = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    linked = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'},--no-as-needed"]
    flags = ["-O0", "-w", "-shared", "-fPIC", "-std=c++20", *headers]
    subprocess.run([COMPILER, *flags, str(HERE / "gpu.cpp"), "-o", str(path), *linked], check=True)
    return path


def check(library: Path, folder: Path, names: list[str]) -> None:
    command = [sys.executable, str(HERE / "runs.py"), str(library), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert found and (not names or list(found) == names)
    for name, one in found.items():
        assert "error" not in one, f"{name}: {one['error']}"
        assert one["operations"] > 100, name
        assert one["gpu"] == pytest.approx(one["cpu"], rel=1e-4, abs=1e-5), name


def test_what_is_done_most(library, tmp_path):
    check(library, tmp_path, CORE)


@pytest.mark.slow
def test_everything(library, tmp_path):
    check(library, tmp_path, [])
