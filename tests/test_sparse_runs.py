"""Whole runs with the methods that train a part of the weights: stopped twice and resumed they end with the same bits,
and what they save is an ordinary model."""

import pytest
from tiny_runs import assert_same_run, read_summary, tiny_config

from graftlm.methods.adapter_settings import LoraSettings
from graftlm.methods.sparse_settings import (
    HftSettings,
    IstSettings,
    LiftSettings,
    MaskSettings,
    ReweightingSettings,
    S2ftSettings,
)
from graftlm.models import load_model
from graftlm.training import run_trainer
from graftlm.training.run import train_one

KINDS = {
    "gmt": {"method": "gmt", "gradient_mask": MaskSettings(scope="model"), "weight_decay": 0.1},
    "rmt": {"method": "rmt"},
    "s2ft": {"method": "s2ft", "s2ft": S2ftSettings(budget=0.1, choose_by="gradient", samples=4)},
    "s2ft-bfloat16": {"method": "s2ft", "dtype": "bfloat16", "s2ft": S2ftSettings(budget=0.1, trains="coupled")},
    "hft": {"method": "hft"},
    "hft-steps": {"method": "hft", "hft": HftSettings(round_steps=3), "gradient_checkpointing": True},
    "lift": {"method": "lift", "lift": LiftSettings(rank=4, interval=3), "bf16": True},
    "lift-bfloat16": {"method": "lift", "dtype": "bfloat16", "lift": LiftSettings(rank=4, interval=5, share=0.2)},
    "ist": {"method": "ist", "lora": LoraSettings(rank=2), "ist": IstSettings(interval=3, samples=4, active=0.5)},
    "apex-gradient": {"method": "apex", "apex": {"assessment": "gradient"}},
    "apex-magnitude": {"method": "apex", "apex": {"assessment": "magnitude"}},
    "reweighting": {"method": "full", "reweighting": ReweightingSettings("linupper", warmup_ratio=0.3)},
}


def stopping_at(step: int):
    class Stopping(run_trainer.RunTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    return Stopping


FAST = ("s2ft", "lift-bfloat16")


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_stopped_twice_and_resumed(kind, dropping, tmp_path, monkeypatch):
    """Two epochs of 6 steps, a checkpoint every 2."""
    settings = {"save_steps": 2, "max_steps": -1, "num_train_epochs": 2, "model": dropping, **KINDS[kind]}
    whole = tiny_config(tmp_path / "whole", **settings)
    train_one(whole)
    summary = read_summary(tmp_path / "whole" / "run")
    assert summary["eval_loss_end"] < summary["eval_loss_start"]
    assert summary["fused_max_abs_logit_difference"] < 1e-5
    saved, plain = load_model(str(tmp_path / "whole" / "run" / "model")), load_model(dropping)
    assert saved.state_dict().keys() == plain.state_dict().keys()
    config = tiny_config(tmp_path / "stopped", **settings)
    for step in (5, 9):
        with monkeypatch.context() as patch:
            patch.setattr("graftlm.training.run.RunTrainer", stopping_at(step))
            with pytest.raises(KeyboardInterrupt):
                train_one(config, resume=step > 5)
    train_one(config, resume=True)
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")
