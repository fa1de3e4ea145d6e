"""The short convolution in pieces, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natsl.kernels.convolution import continued_convolution
from natsl.modules import short_convolution
from tests.oracles import assert_near, make_pieces

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOTALS = [90, 41, 7, 2, 0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_pieces_are_one_convolution(width: int, backend: str) -> None:
    """Pieces of any sizes, shorter than the window too, whose padding is anything; channels of two blocks."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 90, 130), torch.randn(130, width)
    whole = short_convolution(x.double(), weight.double())
    tail = torch.zeros(5, width - 1, 130)
    outputs: list[list[Tensor]] = [[] for _ in TOTALS]
    for piece in make_pieces(TOTALS, 8, 3):
        real = torch.arange(piece.tokens) < piece.lengths[:, None]
        cut = torch.where(real[..., None], piece.cut(x), float("nan"))
        y, after = continued_convolution(*(a.to(DEVICE) for a in (cut, weight, tail, piece.lengths)), backend=backend)
        tail = after.cpu()
        for row, (part, n) in enumerate(zip(y.cpu(), piece.lengths.tolist(), strict=True)):
            outputs[row].append(part[:n])
    for row, total in enumerate(TOTALS):
        assert_near(torch.cat(outputs[row]), whole[row, :total])
        padded = torch.cat((torch.zeros(width - 1, 130), x[row, :total]))
        assert torch.equal(tail[row], padded[total:])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens_of_any_strides(backend: str) -> None:
    x, weight, tail = torch.randn(2, 40, 24), torch.randn(24, 4), torch.randn(2, 3, 24)
    wide = torch.cat((x, x), 2).to(DEVICE)[:, :, :24]
    for one, other in zip(
        continued_convolution(wide, weight.to(DEVICE), tail.to(DEVICE), backend=backend),
        continued_convolution(x.double(), weight.double(), tail.double(), backend="torch"),
        strict=True,
    ):
        assert_near(one.cpu(), other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": torch.zeros(2, 2, 6)}, r"tail has shape \(2, 2, 6\), expected \(2, 3, 6\)"),
        ({"weight": torch.zeros(5, 4)}, r"weight has shape \(5, 4\), expected \(6, 4\)"),
        ({"tail": torch.zeros(2, 3, 6).double()}, "of x's dtype"),
        ({"lengths": torch.zeros(2)}, "lengths must be an int64 tensor"),
    ],
    ids=["tail", "weight", "dtype", "lengths"],
)
def test_mistakes_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(2, 9, 6), "weight": torch.zeros(6, 4), "tail": torch.zeros(2, 3, 6), **change}
    with pytest.raises(ValueError, match=message):
        continued_convolution(**arguments)  # type: ignore[arg-type]
