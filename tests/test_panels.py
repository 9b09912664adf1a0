"""Reading and writing panels, against indexing written out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from panel_cases import case

from graftlm.panels import Place, add_all, put_all, take_all


def entries(place: Place, weight: torch.Tensor):
    """The rows or columns of `weight` that make up the panel, one by one: (slot, i, view)."""
    for slot in range(place.slots):
        for i, at in enumerate(place.index[slot].tolist()):
            yield slot, i, weight[at] if place.dim == 0 else weight[:, at]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 50), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_panels_are_what_indexing_gives(seed, dtype):
    places, weights = case(seed, dtype)
    batch = take_all(places, weights)
    panels = batch.split([place.slots for place in places])
    for place, weight, panel in zip(places, weights, panels, strict=True):
        for slot, i, view in entries(place, weight):
            assert torch.equal(panel[slot, i], view)
    new = torch.randn(batch.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    parts = new.split([place.slots for place in places])
    put, added = ([w.clone() for w in weights] for _ in range(2))
    put_all(places, put, parts)
    add_all(places, added, parts)
    for place, weight, part, written, summed in zip(places, weights, parts, put, added, strict=True):
        expected_put, expected_sum = weight.clone(), weight.clone()
        for slot, i, view in entries(place, expected_put):
            view.copy_(part[slot, i])
        for slot, i, view in entries(place, expected_sum):
            view.add_(part[slot, i])
        assert torch.equal(written, expected_put)
        assert torch.equal(summed, expected_sum)


@pytest.mark.parametrize("dim", [0, 1])
def test_absent_positions_are_left_out(dim):
    grad = torch.zeros(5, 5)
    place = Place(torch.tensor([[3, -1, 1]]), dim)
    place.add_(grad, torch.tensor([1.0, 2.0, 4.0])[None, :, None].expand(1, 3, 5), partly=True)
    expected = torch.zeros(5, 5)
    expected[3], expected[1] = 1.0, 4.0
    assert torch.equal(grad, expected if dim == 0 else expected.T)


def test_a_bias_is_a_panel_of_width_one():
    bias = torch.arange(6.0)
    place = Place(torch.tensor([[4, 2]]), 0)
    panel = place.take(bias)
    assert panel.tolist() == [[[4.0], [2.0]]]
    place.put_(bias, panel + 10)
    place.add_(bias, panel)
    assert bias.tolist() == [0, 1, 14, 3, 18, 5]


def test_gpu_kernels_equal_the_plain_path():
    """By Triton's interpreter, so that this runs everywhere."""
    check = Path(__file__).with_name("panel_kernels_check.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, check], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
