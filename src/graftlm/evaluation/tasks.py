"""From the names on a command line to tasks of the harness, with their data at hand and their questions chosen."""

import contextlib
import dataclasses
import difflib
import functools
import heapq
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.tasks
import numpy as np
import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import set_torch_seed

from graftlm.errors import UserError
from graftlm.evaluation.harness import quiet_harness
from graftlm.evaluation.local_data import LocalData, MissingData, find_format, read_local
from graftlm.evaluation.task_lists import ALIASES, FOLDERS, HUMANEVAL, LISTS

SUBTASK_QUESTIONS = 2
"""A limit leaves every task of a group this many questions: of one, the harness gives no standard error."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One task as it was asked for."""

    name: str
    """As on the command line: the key of its result."""
    task: str
    """The harness's name."""
    shots: int | None
    """Examples in the prompt; None: what the harness's own definition says."""


@dataclasses.dataclass(frozen=True)
class PreparedTasks:
    """Tasks whose data has been read: nothing but the model is missing."""

    built: dict[str, list[Task | Group]]
    """By the name asked for: a task, a group, or the several tasks of one of the harness's tags."""
    chosen: dict[str, list[int]]
    """The questions to be asked, by leaf task: indices into its split, ascending. A task that is not here: all."""
    local: dict[str, LocalData] = dataclasses.field(default_factory=dict)
    """By leaf task; those that are not here come from the Hub."""
    notes: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """By task: what somebody who reads the numbers must know."""


def parse_tasks(names: Iterable[str]) -> list[Asked]:
    """What `arc_easy`, `arc_challenge:25` (25 shots) or a list's name (`paper-cpt`) ask for, each once.

    Raises UserError for shots that are no number and a task that is asked for with two of them.
    """
    asked: dict[str, Asked] = {}
    for word in (word for name in names for word in LISTS.get(name, [name])):
        name, colon, shots = word.partition(":")
        if colon and not shots.isdecimal():
            raise UserError(f"tasks: {word}: {shots!r} is no number of shots; write NAME:SHOTS, e.g. arc_challenge:25")
        new = Asked(name, ALIASES.get(name, name), int(shots) if colon else None)
        if asked.setdefault(name, new) != new:
            raise UserError(f"tasks: {name}: asked for with {_shots(asked[name])} and with {_shots(new)}; choose one")
    if not asked:
        raise UserError("tasks: none named; e.g. arc_easy,piqa")
    return list(asked.values())


def prepare_tasks(
    asked: list[Asked],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 1234,
    beside: str = "",
) -> PreparedTasks:
    """Read the data of every task, from `data_dir` where its files are known and from the Hub otherwise.

    `limit`: questions a task (of a group: in all, shared among its tasks by size, at least two each), chosen by
    `choose_questions`. `beside`: what else stands in --tasks (humaneval), to be named with the tasks whose data is
    there. Raises UserError for an unknown name and data that is wrong, MissingData for data that is missing and a Hub
    out of reach; it names all tasks without data, and the --tasks that would run.
    """
    manager, stock = stock_manager([one.task for one in asked])
    index = manager.task_index
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UserError(f"data_dir: {data_dir}: no such folder")
    local: dict[str, LocalData] = {}
    built: dict[str, list[Task | Group]] = {}
    owners: dict[str, Asked] = {}
    missing: dict[str, MissingData] = {}
    for one in asked:
        for leaf in leaves(stock, one.task):
            if owners.setdefault(leaf, one) != one:
                raise UserError(f"tasks: {leaf} is part of {owners[leaf].name} and of {one.name}; name one of the two")
    with tempfile.TemporaryDirectory(prefix="graftlm-tasks-") as folder:
        for one in asked:
            try:
                for leaf in leaves(stock, one.task):
                    path = write_task(Path(folder), leaf, stock[leaf], shots=one.shots, data_dir=data_dir, local=local)
                    index[leaf] = dataclasses.replace(index[leaf], yaml_path=path)
            except MissingData as error:
                missing[one.name] = error
        with contextlib.ExitStack() as offline:
            for one in (one for one in asked if one.name not in missing):
                from_hub = [leaf for leaf in leaves(stock, one.task) if leaf not in local]
                try:
                    seed_harness(seed)  # some tasks shuffle their choices as they are loaded
                    built[one.name] = _load(manager, one, from_hub)
                except MissingData as error:
                    missing[one.name] = error
                    if isinstance(error.__cause__, ConnectionError):
                        offline.enter_context(_cache_only())  # each further try would take half a minute
    if missing:
        raise MissingData(_what_is_missing(asked, missing, beside)) from next(iter(missing.values()))
    chosen: dict[str, list[int]] = {}
    notes = {name: list(data.notes) for name, data in local.items() if data.notes}
    if limit is not None:
        for member in (member for members in built.values() for member in members):
            sizes = {task.task_name: len(task.eval_docs) for task in leaf_tasks([member])}
            some = choose_questions(sizes, limit, seed)
            if (count := sum(map(len, some.values()))) > limit:
                note = f"{count} questions, not {limit}: {SUBTASK_QUESTIONS} at least of each of its {len(sizes)} tasks"
                notes.setdefault(member.name if isinstance(member, Group) else member.task_name, []).append(note)
            chosen |= some
    return PreparedTasks(built, chosen, local, notes)


