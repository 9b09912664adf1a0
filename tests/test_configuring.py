"""YAML and key=value words to RunConfig: what is accepted, what is refused, and where each error points."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.apex_config import PRESETS, ApexConfig
from graftlm.comparing.config import load_comparison
from graftlm.comparing.pruning.config import load_prune_comparison
from graftlm.configuring import config_to_dict, dump_yaml, load_config, load_dataclass
from graftlm.errors import UserError
from graftlm.pruning.shrink.config import load_shrink
from graftlm.training.config import RunConfig, SourceConfig

BASE = "model: tiny-llama\ndata: book.txt\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(text, *overrides) reads `text` as c.yaml, so that messages start with c.yaml:LINE."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> RunConfig:
        Path("c.yaml").write_text(text, encoding="utf-8")
        return load_config(Path("c.yaml"), overrides)

    return read


@pytest.fixture
def message(load):
    """message(text, *overrides) is the text of the UserError, which must be one line."""

    def read(text: str, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read


@pytest.mark.parametrize("text", ["1e-4", "1E-4", '"1e-4"', "0.0001", "1.0e-4", "0.000_1"])
def test_floats_as_people_write_them(load, text):
    assert load(BASE + f"learning_rate: {text}").learning_rate == 1e-4
    assert load(BASE, f"learning_rate={text}").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 1_000", "max_steps", 1000),
        ("seed: 010", "seed", 10),  # YAML 1.1 would say 8
        ("eval_steps: 9007199254740993", "eval_steps", 2**53 + 1),  # not through a float
        ("learning_rate: 1", "learning_rate", 1.0),
        ("packing: no", "packing", False),
        ("packing: 'true'", "packing", True),
        ("optim: off", "optim", "off"),  # YAML 1.1 would say False
        ("attn_implementation: null", "attn_implementation", None),
        ("attn_implementation: 'null'", "attn_implementation", "null"),
        ("report_to: tensorboard", "report_to", ("tensorboard",)),
        ("report_to: [tensorboard, wandb]", "report_to", ("tensorboard", "wandb")),
        ("lr_scheduler_kwargs: {min_lr_rate: 1e-1}", "lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
        ("apex: {operator_learning_rate: auto}", "apex", ApexConfig(operator_learning_rate="auto")),
        ("apex: {operator_learning_rate: 2}", "apex", ApexConfig(operator_learning_rate=2.0)),
        ("apex:", "apex", None),
    ],
)
def test_values_are_read_by_the_type_of_their_field(load, message, line, name, value):
    if value is None and name == "apex":
        assert message(BASE + line).startswith("c.yaml:3: apex: '' must be a mapping")
        return
    read = getattr(load(BASE + line), name)
    assert read == value
    assert type(read) is type(value)


A, B = SourceConfig(path="a.txt"), SourceConfig(path="b.jsonl", limit=2)


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ("a.txt", (A,)),
        ("[a.txt]", (A,)),
        ("{path: b.jsonl, limit: 2}", (B,)),
        ("[{path: a.txt}, {path: b.jsonl, limit: 2}]", (A, B)),
        ("[a.txt, {path: b.jsonl, limit: 2}]", (A, B)),
    ],
)
def test_forms_of_data(load, data, sources):
    assert load(f"model: m\ndata: {data}").data == sources
    assert load(BASE, f"eval_data={data}").eval_data == sources


@pytest.mark.parametrize(
    ("overrides", "sources"),
    [
        (["data=a.txt"], (A,)),
        (["data=[a.txt, b.jsonl]", "data.1.limit=2"], (A, B)),
        (["data=b.jsonl", "data.0.limit=2"], (B,)),
        (["data=b.jsonl", "data.limit=2"], (B,)),
        (["data={path: b.jsonl, limit: 2}"], (B,)),
        (["data=a.txt", "data.0=b.jsonl", "data.0.limit=2"], (B,)),
        (["data=a: b #c.txt"], (SourceConfig(path="a: b #c.txt"),)),
        (['data="a: b"'], (SourceConfig(path="a: b"),)),
    ],
)
def test_overrides_reach_into_data(load, overrides, sources):
    assert load(BASE, *overrides).data == sources


def test_overrides_win_over_given_and_given_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(BASE + "apex:\n  k_heads: 0.2\n  k_channels: 0.3\noutput_dir: one\nseed: 1\n")
    config = load_config(path, ["apex.k_heads=0.1", "seed=3"], output_dir="two", seed=2, model=None)
    assert (config.apex.k_heads, config.apex.k_channels) == (0.1, 0.3)
    assert (config.output_dir, config.seed, config.model) == ("two", 3, "tiny-llama")


def test_without_a_file():
    config = load_config(None, ["apex.stages=2"], model="m", data=["a.txt", "b.txt"], apex={"k_heads": 0.25})
    assert [source.path for source in config.data] == ["a.txt", "b.txt"]
    assert config.apex == ApexConfig(stages=2, k_heads=0.25)


def test_an_anchor_shared_by_two_keys_is_overridden_for_one(load):
    config = load("model: m\ndata: &d [{path: a.txt}]\neval_data: *d", "data.0.limit=2")
    assert (config.data[0].limit, config.eval_data[0].limit) == (2, None)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(load, name):
    # One stage more, and as many rates, so that the explicit keys are seen to win in each preset.
    explicit = "stages: 4, stage_learning_rates: [4e-5, 3e-5, 2e-5, 1e-5]"
    apex = load(BASE + f"apex: {{{explicit}, preset: {name}}}").apex
    untouched = {key: value for key, value in PRESETS[name].items() if key not in ("stages", "stage_learning_rates")}
    assert {key: getattr(apex, key) for key in untouched} == untouched
    assert (apex.stages, apex.stage_learning_rates) == (4, (4e-5, 3e-5, 2e-5, 1e-5))
    assert load(BASE, f"apex.preset={name}").apex == ApexConfig(**PRESETS[name])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' (did you mean learning_rate?)"),
        ("k_heads: 0.1", "unknown key 'k_heads' (did you mean apex.k_heads?)"),
        ("apex: {learning_rate: 1}", "unknown key 'apex.learning_rate' (did you mean learning_rate?)"),
        ("apex: {stage: 1}", "unknown key 'apex.stage' (did you mean apex.stages?)"),
        ("epochs: 1", "unknown key 'epochs' (did you mean num_train_epochs?)"),
        ("lr: 1", "unknown key 'lr' (did you mean learning_rate?)"),
        ("eval_data: [{path: a, wieght: 1}]", "unknown key 'eval_data.wieght' (did you mean eval_data.weight?)"),
        ("zzzz: 1", "unknown key 'zzzz'; docs/configuration.md lists all keys"),
        ("model: again", "key 'model' is given twice (first in line 1)"),
        ("learning_rate: fast", "learning_rate: 'fast' must be a number"),
        ("learning_rate: .nan", "learning_rate: '.nan' must be a number"),
        ("learning_rate: true", "learning_rate: 'true' must be a number"),
        ("max_steps: 1.5", "max_steps: '1.5' must be a whole number"),
        ("seed: true", "seed: 'true' must be a whole number"),
        ("packing: 1", "packing: '1' must be true or false"),
        ("task: pretrain", "task: 'pretrain' must be one of auto, cpt, sft"),
        ("output_dir: [a]", "output_dir: a sequence must be text"),
        ("output_dir:", "output_dir: '' must be text"),
        ("lr_scheduler_kwargs: 3", "lr_scheduler_kwargs: '3' must be a mapping"),
        ("lr_scheduler_kwargs: {a: b}", "lr_scheduler_kwargs.a: 'b' must be a number"),
        ("apex: {operator_learning_rate: x}", "apex.operator_learning_rate: 'x' must be a number or auto"),
        ("apex: {stage_learning_rates: [1, x]}", "apex.stage_learning_rates: 'x' must be a number"),
        ("apex: 3", "apex: '3' must be a mapping"),
        ("apex: {preset: none}", "apex.preset: 'none' is not one of paper-it"),
        ("eval_data: [{limit: 2}]", "eval_data.path: is missing"),
        ("eval_data: &a [*a]", "eval_data: a sequence must be a mapping"),
        ("max_length: 0", "max_length: 0 must be above 0"),  # from __post_init__, as the next four
        ("max_length: 1", "max_length: 1 leaves nothing to predict; give at least 2"),
        ("apex: {k_heads: 0.9}", "apex.k_heads: 0.9 must be above 0 and at most 0.5"),
        ("apex: {stage_by: epochs}\nstreaming: true\nmax_steps: 5", "apex.stage_by: streaming data has no epochs"),
        ("eval_data: {path: a, weight: 0}", "data.weight: 0.0 of a must be above 0"),
        ("? [a]\n: b", "the config: a key must be one word"),
        ("- 3", "not valid YAML: "),
        ("x: 'open", "not valid YAML: "),
    ],
)
def test_errors_name_file_line_and_key(message, line, said):
    assert message(BASE + line).startswith(f"c.yaml:3: {said}")


@pytest.mark.parametrize(
    ("verb", "file", "said"),
    [
        (load_config, "compare_tiny", "base: this is a file for `graftlm compare`, not for `graftlm train`"),
        (load_config, "compare_prune_tiny", "perplexity: this is a file for `graftlm compare`"),
        (load_config, "shrink_tiny", "target_parameters: this is a file for `graftlm shrink`"),
        (load_shrink, "compare_tiny", "base: this is a file for `graftlm compare`, not for `graftlm shrink`"),
        (load_shrink, "cpt_tiny", "method: this is a file for `graftlm train`, not for `graftlm shrink`"),
        (load_comparison, "cpt_tiny", "model: this is a file for `graftlm train`, not for `graftlm compare`"),
        (load_comparison, "shrink_tiny", "target_parameters: this is a file for `graftlm shrink`"),
        (load_prune_comparison, "shrink_tiny", "interleaves: this is a file for `graftlm shrink`"),
    ],
)
def test_another_verbs_file_is_named(verb, file, said):
    with pytest.raises(UserError) as caught:
        verb(Path(__file__).parents[1] / "examples" / f"{file}.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert re.search(rf"{file}\.yaml:\d+: ", str(caught.value))


def test_a_misspelt_key_is_no_other_verbs(message, tmp_path):
    (tmp_path / "s.yaml").write_text("model: m\ndata: d\nsparsity: 0.5\nlearning_rate: 1\n")
    with pytest.raises(UserError, match="unknown key 'learning_rate'"):
        load_shrink(tmp_path / "s.yaml")
    assert "unknown key 'base'" in message(BASE, "base.max_steps=3")


def test_errors_of_nested_lines(message):
    assert message("model: m\ndata:\n  - a.txt\n  - path: b\n    limit: 0\n").startswith("c.yaml:5: data.limit: 0 of b")
    assert message(BASE + "apex:\n  stages: 2\n\n  k_head: 0.1\n").startswith("c.yaml:6: unknown key 'apex.k_head'")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_steps", "'max_steps' is not KEY=VALUE"),
        ("=3", "'=3' is not KEY=VALUE"),
        ("apex.k_head=0.1", "unknown key 'apex.k_head' (did you mean apex.k_heads?)"),
        ("apex.k_heads=0.9", "apex.k_heads: 0.9 must be above 0"),
        ("data.7.weight=1", "data: has no entry '7'; there are 1, from 0"),
        ("model.x=1", "model.x: model holds no keys"),
        ("data=[a", "data: '[a' is not valid YAML"),
    ],
)
def test_errors_of_overrides_name_the_command_line(message, override, said):
    assert message(BASE, override).startswith(f"command line: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "c.yaml: model: is missing; give model: "),
        ("model: m", "c.yaml:1: data: is missing; give data: "),
        ("model: m\ndata: []", "c.yaml:2: data: no source given"),
        ("just words", "c.yaml:1: must be `key: value` lines"),
        (BASE + "apex: {trains: half, budget: 2}", "c.yaml:3: apex.budget: 2.0 must be in (0, 1]"),
        (BASE + "streaming: true", "c.yaml: max_steps: streaming data has no known length"),
    ],
)
def test_errors_of_the_whole(message, text, said):
    assert message(text).startswith(said)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"none\.yaml: no such file; name a YAML file$"):
        load_dataclass(tmp_path / "none.yaml", RunConfig)
    with pytest.raises(UserError, match=r"is a folder; name a YAML file, such as .*/config\.yaml$"):
        load_config(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"c\.yaml: cannot be read as text"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes(b"model: \x01\n")
    with pytest.raises(UserError, match=r"c\.yaml: not valid YAML"):
        load_config(tmp_path / "c.yaml")


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1)
rates = st.floats(min_value=1e-12, max_value=1.0)
configs = st.builds(
    RunConfig,
    model=words,
    data=st.lists(st.builds(SourceConfig, path=words, weight=rates, name=st.none() | words), min_size=1).map(tuple),
    learning_rate=rates,
    max_steps=st.integers(1, 10**18),
    packing=st.booleans(),
    report_to=st.lists(words).map(tuple),
    lr_scheduler_kwargs=st.none() | st.dictionaries(words, st.floats(allow_nan=False, allow_infinity=False)),
    apex=st.builds(
        ApexConfig,
        k_heads=st.floats(min_value=1e-3, max_value=0.5),
        operator_learning_rate=st.just("auto") | rates,
        stages=st.just(2),
        stage_learning_rates=st.none() | st.tuples(rates, rates),
        trains=st.just("half"),
        budget=st.none() | rates,
    ),
)


@settings(max_examples=60, deadline=None)
@given(config=configs)
def test_a_dumped_config_loads_as_the_same(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == config_to_dict(config)
