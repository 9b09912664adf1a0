"""What the recorder counts, against activations computed by hand and naive votes."""

import types
import warnings

import pytest
import torch
from activation_oracle import by_hand, check, counts, recorder_of, rows_of, same, train_pass
from tiny_models import FAMILIES, batches, tiny_model
from torch.nn import functional as F

from graftlm.activations import count_tokens
from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig

# -- the statistic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_the_definition(family):
    model = tiny_model(family, torch.float64)
    recorder = recorder_of(model)
    data = batches(3)
    assert recorder.run(data) == 6
    check(recorder, [s for batch in data for s in rows_of(by_hand(model, input_ids=batch["input_ids"]))])
    means = recorder.mean_activations()
    assert {kind: sorted(layers) for kind, layers in means.items()} == {"heads": [0, 1], "channels": [0, 1]}
    torch.testing.assert_close(means["heads"][1] * 6, recorder.sums["layer1_heads"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positional", [False, True])
def test_padding_never_counts(family, side, positional):
    """A padded batch counts as its rows one by one without padding."""
    model = tiny_model(family).train()  # in float64, transformers' eager attention gives NaN where all is masked
    ids = batches(1, rows=3)[0]["input_ids"]
    lengths = (12, 7, 4)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    recorder = recorder_of(model)
    if positional:
        model(ids, mask)
    else:
        model(input_ids=ids, attention_mask=mask)
    alone = [rows_of(by_hand(model, input_ids=ids[row][mask[row].bool()][None]))[0] for row in range(3)]
    check(recorder, alone, rtol=1e-4)  # other positions, so other rounding
    assert recorder.tokens == sum(lengths) == count_tokens({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("family", ["llama", "smollm3", "phi3"])
def test_packed_documents_count_one_by_one(family):
    """And a block's padding, documents of one token, does not."""
    model = tiny_model(family, torch.float64).train()
    lengths = [[5, 4, 1, 1, 1], [12], [2, 10]]
    ids = batches(1, rows=3)[0]["input_ids"]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    recorder = recorder_of(model)
    model(input_ids=ids, position_ids=positions, use_cache=False)
    alone = []
    for row, documents in zip(ids, lengths, strict=True):
        alone += [rows_of(by_hand(model, input_ids=d[None]))[0] for d in row.split(documents) if len(d) > 1]
    check(recorder, alone)
    assert recorder.tokens == 33 == count_tokens({"input_ids": ids, "position_ids": positions})


def test_a_row_of_padding_alone_is_no_sample():
    model = tiny_model(dtype=torch.float64)
    ids = batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1] = 0
    recorder = recorder_of(model)
    recorder.run([{"input_ids": ids, "attention_mask": mask}])
    assert set(recorder.samples.values()) == {1}


def test_microbatch_ranks_the_flattened_batch_with_its_padding():
    model = tiny_model()
    ids = batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    recorder = recorder_of(model, per="microbatch")
    recorder.run([inputs, inputs])
    whole = {name: values.sum((0, 1)) for name, values in by_hand(model, **inputs).items()}
    check(recorder, [whole, whole], rtol=1e-5)


def test_bfloat16_is_summed_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    recorder = recorder_of(model)
    seen = []
    probe = model.model.layers[0].self_attn.o_proj
    handle = probe.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    recorder.run(batches(1))
    handle.remove()
    expected = seen[0].double().unflatten(-1, (4, 8)).square().sum((1, 3)).sum(0)
    torch.testing.assert_close(recorder.sums["layer0_heads"], expected, rtol=1e-6, atol=0)


def test_autocast_does_not_round_the_sums():
    """Of padded batches, that is, where samples are told apart by a product."""
    model = tiny_model().train()
    ids = batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen = []
    probe = model.model.layers[0].self_attn.o_proj
    handle = probe.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    recorder = recorder_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    by_token = seen[0].double().unflatten(-1, (4, 8)).square().sum(-1)
    expected = (by_token * mask[..., None]).sum((0, 1))
    torch.testing.assert_close(recorder.sums["layer0_heads"], expected, rtol=1e-6, atol=0)


# -- which passes count ---------------------------------------------------------------------------------------------


def test_accumulated_batches_add_up():
    model = tiny_model(dtype=torch.float64)
    recorder = recorder_of(model)
    data = batches(4)
    for batch in data:
        train_pass(model, batch)
    check(recorder, [s for batch in data for s in rows_of(by_hand(model, input_ids=batch["input_ids"]))])
    assert recorder.tokens == 4 * 24


def test_evaluation_never_counts():
    model = tiny_model()
    recorder = recorder_of(model)
    batch = batches(1)[0]
    model.eval()
    model(**batch)
    with torch.no_grad():
        model(**batch)
        model.train()
        model(**batch)
    with torch.inference_mode():
        model(**batch)
    model.eval().generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    assert not any(recorder.samples.values())
    assert recorder.tokens == 0
    recorder.run([batch])
    assert set(recorder.samples.values()) == {2}
    assert recorder.tokens == 0  # tokens are those of training
    assert not model.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(reentrant):
    plain, model = tiny_model(), tiny_model()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    expected, recorder = recorder_of(plain), recorder_of(model)
    for batch in batches(3):
        train_pass(plain, batch)
        train_pass(model, batch, use_cache=False)
    assert set(recorder.samples.values()) == {6}
    same(counts(recorder), counts(expected))


def test_checkpointing_through_torch_counts_once():
    """Without transformers' switch: the user wraps layers by hand."""
    plain, model = tiny_model(), tiny_model()
    for layer in model.model.layers:
        inner = layer.forward
        layer.forward = types.MethodType(
            lambda _self, *a, inner=inner, **k: torch.utils.checkpoint.checkpoint(inner, *a, use_reentrant=False, **k),
            layer,
        )
    expected, recorder = recorder_of(plain), recorder_of(model)
    train_pass(plain, batches(1)[0])
    train_pass(model, batches(1)[0], use_cache=False)
    same(counts(recorder), counts(expected))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_count_the_same(backend):
    torch._dynamo.reset()
    plain, model = tiny_model(), tiny_model()
    expected, recorder = recorder_of(plain), recorder_of(model)
    compiled = torch.compile(model, backend=backend)
    for batch in batches(3):
        train_pass(plain, batch)
        model.train()
        compiled(**batch).loss.backward()
        model.eval()
        with torch.no_grad():
            compiled(**batch)
    assert set(recorder.samples.values()) == {6}
    same(counts(recorder), counts(expected), rtol=1e-5)


# -- kernels that hide the activation -------------------------------------------------------------------------------


def fuse_activation(model):
    """An FFN that never calls its activation module, as fused kernels do."""
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate_up_proj"):

            def forward(self, x):
                gate, up = self.gate_up_proj(x).chunk(2, -1)
                return self.down_proj(F.silu(gate) * up)
        else:

            def forward(self, x):
                return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

        layer.mlp.forward = types.MethodType(forward, layer.mlp)
    return model


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("through", ["recorder", "apex"])
def test_fused_activations_are_seen_at_the_gate(family, through):
    expected = recorder_of(tiny_model(family))
    expected.run(batches(3))
    model = fuse_activation(tiny_model(family))
    apex = None
    if through == "apex":
        apex = Apex(model, ApexConfig(stages=1, k_heads=0.25, k_channels=0.125))
        recorder = apex.recorder
    else:
        recorder = recorder_of(model)
    with pytest.warns(UserWarning, match="fused kernel") as caught:
        seen = apex.assess(batches(3)) if apex is not None else recorder.run(batches(3))
    assert seen == 6
    assert len([w for w in caught if "fused" in str(w.message)]) == 1
    assert len(recorder.notes) == (1 if apex is None else 2)  # an Apex would rather have fused the gate itself
    assert apex is None or set(recorder.notes) <= set(apex.notes)
    same(counts(recorder), counts(expected))


def test_fused_activations_in_training_miss_the_first_batch_and_say_so():
    data = batches(3)
    expected = recorder_of(tiny_model())
    for batch in data[1:]:
        train_pass(expected.model, batch)
    model = fuse_activation(tiny_model())
    recorder = recorder_of(model)
    with pytest.warns(UserWarning, match="first batch was not counted"):
        train_pass(model, data[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for batch in data[1:]:
            train_pass(model, batch)
    assert torch.equal(recorder.votes["layer0_channels"], expected.votes["layer0_channels"])
    assert recorder.samples["layer0_channels"] == 4
    assert recorder.samples["layer0_heads"] == 6


# -- the penalty (table 7) ------------------------------------------------------------------------------------------


def penalty_by_hand(model, ids):
    """sigma / mean over units, averaged over samples and modules."""
    found = by_hand(model, input_ids=ids)
    per_sample = [values.sum(1) for values in found.values()]
    return torch.stack([(a.std(1, correction=0) / a.mean(1)).mean() for a in per_sample]).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_penalty_and_its_gradient(checkpointing):
    model = tiny_model(dtype=torch.float64).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    recorder = recorder_of(model)
    recorder.differentiable = True
    ids = batches(1)[0]["input_ids"]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert recorder.penalty is not None
    (loss * 0 + recorder.penalty).backward()
    assert set(recorder.samples.values()) == {2}
    weight = model.model.layers[0].self_attn.v_proj.weight
    slope, step = float(weight.grad[3, 4]), 1e-3  # attention's softmax is float32 at best
    recorder.close()
    model.eval()
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            weight[3, 4] += sign * step
            values.append(float(penalty_by_hand(model, ids)))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-3)


def test_penalty_is_none_when_off_and_in_evaluation():
    model = tiny_model().train()
    recorder = recorder_of(model)
    model(**batches(1)[0])
    assert recorder.penalty is None
    recorder.differentiable = True
    model(**batches(1)[0])
    assert recorder.penalty.requires_grad
    model.eval()(**batches(1)[0])
    assert recorder.penalty is None


# -- state ----------------------------------------------------------------------------------------------------------


def test_state_round_trip():
    model = tiny_model()
    recorder = recorder_of(model)
    data = batches(4)
    for batch in data[:2]:
        train_pass(model, batch)
    other = recorder_of(tiny_model())
    other.load_state_dict(recorder.state_dict())
    same(counts(other), counts(recorder))
    for batch in data[2:]:
        train_pass(model, batch)
        train_pass(other.model, batch)
    same(counts(other), counts(recorder))
    recorder.reset()
    assert not any(recorder.samples.values())
    assert recorder.tokens == 4 * 24  # of the run, not of the stage


def test_close_leaves_no_hook():
    model = fuse_activation(tiny_model())
    recorder = recorder_of(model)
    with pytest.warns(UserWarning):
        recorder.run(batches(1))
    recorder.close()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks and not module._backward_pre_hooks
    before = counts(recorder)
    train_pass(model, batches(1)[0])
    same(counts(recorder), before)


def test_the_penalty_is_of_every_pass_and_votes_of_those_that_are_due():
    model = tiny_model()
    recorder = recorder_of(model)
    recorder.differentiable = True
    recorder.due = lambda: recorder.passes % 3 == 1
    found = []
    for batch in batches(6):
        model.train()(**batch)
        found.append((float(recorder.penalty.detach()), *recorder.samples.values()))
    assert all(penalty > 0 for penalty, *_ in found)
    assert [counts[0] for _, *counts in found] == [2, 2, 2, 4, 4, 4]  # 2 rows a batch


def test_a_pass_that_fails_is_as_if_it_had_not_been():
    model = tiny_model().train()
    recorder = recorder_of(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10_000]]))
    assert recorder.notes == [] and set(recorder.samples.values()) == {0}
    model(**batches(1)[0])
    assert set(recorder.samples.values()) == {2}


def test_looking_makes_no_logits_of_all_tokens():
    model, seen = tiny_model(), []
    model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:2]))
    recorder_of(model).run(batches(2, rows=3, length=12))
    assert seen == [(3, 1)] * 2
