"""Margins to routes: chunk means, thresholds, budgets, the hard cap; and the choice of backend."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from natsl.kernels import dispatch
from natsl.kernels.dispatch import resolve
from natsl.kernels.routing import (
    budget_threshold,
    cap_limits,
    chunk_means,
    complete_chunks,
    continued_means,
    limit_routes,
    quantile_table,
    route_margins,
    threshold_routes,
)
from natsl.kernels.segment import touched_chunks
from tests.oracles import assert_near, chunk_count, make_pieces, where_kernels_run


@pytest.mark.parametrize("T", [1, 3, 4, 5, 11])
def test_chunk_means_divide_by_the_true_count(T: int) -> None:
    x = torch.randn(2, T, 3)
    means = chunk_means(x, 4)
    assert means.shape == (2, -(-T // 4), 3)
    for n in range(means.shape[1]):
        torch.testing.assert_close(means[:, n], x[:, 4 * n : 4 * n + 4].mean(1))


def test_chunk_means_of_padded_rows_equal_those_of_short_ones() -> None:
    x = torch.randn(4, 11, 3)
    lengths = torch.tensor([11, 6, 4, 0])
    means = chunk_means(x, 4, lengths)
    for row, length in enumerate(lengths.tolist()):
        chunks = -(-length // 4)
        if chunks:
            torch.testing.assert_close(means[row : row + 1, :chunks], chunk_means(x[row : row + 1, :length], 4))
        assert not means[row, chunks:].any()


@pytest.mark.parametrize("seed", range(8))
def test_means_in_pieces_equal_those_of_one_shot(seed: int) -> None:
    totals = [30, 23, 12, 9, 2]
    x = torch.randn(5, 30, 3).double()
    total = x.new_zeros(5, 3)
    for piece in make_pieces(totals, 4, seed):
        means, total = continued_means(piece.cut(x), piece.done % 4, total, 4, piece.lengths)
        assert means.shape == (5, touched_chunks(piece.tokens, 4), 3)
        for row, (done, length) in enumerate(zip(piece.done.tolist(), piece.lengths.tolist(), strict=True)):
            end, first = done + length, done // 4
            touched = chunk_count(end, 4) - first
            expected = chunk_means(x[row : row + 1, :end], 4)[0, first:] if end else means.new_zeros(0, 3)
            assert_near(means[row, :touched], expected)
            assert not means[row, touched:].any()
            assert_near(total[row], x[row, end // 4 * 4 : end].sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 9])
def test_continued_means_sum_in_float32(T: int, dtype: torch.dtype) -> None:
    x, start = torch.randn(2, T, 3).to(dtype), torch.tensor([0, 3])
    total = torch.randn(2, 3)
    total[0] = 0
    means, after = continued_means(x, start, total, 4)
    assert (means.dtype, after.dtype) == (dtype, torch.float32)
    exact, exact_after = continued_means(x.double(), start, total.double(), 4)
    assert_near(means, exact)
    assert_near(after, exact_after)


@pytest.mark.parametrize("T", [1, 9])
def test_continued_means_read_no_value_of_a_tensor(T: int) -> None:
    start = torch.zeros(2, dtype=torch.int64, device="meta")
    means, total = continued_means(torch.ones(2, T, 3, device="meta"), start, torch.ones(2, 3, device="meta"), 4, start)
    assert means.shape == (2, touched_chunks(T, 4), 3)
    assert total.shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total": torch.zeros(2, 4)}, "continued_means: total has shape \\(2, 4\\), expected \\(2, 3\\)"),
        ({"start": torch.zeros(2)}, "start must be an int64 tensor, found torch.float32"),
        ({"lengths": torch.tensor([1])}, "lengths has shape \\(1,\\), expected \\(2,\\)"),
    ],
    ids=["total", "start", "lengths"],
)
def test_mistakes_with_continued_means(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.ones(2, 5, 3), "start": torch.tensor([0, 1]), "total": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=message):
        continued_means(**{**arguments, "chunk_size": 4, **change})  # type: ignore[arg-type]


def test_complete_chunks() -> None:
    found = complete_chunks(torch.tensor([0, 3, 4, 7, 12]), 4, 3).sum(1)
    assert found.tolist() == [0, 0, 1, 1, 3]


def test_threshold_routes_are_nested() -> None:
    margins = torch.randn(3, 20, 2)
    kept = [threshold_routes(margins, t) for t in (-math.inf, -1.0, 0.0, 0.3, 2.0, math.inf)]
    assert kept[0].all()
    assert not kept[-1].any()
    for more, fewer in pairwise(kept):
        assert (more >= fewer).all()
    by_head = threshold_routes(margins, torch.tensor([math.inf, -math.inf]))
    assert by_head.sum((0, 1)).tolist() == [0, 60]
    assert not threshold_routes(torch.full((1, 1, 1), math.nan), 0.0).any()


# Budgets


def even_levels(points: int) -> Tensor:
    return torch.linspace(0.0, 1.0, points, dtype=torch.float64)


def even_threshold(table: Tensor, budget: float) -> Tensor:
    """θ(budget) from quantiles [R,P] at even levels, one budget at a time."""
    if budget in (0.0, 1.0):
        return torch.full_like(table[:, 0], math.inf if budget == 0.0 else -math.inf)
    place = (1.0 - budget) * (table.shape[1] - 1)
    low = min(int(place), table.shape[1] - 2)
    return torch.lerp(table[:, low], table[:, low + 1], place - low)


def thresholds(table: Tensor, levels: Tensor, budgets: list[float]) -> Tensor:
    """[budgets,R] from a table [R,P]."""
    return budget_threshold(table, levels, torch.tensor(budgets, dtype=torch.float64)[:, None])


@pytest.mark.parametrize("M", [1, 2, 100, 4001])
def test_quantiles_are_those_of_torch(M: int) -> None:
    margins = torch.randn(M, 3)
    levels = torch.cat((torch.zeros(1), torch.rand(20).sort().values, torch.ones(1))).double()
    for at in (levels, even_levels(65)):
        assert torch.equal(quantile_table(margins, at), torch.quantile(margins.double(), at, dim=0))
    margins[0, 1] = math.nan
    assert quantile_table(margins, levels).isnan().all(0).tolist() == [False, True, False]


def test_quantiles_of_more_margins_than_torch_takes() -> None:
    table = quantile_table(torch.arange(2**24 + 1, dtype=torch.float32)[:, None], even_levels(3))
    assert table.flatten().tolist() == [0, 2**23, 2**24]


def test_quantiles_of_nothing() -> None:
    with pytest.raises(ValueError, match="no margins"):
        quantile_table(torch.zeros(0, 2), even_levels(3))


def test_even_levels_interpolate_as_place_in_the_table() -> None:
    rng = random.Random(0)
    budgets = [i / 1000 for i in range(1001)] + [i / 64 for i in range(65)]
    budgets += [rng.random() for _ in range(2000)] + [5e-324, 1e-17, 1 - 2**-53, math.nextafter(0.5, 0)]
    levels = even_levels(65)
    assert levels.tolist() == [i / 64 for i in range(65)]
    for R in (1, 6):
        table = torch.randn(R, 65).sort(1).values
        together = thresholds(table, levels, budgets)
        assert together.dtype is torch.float32
        for budget, theta in zip(budgets, together, strict=True):
            assert torch.equal(theta, even_threshold(table, budget)), budget
            assert torch.equal(thresholds(table, levels, [budget])[0], theta), budget


def test_budgets_give_quantiles() -> None:
    margins = torch.randn(4001, 2).double()
    levels = torch.tensor(
        [0.0, 0.02, 0.04, 0.06, 0.1, 0.2, 0.3, 0.45, 0.5, 0.6, 0.7, 0.75, 0.9, 0.95, 0.98, 1.0]
    ).double()
    for at in (even_levels(65), levels):
        table = quantile_table(margins, at).T
        assert table.shape == (2, len(at))
        assert (table.diff(dim=1) >= 0).all()
        assert torch.equal(table[:, 0], margins.amin(0))
        assert torch.equal(table[:, -1], margins.amax(0))
        budgets = [0.05, 0.1, 0.25, 0.5, 0.77, 0.95]
        for budget, theta in zip(budgets, thresholds(table, at, budgets), strict=True):
            kept = (margins > theta).double().mean(0)
            assert (kept - budget).abs().max() < 0.015


def test_budget_thresholds_fall_as_the_budget_grows() -> None:
    levels = torch.cat((torch.zeros(1), torch.rand(20).sort().values, torch.ones(1))).double()
    table = quantile_table(torch.randn(100, 3), levels).T.float()
    thetas = thresholds(table, levels, torch.linspace(0, 1, 501).tolist())  # [501,3]
    assert (thetas.diff(dim=0) <= 0).all()
    margins = torch.randn(2, 50, 3)
    kept = torch.stack([threshold_routes(margins, theta) for theta in thetas])
    assert (kept.diff(dim=0) >= 0).all(), "a larger budget keeps a superset"
    assert not kept[0].any()
    assert kept[-1].all()


@pytest.mark.parametrize(
    ("levels", "budgets"),
    [
        ([0.0, 0.5, 1.0], [1.0, 0.75, 0.5, 0.25, 0.125, 0.0]),
        ([0.0, 0.125, 1.0], [1.0, 0.9375, 0.875, 0.4375, 0.21875, 0.0]),
    ],
    ids=["even", "uneven"],
)
def test_interpolation_between_the_points_of_a_table(levels: list[float], budgets: list[float]) -> None:
    table = torch.tensor([[0.0, 1.0, 3.0]])
    values = thresholds(table, torch.tensor(levels, dtype=torch.float64), budgets).flatten().tolist()
    assert values == [-math.inf, 0.5, 1.0, 2.0, 2.5, math.inf]


def test_one_budget_per_table() -> None:
    tables, budgets = torch.randn(4, 3, 17).sort(-1).values, torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    theta = budget_threshold(tables, even_levels(17), budgets[:, None])
    assert theta.shape == (4, 3)
    for table, budget, row in zip(tables, budgets.tolist(), theta, strict=True):
        assert torch.equal(row, even_threshold(table, budget))
    every = budgets.expand(3, 4).T  # no stride of a row
    assert torch.equal(budget_threshold(tables, even_levels(17), every), theta)


def test_equal_margins_keep_nothing_but_at_budget_1() -> None:
    table = quantile_table(torch.zeros(50, 1), even_levels(17)).T
    margins = torch.zeros(1, 8, 1)
    thetas = thresholds(table, even_levels(17), [0, 0.5, 0.99, 1])
    assert [threshold_routes(margins, theta).mean().item() for theta in thetas] == [0, 0, 0, 1]


# Limits


def cap_routes(route: Tensor, cap: float, burst: int = 0) -> Tensor:
    return limit_routes(route, cap_limits(route.shape[1], cap, burst, route.device))


def sequential_cap(wanted: list[int], cap: str, burst: int) -> list[int]:
    """The rule, chunk by chunk, in exact numbers."""
    kept: list[int] = []
    for n, want in enumerate(wanted):
        limit = math.ceil(Fraction(cap) * (n + 1)) + burst
        kept.append(int(want and sum(kept) < limit))
    return kept


def test_cap_equals_the_sequential_rule() -> None:
    rng = random.Random(0)
    for case in range(400):
        cap = rng.choice(["0", "1", "0.5", "0.07", "0.1", "0.3", f"{rng.random():.3f}"])
        burst, length, density = rng.choice([0, 0, 1, 3]), rng.choice([1, 2, 30, 130]), rng.random()
        wanted = [[int(rng.random() < density) for _ in range(length)] for _ in range(4)]
        route = torch.tensor(wanted, dtype=torch.float32).view(2, 2, length).transpose(1, 2)  # [B,N,R]
        capped = cap_routes(route, float(cap), burst)
        assert capped.dtype is route.dtype
        expected = [sequential_cap(row, cap, burst) for row in wanted]
        assert capped.transpose(1, 2).reshape(4, length).int().tolist() == expected, (case, cap, burst)
        assert (capped <= route).all()


def test_cap_is_causal_and_bounds_every_prefix() -> None:
    route = (torch.rand(2, 60, 3) < 0.6).float()
    whole = cap_routes(route, 0.23, 2)
    for n in (1, 7, 33, 59):
        assert torch.equal(cap_routes(route[:, :n], 0.23, 2), whole[:, :n])
    limit = torch.tensor([math.ceil(Fraction("0.23") * n) + 2 for n in range(1, 61)])[None, :, None]
    assert (whole.cumsum(1) <= limit).all()


def test_cap_0_and_1() -> None:
    route = torch.ones(1, 9, 1)
    assert not cap_routes(route, 0.0).any()
    assert cap_routes(route, 0.0, burst=2).flatten().tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert torch.equal(cap_routes(route, 1.0), route)
    assert cap_routes(torch.ones(0, 4, 2), 0.5).shape == (0, 4, 2)


def test_caps_of_a_batch_equal_those_of_its_rows() -> None:
    caps, bursts = [0.0, 1.0, 0.07, 0.5, 0.29], [2, 0, 0, 10**12, 1]
    limits = cap_limits(200, torch.tensor(caps, dtype=torch.float64), torch.tensor(bursts), torch.device("cpu"))
    assert limits.dtype is torch.int64
    for row, cap, burst in zip(limits, caps, bursts, strict=True):
        assert torch.equal(row, cap_limits(200, cap, burst, row.device))
        assert row.tolist() == [math.ceil(Fraction(str(cap)) * n) + burst for n in range(1, 201)]
    one_burst = cap_limits(200, torch.tensor(caps, dtype=torch.float64), 3, limits.device)
    assert torch.equal(one_burst - 3, limits - torch.tensor(bursts)[:, None])
    assert torch.equal(
        cap_limits(200, 0.5, torch.tensor([0, 4]), limits.device)[1], cap_limits(200, 0.5, 4, limits.device)
    )
    assert cap_limits(0, torch.tensor(caps, dtype=torch.float64), 0, limits.device).shape == (5, 0)
    with pytest.raises(ValueError, match=r"cap is torch.float32, it must be torch.float64"):
        cap_limits(3, torch.tensor(caps), 0, limits.device)


@pytest.mark.parametrize("seed", range(8))
def test_limits_in_pieces_equal_those_of_one_shot(seed: int) -> None:
    totals = [90, 61, 40, 13, 2]
    wanted = (torch.rand(5, 23, 3) < 0.6).double()
    caps, bursts = torch.tensor([0.3, 0.0, 1.0, 0.07, 0.5]).double(), torch.tensor([0, 2, 0, 1, 3])
    whole = limit_routes(wanted, cap_limits(23, caps, bursts, caps.device))
    kept = torch.zeros(5, 3, dtype=torch.int64)
    for piece in make_pieces(totals, 4, seed):
        done = piece.done // 4
        chunks = piece.cut_route(wanted, 4)
        limits = cap_limits(chunks.shape[1], caps, bursts, caps.device, done)
        route = route_margins(chunks, 0.5, limits, kept)
        assert torch.equal(route, limit_routes(chunks, limits, kept))
        complete = ~chunks.isnan()
        assert torch.equal(route[complete], piece.cut_route(whole, 4)[complete])
        kept += torch.where(complete, route, 0).sum(1).long()
    for row, n in enumerate(totals):
        assert torch.equal(kept[row], whole[row, : n // 4].sum(0).long())


def test_a_lowered_cap_takes_back_nothing() -> None:
    rng = random.Random(0)
    for _ in range(100):
        kept, limit = rng.randint(0, 8), sorted(rng.randint(0, 12) for _ in range(10))
        wanted = [rng.random() < 0.6 for _ in range(10)]
        expected, count = [], kept
        for want, most in zip(wanted, limit, strict=True):
            expected.append(int(want and count < max(most, kept)))
            count += expected[-1]
        route = torch.tensor(wanted, dtype=torch.float32)[None, :, None]
        capped = limit_routes(route, torch.tensor(limit)[None], torch.tensor([[kept]]))
        assert capped.flatten().int().tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": torch.zeros(1, 2)}, "route_margins: kept must be an int64 tensor, found torch.float32"),
        ({"kept": torch.zeros(2, dtype=torch.int64)}, "kept has shape \\(2,\\), expected \\(1, 2\\)"),
        ({"kept": torch.zeros(1, 2, dtype=torch.int64, device="meta")}, "kept is on meta, expected cpu"),
    ],
    ids=["dtype", "shape", "device"],
)
def test_mistakes_with_kept(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"margins": torch.ones(1, 4, 2), "kept": torch.zeros(1, 2, dtype=torch.int64)}
    arguments = {**arguments, "threshold": 0.0, "limits": torch.ones(4, dtype=torch.int64), **change}
    if "backend" in change:
        arguments = where_kernels_run(arguments)
    with pytest.raises(ValueError, match=message):
        route_margins(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cap", "burst", "message"),
    [(1.2, 0, "cap = 1.2"), (-0.1, 0, "cap = -0.1"), (math.nan, 0, "cap"), (0.5, -1, "burst = -1")],
)
def test_cap_mistakes(cap: float, burst: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cap_routes(torch.ones(1, 4, 1), cap, burst)


# Backend


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("auto", "cpu", "torch"),
        ("auto", "cuda", "triton"),
        ("torch", "cuda", "torch"),
        ("triton", "cuda", "triton"),
    ],
)
def test_backend(backend: str, device: str, expected: str) -> None:
    assert resolve(backend, "op", torch.device(device)) == expected


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", "op", torch.device("cpu")) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend = 'triton' is not available for op on cpu: it needs CUDA"):
        resolve("triton", "op", torch.device("cpu"))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert resolve("auto", "op", torch.device("cuda")) == "torch"
    with pytest.raises(ValueError, match="backend = 'triton' is not available for op: triton is not installed"):
        resolve("triton", "op", torch.device("cuda"))


@pytest.mark.parametrize("backend", ["Auto", ""])
def test_unknown_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend = '{backend}' is not allowed"):
        resolve(backend, "op", torch.device("cpu"))


def test_poisoned_memory_shows() -> None:
    """The suite runs with uninitialised memory set to NaN, so that any op that reads it would fail its test."""
    poisoned: Tensor = torch.empty(4)
    assert poisoned.isnan().all()


@pytest.mark.parametrize("T", [1, 7, 8, 9, 32, 37])
def test_means_at_a_border_need_no_slots(T: int) -> None:
    x, start, total = torch.randn(2, T, 5).double(), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 5).double()
    for one, other in zip(
        continued_means(x, start, total, 8, at_border=True), continued_means(x, start, total, 8), strict=True
    ):
        assert_near(one, other)
