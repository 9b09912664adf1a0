"""The loss that every evaluation of a run, a split and a pruning is, against nats and tokens counted one by one."""

import pytest
from tiny_models import nats_and_tokens, tiny_model, unequal_batches

from graftlm.held_out import mean_loss


def test_mean_loss_weighs_tokens():
    model = tiny_model().eval()
    given = unequal_batches()
    counted = [nats_and_tokens(model, batch["input_ids"]) for batch in given]
    nats, tokens = [float(n.detach()) for n, _ in counted], [t for _, t in counted]
    assert abs(nats[0] / tokens[0] - nats[1] / tokens[1]) > 1e-2  # else the mean of means would be the same
    found = mean_loss(model, [{**batch, "labels": batch["input_ids"]} for batch in given])
    assert found == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)
