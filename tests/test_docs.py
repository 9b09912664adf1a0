"""What the documents say is what the program does: commands parse, examples load, references are up to date."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from graftlm import cli, config_docs
from graftlm.apex_config import PRESETS, ApexConfig
from graftlm.comparing.config import load_comparison
from graftlm.comparing.pruning.config import load_prune_comparison
from graftlm.configuring import load_config
from graftlm.pruning.shrink.config import load_shrink
from graftlm.training.config import RunConfig, SourceConfig

ROOT = Path(__file__).parents[1]
LOGS = [ROOT / "CHANGELOG.md", *sorted(ROOT.glob("experiments/**/*.md")), *sorted(ROOT.glob("benchmarks/**/*.md"))]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
CONFIGS = sorted([*ROOT.glob("examples/*.yaml"), *ROOT.glob("src/graftlm/**/*.yaml")])
RUNS = [config for config in CONFIGS if not config.name.startswith(("compare_", "shrink_"))]  # read elsewhere


def commands(text: str) -> list[str]:
    """Every `graftlm ...` command line in a Markdown page or a help text: lines of code blocks, and inline code."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^(?:\$ |    |  )?(graftlm (?!-h).*)$", "\n".join(re.findall(r"```.*?```", text, re.S)), re.M)
    inline = re.findall(r"`(graftlm [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    # `graftlm VERB --help` is about any verb.
    return [line for line in [*lines, *inline] if "VERB" not in line]


def parses(command: str) -> None:
    """A command as written for the shell, placeholders included; --help ends argparse, and is fine."""
    words = shlex.split(command, comments=True)[1:]
    words += ["--help"] * (len(words) == 1)  # a verb alone is its name
    try:
        cli.parse(words)
    except SystemExit as stop:
        assert stop.code == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, capsys):
    for command in commands(page.read_text(encoding="utf-8")):
        parses(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_examples_load_them(page, monkeypatch):
    """With their overrides; a comparison's and a shrink's too."""
    monkeypatch.chdir(ROOT)
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        file = next((word for word in words if word.startswith("examples/") and word.endswith(".yaml")), None)
        if file is None or "OUT" in command:
            continue
        overrides = [word for word in words if re.match(r"[a-z_.0-9]+=", word)]
        name = Path(file).name
        if name.startswith("compare_prune_"):
            load_prune_comparison(file, overrides)
        elif name.startswith("compare_"):
            load_comparison(file, overrides)
        elif name.startswith("shrink_"):
            load_shrink(file, overrides)
        else:
            load_config(file, overrides)


def test_commands_are_found():
    page = "a `graftlm env` b\n```sh\ngraftlm train c.yaml \\\n  seed=1  # why\n```\n"
    assert commands(page) == ["graftlm train c.yaml  seed=1  # why", "graftlm env"]
    assert len(commands((ROOT / "docs/cli.md").read_text(encoding="utf-8"))) > 15


def test_commands_inside_examples_and_help_parse(capsys):
    for config in CONFIGS:
        for command in re.findall(r"^#\s+(?:.*:\s+)?(graftlm .+)$", config.read_text(encoding="utf-8"), re.M):
            parses(command)
    for name in (
        "train",
        "plan",
        "data",
        "assess",
        "eval",
        "compare",
        "pilot",
        "prune",
        "shrink",
        "export",
        "generate",
        "report",
        "demo",
        "env",
    ):
        with pytest.raises(SystemExit):
            cli.parse([name, "--help"])
        for command in re.findall(r"^  (graftlm .+?)(?:\s{3,}.*)?$", capsys.readouterr().out, re.M):
            parses(command)


@pytest.mark.parametrize("page", [*PAGES, *LOGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        if link.startswith(("http:", "https:")):
            continue
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {link}#{anchor}"


def test_the_file_tree_of_the_readme_is_there():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("src/graftlm/\n")[2].partition("```")[0]
    named = {name for line in tree.splitlines() for name in re.findall(r"\b[a-z_/]+(?:\.(?:py|yaml)|/)", line)}
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "src/graftlm" / name).exists(), f"README.md's tree names {name}"


@pytest.mark.parametrize("config", RUNS, ids=lambda config: config.name)
def test_examples_load(config):
    loaded = load_config(config)
    assert loaded.output_dir.startswith("runs/")  # the folder that git ignores


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/*.py")), ids=lambda script: script.name)
def test_example_scripts_compile(script):
    compile(script.read_text(encoding="utf-8"), str(script), "exec")


def test_the_loop_has_five_lines_of_apex():
    lines = (ROOT / "examples/loop.py").read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if "  # APEX" in line]
    assert len(marked) == 5
    assert [line for line in lines if re.match(r"\s*apex[. =]", line)] == marked


def test_the_page_on_loops_runs(tmp_path, monkeypatch):
    """From training over a checkpoint to the same weights, which its last line asserts."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    assert code.rstrip().splitlines()[-1].startswith("assert ")
    exec(compile(code, "python.md", "exec"), {})
    assert (tmp_path / "trained/model.safetensors").exists()


def test_the_configuration_reference_is_generated(tmp_path):
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == config_docs.configuration_markdown(), "run `make docs`"


def test_the_generator_is_a_command(tmp_path):
    subprocess.run([sys.executable, "-m", "graftlm.config_docs", tmp_path / "c.md"], check=True)
    assert (tmp_path / "c.md").read_text(encoding="utf-8") == config_docs.configuration_markdown()


@pytest.mark.parametrize(("kind", "prefix"), [(RunConfig, ""), (SourceConfig, "data."), (ApexConfig, "apex.")])
def test_every_key_is_explained(kind, prefix):
    page = config_docs.configuration_markdown()
    for name, (_, text) in config_docs.field_docs(kind).items():
        assert text.endswith((".", "...", "...).")), f"{prefix}{name} has no docstring"
        row = next(line for line in page.splitlines() if line.startswith(f"| `{prefix}{name}` |"))
        assert len(re.findall(r"(?<!\\)\|", row)) == 5  # a | inside a cell would break the table


def test_the_reference_has_values_and_whole_sentences():
    """No name of a Python type where a value may stand, and no introduction that stops midway."""
    page = config_docs.configuration_markdown()
    known = {"text", "whole number", "number", "true or false", "null", "mapping", "list of", "source", "see below"}
    for row in re.findall(r"^\| `.*", page, re.MULTILINE):
        cells = re.split(r"(?<!\\)\|", row)
        kind = cells[2] if len(cells) == 6 else ""  # not of the table of presets
        kind = re.sub(r"mapping, see [^,|]+ below|`[^`]*`", "", kind)
        words = [word.strip() for word in re.split(r"[,:]|(?<!true) or ", kind) if word.strip()]
        assert set(words) <= known | {"mapping to"}, row
    for title, _, _ in config_docs.SECTIONS:
        section = page.partition(f"\n## {title}\n\n")[2]
        assert section.partition("\n")[0].endswith("."), title


def test_presets_in_the_reference_can_be_copied():
    page = config_docs.configuration_markdown()
    for name, settings in PRESETS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        lines = [f"  {item}" for item in re.findall(r"`([a-z_]+: [^`]+)`", row)]
        text = "\n".join(["apex:", *lines])
        read = load_config(None, [], model="m", data="d", apex=yaml.safe_load(text)["apex"]).apex
        assert read == ApexConfig(**settings)


def test_the_first_configuration_example_loads(tmp_path):
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    (tmp_path / "c.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.S)[0])
    config = load_config(tmp_path / "c.yaml")
    assert (config.learning_rate, config.apex.k_heads) == (1e-4, 0.2)


def test_citation_names_software_and_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], citation["license"]) == ("graftlm", "Apache-2.0")
    found = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert found == ["arXiv:2505.24241", "arXiv:2502.03460"]


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z-]+)`", page.read_text(encoding="utf-8"))}
    named |= set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize(("broken", "ran"), [("lint", ["lint"]), ("test", ["lint", "test"]), ("", ["lint", "test"])])
def test_ci_runs_lint_and_test_and_fails_with_them(tmp_path, broken, ran):
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1"\n[ "$1" != "{broken}" ]\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / ".ci/run"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ran
    assert (done.returncode != 0) == bool(broken)


@pytest.mark.parametrize("broken", ["ruff", "mypy", ""])
def test_make_lint_fails_with_each_of_its_tools(tmp_path, broken):
    for tool in ("ruff", "mypy"):
        (tmp_path / tool).write_text(f"#!/bin/sh\nexit {int(tool == broken)}\n")
        (tmp_path / tool).chmod(0o755)
    # --old-file: the tools are stand-ins, so nothing is to be installed.
    command = ["make", "--old-file=setup", "lint", f"BIN={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(broken)
