"""New tokens of rows that stand at different places inside their chunk, laid out in chunks and back."""

from __future__ import annotations

import pytest
import torch

from natsl.kernels.segment import align, check_counts, closed_chunks, ends, touched_chunks, unalign

C = 4
START = torch.arange(C)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 7])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 11])
def test_touched_chunks_is_the_most_that_any_start_touches(tokens: int, chunk_size: int) -> None:
    touched = [(start + tokens - 1) // chunk_size + 1 for start in range(chunk_size)]
    assert touched_chunks(tokens, chunk_size) == max(touched)


@pytest.mark.parametrize("lengths", [None, [7, 0, 5, 1]], ids=["all", "padded"])
def test_align_puts_every_token_into_its_slot(lengths: list[int] | None) -> None:
    x = torch.randn(4, 7, 3, 2)
    counts = None if lengths is None else torch.tensor(lengths)
    if counts is not None:
        for row, length in enumerate(counts.tolist()):
            x[row, length:] = float("nan")
    aligned = align(x, START, C, counts)
    assert aligned.shape == (4, 3, C, 3, 2)
    for row, start in enumerate(START.tolist()):
        length = 7 if lengths is None else lengths[row]
        expected = torch.zeros(3 * C, 3, 2)
        expected[start : start + length] = x[row, :length]
        assert torch.equal(aligned[row].flatten(0, 1), expected)
        assert torch.equal(unalign(aligned, START, 7)[row, :length], x[row, :length])


def test_align_hands_gradients_to_real_tokens_only() -> None:
    x = torch.randn(4, 5, 2, requires_grad=True)
    lengths = torch.tensor([5, 0, 2, 4])
    (grad,) = torch.autograd.grad(align(x, START, C, lengths).sum(), x)
    assert torch.equal(grad, (torch.arange(5) < lengths[:, None]).float()[..., None].expand(4, 5, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_align_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.ones(4, 5).to(dtype)
    assert align(x, START, C).dtype is dtype
    assert unalign(align(x, START, C), START, 5).equal(x)


def test_closed_chunks() -> None:
    lengths = torch.tensor([4, 2, 2, 9])
    assert ends(START, 9).tolist() == [9, 10, 11, 12]
    assert ends(START, 9, lengths).tolist() == [4, 3, 4, 12]
    assert closed_chunks(START, 9, C).sum(1).tolist() == [2, 2, 2, 3]
    assert closed_chunks(START, 9, C, lengths).int().tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ([0, 1], "op: start must be an int64 tensor, found list"),
        (torch.zeros(2, dtype=torch.int32), "start must be an int64 tensor, found torch.int32"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "start is on meta, expected cpu"),
        (torch.zeros(2, 1, dtype=torch.int64), "start has shape \\(2, 1\\), expected \\(2,\\)"),
    ],
    ids=["list", "int32", "device", "shape"],
)
def test_mistakes_name_the_argument(count: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_counts("op", {"lengths": None, "start": count}, torch.device("cpu"), (2,))  # type: ignore[dict-item]
