"""Products of few rows: the kernel against the torch backend in float64, with everything that may come around them."""

from __future__ import annotations

import pytest
import torch

from natsl.kernels.rows import LARGEST_ROWS, rows_linear
from tests.oracles import assert_near, where_kernels_run

DTYPES = [
    torch.float32,
    torch.float16,
    *([torch.bfloat16] if torch.cuda.is_available() else []),
]  # no bfloat16 interpreted
OPTIONS: list[dict[str, bool]] = [
    {},
    {"norm": True},
    {"gated": True},
    {"residual": True},
    {"norm": True, "gated": True, "residual": True},
    {"norm": True, "want_normed": True},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 17])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_kernel_equals_the_torch_backend(options: dict[str, bool], M: int, dtype: torch.dtype) -> None:
    K, N = 300, 19
    x = torch.randn(M, K) * 2
    tensors = {
        "weight": torch.randn(2 * N if options.get("gated") else N, K) * K**-0.5,
        "norm": 1 + 0.3 * torch.randn(K) if options.get("norm") else None,
        "residual": torch.randn(M, N) if options.get("residual") else None,
    }
    arguments = where_kernels_run({"x": x, **tensors})
    rounded = {k: v.to(dtype) if isinstance(v, torch.Tensor) and k != "norm" else v for k, v in arguments.items()}
    precise = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in rounded.items()}
    flags = {name: options.get(name, False) for name in ("gated", "want_normed")}
    actual = rows_linear(**rounded, **flags, backend="triton")  # type: ignore[arg-type]
    expected = rows_linear(**precise, **flags, backend="torch")  # type: ignore[arg-type]
    for y, z in zip(actual, expected, strict=True):
        assert y.dtype is dtype
        assert_near(y, z)


def test_more_rows_than_the_kernel_takes() -> None:
    x, weight = torch.randn(LARGEST_ROWS + 1, 32), torch.randn(8, 32)
    with pytest.raises(ValueError, match=f"rows = {LARGEST_ROWS + 1} is not supported by the triton backend"):
        rows_linear(**where_kernels_run({"x": x, "weight": weight}), backend="triton")  # type: ignore[arg-type]
    assert_near(rows_linear(x, weight, backend="torch")[0], x.double() @ weight.double().T, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(8, 31)}, r"weight has shape \(8, 31\), expected \(8, 32\)"),
        ({"weight": torch.randn(8, 32).half()}, "weight is torch.float16 .*x's dtype, torch.float32"),
        ({"weight": torch.randn(32, 8).T}, "must be contiguous"),
        ({"weight": torch.randn(7, 32), "gated": True}, "even number of rows"),
        ({"norm": torch.randn(31)}, r"norm has shape \(31,\), expected \(32,\)"),
        ({"residual": torch.randn(2, 9)}, r"residual has shape \(2, 9\), expected \(2, 8\)"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_mistakes_name_the_argument(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.randn(2, 32), "weight": torch.randn(8, 32), **change}
    with pytest.raises(ValueError, match=message):
        rows_linear(**arguments)  # type: ignore[arg-type]
