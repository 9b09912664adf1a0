"""`graftlm eval`: open a model once, measure all that was asked for, write one JSON."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from graftlm.content import file_sha256
from graftlm.errors import UserError
from graftlm.evaluation.evaluate import SEED, evaluate_tasks, prepare_multiple_choice
from graftlm.evaluation.humaneval import check_humaneval, evaluate_humaneval
from graftlm.evaluation.perplexity import evaluate_perplexity
from graftlm.evaluation.request_cache import RequestCache
from graftlm.evaluation.task_lists import CODE_SAMPLES, HUMANEVAL
from graftlm.evaluation.tasks import PreparedTasks, parse_tasks, prepare_tasks
from graftlm.files import check_file, locked, plain_disk_errors, write_json
from graftlm.models import load_model, load_tokenizer, to_gpu
from graftlm.training.data.cache import tokenizer_fingerprint


def run_evaluation(
    model_name: str,
    out: str | Path,
    *,
    tasks: Iterable[str] = (),
    multiple_choice: Sequence[str | Path] = (),
    perplexity: Sequence[str | Path] = (),
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    seed: int = SEED,
    log_samples: bool = False,
    allow_code_execution: bool = False,
    code_samples: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate the model `model_name` on `tasks` (names of the harness, lists of papers, humaneval), on files of
    multiple-choice questions and on texts; write what was found to `out` (JSON) and return it.

    Everything is checked before the model is loaded. Answers are kept in `OUT.answers.jsonl` while they come, and
    dropped when `out` is written: the same command goes on where it was killed. `limit`: questions a task, documents a
    text. `code_samples`: programs a HumanEval problem (None: 1; 20 for paper-it). Other arguments, and the parts
    `results`, `subtasks`, `data`, `notes`, `samples`: as in `evaluate_tasks`; results of files are called
    `multiple_choice:FILE` and `perplexity:FILE`. Also: model, model_fingerprint, dtype, lm_eval, graftlm, date, limit,
    seed, batch_size, max_length, seconds.
    Raises UserError for anything that is missing, wrong or not allowed.
    """
    tasks, out = list(tasks), Path(out)
    check_file(out)
    if not (tasks or multiple_choice or perplexity):
        raise UserError("eval: nothing to measure; give --tasks, --multiple-choice or --perplexity")
    for file in (*multiple_choice, *perplexity):
        if not Path(file).expanduser().is_file():
            raise UserError(f"{file}: no such file; check the path")
    asked = parse_tasks(tasks) if tasks else []
    code = any(one.name == HUMANEVAL for one in asked)
    if code:
        check_humaneval(allow_code_execution)
        code_samples = code_samples or max(CODE_SAMPLES.get(name, 1) for name in tasks)
    asked = [one for one in asked if one.name != HUMANEVAL]
    prepared: list[PreparedTasks] = []
    if asked:
        beside = f"{HUMANEVAL} --code-samples {code_samples}" if code else ""
        prepared.append(prepare_tasks(asked, data_dir=data_dir, limit=limit, seed=seed, beside=beside))
    for file in multiple_choice:
        prepared.append(prepare_multiple_choice(file, f"multiple_choice:{file}", limit=limit, seed=seed))

    tokenizer = load_tokenizer(model_name, trust_remote_code=trust_remote_code)
    model = load_model(model_name, dtype=dtype, trust_remote_code=trust_remote_code)
    to_gpu(model)
    key = {
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "config": _settings_fingerprint(model),
        "max_length": max_length,
        "batch_size": batch_size,
        "device": model.device.type,
        "seed": seed,
        "packages": {name: importlib.metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
    }
    began = time.monotonic()
    with _alone(out):
        answers = RequestCache(out.with_name(out.name + ".answers.jsonl"), key)
        shared: dict[str, Any] = {
            "batch_size": batch_size,
            "max_length": max_length,
            "answers": answers,
            "progress": progress,
        }
        report: dict[str, Any] = {"results": {}, "subtasks": {}, "data": {}, "notes": {}}
        for part in prepared:
            _add(report, evaluate_tasks(model, tokenizer, part, seed=seed, log_samples=log_samples, **shared))
        if code:
            settings = {"samples": code_samples, "limit": limit, "seed": seed, "log_samples": log_samples}
            _add(report, evaluate_humaneval(model, tokenizer, **settings, **shared))  # type: ignore[arg-type]
        for file in perplexity:
            numbers = evaluate_perplexity(model, tokenizer, file, limit=limit, **shared)
            kept = ("token_perplexity", "word_perplexity", "loss", "tokens", "words", "max_length")
            result = {name: numbers[name] for name in kept} | {"n": numbers["documents"], "main_metric": "loss"}
            _add(report, {"results": {f"perplexity:{file}": result}})
        for file in (*multiple_choice, *perplexity):
            kind = "multiple_choice" if file in multiple_choice else "perplexity"
            report["data"][f"{kind}:{file}"] = {Path(file).name: file_sha256(Path(file).expanduser())}
        result = {
            **report,
            "model": model_name,
            "model_fingerprint": key["model"],
            "dtype": dtype,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "graftlm": importlib.metadata.version("graftlm"),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "limit": limit,
            "seed": seed,
            "batch_size": batch_size,
            "max_length": max_length,
            "seconds": round(time.monotonic() - began, 1),
        }
        write_json(out, result)
        answers.remove()
    return result


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse to measure beside another process that writes `out`: their answers would be mixed."""
    name = f".{out.name}.lock"
    with plain_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent, name, busy=f"another evaluation is writing {out.name}; wait, or give another --out"):
        try:
            yield
        finally:
            (out.parent / name).unlink(missing_ok=True)


def _settings_fingerprint(model: PreTrainedModel) -> str:
    """Of what beside its weights a model's answers depend on: its config, and that of its generation."""
    generation = model.generation_config
    told = {**model.config.to_dict(), "generation": generation.to_dict() if generation is not None else None}
    told.pop("_name_or_path", None)  # where it lies
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def model_fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the names, dtypes, shapes and bits of the weights: 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _add(report: dict[str, Any], part: dict[str, Any]) -> None:
    for name, values in part.items():
        report.setdefault(name, {}).update(values)
