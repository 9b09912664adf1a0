"""What a user should know of a pruning that its method does not say: settings without effect, a class of one's own."""

from collections.abc import Sequence
from dataclasses import fields

from graftlm.anatomy import is_per_layer
from graftlm.pruning.base import Pruned
from graftlm.pruning.settings import DEFAULTS, PRESETS, PruneSettings
from graftlm.pruning.shapes import head_dim_of, names_head_dim
from graftlm.pruning.ways import WAYS, is_uniform, layers_differ


def notes_on(pruned: Pruned, of_data: Sequence[str] = ()) -> tuple[str, ...]:
    """Of what came out, beside what its method says; first what is known of the data (TextCalibration.notes)."""
    model, notes = pruned.model, [*of_data, *pruned.notes]
    shape = pruned.shapes[0] if len(set(pruned.shapes)) == 1 else None
    if shape is not None and not shape.output_biases and is_per_layer(model.config):
        config = model.config.get_text_config()
        notes.append(
            f"all layers are alike, but transformers has no {type(config).__mro__[2].__name__} of "
            f"{shape.num_attention_heads} heads, {shape.num_key_value_heads} key-value groups, "
            f"{shape.intermediate_size} channels and a hidden size of {config.hidden_size}, so the model has a class "
            "of its own; a sparsity that leaves another number of heads gives a stock checkpoint"
        )
    if shape is not None and not is_per_layer(model.config) and not names_head_dim(model.config):
        heads, width, hidden = shape.num_attention_heads, head_dim_of(model), model.config.hidden_size
        if heads * width != hidden:
            notes.append(
                f"{heads} heads of {width} are not the hidden size {hidden}: transformers reads the head_dim in "
                f"config.json, and other programs may take {hidden} / {heads} in its place (vLLM's own class for qwen2 "
                "does, its Transformers backend does not); graftlm export --format padded gives a model that all read "
                "alike"
            )
    if is_uniform(pruned.settings) and pruned.settings.exact and shape is None:
        notes.append("the layers that it was given differ: what had less than the others keeps all it had")
    if without := unused(pruned.settings):
        notes.append(f"without effect on {pruned.settings.method}: {', '.join(without)}")
    return tuple(notes)


def unused(settings: PruneSettings) -> list[str]:
    """Settings that were given and that the method does not read; what only a preset says is not given."""
    by_layer = (settings.method,) if layers_differ(settings) else ()
    readers = {
        **dict.fromkeys(("amplitude", "rule"), by_layer),
        "similarity": (*by_layer, "shortgpt"),
        **dict.fromkeys(
            ("uniform", "min_groups", "min_channels"), tuple(name for name, way in WAYS.items() if way.components)
        ),
        **{one.name: ("flap",) for one in fields(settings) if one.name.startswith("flap_")},
        **{one.name: ("sheared",) for one in fields(settings) if one.name.startswith("sheared_")},
    }
    plain = {one.name: one.default for one in fields(settings)} | DEFAULTS
    preset = PRESETS.get(settings.preset or "", {})
    return [
        name
        for name, methods in readers.items()
        if settings.method not in methods and getattr(settings, name) not in (None, plain[name], preset.get(name))
    ]
