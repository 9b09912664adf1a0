"""`graftlm report DIR`: whatever the folder holds, its report is made anew."""

from pathlib import Path

from graftlm.errors import UserError
from graftlm.pruning.saving import SUMMARY
from graftlm.reporting import pruning, shrinking
from graftlm.reporting.report import make_report

MODEL = "config.json"
COMPARISON = "comparison.json"


def report_on(folder: str | Path) -> Path:
    """Write report.html of a run, a pruned model or a shrink; returns it.

    Raises UserError for a folder that is missing, broken, or of anything else.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; name the folder that train, prune or shrink wrote")
    if (folder / SUMMARY).is_file():
        return pruning.write_report(folder)
    if (folder / shrinking.PLAN).is_file():
        return shrinking.write_report(folder)
    if (folder / COMPARISON).is_file():
        raise UserError(f"{folder}: is a comparison, whose report graftlm compare writes: give its CONFIG.yaml to that")
    if (folder / MODEL).is_file() and not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: is a model, which tells nothing of how it was made; name the folder of its run or shrink "
            "(output_dir), or look into it with graftlm assess"
        )
    return make_report(folder)
