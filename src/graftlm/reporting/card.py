"""The model card that goes into a run's model folder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from graftlm.reporting import figures
from graftlm.reporting.nextsteps import CITATION, PAPER, load_snippet

PLACE = "PATH_OR_HUB_ID"
KEPT = ("license", "license_name", "license_link", "base_model", "language")
"""What a model has in common with the one it was made from, in the front matter of cards."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(summary: dict[str, Any], config: dict[str, Any], base_model: str, *, own_class: bool = False) -> str:
    """A Hugging Face model card (Markdown with YAML front matter) for the model of a run.

    `summary` is summary.json's content, `config` the resolved config as plain data, `base_model` what was trained (a
    Hub id, a folder, a file or a built-in name; only a Hub id goes into the front matter), `own_class` whether it needs
    a class that transformers does not have (models.has_own_class).
    """
    name = figures.method_name(summary.get("method"))
    control = summary.get("control")
    expanded = summary.get("method") == "apex"
    return (
        "\n\n".join(
            part
            for part in (
                front_matter(["apex"] if expanded else [], base_model, _datasets(config), more=kept_matter(base_model)),
                f"# {cell(Path(base_model).name)}, trained with {name}",
                f"{_what_was_done(summary, config, base_model)}",
                "## Figures",
                _table(summary, control, name),
                figures.ONE_SEED if control else "",
                "## How to use it",
                "Nothing of the training method is left in it.",
                how_to_open(own_class),
                "## Limits",
                "Those of the model it was trained from and of the data it was trained on. Nothing was measured here "
                "but the loss on held-out data.",
                "## Citation" if expanded else "",
                f"The method is that of [Gu et al., 2025]({PAPER}).\n\n```bibtex\n{CITATION}\n```" if expanded else "",
            )
            if part
        )
        + "\n"
    )


def source_card(model: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of the card in the folder `model`; both empty where there is none, or it cannot be read."""
    file = Path(model) / "README.md"
    if not file.is_file():
        return {}, ""
    text = file.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---\n?", text, re.DOTALL)
    try:
        matter = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        matter = {}
    return (matter if isinstance(matter, dict) else {}), text[head.end() :].strip() if head else text.strip()


def kept_matter(model: str, *more: str) -> dict[str, Any]:
    """Front matter of the card in the folder `model` that holds for what is made from it too: its licence above all."""
    matter, _ = source_card(model)
    return {key: matter[key] for key in (*KEPT, *more) if key in matter}


def how_to_open(own_class: bool) -> str:
    """Words and Python that open the model of the folder that the card lies in."""
    if not own_class:
        return f"An ordinary model, which stock transformers opens.\n\n```python\n{load_snippet(PLACE)}\n```"
    return (
        "No class of transformers' own can hold its shapes, so its class lies beside the weights as a short Python "
        "file: read it, then trust it. It needs torch and transformers 5.14 or newer, and nothing else.\n\n"
        f"```python\n{load_snippet(PLACE, trust=True)}\n```\n\n"
        "Where graftlm is installed it opens without running that file:\n\n"
        "```python\nfrom graftlm.models import load_model, load_tokenizer\n"
        f"model, tokenizer = load_model({PLACE!r}), load_tokenizer({PLACE!r})\n```"
    )


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as OWNER/NAME on the Hub and is not a file or folder here."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf") and not Path(name).exists()


def front_matter(
    tags: Sequence[str], base_model: str, datasets: Sequence[str] = (), *, more: Mapping[str, Any] | None = None
) -> str:
    """What the Hub reads of a card. `base_model`: named where it is a Hub id; `datasets`: Hub ids; `more`: further
    entries, which win."""
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    matter["tags"] = ["graftlm", *tags]
    if is_hub_id(base_model):
        matter["base_model"] = base_model
    if datasets:
        matter["datasets"] = list(datasets)
    matter |= more or {}
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def _datasets(config: dict[str, Any]) -> list[str]:
    sources = [str(source.get("path", "")) for source in config.get("data") or [] if isinstance(source, dict)]
    return [path.removeprefix("hub:") for path in sources if path.startswith("hub:")]


def _what_was_done(summary: dict[str, Any], config: dict[str, Any], base_model: str) -> str:
    text = f"`{code(base_model)}` trained on {figures.count(summary.get('tokens'))} tokens "
    text += f"in {figures.integer(summary.get('steps'))} optimizer steps "
    text += f"with a peak learning rate of {_peak_rate(config)}" if "learning_rate" in config else ""
    text = text.rstrip() + ", by graftlm."
    if summary.get("method") == "apex":
        stages = len(summary.get("stages") or [])
        text += (
            f" APEX (Advantageous Parameter EXpansion) ran for {stages} stage{'s' if stages != 1 else ''}: each ranks "
            "attention heads and FFN channels by their activations, carries the strongest into the space of the "
            "weakest through an operator that is trained along, and fuses the result into the weights. Architecture "
            "and size are those of the original."
        )
    if figures.is_number(gap := summary.get("fused_max_abs_logit_difference")):
        text += f" Largest change of a logit through fusion and saving: {figures.scientific(gap)}."
    return text


def _peak_rate(config: dict[str, Any]) -> float:
    """Of the whole run: stages may have rates of their own."""
    in_stages = config.get("method", "apex") == "apex" or config.get("stage_starts")
    by_stage = (config.get("apex") or {}).get("stage_learning_rates") if in_stages else None
    rate: float = max(by_stage) if by_stage else config["learning_rate"]
    return rate


def _table(summary: dict[str, Any], control: dict[str, Any] | None, name: str) -> str:
    head = ["", name, "plain training, same tokens", "against it"] if control else ["", name]
    rows = [[row.label, row.run, row.control, row.compared] for row in figures.comparison(summary, control)]
    return markdown_table([head, *(row[: len(head)] for row in rows)])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first of them the head; the first column is words, the others are numbers."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines)


def cell(text: str) -> str:
    """Text that stays inside a table's cell or a heading."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Text that stays inside backquotes."""
    return " ".join(text.split()).replace("`", "'")
