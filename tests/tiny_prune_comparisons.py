"""Small comparisons of ways of pruning."""

import io
from pathlib import Path

import yaml
from rich.console import Console
from tiny_runs import words, write_texts

from graftlm.comparing.pruning.cells import PruneCells
from graftlm.comparing.pruning.config import PruneComparison, load_prune_comparison
from graftlm.comparing.results import Results


def write_comparison(folder: Path, **changes) -> Path:
    """compare.yaml of a tiny model in `folder`; `changes` are top-level keys, None leaves one out."""
    folder.mkdir(exist_ok=True)
    (folder / "held_out.txt").write_text(words(60, 7), encoding="utf-8")
    content = {
        "model": "tiny-llama",
        "data": str(write_texts(folder / "text.jsonl")),
        "perplexity": str(folder / "held_out.txt"),
        "max_length": 64,
        "prune": {"samples": 4, "sample_length": 32, "iterations": 2},
        "variants": {"adapt": {"method": "adapt"}, "uniform": {"method": "llm-pruner"}},
        "sparsities": [0.4],
        "seeds": [0],
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def opened(path: Path, *overrides: str) -> tuple[PruneComparison, PruneCells]:
    comparison = load_prune_comparison(path, overrides)
    return comparison, PruneCells(comparison, Results(comparison.results_path))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)
