"""Kill -9 while a pruned model is written over an earlier one: what stands at --out is always whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from graftlm.files import atomic_folder, atomic_path, remove_unfinished
from graftlm.models import load_model, load_tokenizer, save_model

REPLACE = """
import os, signal, sys
from pathlib import Path
from graftlm.files import atomic_folder
TOUCH = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "tempfile.mkdtemp"}
left = int(sys.argv[2])
def audit(event, args):
    global left
    if event in TOUCH:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
with atomic_folder(sys.argv[1]) as folder:
    for name in "ab":
        Path(folder / name).write_text("new")
"""


def content(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in "ab"}


def test_a_folder_is_replaced_whole_wherever_the_process_is_killed(tmp_path):
    """At each moment at which it touches the disk, one after the other, until one process lives to the end."""
    out, aside = tmp_path / "out", 0
    for moment in range(100):
        with atomic_folder(out) as folder:
            for name in "ab":
                (folder / name).write_text("old")
        done = subprocess.run([sys.executable, "-c", REPLACE, str(out), str(moment)])
        aside += not out.exists()
        remove_unfinished(tmp_path, "out")  # as the next run begins
        assert content(out) in ({"old"}, {"new"})
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert done.returncode == 0 and content(out) == {"new"}
    assert moment > 10 and aside == 1  # the old one aside, the new one not yet in place: put back


def test_the_next_writer_puts_back_too(tmp_path):
    aside = tmp_path / ".out.unfinished-abc.old"
    aside.mkdir()
    (aside / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_what_another_writes_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with atomic_folder(out) as first:
        (first / "a").write_text("first")
        remove_unfinished(tmp_path, "out")
        with atomic_folder(out) as second:
            (second / "a").write_text("second")
        assert (out / "a").read_text() == "second"
        with atomic_path(tmp_path / "file") as third:
            third.write_text("third")
            remove_unfinished(tmp_path)
    assert (out / "a").read_text() == "first" and (tmp_path / "file").read_text() == "third"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path):
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    (there / "a").write_text("old")
    link.symlink_to(there)
    for text in ("new", "newer"):
        with atomic_folder(link) as folder:
            (folder / "a").write_text(text)
        assert link.is_symlink() and (there / "a").read_text() == text
    (tmp_path / ".link.unfinished-x.old").symlink_to(there)  # of an earlier version
    remove_unfinished(tmp_path, "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    assert (there / "a").read_text() == "newer"


@pytest.mark.slow
def test_prune_killed_at_random_moments(tmp_path):
    text = tmp_path / "text.jsonl"
    generator = random.Random(0)
    rows = ["".join(generator.choices("abcdefgh ", k=400)) for _ in range(40)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    out, home = tmp_path / "small", tmp_path / "home"
    words = ["prune", "tiny-llama", "--data", str(text), "--out", str(out), "--iterations", "20"]
    environment = {**os.environ, "GRAFTLM_CACHE": str(home)}

    def start(share: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "graftlm", *words, "--sparsity", str(share)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start(0.2).wait() == 0
    whole = time.monotonic() - began
    sizes = {sum(p.numel() for p in load_model(str(out)).parameters())}
    for number in range(12):
        process = start(0.3 + number / 100)
        # Half of them near the end, where the folder is written.
        share = generator.uniform(0.3, 1.0) if number % 2 else generator.uniform(0.8, 1.1)
        time.sleep(share * whole)
        process.kill()
        process.wait()
        if not out.exists():
            remove_unfinished(tmp_path, "small")
        model = load_model(str(out))
        sizes.add(sum(p.numel() for p in model.parameters()))
        summary = json.loads((out / "pruning.json").read_text())
        assert summary["parameters"] == sum(p.numel() for p in model.parameters())
        assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()
        load_tokenizer(str(out))
    assert start(0.5).wait() == 0
    assert not list(tmp_path.glob(".small*"))
    assert sum(p.numel() for p in load_model(str(out)).parameters()) < min(sizes)


def test_a_model_is_saved_in_place_of_another(tmp_path):
    model, tokenizer = load_model("tiny-llama"), load_tokenizer("tiny-llama")
    for texts in ({"a.txt": "first"}, {"b.txt": "second"}):
        save_model(model, tokenizer, tmp_path / "m", texts=texts)
    assert not (tmp_path / "m" / "a.txt").exists() and (tmp_path / "m" / "b.txt").exists()
