"""The YAML of a comparison: what is accepted, what is refused and where each error points; what makes runs the same."""

import dataclasses
import os
from pathlib import Path

import pytest
import tiny_prune_comparisons
from tiny_comparisons import opened, write_comparison

from graftlm import config_docs
from graftlm.comparing.config import CONTROL, CompareConfig, load_comparison
from graftlm.comparing.pruning.config import load_prune_comparison
from graftlm.errors import UserError
from graftlm.identity import key_of, same_settings, settings_of
from graftlm.training.config import DistillationConfig

ROOT = Path(__file__).parents[1]
BASE = "base:\n  model: tiny-llama\n  data: a.jsonl\n  eval_data: b.jsonl\n  max_steps: 10\n"


@pytest.fixture
def message(tmp_path, monkeypatch):
    """message(text, *overrides) is the text of the UserError of c.yaml, which must be one line."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> str:
        Path("c.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            load_comparison("c.yaml", overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read


def load(tmp_path, text, *overrides):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    return load_comparison(tmp_path / "c.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE + "variants:\n  a: {method: apex}\nsede: [0]\n", "c.yaml:8: unknown key 'sede' (did you mean seeds?)"),
        (BASE + "variants:\n  a:\n    methd: full\n", "c.yaml:8: unknown key 'methd' (did you mean method?)"),
        (BASE + "variants:\n  a:\n    apex.k_head: 0.2\n", "c.yaml:8: unknown key 'apex.k_head' (did you mean apex.k_"),
        (BASE + "variants:\n  a:\n    apex:\n      stages: 0\n", "c.yaml:9: apex.stages: 0 must be at least 1"),
        (BASE + "variants:\n  a:\n    method: apx\n", "c.yaml:8: method: 'apx' must be apex (the nearest)"),
        (BASE + "variants:\n  a: 3\n", "c.yaml:7: must be a mapping"),
        (BASE + "  max_step: 3\nvariants: {a: {}}\n", "c.yaml:6: unknown key 'max_step' (did you mean max_steps?)"),
        (BASE + "  output_dir: x\nvariants: {a: {method: apex}}\n", "c.yaml:6: base.output_dir: a comparison names"),
        (BASE + "variants:\n  a: {seed: 3}\n", "c.yaml:7: variants.a.seed: give seeds at the top"),
        (BASE + "variants:\n  control: {method: apex}\n", "c.yaml:7: variants.control: the control is always there"),
        (BASE, "c.yaml:1: variants: is missing; give variants"),
        (BASE + "variants: {}\n", "c.yaml:6: variants: there is none"),
        (BASE.replace("eval_data: b.jsonl", "eval_fraction: 0") + "variants: {a: {}}\n", "base.eval_data: there is"),
        (BASE + "variants: {a: {}}\nseeds: [0, 0]\n", "c.yaml:7: seeds: [0, 0] has a value twice"),
        (BASE + "variants: {a: {}}\nseeds: [0]\nselection_seeds: [1]\n", "c.yaml:8: selection_seeds: 1 is not among"),
        (BASE + "  distributed: {strategy: ddp}\nvariants: {a: {}}\n", "base.distributed: strategy ddp, and these"),
        (BASE + "variants:\n  a: {distributed: {strategy: ddp}}\n", "c.yaml:7: variants.a.distributed: strategy ddp"),
        (BASE + "variants: {a: {}}\ntask_batch_size: 0\n", "c.yaml:7: task_batch_size: 0 must be at least 1"),
        (BASE + "variants: {a: {}}\nlearning_rates: [0]\n", "c.yaml:7: learning_rates: every value must be above 0"),
        (
            BASE + "variants:\n  a:\n    learning_rate: 1e-3\n    learning_rates: [1e-3]\n",
            "c.yaml:9: variants.a: learning_rate or learning_rates, not both",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(message, text, said):
    assert message(text).startswith(said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_length: 64", "variants.a.max_length: is 64 here and 1024 in base, so the arms could not be compared"),
        ("max_steps: 20", "variants.a.max_steps: is 20 here and 10 in base"),
        ("data: other.jsonl", "variants.a.data: is other.jsonl here and a.jsonl in base"),
        ("eval_data: other.jsonl", "variants.a.eval_data: is other.jsonl here and b.jsonl in base"),
        ("model: smollm2", "variants.a.model: is smollm2 here and tiny-llama in base"),
        ("per_device_train_batch_size: 3", "variants.a: a step has 3 sequences and base's 8"),
    ],
)
def test_arms_that_could_not_be_compared(message, line, said):
    assert message(BASE + f"variants:\n  a:\n    {line}\n").startswith(f"c.yaml:8: {said}")


def test_multiples_of_the_same_number_of_steps(tmp_path):
    """They would be one run, and no curve goes through two losses at the same tokens."""
    path = write_comparison(tmp_path, base={"max_steps": 2}, plain_multiples=[0.5, 0.75, 1])
    with pytest.raises(UserError, match=r"plain_multiples: 0.75 and 1 times base.max_steps = 2 are the same number"):
        load_comparison(path)


def test_a_step_may_be_cut_otherwise(tmp_path):
    text = BASE + "variants:\n  a: {per_device_train_batch_size: 2, gradient_accumulation_steps: 4}\n"
    assert load(tmp_path, text).arm("a").config.gradient_accumulation_steps == 4


def test_layers(tmp_path):
    text = BASE + "  apex: {stages: 4, k_heads: 0.2}\n"
    text += "variants:\n  dotted: {apex.k_heads: 0.3}\n  nested: {apex: {k_heads: 0.3}}\n"
    read = load(tmp_path, text, "variants.nested.learning_rate=3e-4", "base.max_steps=12")
    for name in ("dotted", "nested"):
        config = read.arm(name).config
        assert (config.apex.stages, config.apex.k_heads, config.max_steps) == (4, 0.3, 12)
    assert read.arm("nested").learning_rates == (3e-4,)
    assert read.arm("dotted").learning_rates == (2e-5,)


def test_controls_have_the_schedule_of_their_arm(tmp_path):
    text = BASE + "  apex: {k_heads: 0.3}\n" + (
        "variants:\n  a: {method: apex}\n  b: {method: apex, apex.stages: 2}\n  warm: {warmup_ratio: 0.2}\n"
        "  staged: {apex.stages: 2, apex.stage_learning_rates: [1e-4, 1e-5]}\n  plain: {method: full}\n"
    )  # fmt: skip
    read = load(tmp_path, text)
    assert read.controls[0].name == CONTROL
    assert read.arms[: len(read.controls)] == read.controls  # first
    matched = {arm.name: arm.matched for arm in read.arms if arm.matched}
    assert matched["a"] == matched["b"] == matched["plain"] == CONTROL  # stages alone do not change a schedule
    assert matched["warm"] == "control with the schedule of warm"
    assert matched["staged"] == "control with the schedule of staged"
    for control in read.controls:
        assert control.config.method == "full"
        assert control.config.apex.k_heads == 0.125  # of no effect, so at its default
    assert read.arm(matched["warm"]).config.warmup_ratio == 0.2
    staged = read.arm(matched["staged"])
    assert (staged.follows, staged.config.apex.stage_learning_rates) == ("staged", (1e-4, 1e-5))
    assert read.arm(CONTROL).follows is None
    assert read.arm("plain").config == read.arm(CONTROL).config  # the same run, then


def test_what_is_no_methods_own_stays_with_plain_arms_and_the_control(tmp_path):
    """A teacher and weights of samples change plain training, too."""
    text = BASE + (
        "variants:\n  teacher: {method: full, distillation.teacher: tiny-llama}\n"
        "  weighted: {method: full, reweighting.strategy: quadratic}\n"
    )
    read = load(tmp_path, text)
    assert read.arm("teacher").config.distillation.teacher == "tiny-llama"
    assert read.arm("weighted").config.reweighting.strategy == "quadratic"
    assert len({str(arm.config) for arm in read.arms}) == 3
    read = load(tmp_path, BASE + "  distillation: {teacher: tiny-llama}\nvariants:\n  a: {method: apex}\n")
    assert read.arm(CONTROL).config.distillation.teacher == read.arm("a").config.distillation.teacher == "tiny-llama"
    read = load(tmp_path, BASE + "  reweighting: {strategy: quadratic}\nvariants:\n  a: {method: apex}\n")
    assert read.arm("a").config.reweighting.strategy == "quadratic"
    assert read.arm(CONTROL).config.reweighting.strategy == "none"  # all samples count alike


def test_data_that_a_run_chooses_itself_cannot_be_compared(message):
    two = BASE.replace("data: a.jsonl\n", "data: [a.jsonl, c.jsonl]\n", 1).replace("b.jsonl", "[b.jsonl, d.jsonl]")
    text = two + "  dynamic_loading: {every: 5}\nvariants: {a: {method: apex}}\n"
    assert "a run's losses decide what it reads next" in message(text)


def test_learning_rates_and_the_halves_of_held_out_data(tmp_path):
    text = BASE + "variants:\n  a: {method: apex}\n  b: {learning_rates: [1e-2, 2e-2]}\nlearning_rates: [1e-3, 2e-3]\n"
    read = load(tmp_path, text)
    assert read.arm("a").learning_rates == read.arm(CONTROL).learning_rates == (1e-3, 2e-3)
    assert read.arm("b").learning_rates == (1e-2, 2e-2)
    for arm in read.arms:
        assert [source.half for source in arm.config.eval_data] == ["odd"]
        assert [source.half for source in arm.config.selection_data] == ["even"]
    one = load(tmp_path, BASE + "variants:\n  a: {method: apex}\n")
    assert one.arm("a").config.selection_data == () and one.arm("a").config.eval_data[0].half is None
    given = load(tmp_path, text.replace("  max_steps", "  selection_data: c.jsonl\n  max_steps"))
    assert given.arm("a").config.selection_data[0].path == "c.jsonl"
    assert given.arm("a").config.eval_data[0].half is None


def test_choosing_a_learning_rate_needs_held_out_data(message):
    text = BASE.replace("  eval_data: b.jsonl\n", "") + "variants: {a: {}}\nlearning_rates: [1e-3, 2e-3]\n"
    assert message(text).startswith("base.eval_data: learning rates are chosen on a part of it")


def test_too_few_seeds_are_said(tmp_path):
    assert "too few for an interval" in load(tmp_path, BASE + "variants: {a: {}}\nseeds: [0, 1]\n").notes[0]


# --- what makes two runs the same run


@pytest.fixture
def config(tmp_path):
    return opened(write_comparison(tmp_path))[1].open()[0].config


def test_the_name_of_a_run_is_its_content(config, tmp_path):
    key = key_of(settings_of(config))
    same = dataclasses.replace(config, output_dir="elsewhere", cache_dir=None, save_steps=3, report_to=("tensorboard",))
    assert key_of(settings_of(same)) == key
    text = Path(config.data[0].path)
    copied = tmp_path / "other" / "copied.jsonl"
    copied.parent.mkdir()
    copied.write_bytes(text.read_bytes())
    os.utime(copied, (1, 1))
    moved = dataclasses.replace(config, data=(dataclasses.replace(config.data[0], path=str(copied)),))
    assert key_of(settings_of(moved)) == key  # the same tokens on another machine
    copied.write_text("something else")
    assert key_of(settings_of(moved)) != key
    for change in ({"seed": 5}, {"learning_rate": 1e-2}, {"max_steps": 9}, {"eval_steps": 2}):
        assert key_of(settings_of(dataclasses.replace(config, **change))) != key


def test_the_same_bytes_read_otherwise_are_another_run(config, tmp_path):
    """A .txt is one document, a .jsonl a document a line. The name of the run is the same, so that kept ones stay."""
    path = Path(config.data[0].path)
    text = tmp_path / "same.txt"
    text.write_bytes(path.read_bytes())
    read_as_text = dataclasses.replace(config, data=(dataclasses.replace(config.data[0], path=str(text)),))
    rows, plain = settings_of(config), settings_of(read_as_text)
    assert key_of(rows) == key_of(plain) and not same_settings(rows, plain)
    folder = tmp_path / "v1.0"
    folder.mkdir()
    path.rename(folder / "a.jsonl")
    in_a_folder = settings_of(
        dataclasses.replace(config, data=(dataclasses.replace(config.data[0], path=str(folder)),))
    )
    folder.rename(tmp_path / "v2")
    renamed = dataclasses.replace(config, data=(dataclasses.replace(config.data[0], path=str(tmp_path / "v2")),))
    assert same_settings(in_a_folder, settings_of(renamed))


def test_no_path_of_this_machine_is_kept(config, tmp_path):
    assert str(tmp_path) not in str(settings_of(config))


def test_a_models_weights_are_part_of_it(config, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    given = dataclasses.replace(config, model=str(tmp_path / "m"))
    before = key_of(settings_of(given))
    (tmp_path / "m").rename(tmp_path / "n")
    assert key_of(settings_of(dataclasses.replace(config, model=str(tmp_path / "n")))) == before
    (tmp_path / "n" / "model.safetensors").write_bytes(b"other")
    assert key_of(settings_of(dataclasses.replace(config, model=str(tmp_path / "n")))) != before


def test_settings_that_come_later_change_no_name(config):
    """A version that knows one setting less, or a whole section less, names the run the same way."""
    settings = settings_of(config)
    older = {key: value for key, value in settings.items() if key not in ("optim", "selection_data")}
    older["apex"] = {key: value for key, value in settings["apex"].items() if key != "operator_scale"}
    assert key_of(older) == key_of(settings)
    assert same_settings(older, settings)
    changed_default = {**settings, "adam_beta2": 0.5}
    assert not same_settings(changed_default, settings)


# --- documents


def test_the_example_loads(monkeypatch):
    monkeypatch.chdir(ROOT)
    read = load_comparison("examples/compare_tiny.yaml")
    assert [arm.name for arm in read.arms] == ["control", "apex", "apex-fast"]
    assert read.settings.output_dir.startswith("runs/")


def test_every_key_is_explained():
    page = " ".join((ROOT / "docs/compare.md").read_text(encoding="utf-8").split())
    for name, (_, text) in config_docs.field_docs(CompareConfig).items():
        assert f"| `{name}` |" in page
        assert text in page, name


def test_a_teacher_is_known_by_its_weights(config, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").write_text("weights")
    taught = dataclasses.replace(config, distillation=DistillationConfig(teacher=str(teacher)))
    before = key_of(settings_of(taught))
    teacher.rename(tmp_path / "moved")
    moved = dataclasses.replace(config, distillation=DistillationConfig(teacher=str(tmp_path / "moved")))
    assert key_of(settings_of(moved)) == before != key_of(settings_of(config))
    (tmp_path / "moved/model.safetensors").write_text("others")
    assert key_of(settings_of(moved)) != before


@pytest.mark.parametrize("loads", [load_comparison, load_prune_comparison])
def test_a_misspelt_variant_is_no_new_one(tmp_path, loads):
    path = write_comparison(tmp_path, variants={"apex": {"method": "apex"}, "APEX 2.4%": {"method": "apex"}})
    if loads is load_prune_comparison:
        path = tiny_prune_comparisons.write_comparison(tmp_path, variants={"apex": {}})
    with pytest.raises(UserError, match=r"variants.apx.apex.stages: there is no variant apx \(did you mean apex\?\)"):
        loads(path, ["variants.apx.apex.stages=4"])
    if loads is load_comparison:
        new = ["variants.new={method: lora}", "variants.new.lora.rank=2"]
        arms = loads(path, ["variants.apex.apex.stages=1", *new]).arms
        assert {arm.name for arm in arms} == {"control", "apex", "APEX 2.4%", "new"}


def test_a_single_document_cannot_be_halved(tmp_path):
    path = write_comparison(tmp_path, learning_rates=[1e-3, 2e-3])
    text = tmp_path / "held_out.txt"
    text.write_text("one text\n" * 50)
    with pytest.raises(UserError, match=r"base.eval_data: .*held_out.txt is a single document.*give selection_data"):
        load_comparison(path, [f"base.eval_data={text}"])
    load_comparison(path, [f"base.eval_data={text}", f"base.selection_data={path.parent / 'train.txt'}"])


def test_learning_rates_are_not_chosen_on_what_is_reported(tmp_path):
    path = write_comparison(tmp_path, learning_rates=[1e-3, 2e-3])
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("one text\n" * 50)

    def halves(eval_half, selection_half):
        parts = zip(("eval_data", "selection_data"), (eval_half, selection_half), strict=True)
        return [f"base.{key}=[{{path: {held_out}, half: {half}}}]" for key, half in parts]

    for given in (halves("null", "null"), halves("odd", "odd"), halves("null", "even")):
        with pytest.raises(UserError, match=r"base.selection_data: .*held_out.txt is in eval_data, too"):
            load_comparison(path, given)
    load_comparison(path, halves("odd", "even"))
    load_comparison(path, [*halves("null", "null"), "learning_rates=[]"])  # nothing is chosen


def test_settings_of_apex_are_none_of_other_methods(tmp_path):
    """Another base.apex must not have a LoRA arm trained again; its section follows, and is no part of the run."""
    variants = {"lora": {"method": "lora"}, "apex": {"method": "apex"}}
    path = write_comparison(tmp_path, variants=variants)
    one, other = (load_comparison(path, [f"base.apex.stages={count}"]) for count in (2, 3))
    keys = [{arm.name: key_of(settings_of(arm.config)) for arm in each.arms} for each in (one, other)]
    assert keys[0]["lora"] == keys[1]["lora"] and keys[0]["control"] == keys[1]["control"]
    assert keys[0]["apex"] != keys[1]["apex"]
