"""Pruned models padded to a stock class: they compute the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES as TRAINED
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from graftlm.errors import UserError
from graftlm.pruning.padding import padded
from graftlm.pruning.shapes import shapes_of
from graftlm.pruning.surgery import add_output_biases, keep_components

FAMILIES = (*TRAINED, "gemma2")
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
IN_FLOAT32 = ("olmo2",)
KEPTS = {
    "widths": {"layer0_heads": [1], "layer0_channels": [0, 5, 6], "layer1_channels": range(9)},
    "narrow": {"layer0_heads": [1], "layer1_heads": [0], "layer0_channels": [0, 5, 6]},
    "nothing": {"layer0_channels": [], "layer1_heads": [], "layer0_heads": [0]},
    "no attention": {"layer0_heads": [], "layer1_heads": []},
    "no FFN": {"layer0_channels": [], "layer1_channels": [], "layer1_heads": [1]},
}


# What the order of a sum's terms changes; some families compute their norms in float32 whatever they are held in.
ROUNDING = {"float64": 1e-12, "float32": 5e-6}


def agree(a, b, family) -> None:
    bound = ROUNDING["float32" if a.dtype == torch.float32 or family in IN_FLOAT32 else "float64"]
    torch.testing.assert_close(a, b, rtol=0, atol=bound)


def per_layer(family, kept, **changes):
    kept = {name: torch.tensor(list(ids), dtype=torch.long) for name, ids in kept.items()}
    return keep_components(tiny_model(family, **changes), kept).eval()


@torch.no_grad()
def logits(model) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_one_head_is_padded_exactly(family):
    """Norms over one head and over all are of one length there."""
    model = per_layer(family, {"layer0_channels": [0]}, num_attention_heads=1, num_key_value_heads=1)
    agree(logits(padded(model)), logits(model), family)


@pytest.mark.parametrize("kept", KEPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_computes_the_same(family, kept, tmp_path):
    model = per_layer(family, KEPTS[kept], dtype=torch.float64)
    want = logits(model)
    stock = padded(model)
    assert type(stock).__module__.startswith("transformers.")
    assert len(set(shapes_of(stock))) == 1
    agree(logits(stock), want, family)
    assert torch.equal(logits(model), want)  # the model is left as it was
    stock.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64)
    assert type(again) is type(stock)
    for parameter in again.parameters():  # mapped from the file they lie anywhere, and some kernels round by that
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(again), logits(stock))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_rounding_is_left(family):
    model = per_layer(family, KEPTS["widths"])
    agree(logits(padded(model)), logits(model), family)


def test_a_stock_model_is_given_back():
    model = per_layer("llama", {f"layer{i}_channels": range(7) for i in (0, 1)})
    assert padded(model) is model


def test_heads_that_the_stock_config_takes():
    """8 heads of 4 in 4 groups over a hidden size of 32: 6 do not divide it, so 8 are taken."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    kept = {"layer0_heads": [0, 2, 3], "layer1_heads": [1]}
    model = per_layer("llama", kept, **shape)
    stock = padded(model)
    assert stock.config.num_attention_heads == 8
    assert stock.config.num_key_value_heads == 4
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=5e-6)
    # This family's config has no head_dim: readers divide the hidden size by the heads.
    model = per_layer("qwen2", {"layer0_heads": [0], "layer1_heads": [1, 2]}, **shape)
    assert padded(model).config.num_attention_heads * 4 == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_need_a_place(family):
    bias = torch.randn(32, generator=torch.Generator().manual_seed(5))
    model = per_layer(family, KEPTS["nothing"])
    model = add_output_biases(model, {0: (bias, bias), 1: (bias, None)}).eval()
    if family in ("llama", "smollm3"):  # attention_bias and mlp_bias
        torch.testing.assert_close(logits(padded(model)), logits(model), rtol=0, atol=2e-5)
    else:
        with pytest.raises(UserError, match="constants"):
            padded(model)


SETS = st.sets(st.integers(0, 1)), st.sets(st.integers(0, 23))


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(["olmo2", "phi3", "qwen3"]), *SETS, *SETS)
def test_any_widths(family, heads0, channels0, heads1, channels1):
    if not heads0 | channels0 | heads1 | channels1:
        return
    kept = {
        "layer0_heads": heads0, "layer0_channels": channels0, "layer1_heads": heads1, "layer1_channels": channels1
    }  # fmt: skip
    model = per_layer(family, kept, dtype=torch.float64)
    agree(logits(padded(model)), logits(model), family)
