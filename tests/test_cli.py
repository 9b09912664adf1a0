"""The command line: what reaches the functions behind the verbs, and what a person sees when something goes wrong."""

import errno
import importlib.util
import logging
import re
import shlex
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

import graftlm
from graftlm import cli, demo
from graftlm.errors import UserError

VERBS = ["train", "compare", "pilot", "plan", "data", "assess", "eval", "generate", "report", "demo", "env"]
VERBS += ["prune", "shrink", "export"]


@pytest.fixture
def replace(monkeypatch):
    """replace("training.run", train=...) puts a module of these names where a verb imports graftlm.training.run."""

    def put(path: str, **names: object) -> None:
        parent, _, name = f"graftlm.{path}".rpartition(".")
        module = types.SimpleNamespace(**names)
        monkeypatch.setitem(sys.modules, f"graftlm.{path}", module)
        monkeypatch.setattr(import_module(parent), name, module, raising=False)

    return put


@pytest.fixture
def calls(replace):
    """Every call behind the verbs, as (name, positional, keyword); the functions themselves do nothing."""
    made = []

    def record(name, returns=None):
        return lambda *args, **kwargs: (made.append((name, args, kwargs)), returns)[1]

    replace("training.run", train=record("train", Path("runs/x")))
    replace("training.plan", plan=record("plan"))
    replace("training.data", show_data=record("show_data"))
    replace("models", load_tokenizer=lambda name, **kwargs: f"tokenizer of {name}")
    replace("assess", assess=record("assess"))
    evaluated = {"results": {"piqa": {"acc": 0.5}}, "notes": {"piqa": ["half of it"]}}
    replace("evaluation.run", run_evaluation=record("run_evaluation", evaluated))
    replace("generation", generate=record("generate"))
    replace("reporting.folders", report_on=record("report_on", Path("runs/x/report.html")))
    replace("environment", describe_environment=record("describe_environment", {"python": "3", "packages": {"a": "1"}}))
    return made


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("model: tiny-llama\ndata: a.txt\nlearning_rate: 1e-3\n")
    return "c.yaml"


def only(calls):
    assert len(calls) == 1
    return calls[0]


@pytest.mark.parametrize(
    "words",
    [
        ["c.yaml", "--resume", "learning_rate=1e-4", "apex.stages=2"],
        ["c.yaml", "learning_rate=1e-4", "apex.stages=2", "--resume"],
        ["--resume", "c.yaml", "learning_rate=1e-4", "apex.stages=2"],
        ["learning_rate=1e-4", "--resume", "c.yaml", "apex.stages=2"],
    ],
)
def test_train_takes_config_settings_and_options_in_any_order(calls, config, words):
    assert cli.main(["train", *words]) == 0
    name, (given,), kwargs = only(calls)
    assert (name, kwargs) == ("train", {"resume": True})
    assert (given.model, given.learning_rate, given.apex.stages) == ("tiny-llama", 1e-4, 2)


def test_train_without_yaml(calls):
    assert cli.main(["train", "--model", "m", "--data", "b.txt", "--output-dir", "runs/y", "max_steps=3"]) == 0
    _, (given,), kwargs = only(calls)
    assert (given.model, given.data[0].path, given.output_dir, given.max_steps) == ("m", "b.txt", "runs/y", 3)
    assert kwargs == {"resume": False}


@pytest.mark.parametrize("words", [["train", "c.yaml", "--dry-run", "seed=5"], ["plan", "c.yaml", "seed=5"]])
def test_plan_and_dry_run_are_the_same(calls, config, words):
    assert cli.main(words) == 0
    name, (given,), _ = only(calls)
    assert (name, given.seed) == ("plan", 5)


def test_data(calls, config):
    assert cli.main(["data", "c.yaml", "--count", "2", "model=other"]) == 0
    name, (given, tokenizer), kwargs = only(calls)
    assert (name, given.model, tokenizer, kwargs) == ("show_data", "other", "tokenizer of other", {"count": 2})


def test_assess(calls):
    assert (
        cli.main(shlex.split("assess m --data f.txt --out d --compare m2 --samples 8 --max-length 64 --mask 0.1")) == 0
    )
    expected = {"compare": "m2", "samples": 8, "max_length": 64, "mask": 0.1, "prune_sensitivity": None}
    expected |= {"dtype": "float32", "trust_remote_code": False}
    assert only(calls) == ("assess", ("m", "f.txt", Path("d")), expected)


