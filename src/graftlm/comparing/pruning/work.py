"""The process of one cell (`python -m graftlm.comparing.pruning.work GIVEN.json`): open, prune, save."""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from graftlm.comparing.pruning.jobs import DONE, MODEL
from graftlm.environment import describe_environment, peak_memory_bytes
from graftlm.errors import UserError
from graftlm.files import read_json, write_json, write_text
from graftlm.models import load_model, load_tokenizer
from graftlm.pruning.calibration import calibration_from
from graftlm.pruning.checks import check
from graftlm.pruning.prune import prune
from graftlm.pruning.saving import save_pruned, summary_of
from graftlm.pruning.settings import PruneSettings
from graftlm.pruning.shrink.config import load_shrink
from graftlm.pruning.shrink.run import run_shrink
from graftlm.pruning.targets import parameters_left
from graftlm.training.child import end_with_parent
from graftlm.training.config import SourceConfig


def work(given: dict[str, Any], folder: Path) -> None:
    """Do what `given` says (jobs.py; and model, data), leaving the model and what is kept of it in `folder`."""
    if "shrink" in given:
        return _shrink(given["shrink"], folder)
    settings = PruneSettings(**given["prune"])
    tokenizer = load_tokenizer(given["model"])
    model = load_model(given["model"], dtype=given["dtype"])
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    if given["sparsity_of"] == "parameters" and settings.sparsity is not None:
        target = parameters_left(model, settings.sparsity)
        settings = dataclasses.replace(settings, sparsity=None, target_parameters=target)
    check(model, settings)  # before data are read
    data = tuple(SourceConfig(**source) for source in given["data"])
    pruned = prune(model, settings, calibration_from(tokenizer, settings, data or None))
    peak = peak_memory_bytes()
    save_pruned(pruned, tokenizer, folder / MODEL, base_model=given["model"])
    kept = told(summary_of(pruned))
    write_json(
        folder / DONE,
        {
            **kept,
            "target_parameters": settings.target_parameters,
            "peak_memory_bytes": peak,
            "environment": describe_environment(),
        },
    )


def _shrink(values: dict[str, Any], folder: Path) -> None:
    """Shrink, or go on with it, in `folder`/shrink."""
    own = folder / "shrink"
    given = folder / "shrink.yaml"
    write_text(given, yaml.safe_dump({**values, "output_dir": str(own)}, sort_keys=False))
    summary = run_shrink(load_shrink(given))
    if not (folder / MODEL).exists():
        (own / MODEL).rename(folder / MODEL)
    more = {key: summary[key] for key in ("target_parameters", "tokens", "steps", "eval_loss_end", "peak_memory_bytes")}
    looked_at = sum(phase["calibration_tokens"] or 0 for phase in summary["phases"])
    kept = {**told(summary), **more, "seconds": summary["total_seconds"], "calibration_tokens": looked_at}
    write_json(folder / DONE, {**kept, "environment": read_json(own / "environment.json")})
    shutil.rmtree(own)


def told(summary: dict[str, Any]) -> dict[str, Any]:
    """What a comparison keeps of a pruned model's summary, of pruning or of a shrink."""
    kept = ("parameters", "original_parameters", "shapes", "original_shapes", "seconds", "notes")
    return {key: summary[key] for key in kept}


def main(arguments: Sequence[str]) -> int:
    end_with_parent()
    given = Path(arguments[0])
    try:
        work(read_json(given), given.parent)
    except UserError as error:
        print(f"graftlm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
