"""Dynamic batch loading: weights of sources follow their losses, and a resumed run sees the same sequences."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_shrinks import quiet_shrink, tiny_shrink

from graftlm.errors import UserError
from graftlm.models import load_tokenizer
from graftlm.training.config import DynamicLoadingConfig, RunConfig, SourceConfig
from graftlm.training.data import prepare_data
from graftlm.training.data.dynamic import DynamicBlocks
from graftlm.training.data.packing import Block
from graftlm.training.dynamic_loading import SMOOTHING, updated_weights
from graftlm.training.run import train_one

positive = st.floats(0.01, 1)
losses = st.floats(0, 12)


# --- the weights -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(positive, losses, losses), min_size=2, max_size=6))
@settings(max_examples=50, deadline=None)
def test_weights_follow_algorithm_1(rows):
    weights, now, references = zip(*rows, strict=True)
    new = updated_weights(weights, now, references)
    alpha = [w * math.exp(max(a - b, 0)) for w, a, b in rows]
    plain = [a / sum(alpha) for a in alpha]
    assert new == pytest.approx([(1 - SMOOTHING) * p + SMOOTHING / len(rows) for p in plain], rel=1e-9)
    assert sum(new) == pytest.approx(1)
    assert min(new) > 0


def test_a_source_that_is_behind_is_seen_more():
    new = updated_weights([0.5, 0.5], [3.0, 2.0], [2.0, 2.0])
    assert new[0] / new[1] == pytest.approx(math.e, rel=1e-3)
    assert updated_weights([0.3, 0.7], [1.0, 1.5], [2.0, 2.0]) == pytest.approx([0.3, 0.7], abs=1e-4)  # both are there
    assert sum(updated_weights([0.5, 0.5], [5000.0, 1.0], [1.0, 1.0])) == pytest.approx(1)


# --- the data --------------------------------------------------------------------------------------------------------


def blocks(lengths, seed=0, weights=(1.0, 3.0)):
    made = [[Block(np.full(n, source, np.int32), None, None) for n in some] for source, some in enumerate(lengths)]
    sizes = [np.array(some) for some in lengths]
    return DynamicBlocks(made, sizes, weights, 400, seed, [])


def shares(data, first, end):
    tokens = np.zeros(len(data.sources))
    for number in range(first, end):
        source, block = data.pick(number)
        tokens[source] += data.sizes[source][block]
    return tokens / tokens.sum()


def test_shares_of_tokens_are_the_weights_window_by_window():
    data = blocks([[10, 20, 30] * 9, [15] * 20])
    assert shares(data, 0, 200) == pytest.approx([0.25, 0.75], abs=0.02)
    before = [data.pick(number) for number in range(200)]
    data.begin_window(200, [0.8, 0.2])
    assert shares(data, 200, 400) == pytest.approx([0.8, 0.2], abs=0.02)
    assert [data.pick(number) for number in range(200)] == before


@given(st.integers(0, 5), st.integers(1, 60), st.integers(1, 60), st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_what_is_seen_depends_on_nothing_but_the_windows(seed, first, more, asked):
    """However far was read ahead before the weights changed, as another process would that begins at any item."""
    data, again = (blocks([[10, 20, 30] * 9, [15] * 20], seed) for _ in range(2))
    data.pick(asked)
    data.begin_window(first, [0.9, 0.1])
    data.pick(asked)
    data.begin_window(first + more, [0.4, 0.6])
    again.set_windows(data.windows)
    assert again.pick(301) == data.pick(301)
    assert [data.pick(n) for n in range(301)] == [again.pick(n) for n in range(301)]


def test_every_block_comes_once_before_one_comes_twice():
    data = blocks([[10] * 7, [10] * 5], weights=(1.0, 1.0))
    data.begin_window(9, [0.5, 0.5])
    seen = [[block for source, block in map(data.pick, range(60)) if source == one] for one in range(2)]
    for one, size in zip(seen, (7, 5), strict=True):
        for turn in range(0, len(one) - size, size):
            assert sorted(one[turn : turn + size]) == list(range(size))
        assert one[:size] != one[size : 2 * size]


# --- runs ------------------------------------------------------------------------------------------------------------


def sources(folder):
    """Two kinds of text, one of which is much easier."""
    easy, hard = folder / "easy.jsonl", folder / "hard.jsonl"
    letters = np.random.default_rng(0).integers(97, 123, (40, 400))
    easy.write_text("".join(json.dumps({"text": f"{i} " + "abc " * 100}) + "\n" for i in range(40)))
    hard.write_text("".join(json.dumps({"text": bytes(row.tolist()).decode()}) + "\n" for row in letters))
    return (SourceConfig(str(easy), weight=1.0), SourceConfig(str(hard), weight=1.0))


def run_config(folder, data, name, **changes):
    return RunConfig(
        **{
            "model": "tiny-llama",
            "data": data,
            "eval_fraction": 0.2,
            "output_dir": str(folder / name),
            "cache_dir": str(folder / "cache"),
            "method": "full",
            "max_length": 32,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_steps": 12,
            "save_steps": 4,
            "save_total_limit": 9,
            "logging_steps": 1,
            "dynamic_loading": DynamicLoadingConfig(every=3, sequences=4, reference_losses=(0.1, 4.0)),
            **changes,
        }
    )


def lines(folder, event="weights"):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    drop = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in drop} for line in found if line["event"] == event]


def test_a_run_sees_more_of_what_it_is_behind_in_and_resumes(tmp_path):
    config = run_config(tmp_path, sources(tmp_path), "whole")
    train_one(config, lean=True)
    told = lines(tmp_path / "whole")
    assert [line["step"] for line in told] == [3, 6, 9]
    weights = [0.5, 0.5]
    for line in told:
        assert line["references"] == [0.1, 4.0]
        weights = updated_weights(weights, line["losses"], line["references"])
        assert line["weights"] == weights
    assert weights[0] > 0.9  # the easy one is far above 0.1
    shutil.copytree(tmp_path / "whole", tmp_path / "kept")
    for later in ("step-8", "step-12"):  # as if it had been killed after the step 7
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / later)
    shutil.rmtree(tmp_path / "whole" / "model")
    (tmp_path / "whole" / "summary.json").unlink()
    train_one(config, resume=True, lean=True)
    ours, theirs = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "kept"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for event in ("weights", "train"):
        assert lines(tmp_path / "whole", event) == lines(tmp_path / "kept", event)


def test_references_are_the_starting_models(tmp_path):
    loading = DynamicLoadingConfig(every=2, sequences=4)
    config = run_config(tmp_path, sources(tmp_path), "run", dynamic_loading=loading, max_steps=3, save_steps=0)
    train_one(config, lean=True)
    [told] = lines(tmp_path / "run")
    assert told["references"] == pytest.approx([5.6, 5.6], abs=0.4)  # of 256 letters, about: ln 256 = 5.5
    assert told["losses"] != told["references"]


def test_in_a_shrink_they_are_the_originals(tmp_path):
    """And weights go on from phase to phase."""
    train = {"dynamic_loading": {"every": 2, "sequences": 4}, "eval_fraction": 0.2, "max_length": 32}
    quiet_shrink(tiny_shrink(tmp_path, data=sources(tmp_path), eval_data=(), train=train))
    told = lines(tmp_path / "run")
    assert [line["step"] for line in told] == [2, 4, 6, 8, 10]
    first = json.loads((tmp_path / "run/phase_01/pruned/phase.json").read_text())
    weights = [0.5, 0.5]
    for line in told:
        assert line["references"] == first["reference_losses"]
        weights = updated_weights(weights, line["losses"], line["references"])
        assert line["weights"] == pytest.approx(weights)


def test_data_has_the_weights_of_the_config(tmp_path):
    easy, hard = sources(tmp_path)
    data = (dataclasses.replace(easy, weight=3.0), hard)
    found = prepare_data(run_config(tmp_path, data, "x"), load_tokenizer("tiny-llama"), progress=False)
    assert isinstance(found.train, DynamicBlocks)
    assert found.train.weights == (0.75, 0.25)
    assert len(found.train) == 12 * 4
    assert [len(one) for one in found.train.held_out] == [4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": (SourceConfig("a.txt"),)}, "data has one source"),
        ({"dynamic_loading": DynamicLoadingConfig(every=1, reference_losses=(1.0,))}, "has 1 losses for 2 sources"),
        ({"eval_data": (SourceConfig("a.txt"),)}, "eval_data: has 1 sources; dynamic_loading needs one for each"),
        ({"eval_fraction": 0.0}, "eval_fraction: dynamic_loading measures losses on held-out text"),
        ({"max_steps": -1}, "num_train_epochs: does not go with dynamic_loading"),
        ({"streaming": True}, "streaming: does not go with dynamic_loading"),
        ({"control": True}, "control: would see other data than the run"),
    ],
)
def test_what_cannot_be_is_said(changes, message, tmp_path):
    data = changes.pop("data", (SourceConfig("a.txt", weight=1), SourceConfig("b.txt", weight=1)))
    with pytest.raises(UserError, match=message) as error:
        run_config(tmp_path, data, "x", **changes)
    assert "\n" not in str(error.value)
