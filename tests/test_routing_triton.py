"""Capped routes, lists of kept chunks and tiles of packed sequences: the kernels against plain Python and torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from natsl.kernels._triton.routing import capped_routes, kept_chunks, packed_blocks
from natsl.kernels.routing import budget_threshold, cap_limits, limit_routes, route_margins, threshold_routes
from tests.oracles import chunk_count

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A few chunks, the kernels' smaller block and one less or more, and more than the larger block.
LENGTHS = [1, 2, 127, 128, 129, 1025]


def packed(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def assert_lists(route: Tensor, first: list[int], found: tuple[Tensor, Tensor]) -> None:
    """``starts`` and ``count`` hold what a loop over the chunks finds."""
    starts, count = found
    B, N, R = route.shape
    assert starts.shape == (B, R, N)
    assert count.shape == (B, R, N + 1)
    assert starts.dtype is count.dtype is torch.int32
    kept = (route > 0.5).cpu().tolist()
    for b in range(B):
        for r in range(R):
            wanted = [first[n] for keep in (True, False) for n in range(N) if kept[b][n][r] is keep]
            assert starts[b, r].tolist() == wanted
            assert count[b, r].tolist() == [sum(kept[b][m][r] for m in range(n)) for n in range(N + 1)]


# Kept chunks


@pytest.mark.parametrize("N", [1, 2, 127, 128, 129, 260])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_kept_chunks(N: int, density: float) -> None:
    route = (torch.rand(2, N, 3, device=DEVICE) < density).float()
    assert_lists(route, [16 * n for n in range(N)], kept_chunks(route, None, 16, 16 * N - 5))


def test_kept_chunks_over_many_blocks() -> None:
    route = (torch.rand(1, 2500, 1, device=DEVICE) < 0.3).float()
    starts, count = kept_chunks(route, None, 64, 2500 * 64)
    wanted = torch.cat([keep.nonzero()[:, 0] * 64 for keep in (route[0, :, 0] > 0.5, route[0, :, 0] < 0.5)])
    assert torch.equal(starts[0, 0].long(), wanted)
    assert torch.equal(count[0, 0, 1:].long(), route[0, :, 0].long().cumsum(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_kept_chunks_of_strided_routes(dtype: torch.dtype) -> None:
    route = torch.tensor([0.0, 1.0, 0.49, 0.51, math.nan, 1.0], dtype=dtype, device=DEVICE)
    route = torch.stack([route, 1 - route.flip(0)])[:, None].expand(2, 3, 6)[::2]  # [1,3,6], no stride of a row
    for strided in (route, route.transpose(1, 2)):
        assert_lists(strided, [8 * n for n in range(strided.shape[1])], kept_chunks(strided, None, 8, 48))


@pytest.mark.parametrize(
    "lengths",
    [[5], [0, 9, 0, 0, 8, 1, 16, 0], [1] * 7, [0], [0, 0, 17]],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_kept_chunks_of_packed_sequences(lengths: list[int]) -> None:
    C = 8
    first = [sum(lengths[:s]) + C * n for s in range(len(lengths)) for n in range(chunk_count(lengths[s], C))]
    route = (torch.rand(1, len(first), 2, device=DEVICE) < 0.5).float()
    assert_lists(route, first, kept_chunks(route, packed(lengths), C, sum(lengths)))


def test_kept_chunks_of_an_empty_batch() -> None:
    starts, count = kept_chunks(torch.ones(0, 4, 2, device=DEVICE), None, 16, 64)
    assert starts.shape == (0, 2, 4)
    assert count.shape == (0, 2, 5)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_blocks(size: int, dtype: torch.dtype) -> None:
    lengths = [0, 0, 5, 4, 0, 1, 13, 0]
    wanted = [(s, size * i) for s in range(8) for i in range(chunk_count(lengths[s], size))]
    bound = sum(lengths) // size + len(lengths)
    assert bound >= len(wanted)
    sequence, start = packed_blocks(packed(lengths).to(dtype), size, bound)
    assert sequence.dtype is start.dtype is torch.int32
    assert sequence.tolist() == [s for s, _ in wanted] + [-1] * (bound - len(wanted))
    assert start[: len(wanted)].tolist() == [place for _, place in wanted]


# Capped routes


@pytest.mark.parametrize("N", LENGTHS)
def test_capped_routes_equal_those_of_torch(N: int) -> None:
    margins = torch.randn(2, N, 2, device=DEVICE)
    margins[:, :: max(2, N // 3)] = math.nan
    threshold = torch.tensor([-0.3, 0.4], device=DEVICE)
    cases = [(0.07, 0), (0.3, 3)] if N > 1000 else [(0.0, 0), (0.0, 2), (0.07, 0), (0.3, 1), (0.5, 10**12), (1.0, 0)]
    for cap, burst in cases:
        for limits in (cap_limits(N, cap, burst, DEVICE), cap_limits(N, cap, min(burst, N), DEVICE).int()):
            for kept in (None, torch.randint(2 * N // 3 + 2, (2, 2), device=DEVICE)):
                expected = limit_routes(threshold_routes(margins, threshold), limits, kept)
                assert torch.equal(capped_routes(margins, threshold, limits, kept), expected), (cap, burst)


def test_caps_where_the_limit_is_an_integer() -> None:
    margins = torch.ones(1, 100, 1, device=DEVICE)
    for cap in (0.01, 0.07, 0.1, 0.29, 1 / 3, 0.57):
        limits = cap_limits(100, cap, 0, DEVICE)
        assert torch.equal(capped_routes(margins, 0.0, limits), limit_routes(margins, limits)), cap


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("N", [0, 1, 40, 129, 1025])
def test_limits_of_a_batch_equal_those_of_its_rows(N: int, backend: str) -> None:
    caps = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.07], dtype=torch.float64, device=DEVICE)
    bursts = torch.tensor([0, 0, 2, 10**15, 0], device=DEVICE)
    margins = torch.randn(5, N, 2, device=DEVICE)
    margins[:, 3::7] = math.nan
    limits = cap_limits(N, caps, bursts, DEVICE)
    route = route_margins(margins, -0.5, limits, backend=backend)
    assert route.shape == margins.shape
    for b in range(5):
        row = slice(b, b + 1)
        alone = cap_limits(N, float(caps[b]), int(bursts[b]), DEVICE)
        assert torch.equal(route[row], route_margins(margins[row], -0.5, alone, backend=backend))
    unlimited = threshold_routes(margins, -0.5)
    assert not route[0].any()
    assert torch.equal(route[1], unlimited[1])
    assert torch.equal(route[3], unlimited[3])
    assert N < 40 or (route[2] != unlimited[2]).any()


@pytest.mark.parametrize(
    "limits",
    [torch.tensor(3), torch.tensor([2]), torch.tensor([[1], [4]]), torch.tensor([[0, 1, 1, 2, 5]])],
    ids=lambda x: str(tuple(x.shape)),
)
def test_every_shape_of_limits(limits: Tensor) -> None:
    margins, limits = torch.ones(2, 5, 3, device=DEVICE), limits.to(DEVICE)
    expected = route_margins(margins, 0.0, limits.expand(2, 5).contiguous(), backend="torch")
    for backend in ("torch", "triton"):
        assert torch.equal(route_margins(margins, 0.0, limits, backend=backend), expected)


@pytest.mark.parametrize(
    "threshold",
    [0.2, math.inf, -math.inf, math.nan, torch.tensor(0.1), torch.randn(3), torch.randn(2, 1, 3), torch.randn(2, 9, 3)],
    ids=lambda t: str(tuple(t.shape)) if isinstance(t, Tensor) else str(t),
)
def test_every_shape_of_threshold(threshold: Tensor | float) -> None:
    threshold = threshold.to(DEVICE) if isinstance(threshold, Tensor) else threshold
    margins = torch.randn(3, 9, 2, device=DEVICE).permute(2, 1, 0)  # [2,9,3], strided
    for limits in (None, cap_limits(9, 0.4, 1, DEVICE)):
        expected = route_margins(margins, threshold, limits, backend="torch")
        assert torch.equal(route_margins(margins, threshold, limits, backend="triton"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.float64], ids=str)
def test_margins_are_compared_in_the_wider_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    margins = torch.full((1, 4, 1), 0.1, dtype=dtype, device=DEVICE)
    for threshold in (torch.full((1,), 0.1, dtype=other, device=DEVICE), torch.tensor(0.1, dtype=other, device=DEVICE)):
        limits = cap_limits(4, 0.5, 0, DEVICE)
        route = capped_routes(margins, threshold, limits)
        assert route.dtype is dtype
        assert torch.equal(route, limit_routes(threshold_routes(margins, threshold), limits))


def test_capped_routes_carry_no_gradient_and_allow_an_empty_batch() -> None:
    margins = torch.randn(1, 5, 2, device=DEVICE, requires_grad=True)
    for backend in ("torch", "triton"):
        for limits in (None, cap_limits(5, 0.5, 0, DEVICE)):
            assert not route_margins(margins, 0.0, limits, backend=backend).requires_grad
            assert route_margins(margins[:0], 0.0, limits, backend=backend).shape == (0, 5, 2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (0.5, "limits must be an integer tensor, int32 or int64, found float"),
        (torch.ones(4), "found torch.float32"),
        (torch.ones(3).long(), r"limits has shape \(3,\), it must be broadcastable to \(1, 4\)"),
        (torch.ones(2, 4).long(), r"limits has shape \(2, 4\)"),
        (torch.ones(1, 1, 4).long(), r"limits has shape \(1, 1, 4\)"),
    ],
    ids=["number", "float", "chunks", "rows", "dimensions"],
)
def test_mistakes_name_the_argument(backend: str, limits: Tensor, message: str) -> None:
    limits = limits.to(DEVICE) if isinstance(limits, Tensor) else limits
    with pytest.raises(ValueError, match=message):
        route_margins(torch.ones(1, 4, 1, device=DEVICE), 0.0, limits, backend=backend)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU has nothing to wait for")
def test_nothing_waits_for_the_device() -> None:
    margins, cu_seqlens = torch.randn(1, 5, 2, device=DEVICE), packed([7, 0, 17, 1])
    cap, levels = torch.full((1,), 0.5, dtype=torch.float64, device=DEVICE), torch.rand(9, device=DEVICE).double()
    table = torch.rand(2, 9, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        theta = budget_threshold(table, levels.sort().values, cap)
        kept_chunks(route_margins(margins, theta, cap_limits(5, cap, 1, DEVICE)), None, 8, 40)
        kept_chunks(route_margins(margins, 0.1, cap_limits(5, 0.5, 1, DEVICE)), None, 8, 40)
        kept_chunks(route_margins(margins, 0.1), cu_seqlens, 8, 25)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_op_keeps_the_rules_of_custom_ops() -> None:
    margins, threshold = torch.randn(2, 5, 3, device=DEVICE), torch.zeros(3, device=DEVICE)
    for limits in (cap_limits(5, 0.3, 1, DEVICE), torch.tensor([[1], [3]], device=DEVICE)):
        for kept in (None, torch.ones(2, 3, dtype=torch.int64, device=DEVICE)):
            torch.library.opcheck(torch.ops.natsl.capped_routes.default, (margins, threshold, limits, kept))