def seed_harness(seed: int) -> None:
    """The state of the random generators that the harness starts from."""
    random.seed(0)  # its own number, whatever the seed
    np.random.seed(seed)
    set_torch_seed(seed)


def choose_questions(sizes: Mapping[str, int], limit: int, seed: int) -> dict[str, list[int]]:
    """`limit` questions of one task, or of the tasks of one group together: indices by task, ascending.

    They depend on the seed, the task's name and the number of its questions alone, so every model gets the same ones,
    and those of a smaller limit are among those of a larger. The harness would take the first, but files are sorted:
    by subject, by source, by label. A group's tasks get shares by size (Webster's method, for a larger limit never
    gives a task fewer), at least two each.
    """
    if limit >= sum(sizes.values()):
        return {}  # all of them
    least = 1 if len(sizes) == 1 else SUBTASK_QUESTIONS
    shares = {name: min(least, size) for name, size in sizes.items()}

    def turn(name: str) -> tuple[float, str]:
        """Whose turn is lowest gets the next question."""
        return -sizes[name] / (2 * shares[name] + 1), name

    waiting = [turn(name) for name in sizes if shares[name] < sizes[name]]
    heapq.heapify(waiting)
    for _ in range(limit - sum(shares.values())):
        _, name = heapq.heappop(waiting)
        shares[name] += 1
        if shares[name] < sizes[name]:
            heapq.heappush(waiting, turn(name))
    chosen = {}
    for name, size in sizes.items():
        order = list(range(size))
        random.Random(f"{seed}/{name}").shuffle(order)
        chosen[name] = sorted(order[: shares[name]])
    return chosen


def leaves(index: Mapping[str, Any], name: str) -> list[str]:
    """The tasks that a name of the harness stands for: itself, or those of a group or tag, in the harness's order."""
    entry = index[name]
    if entry.kind.name == "TAG":
        members: Iterable[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        members = _members(entry.cfg)
    else:
        return [name]
    return list(dict.fromkeys(leaf for member in members if member in index for leaf in leaves(index, member)))


def _members(member: Any) -> list[str]:
    """The names in a group's `task`: names, settings of a known task or group, or groups defined on the spot."""
    if isinstance(member, str):
        return [member]
    inside = member["task"] if "task" in member else member["group"]
    return [name for one in (inside if isinstance(inside, list) else [inside]) for name in _members(one)]


def write_task(
    folder: Path,
    name: str,
    entry: Any,
    *,
    shots: int | None = None,
    data_dir: str | Path | None = None,
    local: dict[str, LocalData] | None = None,
) -> Path | None:
    """Write a YAML that includes the stock task `entry` and sets its shots and, from `data_dir`, its data set.

    Such a folder also serves the harness's own command line (`lm_eval run --include_path FOLDER`). What was read is
    added to `local`. Returns the file; or the stock one, where nothing is to be changed.
    """
    config = dict(entry.cfg or {})
    pinned = config.get("num_fewshot") == 0  # as the harness itself: a task whose definition says 0 keeps 0
    shots = None if pinned else shots
    form = find_format(name, config) if data_dir is not None else None
    if shots is None and form is None:
        return entry.yaml_path
    if "class" in config:
        raise UserError(f"{name}: is written in Python, and its number of shots cannot be set; leave out :{shots}")
    text = {"include": str(entry.yaml_path), "task": name, "tag": None}
    if shots is not None:
        text["num_fewshot"] = shots  # type: ignore[assignment]
    tail = ""
    if form is not None and data_dir is not None:
        needed = _examples_needed(config, shots)
        dataset = {"dataset_path": config["dataset_path"], "dataset_name": config.get("dataset_name")}
        data = read_local(name, dataset, data_dir, needed)
        if local is not None:
            local[name] = data
        place = {"graftlm_task": name, "graftlm_dir": str(Path(data_dir).resolve()), "graftlm_shots": needed}
        text["dataset_kwargs"] = place | {"dataset": dataset}  # type: ignore[assignment]
        tail = f"custom_dataset: !function {read_local.__module__}.read_splits\n"
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(text, sort_keys=False) + tail, encoding="utf-8")
    return path


