"""The combination of the two branches against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natsl.kernels.mix import routed_mix
from natsl.kernels.reference import gated_norm
from tests.oracles import DTYPES, assert_near, leaves, where_kernels_run

EPS = 1e-6


def mix_inputs(B: int = 2, T: int = 5) -> list[Tensor]:
    shape = (B, T, 3, 4)
    return [
        *(torch.randn(shape).double() for _ in range(3)),
        torch.randn(B, T, 3, 2).double(),
        *torch.randn(2, 4).double(),
    ]


def plain_mix(o_delta: Tensor, o_softmax: Tensor, gate: Tensor, logits: Tensor, w_d: Tensor, w_s: Tensor) -> Tensor:
    """The formula of the paper, by other means than the op: a sigmoid in the place of the softmax over two."""
    share = 1 / (1 + (logits[..., 1:] - logits[..., :1]).exp())  # of the delta branch
    normed = [x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() for x in (o_delta, o_softmax)]
    return gate / (1 + (-gate).exp()) * (share * w_d * normed[0] + (1 - share) * w_s * normed[1])


def test_formula_and_gradients() -> None:
    ours, theirs = leaves(mix_inputs()), leaves(mix_inputs())
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    y, expected = routed_mix(*ours, eps=EPS), plain_mix(*theirs)
    dy = torch.randn_like(y)
    assert_near(y, expected)
    gradients = torch.autograd.grad((expected * dy).sum(), theirs)
    for actual, wanted in zip(torch.autograd.grad((y * dy).sum(), ours), gradients, strict=True):
        assert_near(actual, wanted)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *ts: routed_mix(*ts, eps=EPS), leaves(mix_inputs(1, 2)))


def test_logit_0_is_delta_and_1_is_softmax() -> None:
    o_delta, o_softmax, gate, logits, w_d, w_s = mix_inputs()
    for index, (o, weight) in enumerate([(o_delta, w_d), (o_softmax, w_s)]):
        certain = torch.full_like(logits, -1e4)
        certain[..., index] = 1e4
        y = routed_mix(o_delta, o_softmax, gate, certain, w_d, w_s, eps=EPS)
        assert_near(y, gated_norm(o, gate, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    rounded = [x.to(dtype) for x in mix_inputs()]
    exact, ts = leaves(rounded, torch.float64), leaves(rounded)
    y, expected = routed_mix(*ts, eps=EPS), routed_mix(*exact, eps=EPS)
    assert y.dtype is dtype
    assert_near(y, expected)
    wanted = torch.autograd.grad(expected.sum(), exact)
    for actual, other in zip(torch.autograd.grad(y.sum(), ts), wanted, strict=True):
        assert actual.dtype is dtype
        assert_near(actual, other)


def test_outputs_of_zero_stay_finite() -> None:
    ts = leaves([torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), *(x[:1, :2].float() for x in mix_inputs()[2:4])])
    weights = torch.ones(2, 4)
    y = routed_mix(*ts, *weights, eps=EPS)
    assert not y.any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum(), ts))


def test_empty_batch_and_strides() -> None:
    assert routed_mix(*mix_inputs(B=0), eps=EPS).shape == (0, 5, 3, 4)
    inputs = mix_inputs()
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs[:4]]
    assert not any(x.is_contiguous() for x in strided)
    assert_near(routed_mix(*strided, *inputs[4:], eps=EPS), routed_mix(*inputs, eps=EPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o_delta": torch.ones(2, 5, 3, 4, dtype=torch.int64)}, "o_delta must be a floating point tensor"),
        ({"o_delta": torch.ones(2, 5, 12).double()}, "o_delta must be .* found \\(2, 5, 12\\)"),
        ({"o_softmax": torch.ones(2, 5, 3, 4, device="meta")}, "o_softmax is on meta, but o_delta is on cpu"),
        ({"o_softmax": torch.ones(2, 5, 1, 4).double()}, "o_softmax has shape \\(2, 5, 1, 4\\)"),
        ({"gate": torch.ones(2, 5, 3).double()}, "gate has shape"),
        ({"mix_logits": torch.ones(2, 5, 3, 4).double()}, "mix_logits has shape .* expected \\(2, 5, 3, 2\\)"),
        ({"weight_delta": torch.ones(3).double()}, "weight_delta has shape \\(3,\\), expected \\(4,\\)"),
        ({"weight_softmax": 1.0}, "weight_softmax must be a floating point tensor, found float"),
        ({"backend": "triton"}, "float64"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_mistakes_name_the_argument(change: dict[str, object], message: str) -> None:
    names = ("o_delta", "o_softmax", "gate", "mix_logits", "weight_delta", "weight_softmax")
    arguments: dict[str, object] = {**dict(zip(names, mix_inputs(), strict=True)), "eps": EPS, **change}
    if change.get("backend") == "triton":
        arguments = where_kernels_run(arguments)
    with pytest.raises(ValueError, match=message):
        routed_mix(**arguments)  # type: ignore[arg-type]
