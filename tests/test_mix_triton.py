"""The kernels of ``routed_mix``, ``gated_norm`` and ``rms_norm`` against the torch reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from natsl.kernels import reference
from natsl.kernels.launch import parameters
from natsl.kernels.mix import gated_norm, rms_norm, routed_mix
from tests.oracles import assert_near

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1, 1), (3, 1, 2, 5), (2, 5, 3, 4), (1, 37, 2, 100), (2, 19, 3, 128), (1, 3, 1, 512), (1, 70, 12, 16)]
EPS = 1e-6


def mix_inputs(shape: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype | None = None) -> list[Tensor]:
    """Random arguments of ``routed_mix``; the logits and weights have the dtype ``parameters``."""
    other = parameters or dtype
    big = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3)]
    small = [torch.randn(*shape[:3], 2, device=DEVICE), *torch.randn(2, shape[3], device=DEVICE)]
    return [*big, *(x.to(other) for x in small)]


def check_mix(inputs: list[Tensor], eps: float = EPS) -> None:
    """Values and gradients of ``routed_mix`` for the rounded inputs, with the strides they have."""
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = routed_mix(*ours, eps=eps, backend="triton"), routed_mix(*exact, eps=eps, backend="torch")
    assert y.dtype is inputs[0].dtype
    assert_near(y, expected)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for x, actual, other in zip(ours, torch.autograd.grad(y, ours, dy), wanted, strict=True):
        assert actual.dtype is x.dtype
        assert_near(actual, other, inputs[0].dtype)


def check_norm(inputs: list[Tensor]) -> None:
    """The same for ``gated_norm`` of the first, third and fifth of the inputs."""
    ours = [x.detach().requires_grad_() for x in inputs[::2]]
    exact = [x.detach().double().requires_grad_() for x in inputs[::2]]
    y, expected = gated_norm(*ours, eps=EPS, backend="triton"), gated_norm(*exact, eps=EPS, backend="torch")
    assert_near(y, expected)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for actual, other in zip(torch.autograd.grad(y, ours, dy), wanted, strict=True):
        assert_near(actual, other, inputs[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 1100), (7, 64), (9,)], ids=str)
def test_norm_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also those of a part of the columns of a wider tensor."""
    whole = torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE).to(dtype)
    weight = torch.randn(shape[-1], device=DEVICE)
    for x in (whole[..., : shape[-1]], whole[..., shape[-1] :].contiguous()):
        y = rms_norm(x, weight, eps=EPS, backend="triton")
        assert y.dtype is dtype
        assert_near(y, rms_norm(x.double(), weight.double(), eps=EPS, backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = mix_inputs(shape, dtype)
    check_mix(inputs)
    check_norm(inputs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_logits_and_weights_in_float32(dtype: torch.dtype) -> None:
    inputs = mix_inputs((2, 7, 3, 20), dtype, torch.float32)
    check_mix(inputs)
    check_norm(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype) -> None:
    B, T, H, V = 2, 7, 4, 12
    o_delta, o_softmax, gate, logits, *weights = mix_inputs((B, T, H, V), dtype)
    views = [
        o_delta.view(B, T, H // 2, 2 * V).repeat_interleave(2, 1)[:, ::2].view(B, T, H, V),  # every other token
        o_softmax.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),  # [H,B,T,V] in memory
        torch.randn(B, T, 3 * H * V, device=DEVICE).to(dtype)[..., H * V : 2 * H * V].unflatten(-1, (H, V)),
        torch.randn(B, T, 5 * H, device=DEVICE).to(dtype)[..., : 2 * H].unflatten(-1, (H, 2)),
    ]
    assert not any(x.is_contiguous() for x in views)
    check_mix([*views, *weights])
    apart = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (o_delta, o_softmax, gate, logits)]
    assert not any(x.stride(-1) == 1 for x in apart)
    check_mix([*apart, *(w[:, None].expand(-1, 2).contiguous()[:, 0] for w in weights)])
    check_norm([*apart, *weights])
    shared = [o_delta[:1].expand(B, -1, -1, -1), o_softmax[:, :1].expand(-1, T, -1, -1), gate, logits[:, :, :1]]
    check_mix([*shared[:3], shared[3].expand(-1, -1, H, -1), *weights])


def test_an_expanded_gradient() -> None:
    ours = [x.requires_grad_() for x in mix_inputs((1, 5, 2, 8), torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    wanted = torch.autograd.grad(routed_mix(*exact, eps=EPS, backend="torch").sum(), exact)
    found = torch.autograd.grad(routed_mix(*ours, eps=EPS, backend="triton").sum(), ours)
    for actual, other in zip(found, wanted, strict=True):
        assert_near(actual, other)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    ours = [x.requires_grad_() for x in mix_inputs(shape, torch.float32)]
    for y in (routed_mix(*ours, eps=EPS, backend="triton"), gated_norm(*ours[::2], eps=EPS, backend="triton")):
        assert y.shape == shape
        grads = torch.autograd.grad(y.sum(), ours, allow_unused=True)
        assert all(g is None or (g.shape == x.shape and not g.any()) for g, x in zip(grads, ours, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("size", [1e4, 6e4, 3e38, math.inf], ids=str)
def test_certain_logits(size: float) -> None:
    inputs = mix_inputs((2, 5, 3, 4), torch.float32)
    inputs[3] = torch.zeros(2, 5, 3, 2, device=DEVICE)
    inputs[3][..., 0, 0] = inputs[3][..., 1, 1] = -size
    inputs[3][..., 2, 0] = min(size, 3e38)
    check_mix(inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates_and_outputs() -> None:
    inputs = mix_inputs((2, 5, 3, 4), torch.float16)
    inputs[2] = inputs[2] * 1e4  # silu(−∞) has no value, but a large number has
    inputs[0], inputs[1] = inputs[0] * 1e4, inputs[1] * 1e-4
    y = routed_mix(*inputs, eps=EPS, backend="triton")
    exact = routed_mix(*(x.double() for x in inputs), eps=EPS, backend="torch")
    assert_near(y, exact.clamp(-65504, 65504).half(), torch.float16)


def test_rows_of_zeros() -> None:
    inputs = mix_inputs((2, 5, 3, 4), torch.float32)
    inputs[0][0], inputs[1][:, 2], inputs[2][1, 1] = 0.0, 0.0, 0.0
    check_mix(inputs)
    check_norm(inputs)


def test_rows_past_the_end_at_eps_0() -> None:
    check_mix(mix_inputs((1, 3, 1, 5), torch.float32), eps=0.0)


def test_repeats_are_equal_bit_by_bit() -> None:
    inputs = [x.requires_grad_() for x in mix_inputs((2, 33, 3, 128), torch.float32)]
    dy = torch.randn(2, 33, 3, 128, device=DEVICE)
    runs = []
    for _ in range(2):
        y = routed_mix(*inputs, eps=EPS, backend="triton")
        runs.append([y, *torch.autograd.grad(y, inputs, dy)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_launch_parameters_change_nothing(rows: int) -> None:
    options = {"BLOCK_ROWS": rows, "num_warps": 2, "PROGRAMS": 3}
    with parameters.forced({"mix_forward": options, "mix_backward": options}):
        check_mix(mix_inputs((1, 11, 3, 33), torch.float32))
        check_norm(mix_inputs((1, 11, 3, 33), torch.float32))


@pytest.mark.parametrize("frozen", range(6))
def test_inputs_without_a_gradient(frozen: int) -> None:
    inputs = [x.requires_grad_(i != frozen) for i, x in enumerate(mix_inputs((1, 3, 2, 4), torch.float32))]
    routed_mix(*inputs, eps=EPS, backend="triton").square().sum().backward()
    for i, x in enumerate(inputs):
        assert (x.grad is None) == (i == frozen)


@pytest.mark.parametrize("op", ["routed_mix", "gated_norm"])
def test_the_ops_keep_the_rules_of_custom_ops(op: str) -> None:
    inputs = mix_inputs((2, 3, 2, 8), torch.float32)
    inputs = inputs if op == "routed_mix" else inputs[::2]
    x, *others = inputs
    if op == "routed_mix":
        o_softmax, gate, logits, weight, weight_softmax = others
        second = [o_softmax, logits, weight_softmax]
    else:
        gate, weight = others
        second = []
    torch.library.opcheck(torch.ops.natsl.mix.default, (x, gate, weight, EPS, second))
    torch.library.opcheck(torch.ops.natsl.mix_backward.default, (torch.randn_like(x), x, gate, weight, EPS, second))


def test_no_break_in_a_compiled_graph() -> None:
    inputs = mix_inputs((1, 5, 2, 8), torch.float32)

    def layer(*ts: Tensor) -> Tensor:
        return routed_mix(*ts, eps=EPS, backend="triton") + gated_norm(*ts[::2], eps=EPS, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), layer(*inputs))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU has nothing to wait for")
def test_nothing_waits_for_the_device() -> None:
    inputs = [x.requires_grad_() for x in mix_inputs((2, 33, 3, 128), torch.bfloat16, torch.float32)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = routed_mix(*inputs, eps=EPS, backend="triton") + gated_norm(*inputs[::2], eps=EPS, backend="triton")
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (513, torch.float32, "Vs = 513 is not supported by the triton backend: at most 512"),
        (0, torch.float32, "Vs = 0 is not supported by the triton backend: at least 1"),
        (4, torch.float64, "torch.float64 is not supported by the triton backend"),
    ],
    ids=["too-wide", "no-width", "float64"],
)
def test_limits_are_named(width: int, dtype: torch.dtype, message: str) -> None:
    inputs = mix_inputs((1, 2, 1, width), dtype)
    with pytest.raises(ValueError, match=f"routed_mix: {message}"):
        routed_mix(*inputs, eps=EPS, backend="triton")
    with pytest.raises(ValueError, match=f"gated_norm: {message}"):
        gated_norm(*inputs[::2], eps=EPS, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, r"x must be .* found \(2, 3, 4\)"),
        ({"gate": torch.ones(1, 2, 3, 5)}, "gate has shape"),
        ({"gate": torch.ones(1, 2, 3, 4).half()}, "gate is torch.float16, but x is torch.float32"),
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\), expected \(4,\)"),
        ({"weight": 1.0}, "weight must be a floating point tensor, found float"),
        ({"backend": "cuda"}, "backend = 'cuda'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_mistakes_of_gated_norm_name_the_argument(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(1, 2, 3, 4), "gate": torch.ones(1, 2, 3, 4), "weight": torch.ones(4), "eps": EPS}
    with pytest.raises(ValueError, match=message):
        gated_norm(**{**arguments, **change})  # type: ignore[arg-type]


def test_gated_norm_in_torch_takes_float64() -> None:
    x, _, gate, _, weight, _ = mix_inputs((1, 2, 3, 4), torch.float64)
    assert torch.equal(
        gated_norm(x, gate, weight, eps=EPS, backend="torch"), reference.gated_norm(x, gate, weight, EPS)
    )
