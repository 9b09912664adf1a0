"""Time of training is all of it but evaluation and saving: waiting for data too."""

import time

from tiny_runs import tiny_config

from graftlm.files import read_json
from graftlm.training.data.blocks import BlockDataset
from graftlm.training.meter import Meter
from graftlm.training.run import train_one

WAIT = 0.05
"""Seconds."""


def test_parts_that_lie_in_one_another_are_counted_once():
    meter = Meter()
    with meter.timed():
        time.sleep(WAIT)
        with meter.timed():
            time.sleep(WAIT)
        with meter.untimed():
            time.sleep(4 * WAIT)
        meter.start()  # it is running already
        time.sleep(WAIT)
    assert 3 * WAIT <= meter.seconds < 5 * WAIT
    before = meter.seconds
    with meter.untimed():
        time.sleep(WAIT)
    assert meter.seconds == before


def test_waiting_for_data_is_time_of_training(tmp_path, monkeypatch):
    get = BlockDataset.__getitem__

    def slow(self, number):
        if training:
            time.sleep(WAIT)
        return get(self, number)

    training = True
    monkeypatch.setattr(BlockDataset, "__getitem__", slow)
    config = tiny_config(tmp_path, method="full", max_steps=6, eval_fraction=0.0)
    train_one(config, lean=True)
    waited = 5 * config.sequences_per_step * WAIT  # the first step's data come before its time begins
    assert read_json(tmp_path / "run" / "summary.json")["seconds"] > waited


def test_evaluation_is_not(tmp_path, monkeypatch):
    from graftlm.training import run_trainer

    mean_loss = run_trainer.mean_loss

    def slow(*args, **kwargs):
        time.sleep(1)
        return mean_loss(*args, **kwargs)

    monkeypatch.setattr(run_trainer, "mean_loss", slow)
    train_one(tiny_config(tmp_path, max_steps=6, eval_steps=1, apex={"stages": 3}), lean=True)
    evaluations = 6 + 2 + 3
    assert read_json(tmp_path / "run" / "summary.json")["seconds"] < evaluations
