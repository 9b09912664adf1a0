"""What an optimizer keeps of the entries of a parameter."""

import torch

from graftlm.moments import moments_of


def test_what_is_of_the_parameters_shape_and_stacks_of_it():
    parameter, stacked = torch.zeros(3, 4), torch.arange(24.0).view(2, 3, 4)
    state = {"step": torch.tensor(3.0), "row": torch.zeros(3), "state1": stacked, "n": 4, "state2": torch.ones(3, 4)}
    first, second, last = moments_of(state, parameter)
    assert torch.equal(first, stacked[0]) and torch.equal(second, stacked[1]) and last is state["state2"]
    second.zero_()  # they are views
    assert not stacked[1].any() and stacked[0].any()
    assert moments_of({}, parameter) == []
    assert moments_of({"step": torch.tensor(3.0), "rows": torch.zeros(3)}, torch.tensor(1.0)) == [torch.tensor(3.0)]