def test_eval(calls, capsys):
    words = "eval m --tasks piqa,mmlu:5 --perplexity f.txt --perplexity g.txt --multiple-choice q.jsonl --data-dir d"
    assert cli.main(shlex.split(f"{words} --limit 3 --batch-size 2 --seed 5 --log-samples --out o.json")) == 0
    expected = {
        "tasks": ["piqa", "mmlu:5"],
        "perplexity": [Path("f.txt"), Path("g.txt")],
        "multiple_choice": [Path("q.jsonl")],
        "data_dir": Path("d"),
        "limit": 3,
        "batch_size": 2,
        "max_length": None,
        "seed": 5,
        "log_samples": True,
        "allow_code_execution": False,
        "code_samples": None,
        "dtype": "float32",
        "trust_remote_code": False,
    }
    assert only(calls) == ("run_evaluation", ("m", Path("o.json")), expected)
    assert capsys.readouterr().out == "piqa:\n  acc: 0.5\npiqa: half of it\nwritten to o.json\n"


@pytest.mark.parametrize(("words", "chat"), [([], None), (["--no-chat"], False)])
def test_generate(calls, words, chat):
    assert cli.main(["generate", "m", "a = b", "--max-new-tokens", "5", "--temperature", "0.5", *words]) == 0
    expected = {"max_new_tokens": 5, "temperature": 0.5, "dtype": "float32", "trust_remote_code": False, "chat": chat}
    assert only(calls) == ("generate", ("m", "a = b"), expected)


def test_report_and_env(calls, capsys):
    assert cli.main(["report", "runs/x"]) == 0
    assert only(calls) == ("report_on", (Path("runs/x"),), {})
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out == "runs/x/report.html\npython: '3'\npackages:\n  a: '1'\n"


def test_demo_trains_on_python_s_own_library(calls, capsys, tmp_path):
    out = tmp_path / "a: 'b' #c"
    assert cli.main(["demo", "--out", str(out)]) == 0
    name, (given,), _ = only(calls)
    assert name == "train"
    assert (given.model, given.method, given.control, given.output_dir) == ("smollm2", "apex", True, str(out))
    (source,), (held_out,) = given.data, given.eval_data
    texts = set(Path(source.path).glob(source.pattern))
    assert Path(source.path, "argparse.py") in texts
    assert texts.isdisjoint(Path(held_out.path).glob(held_out.pattern))
    assert "graftlm train --model MODEL" in capsys.readouterr().out


def test_quick_demo_is_the_tiny_model(calls, tmp_path):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    _, (quick,), _ = only(calls)
    full = demo.demo_config(tmp_path)
    assert quick.model == "tiny-llama"
    tokens = [
        c.max_steps * c.max_length * c.per_device_train_batch_size * c.gradient_accumulation_steps
        for c in (quick, full)
    ]
    assert tokens[0] < tokens[1] / 4


def test_demo_without_python_s_sources(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path))
    assert cli.main(["demo"]) == 2
    assert "has no .py files" in capsys.readouterr().err


