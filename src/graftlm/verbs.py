"""What each verb of the command line does: read its arguments, call one function of the package, print what came back.

Imports sit inside the functions: torch and transformers take seconds, and --help must not wait for them.
"""

import argparse
from pathlib import Path
from typing import Any

from graftlm.arguments import split_words
from graftlm.errors import UserError
from graftlm.training.config import RunConfig


def _config(args: argparse.Namespace) -> RunConfig:
    from graftlm.configuring import load_config

    files, overrides = split_words(args.settings)
    if len(files) > 1:
        raise UserError(f"{files[1]!r}: one config file, please ({files[0]} is one); settings are written KEY=VALUE")
    if not (files or args.model or args.data or overrides):
        raise UserError(f"{args.verb}: give CONFIG.yaml, or --model M --data D; see graftlm {args.verb} --help")
    given = {"model": args.model, "data": args.data, "output_dir": args.output_dir}
    return load_config(Path(files[0]) if files else None, overrides, **given)


def train(args: argparse.Namespace) -> None:
    if args.dry_run:
        return plan(args)
    config = _config(args)
    args.run_folder = config.output_dir
    from graftlm.training import run

    run.train(config, resume=args.resume)


def plan(args: argparse.Namespace) -> None:
    config = _config(args)
    from graftlm.training import plan as planning

    planning.plan(config, gpus=getattr(args, "gpus", None))


def data(args: argparse.Namespace) -> None:
    config = _config(args)
    from graftlm import models
    from graftlm.training import data as training_data

    tokenizer = models.load_tokenizer(
        config.model, chat_template=config.chat_template, trust_remote_code=config.trust_remote_code
    )
    training_data.show_data(config, tokenizer, count=args.count)


def assess(args: argparse.Namespace) -> None:
    from graftlm import assess as assessment

    names = ("samples", "max_length", "mask", "prune_sensitivity", "dtype", "trust_remote_code")
    kwargs = {name: getattr(args, name) for name in names}
    assessment.assess(args.model, args.data, args.out, compare=args.compare, **kwargs)


def evaluate(args: argparse.Namespace) -> None:
    from graftlm.evaluation import run

    names = ("tasks", "multiple_choice", "perplexity", "data_dir", "limit", "batch_size", "max_length", "seed")
    more = ("log_samples", "allow_code_execution", "code_samples", "dtype", "trust_remote_code")
    report = run.run_evaluation(args.model, args.out, **{name: getattr(args, name) for name in (*names, *more)})
    _print_mapping(report["results"])
    for name, notes in report["notes"].items():
        for note in notes:
            print(f"{name}: {note}")
    print(f"written to {args.out}")


def generate(args: argparse.Namespace) -> None:
    from graftlm import generation

    names = ("max_new_tokens", "temperature", "dtype", "trust_remote_code")
    kwargs = {name: getattr(args, name) for name in names}
    generation.generate(args.model, args.prompt, chat=False if args.no_chat else None, **kwargs)  # prints as it comes


def report(args: argparse.Namespace) -> None:
    from graftlm.reporting import folders

    print(folders.report_on(args.run_dir))


def demo(args: argparse.Namespace) -> None:
    args.run_folder = args.out
    from graftlm import demo as demonstration

    demonstration.run_demo(args.out, quick=args.quick)


def compare(args: argparse.Namespace) -> None:
    from graftlm.comparing import runner

    files, overrides = split_words(args.settings)
    if len(files) != 1:
        raise UserError(f"compare: give one CONFIG.yaml, not {len(files)}; settings are written KEY=VALUE")
    runner.compare(files[0], overrides, minutes=args.minutes, dry_run=args.dry_run)


def pilot(args: argparse.Namespace) -> None:
    config = _config(args)
    from graftlm.comparing import pilot as piloting

    names = ("minimum_effect", "share", "pairs")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    piloting.pilot(config, **given)


def env(args: argparse.Namespace) -> None:
    from graftlm import environment

    _print_mapping(environment.describe_environment())


def _print_mapping(mapping: dict[str, Any]) -> None:
    import yaml

    print(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True), end="")