def stock_manager(names: Iterable[str]) -> tuple[TaskManager, dict[str, Any]]:
    """The harness's manager of its own tasks, knowing at least `names`, and its index as it is.

    Raises UserError for a name that the harness does not know, with the nearest that it does.
    """
    names = list(names)
    root = Path(lm_eval.tasks.__file__).parent
    manager, stock = _read_index(tuple(sorted({folder for name in names if (folder := _guess_folder(root, name))})))
    if any(name not in stock for name in names):
        manager, stock = _read_index(())
    for name in names:
        if name not in stock:
            near = difflib.get_close_matches(name, [*stock, *ALIASES, *LISTS, HUMANEVAL], n=3, cutoff=0.5)
            hint = f"; the nearest: {', '.join(near)}" if near else ""
            raise UserError(f"tasks: {name}: no such task in lm-evaluation-harness{hint}")
    manager.task_index.clear()  # an earlier call may have put its own files there
    manager.task_index.update(stock)
    return manager, stock


@functools.cache
def _read_index(folders: tuple[Path, ...]) -> tuple[TaskManager, dict[str, Any]]:
    """The harness's index of the tasks in `folders`, or of all its 14,000, which takes long; and a copy of it."""
    with quiet_harness():
        manager = TaskManager(include_path=list(folders), include_defaults=False) if folders else TaskManager()
    return manager, dict(manager.task_index)


def _guess_folder(root: Path, name: str) -> Path | None:
    """Where the harness is likely to define `name`: the folder it is called after, with or without its last words."""
    words = FOLDERS.get(name, name).split("_")
    folders = ("_".join(words[:count]) for count in range(len(words), 0, -1))
    return next((root / folder for folder in folders if (root / folder).is_dir()), None)


def _examples_needed(config: Mapping[str, Any], shots: int | None) -> int:
    """Rows of the example file that a prompt needs: none where the task's definition carries its examples."""
    fewshot = config.get("fewshot_config") or {}
    wanted = shots if shots is not None else config.get("num_fewshot") or 0
    if not wanted or "samples" in fewshot:
        return 0
    # The harness's rule: where this holds it draws one more, and drops the question itself if it is among them.
    spare = fewshot.get("split", config.get("fewshot_split")) == config.get("test_split")
    return wanted + (spare and fewshot.get("sampler") != "first_n")


def _load(manager: TaskManager, one: Asked, from_hub: list[str]) -> list[Task | Group]:
    try:
        with quiet_harness():
            loaded = manager.load([one.task])
    except UserError:
        raise
    except Exception as error:
        kind = MissingData if from_hub else UserError
        raise kind(_why_not(manager, one, from_hub, error)) from error
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    for task in tasks.values() if one.shots is not None else ():
        if task.get_config("num_fewshot") != 0:  # the harness's rule; and a group may set its tasks' shots itself
            task.set_config("num_fewshot", one.shots)
    return [groups[one.task]] if one.task in groups else list(tasks.values())


def _why_not(manager: TaskManager, one: Asked, from_hub: list[str], error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not from_hub:
        return f"{one.name}: cannot be made ready: {type(error).__name__}: {first}"
    config = dict(manager.task_index[from_hub[0]].cfg or {})
    todo = "check the network (HF_HUB_OFFLINE?), or leave it out"
    if (form := find_format(from_hub[0], config)) is not None:
        todo += f"; or give --data-dir DIR with {form.folders[0]}/{form.questions}"
    return f"{one.name}: no data from the Hugging Face Hub for {config.get('dataset_path')} ({first}); {todo}"


def _what_is_missing(asked: list[Asked], missing: Mapping[str, MissingData], beside: str) -> str:
    """In one line: why the first has no data, which others have none, and what to type for the rest."""
    first, *others = (one.name for one in asked if one.name in missing)
    there = [one.name + (f":{one.shots}" if one.shots is not None else "") for one in asked if one.name not in missing]
    text = str(missing[first])
    if others:
        text += f"; no data either for {', '.join(others)}"
    if there:
        text += f"; the others can be run: --tasks {','.join([*there, *([beside] if beside else [])])}"
    return text


@contextlib.contextmanager
def _cache_only() -> Iterator[None]:
    """The Hub's libraries take what they have kept, and do not try the network."""
    places: list[Any] = [huggingface_hub.constants, datasets.config]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _shots(one: Asked) -> str:
    return "its own shots" if one.shots is None else f"{one.shots} shots"


def leaf_tasks(members: Iterable[Task | Group]) -> list[Task]:
    """The tasks themselves, and those of the groups."""
    return [task for one in members for task in (one.get_all_tasks() if isinstance(one, Group) else [one])]
