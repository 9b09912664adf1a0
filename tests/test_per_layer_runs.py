"""Whole runs of a model whose layers differ: every verb opens it as it opens any other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_run, read_summary, tiny_config, write_texts

from graftlm.anatomy import read_anatomy
from graftlm.assess import assess
from graftlm.evaluation.run import model_fingerprint, run_evaluation
from graftlm.generation import generate
from graftlm.identity import by_content
from graftlm.methods.adapter_settings import LoraSettings
from graftlm.models import has_own_class, load_model, load_skeleton, load_tokenizer
from graftlm.pruning.saving import save_pruned
from graftlm.pruning.shapes import shapes_of
from graftlm.pruning.surgery import keep_components
from graftlm.training.costs import attention_widths, token_flops
from graftlm.training.plan import plan
from graftlm.training.run import train
from graftlm.training.run_trainer import RunTrainer
from graftlm.training.scaled_copy import cut, layers_copied

KEPT = {
    "layer0_channels": torch.arange(100),
    "layer1_channels": torch.arange(0),
    "layer1_heads": torch.arange(0),
    "layer2_heads": torch.tensor([1]),
    "layer3_channels": torch.arange(31),
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pruned") / "model"
    save_pruned(keep_components(load_model("tiny-llama"), KEPT), load_tokenizer("tiny-llama"), folder)
    return str(folder)


def opened(run):
    """The model of a run; what its folder must have."""
    assert json.loads((run / "model/config.json").read_text())["auto_map"]
    assert (run / "model/per_layer_modeling.py").exists()
    assert "trust_remote_code=True" in (run / "model/README.md").read_text()
    assert "trust_remote_code=True" in (run / "report.html").read_text()
    return load_model(str(run / "model"))


@pytest.fixture(scope="module")
def apex_run(pruned, tmp_path_factory):
    """(config, its plan, the finished run)"""
    config = tiny_config(tmp_path_factory.mktemp("apex") / "folder", model=pruned, method="apex", max_steps=6)
    return config, plan(config), train(config)


def test_expanded(apex_run, pruned):
    """P and N are chosen within each layer's own width."""
    config, planned, run = apex_run
    model, before = opened(run), load_model(pruned)
    assert has_own_class(model)
    assert shapes_of(model) == shapes_of(before)
    summary = read_summary(run)
    assert summary["eval_loss_end"] < summary["eval_loss_start"]
    assert summary["fused_max_abs_logit_difference"] < 1e-4
    blocks = {block.name: block for block in read_anatomy(before).blocks}
    assert set(blocks) == {"layer0_heads", "layer0_channels", "layer2_channels", "layer3_heads", "layer3_channels"}
    for stage in summary["stages"]:
        for block in blocks.values():
            chosen = stage[block.kind][str(block.layer)]
            p, n = set(chosen["advantageous"]), set(chosen["disadvantageous"])
            assert p and n and not p & n
            assert max(p | n) < block.components
            if block.kind == "channels":
                assert len(p) == len(n)
                assert abs(len(p) - config.apex.k_channels * block.components) <= 0.5
    # planned as it was
    assert planned["total_parameters"] == model.num_parameters()
    assert planned["trainable_parameters"] == summary["trainable_parameters"]
    for key in ("estimated_seconds", "estimated_peak_memory_bytes", "flops_per_step"):
        assert planned[key] > 0


def test_adapters(pruned, tmp_path):
    run = train(tiny_config(tmp_path, model=pruned, method="lora", max_steps=4, lora=LoraSettings(rank=2)))
    model, before = opened(run), load_model(pruned)
    assert shapes_of(model) == shapes_of(before)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_goes_on_where_it_was_cut_off(pruned, tmp_path, monkeypatch):
    whole, cut_off = (
        tiny_config(tmp_path / name, model=pruned, method="full", max_steps=4, save_steps=2) for name in "ab"
    )
    train(whole)
    opened(Path(whole.output_dir))
    step, calls = RunTrainer.training_step, []

    def dies(*given, **named):
        calls.append(1)
        if len(calls) == 6:  # two micro-batches a step: in the third
            raise RuntimeError("the power failed")
        return step(*given, **named)

    monkeypatch.setattr(RunTrainer, "training_step", dies)
    with pytest.raises(RuntimeError, match="power"):
        train(cut_off)
    train(cut_off, resume=True)
    assert_same_run(Path(cut_off.output_dir), Path(whole.output_dir))


def test_floating_point_operations_by_hand(pruned):
    """A layer's matrices and attention count at its own width."""
    model = load_skeleton(pruned)
    assert attention_widths(model) == [2 * 64, 0, 2 * 32, 2 * 64]
    layers, head = token_flops(model, None, 10)
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert layers.forward == 2 * weights + 2 * 10 * (64 + 32 + 64) * 2
    assert layers.backward == 2 * layers.forward
    assert head.total == 6 * model.lm_head.weight.numel()


def test_what_a_plan_times_are_the_widest_layers(pruned):
    model = load_model(pruned)
    assert layers_copied(model, 2) == [0, 2]
    small = cut(model, 2, 32)
    assert small.num_parameters() < model.num_parameters()
    ids = torch.arange(12).view(2, 6)
    assert small(ids, use_cache=False).logits.shape == (2, 6, 32)
    assert layers_copied(load_model("tiny-llama"), 2) == [0, 1]


def test_assessed_and_generated_from(pruned, tmp_path):
    data = write_texts(tmp_path / "text.jsonl")
    out = assess(pruned, data=str(data), out=tmp_path / "out", samples=8, max_length=32)
    assert (out / "assessment.json").exists()
    assert load_file(out / "activations.safetensors")
    model, tokenizer = load_model(pruned), load_tokenizer(pruned)
    written = generate(pruned, "the cat", max_new_tokens=4, chat=False)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert written == tokenizer.decode(wanted, skip_special_tokens=True)


def test_evaluated(pruned, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sees the house. " * 20)
    report = run_evaluation(pruned, tmp_path / "report.json", perplexity=[text], progress=False)
    assert report["model_fingerprint"] == model_fingerprint(load_model(pruned))
    assert report["results"][f"perplexity:{text}"]


def test_its_content_is_its_identity(pruned, tmp_path):
    before = by_content(pruned)
    assert before == by_content(pruned)
    model = keep_components(load_model(pruned), {"layer0_channels": torch.arange(99)})
    save_pruned(model, load_tokenizer("tiny-llama"), tmp_path / "model")
    assert by_content(str(tmp_path / "model"))["content"] != before["content"]
