"""Activations computed by hand and naive votes: what the recorder must count, for tests."""

import torch
from transformers.activations import ACT2FN

from graftlm.activations import ActivationRecorder
from graftlm.anatomy import read_anatomy

SHARES = {"heads": 0.25, "channels": 0.125}  # of 4 heads and 24 channels: 1 and 3
VOTES = {"heads": 1, "channels": 3}


def recorder_of(model, **kwargs):
    return ActivationRecorder(model, read_anatomy(model), SHARES, **kwargs)


@torch.no_grad()
def by_hand(model, **inputs) -> dict[str, torch.Tensor]:
    """Squared norms by token: {block: [B, S, units]}; heads from attention weights and values, channels from the gate.

    Nothing is read where the recorder reads it.
    """
    config, kept, handles = model.config, {}, []

    def keep(key):
        return lambda _module, _args, output: kept.__setitem__(key, output)

    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        fused = hasattr(attention, "qkv_proj")
        handles.append((attention.qkv_proj if fused else attention.v_proj).register_forward_hook(keep(("v", i))))
        handles.append((mlp.gate_up_proj if fused else mlp.gate_proj).register_forward_hook(keep(("gate", i))))
    was_training = model.training
    weights = model.eval()(**inputs, use_cache=False, output_attentions=True).attentions  # per layer [B, H, S, S]
    model.train(was_training)
    for handle in handles:
        handle.remove()
    found = {}
    for i, weight in enumerate(weights):
        groups = config.num_key_value_heads
        values = kept["v", i][..., -groups * config.head_dim :]  # v is last where q, k and v are fused
        values = values.unflatten(-1, (groups, config.head_dim)).repeat_interleave(weight.shape[1] // groups, 2)
        heads = torch.einsum("bhst,bthd->bshd", weight, values)
        found[f"layer{i}_heads"] = heads.square().sum(-1)
        gate = ACT2FN[config.hidden_act](kept["gate", i][..., : config.intermediate_size])
        found[f"layer{i}_channels"] = gate.square()
    return found


def naive(samples: list[dict[str, torch.Tensor]]) -> tuple[dict, dict]:
    """Votes and sums over samples of {block: [units]}."""
    votes, sums = {}, {}
    for name in samples[0]:
        k = VOTES[name.split("_")[1]]
        votes[name] = torch.zeros(len(samples[0][name]), dtype=torch.int64)
        for sample in samples:
            order = sorted(range(len(sample[name])), key=lambda u: -float(sample[name][u]))
            votes[name][order[:k]] += 1
            votes[name][order[-k:]] -= 1
        sums[name] = sum(sample[name].double() for sample in samples)
    return votes, sums


def rows_of(found) -> list[dict[str, torch.Tensor]]:
    """Each row of a batch as one sample."""
    rows = len(next(iter(found.values())))
    return [{name: values[b].sum(0) for name, values in found.items()} for b in range(rows)]


def check(recorder, samples, rtol=1e-9):
    votes, sums = naive(samples)
    assert set(recorder.votes) == set(votes)
    for name in votes:
        assert recorder.samples[name] == len(samples), name
        assert torch.equal(recorder.votes[name], votes[name]), name
        torch.testing.assert_close(recorder.sums[name], sums[name], rtol=rtol, atol=0)


def counts(recorder) -> dict[str, torch.Tensor]:
    """What was counted; how it was seen (fallback) is another matter."""
    return {k: v.clone() for k, v in recorder.state_dict().items() if not k.endswith(".fallback")}


def same(a, b, rtol=0.0):
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=rtol if key.endswith("sums") else 0, atol=0)


def train_pass(model, batch, **kwargs):
    model.train()
    model(**batch, **kwargs).loss.backward()
    model.zero_grad()
