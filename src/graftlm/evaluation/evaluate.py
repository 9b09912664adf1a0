"""Accuracy and the like: tasks of lm-evaluation-harness, by its own evaluator, on a model in memory."""

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partialmethod
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from tqdm.std import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.evaluation import rows
from graftlm.evaluation.harness import HarnessModel, harness_model, quiet_harness
from graftlm.evaluation.local_data import read_table
from graftlm.evaluation.request_cache import RequestCache
from graftlm.evaluation.tasks import (
    PreparedTasks,
    choose_questions,
    leaf_tasks,
    parse_tasks,
    prepare_tasks,
    seed_harness,
)

SEED = 1234
"""The harness's own default for examples in prompts."""


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str] | PreparedTasks,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    seed: int = SEED,
    log_samples: bool = False,
    answers: RequestCache | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate `model` on tasks as `lm_eval` does: same prompts, shots, metrics and, by default, same numbers.

    `tasks`: names of the harness (`arc_easy`; `arc_challenge:25` with 25 shots), lists (`paper-it`, `paper-cpt`,
    `adapt`), or what `prepare_tasks` made of them (then `data_dir`, `limit` are its). `data_dir`: a folder with the
    tasks' files (docs/evaluation.md); None: the Hub. `limit`: questions a task, chosen by `seed` as
    `tasks.choose_questions` says. `batch_size`: sequences a pass; `max_length`: tokens of context (None: the model's).
    `seed`: of that choice, of the shots and of sampling. `answers`: where to look for and keep the model's answers.

    Returns JSON values: `results`, by the name asked for, with each metric (`acc`; `exact_match:strict-match` where a
    task reads answers in several ways), `METRIC_stderr` (None: there is none), `n` (questions), `shots`, `version` (of
    the task's definition), `main_metric`; `subtasks`, the same for the tasks of groups; `data`, where the questions
    came from; `notes`; and with `log_samples` `samples`: by leaf task, each question's metrics, answers and id.
    Raises UserError for unknown names, data that is missing or wrong, a model that gives NaN.
    """
    if not isinstance(tasks, PreparedTasks):
        tasks = prepare_tasks(parse_tasks(tasks), data_dir=data_dir, limit=limit, seed=seed)
    with harness_model(
        model, tokenizer, max_length=max_length, batch_size=batch_size, progress=progress, answers=answers
    ) as lm:
        found = run_harness(lm, tasks.built, tasks.chosen, seed)
        cut = {name: notes for name in lm.asked if name is not None and (notes := lm.notes_on_cut(name))}
    report = _report(found, tasks.built, log_samples)
    report["data"] = {
        task.task_name: tasks.local[task.task_name].files if task.task_name in tasks.local else _hub(task)
        for members in tasks.built.values()
        for task in leaf_tasks(members)
    }
    report["notes"] = {
        name: [*tasks.notes.get(name, []), *cut.get(name, [])] for name in dict.fromkeys([*tasks.notes, *cut])
    }
    return report


def multiple_choice_task(path: str | Path, name: str) -> ConfigurableTask:
    """Anyone's own questions as a task of the harness, called `name`.

    `path`: jsonl with `question`, `choices` (texts), `answer` (index) and, if there is one, `passage`. The prompt is
    `{passage}` and a new line if there is one, then `Question: {question}`, a new line and `Answer:`; each choice is
    scored as ` {choice}`. Metrics: acc (likeliest choice), acc_norm (likeliest by character).
    Raises UserError (file:line) for a row without these fields.
    """
    table = Dataset.from_list(read_table(Path(path), rows.user_choice))
    with quiet_harness():
        return ConfigurableTask(
            config={
                "task": name,
                "custom_dataset": lambda **_: {"test": table},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": _prompt,
                "doc_to_target": "answer",
                "doc_to_choice": "choices",
                "metric_list": [
                    {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                    for metric in ("acc", "acc_norm")
                ],
                "metadata": {"version": 1.0},
            }
        )


def prepare_multiple_choice(
    path: str | Path, name: str, *, limit: int | None = None, seed: int = SEED
) -> PreparedTasks:
    """`multiple_choice_task` ready for `evaluate_tasks`."""
    task = multiple_choice_task(path, name)
    chosen = {} if limit is None else choose_questions({name: len(task.eval_docs)}, limit, seed)
    return PreparedTasks({name: [task]}, chosen)


def run_harness(
    lm: HarnessModel, built: Mapping[str, list[Task | Group]], chosen: dict[str, list[int]], seed: int
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` does with tasks that are loaded, without its bars, its printing and its calls of
    other programs to describe the machine."""
    members = [member for several in built.values() for member in several]
    tasks = {task.task_name: task for task in leaf_tasks(members)}
    groups = {group.name: group for one in members if isinstance(one, Group) for group in (one, *one.get_all_groups())}
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"{task.task_name}: runs generated programs uncontained; the task humaneval contains them")
        writes = task.OUTPUT_TYPE == "generate_until"
        told = task.get_config("generation_kwargs") or {}
        longest = told.get("max_gen_toks", lm.max_gen_toks) if writes else 0
        if longest >= lm.max_length:
            raise UserError(
                f"{task.task_name}: writes up to {longest} tokens, and the context has {lm.max_length}; leave it out"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    seed_harness(seed)
    with _silent_harness():
        found = lm_eval.evaluate(lm=lm, task_dict={"tasks": tasks, "groups": groups}, samples=chosen or None)
    assert found is not None
    return dict(found)


def _prompt(row: Mapping[str, Any]) -> str:
    passage = f"{row['passage']}\n" if row["passage"] else ""
    return f"{passage}Question: {row['question']}\nAnswer:"


def _report(found: dict[str, Any], built: Mapping[str, list[Task | Group]], log_samples: bool) -> dict[str, Any]:
    results: dict[str, Any] = {}
    subtasks: dict[str, Any] = {}
    for name, members in built.items():
        for member in members:
            if isinstance(member, Group):
                results[name] = _numbers(found, member)
                inside = [*member.get_all_groups(), *member.get_all_tasks()]
                subtasks[name] = {_name(one): _numbers(found, one) for one in inside}
            else:
                results[name if len(members) == 1 else member.task_name] = _numbers(found, member)
    report: dict[str, Any] = {"results": results, "subtasks": subtasks}
    if log_samples:
        report["samples"] = {name: _outcomes(samples) for name, samples in found["samples"].items()}
    return report


def _name(one: Task | Group) -> str:
    return one.name if isinstance(one, Group) else one.task_name


def _numbers(found: dict[str, Any], one: Task | Group) -> dict[str, Any]:
    """The harness's numbers of a task or group, under plain names."""
    name = _name(one)
    metrics = found["results"].get(name, {})
    plain: dict[str, Any] = {}
    for key, label in _labels(key for key in metrics if "," in key and "_stderr," not in key).items():
        metric, _, filter_ = key.partition(",")
        plain[label] = _number(metrics[key])
        plain[f"{label}_stderr"] = _number(metrics.get(f"{metric}_stderr,{filter_}"))
    higher = found["higher_is_better"].get(name, {})
    names = [label for label in plain if not label.endswith("_stderr")]
    first = next((label for label in names if higher.get(label.partition(":")[0])), next(iter(names), None))
    shots = {task.config.num_fewshot for task in leaf_tasks([one])}
    return plain | {
        "n": metrics.get("sample_len"),
        "shots": shots.pop() if len(shots) == 1 else None,
        "version": found["versions"].get(name),
        "main_metric": first,
    }


def _labels(keys: Iterable[str]) -> dict[str, str]:
    """`acc,none` is acc; where a task reads the answers in several ways, the metric is named after each."""
    keys = list(keys)
    metrics = [key.partition(",")[0] for key in keys]
    return {
        key: metric if metrics.count(metric) == 1 else key.replace(",", ":", 1)
        for key, metric in zip(keys, metrics, strict=True)
    }


def _number(value: Any) -> float | None:
    """As JSON: "N/A", infinite and not-a-number are None."""
    return float(value) if not isinstance(value, str | None) and math.isfinite(value) else None


def _outcomes(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each question came to, in the order of the data: its index, metrics and the model's answers."""
    keys = {
        (metric, sample["filter"]): f"{metric},{sample['filter']}" for sample in samples for metric in sample["metrics"]
    }
    labels = _labels(keys.values())
    outcomes: dict[int, dict[str, Any]] = {}
    for sample in samples:
        one = outcomes.setdefault(sample["doc_id"], {"id": sample["doc_id"], "hash": sample["doc_hash"]})
        for metric in sample["metrics"]:
            one[labels[keys[metric, sample["filter"]]]] = _plain(sample[metric])
        one["answers"] = [_plain(answer) for several in sample["resps"] for answer in several]
    return [outcomes[index] for index in sorted(outcomes)]


def _plain(value: Any) -> Any:
    """Numbers of NumPy and tuples as JSON has them."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def _hub(task: Task) -> dict[str, Any]:
    config = task.config
    return {"hub": config.dataset_path, "name": config.dataset_name} if config.dataset_path else {}


@contextlib.contextmanager
def _silent_harness() -> Iterator[None]:
    """No bars but ours, which say themselves that they are to be drawn, and no remarks on standard output."""
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)  # type: ignore[method-assign, assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original  # type: ignore[method-assign]
