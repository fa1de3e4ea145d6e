"""Both memories from a cache on Triton: pieces of any sizes against the torch backend, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natsl.kernels.delta import DeltaState, routed_delta_rule
from natsl.kernels.pages import KeyPages, paged_softmax, plan_pages
from natsl.kernels.segment import split
from tests.oracles import Piece, assert_near, delta_inputs, make_pieces, softmax_inputs, where_kernels_run

C = 16
TOTALS = [90, 61, 40, 33, 5]
DTYPES = [
    torch.float32,
    torch.float16,
    *([torch.bfloat16] if torch.cuda.is_available() else []),
]  # no bfloat16 interpreted
UNIFORM = [[(0, 90)], [(0, 32), (32, 64), (64, 90)], [(0, 7), (7, 12), (12, 50), (50, 51), (51, 90)]]


def uniform_pieces(borders: list[tuple[int, int]], rows: int) -> list[Piece]:
    return [Piece(b - a, torch.full((rows,), a), torch.full((rows,), b - a)) for a, b in borders]


def on_device(*tensors: Tensor) -> list[Tensor]:
    found = where_kernels_run({str(i): x for i, x in enumerate(tensors)})
    return [x for x in found.values() if isinstance(x, Tensor)]


def moved(state: DeltaState | KeyPages) -> list[Tensor]:
    return on_device(*state)


def run_delta(inputs: list[Tensor], pieces: list[Piece], backend: str, state: DeltaState) -> list[Tensor]:
    """Outputs of every piece, then the state."""
    outputs = []
    for piece in pieces:
        x = on_device(*(piece.cut(x) for x in inputs[:5]), piece.cut_route(inputs[5], C), piece.lengths)
        padded = bool((piece.lengths < piece.tokens).any())
        o, after = routed_delta_rule(
            *x[:6],
            chunk_size=C,
            initial_state=state,
            output_final_state=True,
            lengths=x[6] if padded else None,
            backend=backend,
        )
        assert isinstance(after, DeltaState)
        state = after
        outputs.append(torch.cat([o[b, :n] for b, n in enumerate(piece.lengths.tolist())]))
    return [*outputs, *state]


def compare_delta(inputs: list[Tensor], pieces: list[Piece], dtype: torch.dtype) -> None:
    B = inputs[0].shape[0]
    R, K, V = *inputs[0].shape[2:], inputs[2].shape[3]
    state = DeltaState(*(torch.rand(x.shape) if x.is_floating_point() else x for x in DeltaState.zeros(B, R, K, V)))
    state = state._replace(working=state.border, decay=torch.zeros(B, R))  # at a border, and not empty
    rounded = [x.to(dtype) for x in inputs[:3]] + [x.float() for x in inputs[3:]]
    precise = DeltaState(*(x.double() if x.is_floating_point() else x for x in state))
    expected = run_delta([x.double() for x in rounded], pieces, "torch", DeltaState(*moved(precise)))
    actual = run_delta(rounded, pieces, "triton", DeltaState(*moved(state)))
    for x, y in zip(actual[:-1], expected[:-1], strict=True):
        assert_near(x, y, dtype)
    assert torch.equal(actual[-1], expected[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_in_pieces_of_any_sizes(dtype: torch.dtype) -> None:
    compare_delta(delta_inputs(90, B=5, K=8, V=6, C=C), make_pieces(TOTALS, C, 1), dtype)


@pytest.mark.parametrize("borders", UNIFORM, ids=len)
def test_delta_in_rows_that_agree(borders: list[tuple[int, int]]) -> None:
    compare_delta(delta_inputs(90, C=C, K=8, V=6), uniform_pieces(borders, 2), torch.float32)


def run_pages(inputs: list[Tensor], pieces: list[Piece], backend: str) -> list[Tensor]:
    """Outputs of every piece, then what the pages of every head hold; what must not be read is NaN."""
    _, k, v, route = inputs
    B, R = route.shape[0], route.shape[2]
    made = KeyPages.empty(k, v, R, C).grow(1 + B * R + int(route.sum()), 8)
    pages = KeyPages(*on_device(*(x.fill_(float("nan")) for x in made[:2]), *made[2:]))
    outputs = []
    for piece in pieces:
        q, k, v, routes, start, lengths = on_device(
            *(piece.cut(x) for x in inputs[:3]), piece.cut_route(route, C), piece.done % C, piece.lengths
        )
        padded = bool((piece.lengths < piece.tokens).any())
        o, pages = paged_softmax(
            q,
            k,
            v,
            routes,
            pages,
            start,
            chunk_size=C,
            lengths=lengths if padded else None,
            at_border=not bool(start.any()),
            backend=backend,
        )
        for b, n in enumerate(piece.lengths.tolist()):
            assert not o[b, n:].any()
            outputs.append(o[b, :n])
    used = torch.arange(pages.table.shape[2], device=pages.table.device) <= pages.kept[..., None]
    held = [x[pages.table[used]].nan_to_num(0.5) for x in pages[:2]]
    return [*outputs, *held, pages.kept]


def compare_pages(inputs: list[Tensor], pieces: list[Piece], dtype: torch.dtype) -> None:
    rounded = [x.to(dtype) for x in inputs]
    expected = run_pages([x.double() for x in rounded], pieces, "torch")
    actual = run_pages(rounded, pieces, "triton")
    for x, y in zip(actual, expected, strict=True):
        if x.dtype == torch.int64:
            assert torch.equal(x, y)
        else:
            assert_near(x, y, dtype)


@pytest.mark.parametrize("G", [1, 2], ids=lambda n: f"{n}-per-head")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_in_pieces_of_any_sizes(dtype: torch.dtype, G: int) -> None:
    compare_pages(softmax_inputs(90, B=5, G=G, C=C, K=8, V=6), make_pieces(TOTALS, C, 2), dtype)


@pytest.mark.parametrize("routes", ["random", "ones", "zeros"])
@pytest.mark.parametrize("borders", UNIFORM, ids=len)
def test_softmax_in_rows_that_agree(borders: list[tuple[int, int]], routes: str) -> None:
    inputs = softmax_inputs(90, G=2, C=C, K=8, V=6)
    if routes != "random":
        inputs[3] = torch.full_like(inputs[3], float(routes == "ones"))
    compare_pages(inputs, uniform_pieces(borders, 2), torch.float32)


def test_scores_too_large_for_a_fixed_shift() -> None:
    """A tile whose sum or product is not finite starts again with a running maximum."""
    inputs = softmax_inputs(90, C=C, K=8, V=6)
    inputs[0] *= 60
    compare_pages(inputs, uniform_pieces([(0, 20), (20, 90)], 2), torch.float32)


@pytest.mark.parametrize("chunks", [5, 1100], ids=["a few", "several blocks"])
def test_plans_agree(chunks: int) -> None:
    """Routes of any strides, rows of any lengths: none, to a border, past it."""
    T, R = chunks * C, 3
    start, lengths = torch.tensor([0, 3, 15, 0, 1]), torch.tensor([T, T - 3, 1, 0, T - 5])
    kept, route = torch.randint(9, (5, R)), (torch.rand(5, R, chunks + 1) < 0.4).float().transpose(1, 2)
    x = on_device(route, kept, start, lengths)
    for count in (x[3], None):
        first, other = (
            plan_pages(*x[:3], tokens=T, chunk_size=C, lengths=count, backend=name) for name in ("torch", "triton")
        )
        assert torch.equal(first.routed, other.routed)
        assert torch.equal(first.kept, other.kept)
        used = torch.arange(chunks + 2, device=x[0].device) <= (first.kept - x[1])[..., None]
        assert torch.equal(first.source[used], other.source[used])
        open_ = (x[2] + (T if count is None else count)) // C
        real = torch.arange(chunks + 1, device=x[0].device) <= open_[:, None]
        assert torch.equal(first.before[real], other.before[real].long())


def test_split_covers_every_token_once() -> None:
    start, lengths, T = [0, 3, 15, 8, 0, 5], [37, 40, 1, 7, 0, 11], 40
    found = split(start, lengths, T, C, torch.device("cpu"))
    x = torch.arange(6 * T).view(6, T)
    parts = [part for part in (found.head, found.body, found.tail) if part is not None]
    tokens = torch.cat([part.take(x).flatten() for part in parts]).sort().values
    assert tokens.tolist() == [b * T + t for b, n in enumerate(lengths) for t in range(n)]
    assert found.completes is not None
    assert found.completes.tolist() == [True, True, False, True]  # rows 1, 2, 3 and 5


def test_rows_do_not_reach_one_another() -> None:
    """Sums of one row are of its tokens alone, whatever another has; routes of any strides."""
    found = split([5, 7], [20, 6], 40, C, torch.device("cpu"))
    assert found.head is not None
    g = torch.randn(2, 40, 2)
    g[0, :11] = -1e30
    expected = torch.stack((g[0, :11].sum(0), g[1, :6].sum(0)))
    torch.testing.assert_close(found.head.sums(g), expected, rtol=1e-6, atol=0)
    turned = softmax_inputs(90, C=C, K=8, V=6)
    turned[3] = turned[3].transpose(1, 2).contiguous().transpose(1, 2)
    compare_pages(turned, uniform_pieces([(0, 20), (20, 90)], 2), torch.float32)
