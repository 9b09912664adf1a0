"""The command line: `graftlm VERB`. Verbs parse, call one function each, and turn errors into one line.

Nothing heavy is imported before a verb runs, so that --help answers at once.
"""

import argparse
import difflib
import errno
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from graftlm import arguments, verbs
from graftlm.errors import AgreedError, UserError
from graftlm.pruning import cli as pruning

LESS_MEMORY = {
    "train": "try a smaller per_device_train_batch_size (raise gradient_accumulation_steps instead) or max_length, "
    "gradient_checkpointing=true, bf16=true, or an optim such as adamw_8bit; `graftlm plan` says what each would take",
    "shrink": "try a smaller train.per_device_train_batch_size (and train.per_device_eval_batch_size) or "
    "train.max_length, or train.gradient_checkpointing=true",
    "compare": "try a smaller base.per_device_train_batch_size or base.max_length, or base.gradient_checkpointing=true",
    "eval": "try --dtype bfloat16, a smaller --batch-size, or a smaller --max-length",
    "assess": "try --dtype bfloat16, or a smaller --max-length",
    "generate": "try --dtype bfloat16, or a shorter prompt",
    "prune": "try --dtype bfloat16, or a smaller sample_length",
    "export": "try --no-check, or --quantize f16",
}
"""Verb -> what to do about too little of it; train's for all others."""
MODEL_HELP = "a folder, a Hub id, a .gguf file, or the built-in smollm2 or tiny-llama"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument VERB: invalid choice: "):
            word = message.split("'")[1]
            near = difflib.get_close_matches(word, re.findall("'([^']+)'", message)[1:], n=1)
            message = f"{word}: no such verb" + (f" (did you mean {near[0]}?)" if near else "")
        self.exit(2, f"graftlm: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user can mend it, 130 interrupted, 1 anything else."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.version:
        from importlib.metadata import version

        print(f"graftlm {version('graftlm')}")
        return 0
    if args.verb is None:
        make_parser().print_help()
        return 2
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # `graftlm data ... | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        code, line = _explain(error, args)
        if not isinstance(error, AgreedError):
            rank = os.environ.get("RANK", "0")
            print(f"graftlm{'' if rank == '0' else f' (process {rank})'}: {line}", file=sys.stderr)
        return code


def _explain(error: BaseException, args: argparse.Namespace) -> tuple[int, str]:
    """Exit code and the one line for `error`."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return 2, text
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted; {_how_to_resume(args)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"the disk is full ({error.filename or text}); free space, then {_how_to_resume(args)}"
    # By name: torch may not be imported, and its CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return 1, f"out of memory; {LESS_MEMORY.get(getattr(args, 'verb', ''), LESS_MEMORY['train'])}"
    hint = "" if args.debug else "; run again with --debug"
    return 1, f"unexpected {type(error).__name__}: {text}{hint}"


def _how_to_resume(args: argparse.Namespace) -> str:
    folder = getattr(args, "run_folder", None)
    if folder is None or not (Path(folder) / "config.yaml").exists():
        return "run the same command again"
    return f"go on with: graftlm train {shlex.quote(str(Path(folder) / 'config.yaml'))} --resume"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line. argparse ends a list of words at the first option; key=value words may follow options."""
    args, extra = make_parser().parse_known_args(argv)
    if extra and (not hasattr(args, "settings") or any(word.startswith("-") for word in extra)):
        args.parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.settings = [*args.settings, *extra]
    return args


# --- the parser ------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each verb's function is args.run."""
    parser = _Parser(
        prog="graftlm",
        formatter_class=arguments.HelpFormatter,
        allow_abbrev=False,
        description="Train a language model with APEX, or prune it, and see by its control what that was worth.",
        epilog="start with:\n  graftlm demo --quick           a whole run in a minute\n"
        "  graftlm train --help           your own model and text\n  docs: docs/cli.md, docs/configuration.md",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(parser=parser)
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, run: Callable[[Any], None], summary: str, does: str, example: str, after: str) -> _Parser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=does,
            epilog=f"example:\n  {example}\n\nthen:\n  {after}",
            formatter_class=arguments.HelpFormatter,
            allow_abbrev=False,
        )
        # SUPPRESS: a default here would undo `graftlm --debug VERB`.
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    train = verb(
        "train",
        verbs.train,
        "train a model",
        "Train a model with APEX (or plainly: method=full) on text or conversations, and leave a run folder that\n"
        "explains itself: config, metrics, checkpoints, the model, plots and a report.",
        "graftlm train examples/cpt_tiny.yaml learning_rate=1e-3",
        "graftlm generate RUN/model 'PROMPT'       or open RUN/report.html",
    )
    _config_arguments(train, "the run folder")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the same run folder")
    train.add_argument("--dry-run", action="store_true", help="only say what it would take: the same as graftlm plan")

    plan = verb(
        "plan",
        verbs.plan,
        "what a run would take, without training",
        "Say, without training, what a run will train and cost: parameters, operators, FLOPs, peak memory and time,\n"
        "by reading the data and timing this machine. Nothing is written but the cache of the data.",
        "graftlm plan examples/cpt_tiny.yaml apex.trains=half",
        "graftlm train CONFIG.yaml                 the same arguments",
    )
    _config_arguments(plan, "the run folder, which plan leaves alone")
    plan.add_argument(
        "--gpus",
        type=arguments.positive,
        metavar="N",
        help="plan for N GPUs, there or not, by distributed.strategy (default: this machine)",
    )

    data = verb(
        "data",
        verbs.data,
        "show what the model will see",
        "Show the first training sequences as the model will see them, and what there is of them; tokens that count\n"
        "in the loss are green, or stand between » and « where there is no colour. What was tokenised is cached.",
        "graftlm data examples/sft_smollm2.yaml data=chats.jsonl --count 2",
        "graftlm plan CONFIG.yaml                  what the run will take",
    )
    _config_arguments(data, "the run folder, which data leaves alone")
    data.add_argument("--count", type=arguments.positive, default=3, metavar="N", help="sequences to show (default 3)")

    assess = verb(
        "assess",
        verbs.assess,
        "rank the heads and channels of a model",
        "Run a model over data and write how strongly each head and channel is activated: scores, sigma and\n"
        "sigma/mean, plots; --compare puts two models side by side, --mask measures the loss without some of them.",
        "graftlm assess smollm2 --data book.txt --out runs/assess --samples 64",
        "graftlm train CONFIG.yaml                 expand the weak ones from the strong ones",
    )
    assess.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    seen = "text or conversations to run it on, or a config (.yaml), of which its data: are taken"
    assess.add_argument("--data", required=True, metavar="FILE", help=seen)
    assess.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    assess.add_argument("--compare", metavar="MODEL2", help="a second model of the same shape, e.g. after training")
    assess.add_argument(
        "--samples", type=arguments.positive, default=256, metavar="N", help="sequences to run (default 256)"
    )
    assess.add_argument(
        "--max-length", type=arguments.positive, default=1024, metavar="L", help="tokens a sequence (default 1024)"
    )
    assess.add_argument(
        "--mask", type=arguments.share, metavar="SHARE", help="mask the top, lowest and random SHARE, e.g. 0.1"
    )
    alone = "the loss without SHARE of one layer, for each layer, e.g. 0.5"
    assess.add_argument("--prune-sensitivity", type=arguments.share, metavar="SHARE", help=alone)
    _dtype_argument(assess)
    _code_argument(assess)

    evaluate = verb(
        "eval",
        verbs.evaluate,
        "measure a model",
        "Measure a model as lm-evaluation-harness does: on its tasks, on multiple-choice questions of yours, by its\n"
        "perplexity on text. All in one call share the loaded model; a killed call goes on when it is given again.",
        "graftlm eval runs/demo/model --tasks arc_easy,piqa --data-dir DIR --limit 200 --out runs/demo/tasks.json",
        "graftlm eval OTHER --tasks A --out B.json    numbers compare at the same tasks, limit, seed and --max-length",
    )
    evaluate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    evaluate.add_argument(
        "--tasks",
        type=lambda text: [name for name in text.replace(" ", "").split(",") if name],
        default=[],
        metavar="A,B:5,...",
        help="tasks of the harness (:5 for 5 shots), humaneval, or the lists paper-it, paper-cpt, adapt",
    )
    evaluate.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="take tasks' questions from DIR/TASK/test.jsonl (default: the Hub)"
    )
    evaluate.add_argument(
        "--multiple-choice",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.jsonl",
        help="question, choices, answer (index), optional passage; may be repeated",
    )
    evaluate.add_argument(
        "--perplexity",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="text, jsonl or parquet; may be repeated",
    )
    evaluate.add_argument(
        "--limit",
        type=arguments.positive,
        metavar="N",
        help="N questions a task, always the same; the first N documents of a text",
    )
    evaluate.add_argument(
        "--seed", type=int, default=1234, metavar="S", help="of the questions chosen, shots, sampling (default 1234)"
    )
    evaluate.add_argument(
        "--max-length", type=arguments.positive, metavar="L", help="tokens of context (default: the model's)"
    )
    evaluate.add_argument(
        "--batch-size", type=arguments.positive, default=1, metavar="B", help="sequences a pass (default 1)"
    )
    _dtype_argument(evaluate)
    _code_argument(evaluate)
    evaluate.add_argument("--log-samples", action="store_true", help="keep what became of every question")
    evaluate.add_argument(
        "--allow-code-execution", action="store_true", help="for humaneval: run, contained, programs the model wrote"
    )
    evaluate.add_argument(
        "--code-samples", type=arguments.positive, metavar="N", help="humaneval: programs a problem (default 1)"
    )
    evaluate.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="where the numbers go")

    generate = verb(
        "generate",
        verbs.generate,
        "let a model write",
        "Let a model go on from a prompt; a chat model gets it as the user's message.",
        "graftlm generate runs/demo/model 'Write a Python function that reverses a list.'",
        "graftlm eval MODEL --perplexity FILE --out FILE.json",
    )
    generate.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    generate.add_argument("prompt", metavar="PROMPT", help="text to go on from")
    generate.add_argument(
        "--max-new-tokens", type=arguments.positive, default=128, metavar="N", help="stop after N (default 128)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token"
    )
    _dtype_argument(generate)
    _code_argument(generate)
    generate.add_argument("--no-chat", action="store_true", help="the bare prompt, without the chat template")

    report = verb(
        "report",
        verbs.report,
        "plots and report of a run",
        "Draw the plots of a run, a pruned model or a shrink, and its self-contained report.html again.",
        "graftlm report runs/demo",
        "open RUN_DIR/report.html in a browser",
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what train, prune or shrink wrote")

    demo = verb(
        "demo",
        verbs.demo,
        "a whole run on a real model, about ten minutes",
        "Train SmolLM2-135M-Instruct with APEX, and plainly as the control, on the source of Python's own library.",
        "graftlm demo --quick",
        "graftlm train CONFIG.yaml                 with your own model and text",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run folder (default runs/demo)"
    )
    demo.add_argument("--quick", action="store_true", help="a tiny random model instead: under a minute")

    compare = verb(
        "compare",
        verbs.compare,
        "several methods side by side, with intervals",
        "Run methods x seeds x learning rates on the same tokens in the same order, beside plain training with the\n"
        "same schedule, and say what differs: losses, tokens to the same loss, costs. Finished runs are kept. A file\n"
        "with prune: or shrink: compares ways of pruning at equal sizes instead.",
        "graftlm compare examples/compare_tiny.yaml --minutes 10",
        "open OUTPUT_DIR/report.html in a browser       the same command goes on where it stopped",
    )
    settings = "a YAML file, then settings that override it, e.g. seeds=[0,1] base.max_steps=200"
    compare.add_argument("settings", nargs="+", metavar="CONFIG.yaml [key=value ...]", help=settings)
    compare.add_argument("--minutes", type=arguments.positive_number, metavar="M", help="run what fits into M minutes")
    compare.add_argument("--dry-run", action="store_true", help="only list the runs, finished and open")

    pilot = verb(
        "pilot",
        verbs.pilot,
        "does it pay for this model and data?",
        "Train short runs in pairs, the method and plain training with the same schedule, until the difference is\n"
        "clear or 5% of the run's tokens are spent: APEX pays, does not, or undecided, with an interval. A gain is\n"
        "checked against plain training at 1.5 times the rate. For runs of 1,875 steps or more, or fewer\n"
        "with a larger --share.",
        "graftlm pilot examples/cpt_tiny.yaml max_steps=2000",
        "graftlm train CONFIG.yaml                 the same arguments",
    )
    _config_arguments(pilot, "the run folder; the pilot's own is O-pilot")
    pilot.add_argument(
        "--minimum-effect",
        type=arguments.not_negative,
        metavar="NATS",
        help="a gain in held-out loss below this does not pay (default 0.002)",
    )
    pilot.add_argument(
        "--share", type=arguments.share, metavar="S", help="of the run's tokens, for all pairs (default 0.05)"
    )
    pilot.add_argument("--pairs", type=arguments.positive, metavar="N", help="at most N pairs, at least 3 (default 5)")

    verb(
        "env",
        verbs.env,
        "versions and hardware",
        "Print the versions and the hardware that a run would record: what a bug report needs.",
        "graftlm env",
        "graftlm demo --quick",
    )
    pruning.add_verbs(verb, MODEL_HELP)
    return parser


def _dtype_argument(parser: argparse.ArgumentParser) -> None:
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=kinds, default="float32", help="the weights' (default float32)")


def _code_argument(parser: argparse.ArgumentParser) -> None:
    said = "let code run that comes with the model (default: no)"
    parser.add_argument("--trust-remote-code", action="store_true", help=said)


def _config_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """What a run's config comes from; `output`: what the verb does with the run folder that it names."""
    settings = "a YAML config (optional with --model and --data), then settings that override it"
    parser.add_argument("settings", nargs="*", metavar="[CONFIG.yaml] [key=value ...]", help=settings)
    parser.add_argument("--model", metavar="M", help=MODEL_HELP)
    parser.add_argument("--data", metavar="D", help="a file, a folder, or hub:OWNER/NAME")
    parser.add_argument("--output-dir", metavar="O", help=output)


if __name__ == "__main__":
    sys.exit(main())
