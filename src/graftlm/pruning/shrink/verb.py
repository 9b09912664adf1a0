"""What `graftlm shrink` does: read its arguments, shrink or plan."""

import argparse
from collections.abc import Callable
from typing import Any

from graftlm.arguments import split_words
from graftlm.errors import UserError


def add_verb(verb: Callable[..., Any]) -> None:
    """Give the command line the verb. `verb` as in graftlm.pruning.cli."""
    parser = verb(
        "shrink",
        shrink,
        "prune a little, train, and again, to a size",
        "Make a model smaller in phases (Adapt-Accel): each prunes a few percent and trains, with one schedule of the\n"
        "learning rate over all, until the model has exactly the size that was asked for. The same command goes on\n"
        "where it was stopped or killed.",
        "graftlm shrink examples/shrink_tiny.yaml",
        "graftlm eval OUTPUT_DIR/model --perplexity FILE --out FILE.json",
    )
    settings = "a YAML file, then settings that override it, e.g. interleaves=10 train.learning_rate=1e-4"
    parser.add_argument("settings", nargs="+", metavar="CONFIG.yaml [key=value ...]", help=settings)
    parser.add_argument("--dry-run", action="store_true", help="only say the phases' sizes and what they would take")


def shrink(args: argparse.Namespace) -> None:
    files, overrides = split_words(args.settings)
    if len(files) != 1:
        raise UserError(f"shrink: {len(files)} config files given; give one CONFIG.yaml, and settings as KEY=VALUE")
    from graftlm.pruning.shrink.config import load_shrink

    task = load_shrink(files[0], overrides)  # before torch is imported, so that what is wrong is said at once
    if args.dry_run:
        from graftlm.pruning.shrink.dry_run import dry_run

        dry_run(task)
        return
    from graftlm.pruning.shrink.run import run_shrink
    from graftlm.reporting.shrinking import write_report

    run_shrink(task)
    print(f"report: {write_report(task.folder)}")
