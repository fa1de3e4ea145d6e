"""Attention over the pages of kept chunks: pieces of any sizes against one shot, page by page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natsl.kernels import reference
from natsl.kernels.pages import NULL, KeyPages, paged_softmax, write_chunks
from natsl.kernels.segment import touched_chunks
from natsl.kernels.softmax import routed_softmax
from tests.oracles import Piece, assert_near, chunk_count, make_pieces, softmax_inputs

C = 4
TOTALS = [30, 23, 12, 9, 2]
NAN = float("nan")


def nan_pages(inputs: list[Tensor], pages: int, places: int = 9) -> KeyPages:
    """So many free pages for all heads of all rows, apart from the null page; all hold NaN."""
    _, k, v, route = inputs
    made = KeyPages.empty(k, v, route.shape[2], C).grow(1 + pages, places)
    return made._replace(keys=torch.full_like(made.keys, NAN), values=torch.full_like(made.values, NAN))


def free_slots(pages: KeyPages, start: Tensor) -> Tensor:
    """Slots that hold nothing: bool [P,C]."""
    free = torch.ones(pages.keys.shape[0], C, dtype=torch.bool)
    for b, rows in enumerate(pages.table.tolist()):
        for r, places in enumerate(rows):
            kept = int(pages.kept[b, r])
            assert NULL not in places[: kept + 1]
            assert set(places[kept + 1 :]) <= {NULL}
            free[places[:kept]] = False
            free[places[kept], : start[b]] = False
    return free


def run_piece(inputs: list[Tensor], piece: Piece, pages: KeyPages) -> tuple[Tensor, KeyPages]:
    """One piece of whole sequences; what must not be read is NaN, what is free afterwards becomes NaN."""
    q, k, v = (piece.cut(x) for x in inputs[:3])
    route, start = piece.cut_route(inputs[3], C), piece.done % C
    o, pages = paged_softmax(q, k, v, route, pages, start, chunk_size=C, lengths=piece.lengths)
    free = free_slots(pages, (piece.done + piece.lengths) % C)
    for memory in pages[:2]:
        memory.transpose(1, 2)[free] = NAN
    return o, pages


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.numel = max(self.numel, out.numel())
        return out


def kept_of(inputs: list[Tensor], totals: list[int]) -> Tensor:
    """How many chunks of the first ``totals`` tokens of every row each head keeps."""
    return torch.stack([route[: n // C].sum(0) for route, n in zip(inputs[3], totals, strict=True)])


def uniform(a: int, b: int, rows: int = 2) -> Piece:
    return Piece(b - a, torch.full((rows,), a), torch.full((rows,), b - a))


def one_shot(inputs: list[Tensor], totals: list[int]) -> list[Tensor]:
    """Outputs [1,T,Hs,Vs] of every row alone."""
    outputs = []
    for b, n in enumerate(totals):
        alone = [*(x[b : b + 1, :n] for x in inputs[:3]), inputs[3][b : b + 1, : chunk_count(n, C)]]
        outputs.append(routed_softmax(*alone, chunk_size=C))
    return outputs


def assert_pages_hold(pages: KeyPages, inputs: list[Tensor], totals: list[int]) -> None:
    """The kept chunks of the first ``totals`` tokens in order, then the open chunk's tokens, and NaN.

    No page is of two heads, and pages were given out without gaps.
    """
    _, k, v, route = inputs
    R = route.shape[2]
    given = pages.table[pages.table != NULL]
    assert sorted(given.tolist()) == list(range(1, 1 + len(totals) * R + int(pages.kept.sum())))
    for b, n in enumerate(totals):
        for r in range(R):
            chunks = [c for c in range(n // C) if route[b, c, r] == 1]
            assert pages.kept[b, r] == len(chunks)
            tokens = [C * c + i for c in chunks for i in range(C)] + list(range(n // C * C, n))
            for memory, x in ((pages.keys, k), (pages.values, v)):
                flat = memory[pages.table[b, r, : len(chunks) + 1]].transpose(1, 2).flatten(0, 1)
                assert torch.equal(flat[: len(tokens)], x[b, tokens].unflatten(1, (R, -1))[:, r])
                assert flat[len(tokens) :].isnan().all()


@pytest.mark.parametrize("G", [1, 2], ids=lambda n: f"{n}-per-head")
@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_sizes_equal_one_shot(seed: int, G: int) -> None:
    inputs = softmax_inputs(30, B=5, G=G)
    whole = one_shot(inputs, TOTALS)
    pages = nan_pages(inputs, 5 * 2 + int(kept_of(inputs, TOTALS).sum()))
    for piece in make_pieces(TOTALS, C, seed):
        o, pages = run_piece(inputs, piece, pages)
        done, lengths = piece.done.tolist(), piece.lengths.tolist()
        for b in range(5):
            assert_near(o[b, : lengths[b]], whole[b][0, done[b] : done[b] + lengths[b]])
            assert not o[b, lengths[b] :].any()
        assert_pages_hold(pages, inputs, (piece.done + piece.lengths).tolist())


@pytest.mark.parametrize("routes", ["random", "ones", "zeros"])
@pytest.mark.parametrize("n", range(C - 1, 2 * C + 2))
def test_prefill_then_single_tokens_equal_one_shot(n: int, routes: str) -> None:
    T = 4 * C + 2
    inputs = softmax_inputs(T, G=2)
    if routes != "random":
        inputs[3] = torch.full_like(inputs[3], float(routes == "ones"))
    whole = routed_softmax(*inputs, chunk_size=C)
    pages = nan_pages(inputs, 4 + int(kept_of(inputs, [T, T]).sum()), places=5)
    for a, b in [(0, n), *((t, t + 1) for t in range(n, T))]:
        o, pages = run_piece(inputs, uniform(a, b), pages)
        assert_near(o, whole[:, a:b])
    assert_pages_hold(pages, inputs, [T, T])


def test_no_more_pages_than_needed() -> None:
    """Chunks that are not kept need no page, however many of them a call brings."""
    inputs = softmax_inputs(30)
    inputs[3] = torch.zeros_like(inputs[3])
    inputs[3][:, 2, 0] = inputs[3][1, 4] = 1
    pages = nan_pages(inputs, 4 + 4, places=3)  # an open one of each head, and the kept ones
    for a, b in ((0, 7), (7, 30)):
        o, pages = run_piece(inputs, uniform(a, b), pages)
        assert_near(o, routed_softmax(*inputs, chunk_size=C)[:, a:b])
    assert_pages_hold(pages, inputs, [30, 30])


def test_a_full_row_without_tokens_keeps_its_pages() -> None:
    inputs = softmax_inputs(8)
    inputs[3] = torch.ones_like(inputs[3])
    _, pages = run_piece(inputs, uniform(0, 8), nan_pages(inputs, 4 + 8, places=3))
    _, pages = run_piece(inputs, Piece(5, torch.tensor([8, 8]), torch.tensor([0, 0])), pages)
    assert_pages_hold(pages, inputs, [8, 8])


@pytest.mark.parametrize("scores", [1, 100, 1000], ids=lambda n: f"{n}-scores")
def test_blocks_of_queries(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = softmax_inputs(30, G=2)
    pages = nan_pages(inputs, 32)
    _, pages = run_piece(inputs, uniform(0, 7), pages)
    monkeypatch.setattr(reference, "SCORE_BLOCK", scores)
    o, _ = run_piece(inputs, uniform(7, 30), pages)
    monkeypatch.undo()
    assert_near(o, routed_softmax(*inputs, chunk_size=C)[:, 7:])


@pytest.mark.parametrize("done", range(8))
def test_one_token_equals_a_padded_pair(done: int) -> None:
    inputs = softmax_inputs(9, G=2)
    states = []
    for tokens in (1, 2):
        pages = nan_pages(inputs, 12)
        if done:
            _, pages = run_piece(inputs, uniform(0, done), pages)
        o, pages = run_piece(inputs, Piece(tokens, torch.full((2,), done), torch.ones(2).long()), pages)
        states.append((o[:, :1], *pages))
    assert_near(states[0][0], states[1][0])
    for x, y in zip(states[0][1:], states[1][1:], strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_scale() -> None:
    q, k, v, route = softmax_inputs(4)
    pages = KeyPages.empty(k, v, heads=2, chunk_size=C)
    start = torch.zeros(2, dtype=torch.int64)
    o, _ = paged_softmax(q, k, v, route.repeat(1, 2, 1), pages, start, chunk_size=C, scale=0.1)
    assert_near(o, routed_softmax(q, k, v, route, chunk_size=C, scale=0.1))


def test_writing_is_in_place_and_has_no_gradient() -> None:
    q, k, v, route = (x.requires_grad_() for x in softmax_inputs(4))
    pages, start = KeyPages.empty(k, v, heads=2, chunk_size=C).grow(9, 2), torch.zeros(2, dtype=torch.int64)
    route = torch.ones(2, touched_chunks(4, C), 2)
    o, after = paged_softmax(q, k, v, route, pages, start, chunk_size=C)
    assert not o.requires_grad
    assert after.keys is pages.keys
    assert after.values is pages.values
    assert not any(x.requires_grad for x in after)
    assert pages.kept.tolist() == [[0, 0], [0, 0]]
    assert pages.table.tolist() == [[[1, NULL], [2, NULL]], [[3, NULL], [4, NULL]]]
    assert after.kept.tolist() == [[1, 1], [1, 1]]
    assert after.table.tolist() == [[[1, 5], [2, 6]], [[3, 7], [4, 8]]]


def test_growing_keeps_what_is_there() -> None:
    inputs = softmax_inputs(30)
    _, pages = run_piece(inputs, uniform(0, 6), nan_pages(inputs, 8, places=2))
    same = pages.grow(9, 2)
    assert all(x is y for x, y in zip(same, pages, strict=True))
    more = pages.grow(33, 8)
    assert more.keys.shape == (33, 1, C, 4)
    assert more.values.shape == (33, 1, C, 3)
    assert more.table.shape == (2, 2, 8)
    assert torch.equal(more.keys[:9].nan_to_num(), pages.keys.nan_to_num())
    assert torch.equal(more.table[..., :2], pages.table)
    o, _ = run_piece(inputs, uniform(6, 30), more)
    assert_near(o, routed_softmax(*inputs, chunk_size=C)[:, 6:])


def test_heads_that_keep_nothing_cost_one_page() -> None:
    """However much another head keeps: 1 + 4 heads + 30 chunks of one of them."""
    inputs = softmax_inputs(120)
    inputs[3] = torch.zeros_like(inputs[3])
    inputs[3][0, :, 1] = 1
    pages = nan_pages(inputs, 4 + 30, places=31)
    for a, b in ((0, 1), (1, 62), (62, 63), (63, 120)):
        o, pages = run_piece(inputs, uniform(a, b), pages)
        assert_near(o, routed_softmax(*inputs, chunk_size=C)[:, a:b])
    assert_pages_hold(pages, inputs, [120, 120])
    assert pages.keys.shape[0] == 35


def test_what_is_not_finite_stays_in_its_row_and_head() -> None:
    """Though the null page, which all tables have, counts as one of the first head."""
    inputs = softmax_inputs(14)
    pages = nan_pages(inputs, 16)
    _, pages = run_piece(inputs, uniform(0, 9), pages)
    poisoned = [x.clone() for x in inputs]
    poisoned[0][0, 10, 0] = NAN
    o, _ = run_piece(poisoned, uniform(9, 14), pages)
    expected = routed_softmax(*inputs, chunk_size=C)[:, 9:]
    assert o[0, 1, 0].isnan().all()
    expected[0, 1, 0] = o[0, 1, 0] = 0.0
    assert_near(o, expected)


def test_no_head_is_padded_to_the_one_that_keeps_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though one of 12 keeps everything: only one number of each page and query is."""
    inputs = softmax_inputs(400, R=12, B=1)
    inputs[3] = torch.zeros_like(inputs[3])
    inputs[3][:, :, 5] = 1
    pages = nan_pages(inputs, 12 + 100, places=101)
    _, pages = run_piece(inputs, uniform(0, 380, 1), pages)
    monkeypatch.setattr(reference, "SCORE_BLOCK", 1)
    with LargestTensor() as largest:
        o, _ = run_piece(inputs, uniform(380, 400, 1), pages)
    assert_near(o, routed_softmax(*inputs, chunk_size=C)[:, 380:])
    # a chunk of queries is the least, with the scores or the query of every page, or a number of every place
    assert largest.numel == C * max(max(C, 4) * pages.keys.shape[0], pages.table.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in softmax_inputs(30, G=2)]
    expected = routed_softmax(*(x.double() for x in inputs), chunk_size=C)
    pages = nan_pages(inputs, 32)
    for a, b in ((0, 5), (5, 6), (6, 29), (29, 30)):
        o, pages = run_piece(inputs, uniform(a, b), pages)
        assert o.dtype is dtype
        assert_near(o, expected[:, a:b])
    assert_pages_hold(pages, inputs, [30, 30])


