"""Which verb a config file is for, where it is given to another one."""

from typing import Any, get_type_hints

from yaml.nodes import MappingNode, ScalarNode

from graftlm.errors import UserError
from graftlm.pruning.settings import PruneSettings
from graftlm.training.config import RunConfig
from graftlm.yaml_nodes import place

VERBS = {"RunConfig": "train", "CompareConfig": "compare", "PruneCompareConfig": "compare", "ShrinkConfig": "shrink"}
"""By the class that a verb reads a file as."""
OWN_KEYS = {
    "compare": ("base", "variants", "sparsities", "perplexity"),
    "shrink": ("interleaves", "recovery", "shares", "schedule", "keep_moments", "target_parameters", "sparsity"),
}
"""Keys that tell a verb's files; the rest are runs'."""

SECTIONS: dict[str, dict[str, type[Any]]] = {"ShrinkConfig": {"train": RunConfig, "prune": PruneSettings}}
"""By class, the keys under which the settings of another class stand."""


def section_of(key: str) -> str:
    """The section that a dotted key lies in; empty for none."""
    first = key.partition(".")[0]
    return first if any(first in sections for sections in SECTIONS.values()) else ""


def check_verb(root: MappingNode, kind: type[Any]) -> None:
    """Raise UserError where `root`, a file that is to be read as `kind`, is another verb's: its keys would be told as
    misspelt, one by one."""
    own, known = VERBS.get(kind.__name__), get_type_hints(kind)
    names = {name.value: name for name, _ in root.value if isinstance(name, ScalarNode)}
    strange = [key for key in names if key not in known]
    verb = next((verb for verb, keys in OWN_KEYS.items() if names.keys() & set(keys)), "train")
    theirs = OWN_KEYS.get(verb) or tuple(get_type_hints(RunConfig))
    telling = next((key for key in (*strange, *names) if key in theirs), None)
    if own not in (None, verb) and strange and telling is not None:
        raise UserError(
            f"{place(names[telling])}{telling}: this is a file for `graftlm {verb}`, not for `graftlm {own}`; use that "
            "verb"
        )
