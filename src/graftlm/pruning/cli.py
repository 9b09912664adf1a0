"""Pruning's verbs of the command line (graftlm.cli)."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from graftlm.arguments import not_negative, parameters, positive, share, whole
from graftlm.export import verb as exporting
from graftlm.pruning import verbs
from graftlm.pruning.settings import METHODS, PRESETS, HeadsBy, Rule, Similarity
from graftlm.pruning.shrink import verb as shrinking

Verb = Callable[..., Any]
"""Of graftlm.cli: name, function, summary, what it does, example, what to do then -> the verb's parser."""


def add_verbs(verb: Verb, model_help: str) -> None:
    """Give the command line pruning's verbs."""
    _prune(verb, model_help)
    shrinking.add_verb(verb)
    exporting.add_verb(verb, model_help)


def _prune(verb: Verb, model_help: str) -> None:
    parser = verb(
        "prune",
        verbs.prune,
        "make a model smaller",
        "Remove the heads and FFN channels that a model can best spare, from each layer as much as it can spare\n"
        "(Adapt-Pruner), or by a method that is compared with it. What comes out opens in transformers.",
        "graftlm prune smollm2 --sparsity 0.2 --data book.txt --out runs/small",
        "graftlm eval runs/small --perplexity FILE --out FILE.json",
    )
    parser.add_argument("model", metavar="MODEL", help=model_help)
    words = "any setting of docs/configuration.md#pruning, e.g. flap_compensation=false"
    parser.add_argument("settings", nargs="*", metavar="[key=value ...]", help=words)
    size = parser.add_argument_group("how much (one of the two)")
    size.add_argument(
        "--sparsity", type=share, metavar="S", help="share of the parameters of heads and channels that goes, e.g. 0.2"
    )
    size.add_argument(
        "--target-parameters",
        type=parameters,
        metavar="N",
        help="parameters that are left at most, e.g. 100M or 1.5B",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the pruned model")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE",
        help="text to measure importance on: a file, a folder, hub:OWNER/NAME, or a config (.yaml), of which its data: "
        "are taken; may be repeated (default: the demo's)",
    )
    parser.add_argument("--method", choices=METHODS, help="how (default adapt)")
    parser.add_argument(
        "--uniform",
        action=argparse.BooleanOptionalAction,
        help="every layer loses the same, which a stock class can mostly hold (default: as the method does)",
    )
    parser.add_argument(
        "--iterations", type=positive, metavar="T", help="steps (default: as the method does; adapt 50)"
    )
    parser.add_argument(
        "--heads-by", choices=get_args(HeadsBy), help="loss: rank key-value groups by the loss without each, measured"
    )
    parser.add_argument("--samples", type=positive, metavar="N", help="calibration sequences an iteration (default 10)")
    parser.add_argument(
        "--sample-length", type=positive, metavar="L", help="tokens a calibration sequence (default 64)"
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="authors-code: 512 calibration sequences; at-once: one step, 64 sequences, A = 1, heads by loss",
    )
    parser.add_argument(
        "--width-multiple", type=positive, metavar="N", help="channels of a layer are a multiple of N (GGUF Q8_0: 32)"
    )
    parser.add_argument("--min-groups", type=whole, metavar="N", help="key-value groups a layer keeps (default 1)")
    parser.add_argument("--min-channels", type=whole, metavar="N", help="channels a layer keeps (default 1)")
    parser.add_argument(
        "--amplitude",
        type=not_negative,
        metavar="A",
        help="how far layers' importance moves their sparsity (default 0.02)",
    )
    parser.add_argument("--rule", choices=get_args(Rule), help="of the layers' sparsity (default cumulative)")
    parser.add_argument(
        "--similarity", choices=get_args(Similarity), help="of a layer's input and output (default cosine)"
    )
    parser.add_argument(
        "--as-published",
        dest="exact",
        action="store_const",
        const=False,
        help="a layer keeps int(n (1 - s)), whatever the sum (slicegpt: of the hidden size, shortgpt: of the layers)",
    )
    parser.add_argument("--seed", type=whole, metavar="S", help="of the calibration sequences (default 0)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="the weights' (default float32)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