@pytest.mark.parametrize("T", [1, 9])
def test_nothing_reads_a_value_of_a_tensor(T: int) -> None:
    """Tensors without data stand for a device that nobody waits for."""
    q, k, v, _ = (x.to("meta") for x in softmax_inputs(T, G=2))
    start = torch.zeros(2, dtype=torch.int64, device="meta")
    pages = KeyPages.empty(k, v, heads=2, chunk_size=C).grow(17, 4)
    route = torch.empty(2, touched_chunks(T, C), 2, device="meta")
    o, after = paged_softmax(q, k, v, route, pages, start, chunk_size=C, lengths=start)
    assert o.shape == (2, T, 4, 3)
    assert after.kept.shape == (2, 2)


def test_empty_batch() -> None:
    q, k, v, _ = softmax_inputs(9, B=0)
    pages, start = KeyPages.empty(k, v, heads=2, chunk_size=C), torch.zeros(0, dtype=torch.int64)
    route = torch.ones(0, touched_chunks(9, C), 2)
    o, after = paged_softmax(q, k, v, route, pages, start, chunk_size=C)
    assert o.shape == (0, 9, 2, 3)
    assert after.kept.shape == (0, 2)


def free_pages(rows: int = 2, dtype: torch.dtype = torch.float64, chunk_size: int = C) -> KeyPages:
    k, v = torch.ones(rows, 1, 2, 4, dtype=dtype), torch.ones(rows, 1, 2, 3, dtype=dtype)
    return KeyPages.empty(k, v, heads=2, chunk_size=chunk_size)


