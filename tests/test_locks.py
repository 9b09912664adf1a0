"""Several processes that want the same folder: of runs and pilots one gets it, of the cache's writers one writes."""

import contextlib
import errno
import fcntl
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import files_of, tiny_config

from graftlm import files
from graftlm.comparing import pilot as piloting
from graftlm.errors import UserError
from graftlm.files import locked, write_text
from graftlm.models import load_tokenizer
from graftlm.training import run
from graftlm.training.checkpoints import STATE_FILE, list_checkpoints
from graftlm.training.data import cache, prepare_data


def test_a_folder_that_is_removed_is_whole_or_gone(tmp_path, monkeypatch):
    """Killed while its files go, it has lost its name already, and what is left is cleared away."""
    checkpoints = tmp_path / "checkpoints"
    for step in ("step-2", "step-4", "step-10", "step-2.bad"):
        (checkpoints / step).mkdir(parents=True)
        (checkpoints / step / STATE_FILE).write_text("{}")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2", "step-4", "step-10"]

    def killed(path):
        (path / STATE_FILE).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "rmtree", killed)
        files.remove_folder(checkpoints / "step-4")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2", "step-10"]
    files.remove_unfinished(checkpoints)
    files.remove_folder(checkpoints / "step-2")
    assert {path.name for path in checkpoints.iterdir()} == {"step-10", "step-2.bad"}


@pytest.mark.parametrize("function", [run.train, run.train_one])
def test_only_one_run_trains_in_a_folder(function, tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(UserError, match="run: another run is training there"):
        function(config)
    assert files_of(tmp_path / "run") == {".lock"}


def test_a_run_holds_its_folder_until_its_control_has_ended(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, control=True, max_steps=1, apex={"stages": 1, "assess_samples": 1})
    found = []

    def run_control(config, *args, **kwargs):
        with pytest.raises(UserError, match="another run is training there"):
            run.train(config, resume=True)
        found.append(True)
        return json.loads((tmp_path / "run/summary.json").read_text())

    monkeypatch.setattr(run, "run_control", run_control)
    run.train(config)
    assert found == [True]
    with locked(tmp_path / "run", busy="still held"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*run: File exists"):
        run.train_one(config)


def test_only_one_pilot_at_a_time(tmp_path):
    (tmp_path / "run-pilot").mkdir()
    with locked(tmp_path / "run-pilot"), pytest.raises(UserError, match="another pilot is running there"):
        piloting.pilot(tiny_config(tmp_path, max_steps=9_000), console=Console(file=io.StringIO()))


def test_a_killed_process_holds_nothing(tmp_path):
    script = "import os, sys; from graftlm.files import locked\nwith locked(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -9
    with locked(tmp_path, busy="still held"):
        pass


@pytest.mark.parametrize(("code", "goes_on"), [(errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_without_locks(code, goes_on, tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.nullcontext() if goes_on else pytest.raises(OSError), locked(tmp_path, busy="taken"):
        pass


def test_the_cache_is_written_once(tmp_path, monkeypatch):
    """A second process asks for the same data while the first is writing: it waits, and reads them."""
    config = tiny_config(tmp_path, eval_data=(), eval_fraction=0.0)
    asked, both, written = [], threading.Event(), []
    write = cache._write

    def make_once(folder, make):
        asked.append(folder)
        if len(asked) == 2:
            both.set()
        files.make_once(folder, make)

    def slowly(folder, *rest):
        written.append(folder)
        assert both.wait(60)
        time.sleep(0.2)
        write(folder, *rest)

    monkeypatch.setattr(cache, "make_once", make_once)
    monkeypatch.setattr(cache, "_write", slowly)

    def prepare(number):
        return len(prepare_data(config, load_tokenizer("tiny-llama"), progress=False).train)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(prepare, range(2))) == [23, 23]
    assert len(written) == 1
    assert {path.name for path in written[0].parent.iterdir()} == {written[0].name}  # no lock is left


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    log = []
    fsync, replace, rename = files._fsync, Path.replace, Path.rename

    def named(move, path, target):
        log.append(("name", Path(target).name))
        return move(path, target)

    monkeypatch.setattr(files, "_fsync", lambda path: (log.append(("sync", Path(path).name)), fsync(path))[1])
    monkeypatch.setattr(Path, "replace", lambda path, target: named(replace, path, target))
    monkeypatch.setattr(Path, "rename", lambda path, target: named(rename, path, target))
    write_text(tmp_path / "one", "x")
    assert [kind for kind, _ in log] == ["sync", "name", "sync"] and log[1:] == [
        ("name", "one"),
        ("sync", tmp_path.name),
    ]
    log.clear()
    with files.atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner/file").write_text("x")
    *before, name, after = log
    assert {"inner", "file", temporary.name} <= {path for kind, path in before if kind == "sync"}
    assert (name, after) == (("name", "folder"), ("sync", tmp_path.name))
