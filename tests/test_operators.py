"""Operators against their definition: M written out, and autograd through it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.operators import Monarch, make_operator, monarch_shape, stacked
from graftlm.parts import count_parameters

KINDS = ("monarch", "dense", "diagonal")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# 64, 121, 144: squares; 97, 211: primes; 210 = 14 * 15
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 97, 121, 144, 210, 211]))


def random_operator(kind, k, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    operator = make_operator(kind, k, dtype)
    operator.reset(generator)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return operator


def pulled_back(operator, x, g):
    """For g = dL/d(M x): M^T g, and dL/d(parameter)."""
    back, factors = operator.pull_products(stacked([operator]), x[None], g[None])
    return back[0], [factor[0] for factor in factors]


def drawn(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    k=SIZES,
    d=st.integers(1, 6),
    dtype=st.sampled_from(list(TOLERANCE)),
    strided=st.booleans(),
)
def test_products_and_gradients_are_those_of_the_matrix(kind, k, d, dtype, strided):
    operator = random_operator(kind, k, dtype)
    x, g = (drawn(d, k, dtype=dtype, seed=s).T if strided else drawn(k, d, dtype=dtype, seed=s) for s in (1, 2))
    matrix = operator.matrix()
    assert matrix.shape == (k, k)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * k}
    torch.testing.assert_close(operator(x), matrix @ x, **close)
    (matrix @ x).backward(g)
    back, factors = pulled_back(operator, x, g)
    torch.testing.assert_close(back, matrix.T @ g, **close)
    for parameter, factor in zip(operator.parameters(), factors, strict=True):
        torch.testing.assert_close(factor, parameter.grad, **close)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), k=SIZES)
def test_gradients_of_the_parameters_from_that_of_the_matrix(kind, k):
    operator = random_operator(kind, k)
    grad = drawn(k, k, dtype=torch.float64, seed=1)
    operator.matrix().backward(grad)
    factors = operator.pull_matrix(grad)
    for parameter, factor in zip(operator.parameters(), factors, strict=True):
        torch.testing.assert_close(factor, parameter.grad, rtol=1e-12, atol=1e-12 * k)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 6, 7, 12])
def test_the_monarch_matrix_is_its_definition(k, diagonal):
    """M = [D_ij] blockdiag(R_j), block by block, with D_ij and (when diagonal) R_j written out."""
    operator = random_operator("diagonal" if diagonal else "monarch", k)
    a, b = operator.a, operator.b
    rows = []
    for i in range(a):
        inner = [torch.diag(operator.R[j]) if diagonal else operator.R[j] for j in range(a)]
        rows.append(torch.cat([torch.diag(operator.D[:, i, j]) @ inner[j] for j in range(a)], 1))
    assert a * b >= k
    torch.testing.assert_close(operator.matrix(), torch.cat(rows)[:k, :k], rtol=0, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), k=SIZES)
def test_a_stage_starts_from_exactly_zero(kind, k):
    operator = random_operator(kind, k)
    operator.reset(torch.Generator().manual_seed(3))
    x = drawn(k, 3, dtype=torch.float64, seed=1)
    for product in (operator.matrix(), operator(x), pulled_back(operator, x, x)[0]):
        assert torch.count_nonzero(product) == 0


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), k=SIZES)
def test_a_stage_can_learn_from_zero(kind, k):
    """Zero is no fixed point: some parameter has a gradient there."""
    operator = make_operator(kind, k, torch.float64)
    operator.reset(torch.Generator().manual_seed(3))
    _, factors = pulled_back(
        operator, drawn(k, 4, dtype=torch.float64, seed=1), drawn(k, 4, dtype=torch.float64, seed=2)
    )
    assert any(factor.detach().abs().max() > 0 for factor in factors)


@pytest.mark.parametrize("kind", ["monarch", "diagonal"])
@pytest.mark.parametrize("k", [1, 7, 100, 1600, 2048])
def test_d_is_kaiming_uniform_with_the_fan_in_of_one_block(kind, k):
    operator = make_operator(kind, k, torch.float32)
    operator.reset(torch.Generator().manual_seed(0))
    gain = torch.nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    bound = gain * math.sqrt(3 / operator.a)  # kaiming_uniform_(a=sqrt 5) of an a x a matrix, as nn.Linear's
    found = operator.D.detach().double()
    assert float(found.abs().max()) <= bound
    if found.numel() > 1000:
        assert float(found.abs().max()) > 0.98 * bound
        assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(float(found.mean())) < 0.05 * bound


@pytest.mark.parametrize("kind", ["monarch", "diagonal"])
def test_a_seed_draws_the_same_operator_in_every_dtype(kind):
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        operator = make_operator(kind, 30, dtype)
        operator.reset(torch.Generator().manual_seed(11))
        assert operator.D.dtype == operator.R.dtype == dtype
        found.append(operator.D.detach())
    assert torch.equal(found[0].double(), found[1])
    assert torch.equal(found[0].bfloat16(), found[2])
    other = make_operator(kind, 30, torch.float32)
    other.reset(torch.Generator().manual_seed(12))
    assert not torch.equal(found[0], other.D)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_seed_draws_the_same_operator_on_every_device():
    draws = []
    for device in ("cpu", "cuda"):
        operator = make_operator("monarch", 30, torch.float32, torch.device(device))
        operator.reset(torch.Generator().manual_seed(11))
        draws.append(operator.D.detach().cpu())
    assert torch.equal(*draws)


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_the_number_of_parameters(kind):
    for k in [*range(1, 60), 97, 100, 1024]:
        a, b = monarch_shape(k)
        size = {"dense": k * k, "monarch": a * b * (a + b), "diagonal": a * b * (a + 1)}[kind]
        assert count_parameters(make_operator(kind, k, torch.float32)) == size
    assert count_parameters(make_operator("monarch", 1024, torch.float32)) == 2 * 1024**1.5  # eq. 13's count, a = b


def squarest(n):
    """Brute force: the largest a with a * b = n and a <= b."""
    a = max(a for a in range(1, n + 1) if n % a == 0 and a * a <= n)
    return a, n // a


def test_blocks_are_near_square_and_padding_is_minimal():
    for k in range(1, 700):
        a, b = monarch_shape(k)
        assert a <= b <= 2 * a
        assert (a, b) == squarest(a * b)
        for smaller in range(k, a * b):  # nothing nearer to k would have done
            c, d = squarest(smaller)
            assert d > 2 * c, (k, smaller)
        if k > 3:
            assert a >= 2, "one dense block"


@pytest.mark.parametrize("kind", KINDS)
def test_spread_is_how_far_a_step_moves_a_row(kind):
    """Every zero-started parameter one unit away, with a random sign, on rows of unit rms."""
    operator = make_operator(kind, 400, torch.float64)
    generator = torch.Generator().manual_seed(0)
    operator.reset(generator)
    moving = operator.R if isinstance(operator, Monarch) else operator.M
    with torch.no_grad():
        moving.copy_(torch.randn(moving.shape, generator=generator).sign())
    moved = operator(drawn(400, 200, dtype=torch.float64, seed=4))
    assert operator.spread() == pytest.approx(float(moved.detach().square().mean().sqrt()), rel=0.05)


@pytest.mark.parametrize("kind", ["monarch", "diagonal"])
def test_spread_where_blocks_are_not_square(kind):
    operator = make_operator(kind, 800, torch.float64)  # 25 blocks of 32
    generator = torch.Generator().manual_seed(0)
    operator.reset(generator)
    with torch.no_grad():
        operator.R.copy_(torch.randn(operator.R.shape, generator=generator).sign())
    moved = operator(torch.randn(800, 200, generator=generator, dtype=torch.float64))
    assert operator.spread() == pytest.approx(float(moved.detach().square().mean().sqrt()), rel=0.04)
