"""Methods with adapters: PEFT's numbers, what defines each of them, and a stock model at the end."""

import dataclasses
import json
import math

import many_processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    MissConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from tiny_adapters import METHODS, RANK, SEED, STEPS, config, prepared, train
from tiny_models import FAMILIES, batches, tiny_model
from tiny_runs import assert_same_run, interrupted
from transformers import AutoModelForCausalLM

from graftlm.anatomy import read_anatomy
from graftlm.errors import UserError
from graftlm.held_out import mean_loss
from graftlm.methods import make_method
from graftlm.methods.adapter_settings import LoraSettings
from graftlm.methods.adapters import targets
from graftlm.models import load_model, load_tokenizer
from graftlm.training import run
from graftlm.training.config import RunConfig, SourceConfig
from graftlm.training.data import prepare_data
from graftlm.training.run import train_one

# -- against PEFT -----------------------------------------------------------------------------------------------------


def peft_model(method: str, model, seen):
    """A PeftModel as PEFT's own documents make it, from the same seed."""
    common = {"target_modules": "all-linear"}
    lora = {"r": RANK, "lora_alpha": RANK, **common}
    given = {
        "lora": lambda: LoraConfig(**lora),
        "dora": lambda: LoraConfig(**{**lora, "lora_alpha": 2 * RANK}, use_dora=True),
        "rslora": lambda: LoraConfig(**{**lora, "lora_alpha": math.sqrt(RANK)}, use_rslora=True),
        "pissa": lambda: LoraConfig(**lora, init_lora_weights="pissa"),
        "olora": lambda: LoraConfig(**{**lora, "lora_alpha": RANK / 2}, init_lora_weights="olora"),
        "eva": lambda: LoraConfig(**{**lora, "lora_alpha": 1}, init_lora_weights="eva", eva_config=EvaConfig(rho=1.5)),
        "lora_ga": lambda: LoraConfig(
            **{**lora, "lora_alpha": 2 * RANK}, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
        ),
        "miss": lambda: MissConfig(r=RANK, **common),
    }[method]()
    torch.manual_seed(SEED)
    if method == "lora_ga":
        # PEFT looks for "all-linear" only when it makes the model.
        early = dataclasses.replace(given, target_modules=targets(model, "all"))
        preprocess_loraga(model, early, lambda: [model(**batch).loss.backward() for batch in seen])
        torch.manual_seed(SEED)
        given = early
    made = get_peft_model(model, given)
    if method == "eva":
        torch.manual_seed(SEED)
        initialize_lora_eva_weights(made, seen, show_progress_bar=False)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(method) is a run's folder, its summary, and what its steps and its look saw."""
    done = {}

    def get(method: str):
        if method in done:
            return done[method]
        folder = tmp_path_factory.mktemp(method)
        steps, looked, rates = [], [], []
        inner = run.RunTrainer.training_step

        def training_step(self, model, inputs, items=None, *args, **kwargs):
            steps.append((self.state.global_step, dict(inputs), items))
            rates.append((self.state.global_step, self.optimizer.param_groups[0]["lr"]))
            if not looked:
                looked.extend(self._batches(self.method.settings.samples))
            return inner(self, model, inputs, items, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.RunTrainer, "training_step", training_step)
            # LoRA-GA's small singular vectors turn with the gradient's last bits, which a fused loss may change.
            summary = train_one(config(folder, method, fused_loss=False))
        done[method] = folder / "run", summary, steps, looked, dict(rates)
        return done[method]

    return get


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*low_cpu_mem", "ignore:Full backward hook")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_equals_a_loop_with_peft(method, finished):
    folder, summary, steps, looked, rates = finished(method)
    model = load_model("tiny-llama").train()
    model.config.use_cache = False
    model = peft_model(method, model, looked)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0
    )
    assert summary["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.train()
    for step in range(STEPS):
        for _, inputs, items in (s for s in steps if s[0] == step):
            model(**inputs, num_items_in_batch=items).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        optimizer.zero_grad()
    theirs = model.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    before = load_model("tiny-llama").state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    moved = max(float((ours[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-3  # so that equal weights mean something


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_model_is_stock_and_computes_the_same(method, finished):
    folder, summary, *_ = finished(method)
    assert summary["fused_max_abs_logit_difference"] < 1e-5
    reopened = AutoModelForCausalLM.from_pretrained(folder / "model")
    given = load_model("tiny-llama")
    assert type(reopened) is type(given)
    assert reopened.state_dict().keys() == given.state_dict().keys()
    wanted, found = given.config.to_diff_dict(), json.loads((folder / "model" / "config.json").read_text())
    ignored = {"_name_or_path", "transformers_version", "architectures"}
    assert {k: v for k, v in found.items() if k not in ignored} == {k: v for k, v in wanted.items() if k not in ignored}
    assert not {p.name for p in (folder / "model").iterdir()} & {"adapter_config.json", "adapter_model.safetensors"}


# -- the model while a method is on it and after ----------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_family(method, family):
    model = tiny_model(family)
    kinds, settings = {n: type(m) for n, m in model.named_modules()}, model.config.to_dict()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    data = batches(3)
    made = prepared(method, model, data)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == made.trainable
    if method != "eva":  # whose ranks follow from the data
        assert made.trainable == made.size(RANK)
    losses = train(model, data * 2)
    assert losses[3] < losses[0]
    model.eval()
    before = model(**data[0]).logits
    made.finish()
    torch.testing.assert_close(model(**data[0]).logits, before, rtol=1e-4, atol=1e-4)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert model.config.to_dict() == settings
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False)


def test_targets_come_from_the_anatomy():
    for family in FAMILIES:
        model = tiny_model(family)
        blocks = read_anatomy(model).blocks
        of = {kind: {m.module for b in blocks if b.kind == kind for m in (*b.mixed, *b.followers)}
              for kind in ("heads", "channels")}  # fmt: skip
        assert set(targets(model, "attention")) == of["heads"]
        assert set(targets(model, "ffn")) == of["channels"]
        assert set(targets(model, "all")) == of["heads"] | of["channels"]


def test_one_key_value_head_is_attention_too():
    """Heads that cannot be expanded can have adapters."""
    model = tiny_model("gemma", num_key_value_heads=1)
    assert len(targets(model, "attention")) == 2 * 4 and len(targets(model, "ffn")) == 2 * 3


@pytest.mark.parametrize("which", ["attention", "ffn"])
def test_a_run_on_some_layers(which, tmp_path):
    summary = train_one(config(tmp_path, "lora", lora={"target": which}, max_steps=2))
    before, after = load_model("tiny-llama"), AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    chosen = {f"{name}.weight" for name in targets(before, which)}
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]) == (name not in chosen), name
    assert 0 < summary["trainable_fraction"] < 0.2


def test_gradient_checkpointing_changes_nothing(tmp_path):
    losses = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        train_one(config(folder, "lora", gradient_checkpointing=checkpointing))
        losses.append([json.loads(x).get("loss") for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]


def test_bfloat16_keeps_adapters_in_float32():
    for method in METHODS:
        made = prepared(method, tiny_model(dtype=torch.bfloat16), batches(3))
        assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}, method
        made.finish()
        assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}, method


def test_the_loss_is_that_of_the_saved_model(tmp_path):
    """Merged into bfloat16 weights, adapters are rounded."""
    chosen = config(tmp_path, "lora", dtype="bfloat16", fused_loss=False, per_device_eval_batch_size=1)
    chosen = dataclasses.replace(chosen, selection_data=chosen.eval_data)
    summary = train_one(chosen)
    data = prepare_data(chosen, load_tokenizer("tiny-llama"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.bfloat16)
    for found, blocks in ((summary["eval_loss_end"], data.evaluation), (summary["selection_loss"], data.selection)):
        batches = (data.collator([block]) for block in blocks)
        assert found == pytest.approx(mean_loss(saved, batches), rel=1e-6)
    assert summary["fused_max_abs_logit_difference"] > 1e-3  # the rounding, which is seen


@settings(max_examples=20, deadline=None)
@given(
    share=st.floats(0.02, 0.9), method=st.sampled_from(["lora", "dora", "miss"]), target=st.sampled_from(["all", "ffn"])
)
def test_a_budget_picks_the_highest_rank_below_it(share, method, target):
    model = tiny_model("qwen2")
    total = sum(p.numel() for p in model.parameters())
    lora = LoraSettings(budget=share, target=target)
    given = RunConfig(model="m", data=(SourceConfig("x"),), method=method, lora=lora)
    try:
        made = make_method(model, given)
    except UserError as error:
        assert "too little for rank 1" in str(error) or (method == "miss" and "the narrowest input" in str(error))
        return
    assert made.size(made.rank) <= share * total < made.size(made.rank + 1)
    if made.rank <= min(min(w) for w in made.widths):
        made.prepare()
        assert made.trainable == made.size(made.rank)


def linears_of(model) -> list[torch.nn.Linear]:
    """All of the decoder layers."""
    return [model.get_submodule(name) for name in targets(model, "all")]


@pytest.mark.parametrize(
    ("method", "lora", "words"),
    [
        ("pissa", {"rank": 17}, "lora.rank: 17 is above 16"),
        ("olora", {"rank": 17}, "method olora cannot split"),
        ("lora_ga", {"rank": 9}, "lora.rank: 9 is above 8"),
        ("eva", {"rank": 20}, "lora.rank: 20 times lora.eva_rho: 2 is above 24"),
        ("lora", {"budget": 1e-6}, "lora.budget: 1e-06 of"),
        ("miss", {"rank": 2, "alpha": 4.0}, "lora.alpha: method miss has none"),
        ("miss", {"rank": 25}, "lora.rank: 25 is above 24"),
        ("pissa", {"budget": 0.9}, "lora.budget: 0.9 gives rank {rank}, which is above 16, the width"),
        ("miss", {"budget": 0.9}, "lora.budget: 0.9 gives rank {rank}, which is above 24, the width"),
        ("lora_ga", {"budget": 0.9}, "lora.budget: 0.9 gives rank {rank}, which is above 8: lora_ga"),
        ("eva", {"budget": 0.9}, "lora.budget: 0.9 gives rank {rank}, which times lora.eva_rho: 2 is above 24"),
    ],
)
def test_what_is_refused(method, lora, words):
    given = RunConfig(model="m", data=(SourceConfig("x"),), method=method, lora=LoraSettings(**lora))
    with pytest.raises(UserError) as caught:
        make_method(tiny_model(), given).prepare()
    total = sum(p.numel() for p in tiny_model().parameters())
    of_one = sum((m.in_features if method != "miss" else 0) + m.out_features for m in linears_of(tiny_model()))
    words = words.format(rank=int(0.9 * total / of_one))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"budget": 1.0}, {"alpha": 0.0}, {"dropout": 1.0}, {"eva_rho": 0.5},
                                 {"samples": 0}, {"svd_iterations": 0}, {"eva_tau": 1.0},
                                 {"eva_tau": 0.0}])  # fmt: skip
