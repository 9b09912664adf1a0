"""The environment's description: complete, JSON, and silent about who and where."""

import datetime
import getpass
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import graftlm
from graftlm import environment
from graftlm.environment import describe_environment, peak_memory_bytes


def test_says_what_a_result_depends_on():
    described = describe_environment()
    assert described["python"] == platform.python_version()
    assert described["packages"]["torch"] == torch.__version__
    assert described["packages"]["transformers"] == transformers.__version__
    assert described["packages"]["lm_eval"]
    assert described["threads"] == torch.get_num_threads()
    assert described["cpu_count"] >= 1
    assert described["memory_bytes"] > 2**28
    assert len(described["gpus"]) == torch.cuda.device_count()
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(described["date"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)


def test_is_json_and_names_no_person_host_or_path():
    text = json.dumps(describe_environment())
    assert json.loads(text) == describe_environment() | {"date": json.loads(text)["date"]}
    assert str(Path.home()) not in text
    assert str(Path(graftlm.__file__).parent) not in text
    assert platform.node() not in text.replace("graftlm", "")
    assert f'"{getpass.getuser()}"' not in text


def test_missing_package_is_none(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package-anywhere",))
    assert describe_environment()["packages"] == {"no-such-package-anywhere": None}


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_commit_is_that_of_a_checkout_that_tracks_the_package(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package, installed = tmp_path / "package", tmp_path / "venv"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "__init__.py").touch()
    git("init")
    assert environment._git_state(package) == (None, None)
    (tmp_path / ".gitignore").write_text("venv\n")
    git("add", ".")
    git("commit", "-m", "first")
    assert environment._git_state(package) == (git("rev-parse", "HEAD"), False)
    assert environment._git_state(installed) == (None, None)
    (package / "__init__.py").write_text("changed = True\n")
    assert environment._git_state(package) == (git("rev-parse", "HEAD"), True)


def test_no_git_at_all(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["git_commit"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the peak is then the GPU's")
def test_peak_memory_is_of_this_process_alone():
    """What a parent held must not show in its child (getrusage's peak survives exec on Linux)."""
    code = "from graftlm.environment import peak_memory_bytes; print(peak_memory_bytes())"
    held = bytearray(800 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert peak_memory_bytes() > len(held)
    assert 2**20 < child < len(held)
