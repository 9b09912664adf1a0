"""The model card that goes into a run's model folder."""

import re
from pathlib import Path
from typing import Any

import yaml

from graftlm.reporting import figures
from graftlm.reporting.nextsteps import CITATION, PAPER, load_snippet

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(summary: dict[str, Any], config: dict[str, Any], base_model: str) -> str:
    """A Hugging Face model card (Markdown with YAML front matter) for the model of a run.

    `summary` is summary.json's content, `config` the resolved config as plain data, `base_model` what was trained (a
    Hub id, a folder, a file or a built-in name; only a Hub id goes into the front matter).
    """
    name = figures.method_name(summary.get("method"))
    control = summary.get("control")
    expanded = summary.get("method") == "apex"
    return (
        "\n\n".join(
            part
            for part in (
                f"---\n{yaml.safe_dump(_front_matter(summary, config, base_model), sort_keys=False)}---",
                f"# {_cell(Path(base_model).name)}, trained with {name}",
                f"{_what_was_done(summary, config, base_model)}",
                "## Figures",
                _table(summary, control, name),
                figures.ONE_SEED if control else "",
                "## How to use it",
                "An ordinary model: nothing of the training method is left in it, and stock transformers opens it.",
                f"```python\n{load_snippet('PATH_OR_HUB_ID')}\n```",
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


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as OWNER/NAME on the Hub and is not a file or folder here."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf") and not Path(name).exists()


def _front_matter(summary: dict[str, Any], config: dict[str, Any], base_model: str) -> dict[str, Any]:
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    matter["tags"] = ["graftlm", *(["apex"] if summary.get("method") == "apex" else [])]
    if is_hub_id(base_model):
        matter["base_model"] = base_model
    sources = [str(source.get("path", "")) for source in config.get("data") or [] if isinstance(source, dict)]
    if datasets := [path.removeprefix("hub:") for path in sources if path.startswith("hub:")]:
        matter["datasets"] = datasets
    return matter


def _what_was_done(summary: dict[str, Any], config: dict[str, Any], base_model: str) -> str:
    text = f"`{_code(base_model)}` trained on {figures.count(summary.get('tokens'))} tokens "
    text += f"in {figures.integer(summary.get('steps'))} optimizer steps "
    text += f"with a peak learning rate of {config['learning_rate']}" if "learning_rate" in config else ""
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


def _table(summary: dict[str, Any], control: dict[str, Any] | None, name: str) -> str:
    head = ["", name, "plain training, same tokens", "against it"] if control else ["", name]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in figures.comparison(summary, control):
        lines.append([row.label, row.run, row.control, row.compared][: len(head)])
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays inside a table's cell or a heading."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
