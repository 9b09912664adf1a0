"""The report, the model card and the console table, made from run folders of generated data."""

import html
import io
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from test_reporting import ALL_PLOTS, fake_run, write_config

from graftlm.reporting import figures
from graftlm.reporting.card import model_card
from graftlm.reporting.report import config_differences, make_report
from graftlm.reporting.table import print_summary


@pytest.fixture(scope="module")
def run_and_summary(tmp_path_factory) -> tuple[Path, dict]:
    """A finished APEX run with its control, and its report already made. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    summary = fake_run(folder)
    make_report(folder)
    return folder, summary


def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


# --- report


class References(HTMLParser):
    """Collects every address that a browser could follow or load, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "poster", "action")]


def test_report_needs_nothing_from_outside(run_and_summary):
    folder, _ = run_and_summary
    text = page(folder)
    found = References()
    found.feed(text)
    outside = [address for address in found.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert outside == ["https://arxiv.org/abs/2505.24241"]
    assert not found.tags & {"script", "link", "iframe", "object"}
    assert "url(" not in text and "@import" not in text
    assert text.count("data:image/png;base64,") == len(ALL_PLOTS)


def test_every_link_inside_the_report_has_its_target(run_and_summary):
    text = page(run_and_summary[0])
    targets = re.findall(r'href="#(\w+)"', text)
    assert len(targets) >= 7
    assert all(f'id="{target}"' in text for target in targets)


def test_report_tells_the_summary(run_and_summary):
    folder, summary = run_and_summary
    text = page(folder)
    gap = summary["eval_loss_end"] - summary["control"]["eval_loss_end"]
    told = [f"{summary[key]:.4f}" for key in ("eval_loss_start", "eval_loss_end")]
    told += [f"{summary['control']['eval_loss_end']:.4f}", f"{gap:+.4f}".replace("-", "−")]
    told += [f"{math.exp(summary['eval_loss_end']):.4g}", "4,819", "4,897", "3.00 GiB", "1.18 M", "33.3%", "12.5%"]
    told += ["1,234", "988 k", "87.3%", "1.2%", "exactly 0", "one key-value head", "256 sequences", "1 min 40 s"]
    told += [f"{stage['eval_loss_before_fusion']:.4f}" for stage in summary["stages"]]
    told += ["64 held-out sequences, 65.5 k tokens", "share of the data trained on", "49.8%"]
    told += ["apex.k_channels", "torch", "2.13.0", "graftlm train", "graftlm generate", "AutoModelForCausalLM"]
    assert [piece for piece in told if piece not in text] == []
    assert "not evidence of a difference" in text
    assert not re.search(r"\bnan\b|\bNone\b", re.sub(r"base64,[^\"]*", "", text))


def test_pictures_say_what_they_show(run_and_summary):
    folder, summary = run_and_summary
    alts = dict(re.findall(r'<img alt="([^:"]*): ([^"]*)"', page(folder)))
    ends = [f"{one['eval_loss_end']:.4f}" for one in (summary, summary["control"])]
    said = alts["Training and evaluation loss against tokens"]
    assert said == f"Evaluation loss after 492 k tokens: APEX {ends[0]}, control {ends[1]}"
    assert len(alts) == len(ALL_PLOTS)


def test_stages_name_their_first_step(run_and_summary):
    rows = re.findall(r'<tr><th scope="row">(\d)</th><td>(\d+)</td><td>20</td>', page(run_and_summary[0]))
    assert rows == [("1", "1"), ("2", "21"), ("3", "41")]


def test_report_escapes_what_it_shows(tmp_path):
    nasty = "<script>alert('x')</script>&"
    summary = fake_run(tmp_path, model=nasty, control=False)
    summary |= {"model": nasty, "notes": [nasty]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    make_report(tmp_path)
    text = page(tmp_path)
    assert "<script" not in text and "<b>fast</b>" not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;") >= 3
    assert "&lt;b&gt;fast&lt;/b&gt;" in text


def test_report_of_a_run_still_going(tmp_path):
    folder = tmp_path / "my runs"
    fake_run(folder, finished=False, control=False)
    make_report(folder)
    text = page(folder)
    assert "This run has not ended" in text and 'id="next"' not in text
    command = re.search("<code>(graftlm train .*--resume)</code>", text).group(1)
    assert shlex.split(html.unescape(command)) == ["graftlm", "train", f"{folder}/config.yaml", "--resume"]
    assert "2.9224" in text and "492 k" in text


def test_report_of_a_run_that_has_only_its_config(tmp_path):
    write_config(tmp_path, "apex", "tiny-llama", control=False)
    make_report(tmp_path)
    assert "Nothing has been logged yet" in page(tmp_path)


def test_report_of_plain_training(tmp_path):
    fake_run(tmp_path, method="full", control=False, stages=1)
    make_report(tmp_path)
    text = page(tmp_path)
    assert "plain training" in text and 'id="stages"' not in text and 'id="fusion"' not in text
    assert "not evidence" not in text, "there is nothing to compare"
    assert not (tmp_path / "plots" / "stages.png").exists()


def test_config_differences_are_those_and_no_others():
    config = {"model": "m", "max_length": 1024, "bf16": True, "report_to": [], "apex": {"stages": 3, "budget": 0.3}}
    assert config_differences(config) == [
        ("model", "m", "–"),
        ("bf16", "true", "false"),
        ("apex.budget", "0.3", "null"),
    ]


def test_control_kept_in_the_summary_only(tmp_path):
    summary = fake_run(tmp_path, control=False)
    summary["control"] = {"method": "full", "eval_loss_end": 2.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    make_report(tmp_path)
    assert "2.5000" in page(tmp_path)


# --- card, table, numbers


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_of_a_hub_model(run_and_summary):
    folder, summary = run_and_summary
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {
        "data": [{"path": "hub:owner/texts"}, {"path": "x"}]
    }
    card = model_card(summary, config, "owner/model-1.7B")
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["graftlm", "apex"],
        "base_model": "owner/model-1.7B",
        "datasets": ["owner/texts"],
    }
    assert f"{summary['eval_loss_end']:.4f}" in card and f"{summary['control']['eval_loss_end']:.4f}" in card
    assert "arXiv:2505.24241" in card and "not evidence of a difference" in card and "from_pretrained" in card


@pytest.mark.parametrize("base", ["tiny-llama", "/models/some/folder", "runs/demo/model", "weights/model.gguf"])
def test_card_names_no_base_model_that_is_not_on_the_hub(base, tmp_path, run_and_summary):
    assert "base_model" not in front_matter(model_card(run_and_summary[1], {}, base))


def test_card_of_a_local_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch, run_and_summary):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(model_card(run_and_summary[1], {}, "owner/model"))


def test_card_of_plain_training_cites_no_paper(tmp_path):
    summary = fake_run(tmp_path, method="full", control=False, stages=1)
    card = model_card(summary, {}, "tiny|llama")
    assert "2505.24241" not in card and front_matter(card)["tags"] == ["graftlm"] and "tiny\\|llama" in card


def test_table_shows_both_runs_and_what_comes_next(tmp_path, run_and_summary):
    _, summary = run_and_summary
    out = io.StringIO()
    run = tmp_path / "a rather long folder name, with [brackets] in it"
    print_summary(summary, run, console=Console(file=out, width=100))
    text = out.getvalue()
    for piece in ("APEX", "control", "2.9224", "2.9304", "4,819", "1.016 ×", "not evidence", str(run / "report.html")):
        assert piece in text
    assert f"graftlm generate '{run / 'model'}'" in text
    assert "trainable, of the model's own parameters" in text and "100.88%" in text


def test_table_without_a_control(tmp_path):
    summary = fake_run(tmp_path, method="full", control=False, stages=1)
    out = io.StringIO()
    print_summary(summary, Path("runs/plain"), console=Console(file=out, width=100))
    assert "plain training" in out.getvalue() and "control" not in out.getvalue()
    assert "operators" not in out.getvalue()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.count(1_969_152), "1.97 M"),
        (figures.count(999), "999"),
        (figures.difference(2.0, 2.0 + 8e-6), "0.0000"),
        (figures.difference(2.0, 2.0 + 8e-5), "−0.0001"),
        (figures.difference(2.5, 2.0), "+0.5000"),
        (figures.count(999_700), "1 M"),
        (figures.count(0), "0"),
        (figures.count(None), "–"),
        (figures.loss(float("nan")), "–"),
        (figures.duration(59.94), "59.9 s"),
        (figures.duration(3599.6), "1 h 00 min"),
        (figures.duration(125), "2 min 05 s"),
        (figures.size(3 * 2**30), "3.00 GiB"),
        (figures.size(5 * 2**20), "5 MiB"),
        (figures.scientific(0.0), "exactly 0"),
        (figures.scientific(1.23e-6), "1.2e-06"),
        (figures.perplexity(1000.0), "inf"),
        (figures.difference(2.0, 2.5), "−0.5000"),
        (figures.ratio(1.0, 0.0), ""),
    ],
)
def test_numbers_as_people_read_them(shown, expected):
    assert shown == expected


def test_the_card_names_the_highest_rate_of_all_stages(tmp_path):
    staged = {"learning_rate": 2e-5, "apex": {"stage_learning_rates": [1e-4, 3e-5]}}
    of_stages = ({"method": "apex"}, {"method": "full", "stage_starts": [0, 1]})
    for config, rate in ((of_stages[0], "0.0001"), (of_stages[1], "0.0001"), ({"method": "lora"}, "2e-05")):
        card = model_card({"tokens": 10, "steps": 2}, {**config, **staged}, "m")
        assert f"a peak learning rate of {rate}, by graftlm" in card