def test_settings_are_checked(bad):
    with pytest.raises(UserError, match=f"^lora.{next(iter(bad))}: "):
        LoraSettings(**bad)


# -- resuming, and several processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["lora", "eva", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in ("lora", "eva"))]
)
def test_a_resumed_run_ends_with_the_same_bits(method, dropping, tmp_path):
    """With dropout in the model and in the adapters."""
    changes = {"model": dropping, "save_steps": 2, "lora": {"dropout": 0.1}}
    whole, broken = config(tmp_path / "a", method, **changes), config(tmp_path / "b", method, **changes)
    train_one(whole)
    interrupted(broken, 3)
    train_one(broken, resume=True)
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


@pytest.mark.parametrize("method", ["lora", pytest.param("eva", marks=pytest.mark.slow),
                                    pytest.param("lora_ga", marks=pytest.mark.slow)])  # fmt: skip
def test_ddp(method, tmp_path):
    """Two processes train what one does; data that a method looks at is divided between them."""
    changes = {"method": method, "lora": LoraSettings(rank=RANK, samples=8), "max_steps": STEPS}
    alone = many_processes.run_of(tmp_path, 1, "none", name="alone", **changes)
    both = many_processes.run_of(tmp_path, 2, "ddp", name="both", **changes)
    difference = many_processes.relative_difference(both, alone)
    assert difference < (1e-5 if method == "lora" else 1e-3)  # batches of another size: another PCA
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (both, alone))
    assert a["processes"] == 2 and a["tokens"] == b["tokens"]
    assert a["eval_loss_end"] == pytest.approx(b["eval_loss_end"], rel=1e-3)
