"""How far a stage moved N: against whole copies of the model and operators written out."""

import pytest
import torch
from tiny_loop import REGIMES, begun, train
from tiny_models import batches, tiny_model

from graftlm import movement
from graftlm.apex import Apex
from graftlm.checkpointing import load_tensors, save_tensors
from graftlm.movement import rate_multipliers, stage_movement


def oracle(apex: Apex, start: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """From the model alone: what it was, what it is (effective), P and N, and each operator as a dense matrix."""
    found: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for expansion in apex.expansions:
        choice = apex.choices[expansion.block.name]
        for tie in expansion.ties:
            m = tie.operator.matrix().double()
            for piece in tie.pieces:
                n, p = (piece.matrix.index(ids) for ids in (choice.disadvantageous, choice.advantageous))  # [slots, k]
                now, before = (
                    weights[piece.name]
                    .detach()
                    .double()
                    .movedim(piece.dim, 0)
                    .reshape(len(weights[piece.name].movedim(piece.dim, 0)), -1)
                    for weights in (dict(apex.model.named_parameters()), start)
                )
                moved = m @ now[p]
                raw = now[n] - moved
                k = n.shape[1]
                rows = [round(i * (k - 1) / max(1, min(k, movement.ROWS) - 1)) for i in range(min(k, movement.ROWS))]
                found.setdefault(piece.matrix.role, []).append(
                    tuple(one[:, rows].flatten() for one in (moved, raw - before[n], raw))
                )
    found["all"] = [one for several in list(found.values()) for one in several]
    return {
        role: {
            name: float(torch.cat(list(values)).detach().square().mean().sqrt())
            for name, values in zip(("operator", "own", "weight"), zip(*several, strict=True), strict=True)
        }
        for role, several in found.items()
    }


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("options", [{}, {"operator": "dense", "share_operators": False}])
def test_movement_is_that_of_whole_copies(rows, regime, options, monkeypatch):
    monkeypatch.setattr(movement, "ROWS", rows)
    apex, optimizer = begun(tiny_model("qwen2", torch.float64), **regime, **options)  # which has biases
    assert all(one["operator"] == one["own"] == 0 for one in stage_movement(apex).values())
    start = {name: parameter.detach().clone() for name, parameter in apex.model.named_parameters()}
    train(apex, optimizer, batches(3))
    found, wanted = stage_movement(apex), oracle(apex, start)
    assert found.keys() == wanted.keys()
    for role, one in wanted.items():
        assert found[role] == pytest.approx(one, rel=1e-4), role
        assert one["operator"] > 0


def test_movement_is_of_the_stage_and_survives_saving(tmp_path):
    settings = {"stages": 2, "total_steps": 8}
    apex, optimizer = begun(tiny_model(), **settings)
    train(apex, optimizer, batches(4))
    assert apex.clock.stage == 1 and stage_movement(apex)["all"]["own"] == 0
    train(apex, optimizer, batches(2))
    model = tiny_model(seed=3)
    model.load_state_dict(apex.model.state_dict())
    save_tensors(tmp_path / "apex", apex.state_dict())
    again = Apex(model, apex.config, total_steps=8)
    again.load_state_dict(load_tensors(tmp_path / "apex"))
    assert stage_movement(again) == stage_movement(apex)
    older = {key: value for key, value in apex.state_dict().items() if not key.startswith("start.")}
    again.load_state_dict(older)
    assert stage_movement(again)["all"]["own"] is None


def test_the_multiplier_that_auto_chose():
    apex, _ = begun(tiny_model(), operator_learning_rate="auto")
    found = rate_multipliers(apex)
    assert found["lowest"] == min(apex.rates.multipliers) < found["median"] < found["highest"]
    apex, _ = begun(tiny_model(), operator_learning_rate=3.0)
    assert set(rate_multipliers(apex).values()) == {3.0}


def test_the_authors_diagonals_move_at_the_optimizers_rate():
    """What they scale is the weights themselves: operators' rates are for operators."""
    apex, optimizer = begun(tiny_model(), operator_learning_rate=3.0, authors_diagonals=True)
    diagonals = {id(p) for tie in apex.ties for p in (tie.scale_n, tie.scale_p) if p is not None}
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update(
            {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        )
    )
    train(apex, optimizer, batches(1))
    rate = next(lr for key, (lr, decay) in seen.items() if decay and key not in diagonals)
    operators = {id(p) for tie in apex.ties for p in tie.operator.parameters()}
    assert diagonals and {seen[key] for key in diagonals} == {(rate, 0.0)}
    assert {seen[key] for key in operators} == {(3 * rate, 0.0)}


def test_without_operators_nothing_moves():
    apex, _ = begun(tiny_model(), expand=False)
    assert rate_multipliers(apex) == stage_movement(apex) == {}