# --- errors ----------------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.fixture
def failing(replace, config, capsys):
    """failing(error, *words) runs `train` with a train() that raises, and returns (exit code, stderr)."""

    def run(error: BaseException, *words: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
        def train(given, *, resume):
            raise error

        replace("training.run", train=train)
        code = cli.main([*before, "train", config, *words])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("c.yaml:1: wrong; mend it"), 2, "c.yaml:1: wrong; mend it"),
        (TypeError("two\nlines"), 1, "unexpected TypeError: two lines; run again with --debug"),
        (KeyError("x"), 1, "unexpected KeyError: 'x'; run again with --debug"),
        (OSError(errno.EACCES, "denied"), 1, "unexpected PermissionError: [Errno 13] denied; run again with --debug"),
        (MemoryError(), 1, "out of memory; try a smaller per_device_train_batch_size"),
        (OutOfMemoryError("CUDA out of memory"), 1, "out of memory; try"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory; try"),
        (OSError(errno.ENOSPC, "No space left", "/d/f"), 1, "the disk is full (/d/f); free space, then run the same"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
    ],
)
def test_every_error_is_one_line(failing, error, code, line):
    got, shown = failing(error)
    assert got == code
    assert shown.startswith(f"graftlm: {line}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_started_run_says_how_to_go_on(failing, error):
    Path("my runs").mkdir()
    Path("my runs/config.yaml").write_text("")
    _, shown = failing(error, "output_dir=my runs")
    assert shown.endswith("go on with: graftlm train 'my runs/config.yaml' --resume\n")


@pytest.mark.parametrize("words", [["pilot"], ["plan"], ["data"], ["train", "--dry-run"]])
def test_only_a_run_is_gone_on_with(words, replace, config, capsys):
    """A folder of that name may hold a run that this command has nothing to do with."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    Path("runs").mkdir()
    Path("runs/config.yaml").write_text("")
    replace("training.plan", plan=interrupted)
    replace("training.data", show_data=interrupted)
    replace("comparing.pilot", pilot=interrupted)
    replace("models", load_tokenizer=lambda *args, **kwargs: None)
    verb, *options = words
    assert cli.main([verb, config, "output_dir=runs", *options]) == 130
    assert capsys.readouterr().err == "graftlm: interrupted; run the same command again\n"


def test_bitsandbytes_does_not_ask_for_kernels_that_nobody_needs(caplog):
    """It says so at its import, with every start of a run; what else it says is heard."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    message = "Failed to load CPU gemm_4bit_forward from kernels-community: %s"
    logger.warning(message, "no kernels")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    package = importlib.util.find_spec("bitsandbytes")
    if package is not None:  # that it still says so there, in these words
        assert message in Path(package.submodule_search_locations[0], "backends/cpu/ops.py").read_text()


@pytest.mark.parametrize(("before", "after"), [(["--debug"], []), ([], ["--debug"])])
def test_debug_shows_the_traceback(failing, before, after):
    code, shown = failing(TypeError("x"), *after, before=tuple(before))
    assert code == 1
    assert "Traceback" in shown
    assert shown.endswith("graftlm: unexpected TypeError: x\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train"], "train: give CONFIG.yaml, or --model M --data D"),
        (["train", "c.yaml", "d.yaml"], "'d.yaml': one config file, please (c.yaml is one)"),
        (
            ["train", "c.yaml", "lerning_rate=1"],
            "command line: unknown key 'lerning_rate' (did you mean learning_rate?)",
        ),
        (["train", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_wrong_configs(config, capsys, words, line):
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith(f"graftlm: {line}")


@pytest.mark.parametrize(
    "words",
    [
        ["trian"],
        ["train", "c.yaml", "--resum"],
        ["report", "runs/x", "extra"],
        ["eval", "m"],
        ["data", "c.yaml", "--count", "0"],
        ["assess", "m", "--data", "f", "--out", "d", "--mask", "10"],
    ],
)
def test_wrong_command_lines(capsys, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("graftlm: ")
    assert shown.endswith("--help\n")
    assert shown.count("\n") == 1


def test_no_verb_prints_help(capsys):
    assert cli.main([]) == 2
    listed = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.M)
    assert sorted(listed) == sorted(VERBS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("graftlm ")


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(capsys, verb):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    example = shown.partition("example:\n  ")[2].partition("\n")[0]
    assert example.startswith(f"graftlm {verb}")
    assert "\nthen:\n  " in shown


def shown_help(monkeypatch, capsys, verb, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_as_wide_as_the_terminal(verb, monkeypatch, capsys):
    """Paragraphs are filled; an example is one line, which can be copied."""
    narrow, broad = (shown_help(monkeypatch, capsys, verb, columns) for columns in (60, 200))

    def description(shown):
        return shown.split("\n\n")[1]

    assert max(map(len, description(narrow).splitlines())) <= 60
    assert len(description(broad).splitlines()) <= len(description(narrow).splitlines()) / 2
    assert description(narrow).split() == description(broad).split()
    example = broad.partition("example:\n  ")[2].partition("\n")[0]
    assert f"\n  {example}\n" in narrow


def test_help_says_what_is_true(monkeypatch, capsys):
    shown = {verb: " ".join(shown_help(monkeypatch, capsys, verb, 200).split()) for verb in VERBS}
    assert "[CONFIG.yaml] [key=value ...]" in shown["train"] and " CONFIG.yaml [key=value ...]" in shown["compare"]
    assert "CONFIG.yaml [key=value ...]" in shown["shrink"] and "MODEL [key=value ...]" in shown["prune"]
    assert "which plan leaves alone" in shown["plan"] and "the pilot's own is O-pilot" in shown["pilot"]
    assert "prune: or shrink: compares ways of pruning" in shown["compare"] and "e.g. 0.5" in shown["assess"]


# --- in a process of its own -----------------------------------------------------------------------------------------

HELP = """
import sys, time
from graftlm.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
heavy = [name for name in ("torch", "transformers", "datasets", "lm_eval") if name in sys.modules]
print(time.process_time(), *heavy, file=sys.stderr)
"""


def test_help_is_fast():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stderr.split()
    assert heavy == []
    assert float(seconds) < 0.5  # of processor time: the clock on the wall is the machine's other work, too


PIPE = """
import sys, types
import graftlm
graftlm.environment = types.SimpleNamespace(describe_environment=lambda: {str(n): 'x' * 1000 for n in range(1000)})
sys.modules["graftlm.environment"] = graftlm.environment
from graftlm.cli import main
sys.exit(main(["env"]))
"""


def test_a_reader_that_has_enough_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-c", PIPE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("'0': xxx")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_installed_as_a_command():
    scripts = Path(sys.executable).parent / "graftlm"
    done = subprocess.run([scripts, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("graftlm ")
    assert Path(graftlm.__file__).parent.name == "graftlm"