MISTAKES: list[tuple[dict[str, object], str]] = [
    ({"k": torch.ones(2, 9, 2, 4)}, "k is torch.float32|v is torch.float64, but k is torch.float32"),
    ({"v": torch.ones(2, 8, 2, 3).double()}, r"v has shape \(2, 8, 2, 3\), expected \(2, 9, 2, 3\)"),
    ({"route": torch.ones(2, 3).double()}, r"route \(2, 3\) must be"),
    ({"route": torch.ones(2, 2, 2).double()}, r"route has shape \(2, 2, 2\), expected \(2, 3, 2\)"),
    ({"route": torch.ones(2, 3, 2).bool()}, "route must be a floating point tensor, found torch.bool"),
    ({"pages": free_pages(rows=3)}, r"pages.table has shape \(3, 2, 1\), expected \(2, 2, 1\)"),
    ({"pages": free_pages(chunk_size=8)}, "pages.keys has shape"),
    ({"pages": free_pages()._replace(values=torch.ones(1).double())}, r"pages.values has shape \(1,\)"),
    ({"pages": free_pages(dtype=torch.float32)}, "pages.keys is torch.float32, but k is torch.float64"),
    ({"pages": free_pages()._replace(table=torch.zeros(2, 2))}, "pages.table must be an int64 tensor"),
    ({"pages": free_pages()._replace(kept=torch.zeros(2, 2))}, "pages.kept must be an int64 tensor"),
    ({"start": torch.zeros(2)}, "start must be an int64 tensor, found torch.float32"),
    ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths has shape \(3,\), expected \(2,\)"),
    ({"chunk_size": 0}, "chunk_size = 0"),
]


@pytest.mark.parametrize("op", [paged_softmax, write_chunks], ids=lambda op: op.__name__)
@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_mistakes_name_the_argument(op: object, change: dict[str, object], message: str) -> None:
    q, k, v, route = softmax_inputs(9)
    start = torch.zeros(2, dtype=torch.int64)
    arguments = {"k": k, "v": v, "route": route, "pages": free_pages(), "start": start, "chunk_size": C, **change}
    if op is paged_softmax:
        arguments["q"] = q
    with pytest.raises(ValueError, match=message):
        op(**arguments)  # type: ignore[operator]
