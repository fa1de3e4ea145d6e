"""The Triton kernels of the softmax branch against the torch backend in float64: outputs and every gradient.

Without a GPU they run in Triton's interpreter, in float32 and float16; on one, in bfloat16 too.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from natsl.kernels._triton import softmax as softmax_triton
from natsl.kernels._triton import softmax_kernels
from natsl.kernels.launch import parameters
from natsl.kernels.softmax import routed_softmax
from tests.oracles import assert_near, chunk_count, leaves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
LENGTHS = [1, 63, 64, 65, 127, 300, 340, 384]
NAMES = ("q", "k", "v", "route")


def inputs(
    T: int, *, B: int = 1, R: int = 1, G: int = 1, J: int = 1, C: int = 64, K: int = 16, V: int = 16, N: int = 0
) -> list[Tensor]:
    """Random float32 q, k, v, and routes of 0 and 1, about half of them kept."""
    q, k, v = (torch.randn(B, T, h, w) for h, w in ((R * G * J, K), (R * G, K), (R * G, V)))
    route = (torch.rand(B, N or chunk_count(T, C), R) < 0.5).float()
    return [x.to(DEVICE) for x in (q, k, v, route)]


def run(
    tensors: list[Tensor], C: int, mode: str, *, borders: Tensor | None = None, rate: float = 1.0, backend: str
) -> Tensor:
    q, k, v, route = tensors
    return routed_softmax(
        q, k, v, route, chunk_size=C, cu_seqlens=borders, counterfactual=mode, counterfactual_rate=rate, backend=backend
    )


def compare(
    tensors: list[Tensor], C: int, mode: str, dtype: torch.dtype = torch.float32, borders: Tensor | None = None
) -> list[Tensor]:
    """Hold outputs and gradients against the torch backend in float64 on the same rounded inputs; returns ours."""
    rounded = [x.to(dtype) for x in tensors[:3]] + [tensors[3]]
    ours, exact = leaves(rounded), leaves(rounded, torch.float64)
    o = run(ours, C, mode, borders=borders, backend="triton")
    expected = run(exact, C, mode, borders=borders, backend="torch")
    do = torch.randn_like(o)
    found = torch.autograd.grad((o * do).sum(), ours)
    wanted = torch.autograd.grad((expected * do.double()).sum(), exact)
    assert o.dtype is dtype
    assert_near(o, expected)
    for name, x, y, leaf in zip(NAMES, found, wanted, ours, strict=True):
        assert x.dtype is leaf.dtype, name
        assert_near(x, y, dtype)
    return [o, *found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_lengths(T: int, dtype: torch.dtype) -> None:
    *_, droute = compare(inputs(T), 64, "insertion", dtype)
    assert not droute[:, -1].any(), "no later query sees the last chunk"


@pytest.mark.parametrize("mode", ["none", "derivative", "insertion"])
@pytest.mark.parametrize("C", [16, 32, 64, 128])
def test_chunk_sizes_and_modes(C: int, mode: str) -> None:
    tensors = inputs(5 * C + C // 2 + 1, C=C)
    tensors[3] = torch.tensor([1.0, 0, 0, 1, 1, 0], device=DEVICE)[None, :, None]
    *_, droute = compare(tensors, C, mode)
    assert droute[:, [0, 3]].all()
    assert droute[:, 1:3].any() == (mode != "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "R", "G", "J", "K", "V"),
    [(2, 1, 2, 1, 16, 16), (1, 2, 1, 2, 16, 32), (1, 2, 2, 3, 8, 5), (1, 1, 1, 1, 24, 48), (1, 1, 1, 1, 1, 1)],
    ids=lambda n: str(n),
)
def test_head_shapes(B: int, R: int, G: int, J: int, K: int, V: int, dtype: torch.dtype) -> None:
    compare(inputs(70, B=B, R=R, G=G, J=J, C=16, K=K, V=V), 16, "insertion", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "V"), [(64, 128), (128, 256), (192, 384), (256, 512)])
def test_wide_heads(K: int, V: int, dtype: torch.dtype) -> None:
    compare(inputs(130, K=K, V=V), 64, "insertion", dtype)


@pytest.mark.parametrize("kept", [0.0, 1.0], ids=["none-kept", "all-kept"])
@pytest.mark.parametrize("C", [16, 64])
def test_every_route_the_same(C: int, kept: float) -> None:
    tensors = inputs(C * 3 + 5, J=2, C=C)
    tensors[3].fill_(kept)
    compare(tensors, C, "derivative")


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("C", [16, 128])
def test_block_sizes(C: int, size: int) -> None:
    """Query tiles and key tiles below, at and above the chunk size, each with a small and a large partner."""
    tensors = inputs(77 if C == 16 else 260, C=C)
    for partner in (16, 64):
        blocks = {name: {"BLOCK_M": size, "BLOCK_N": partner} for name in ("softmax_forward", "softmax_dq")}
        blocks["softmax_dkv"] = {"BLOCK_M": partner, "BLOCK_N": size}
        blocks["softmax_counterfactual"] = {"BLOCK_M": size, "BLOCK_N": partner}
        with parameters.forced(blocks):
            compare(tensors, C, "insertion")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("C", "lengths"),
    [(16, [50]), (16, [16, 1, 33]), (16, [0, 15, 0, 0, 40]), (64, [65, 130]), (128, [129, 40])],
    ids=str,
)
def test_packed_sequences(C: int, lengths: list[int], dtype: torch.dtype) -> None:
    chunks = [chunk_count(n, C) for n in lengths]
    borders = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    *_, droute = compare(inputs(sum(lengths), R=2, C=C, N=sum(chunks)), C, "insertion", dtype, borders)
    last = [end - 1 for start, end in pairwise(torch.tensor([0, *chunks]).cumsum(0).tolist()) if end > start]
    assert not droute[:, last].any()


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_a_route_that_needs_no_gradient_changes_none_of_the_others(packed: bool) -> None:
    tensors = inputs(90, R=2, C=16, N=7 if packed else 0)
    borders = torch.tensor([0, 40, 90], device=DEVICE) if packed else None
    found = []
    for wanted in (4, 3):
        ts = leaves(tensors)
        o = run([*ts[:wanted], *tensors[wanted:]], 16, "insertion", borders=borders, backend="triton")
        found.append(torch.autograd.grad((o * tensors[2]).sum(), ts[:3]))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_packed_sequences_do_not_see_each_other() -> None:
    borders = torch.tensor([0, 40, 90], dtype=torch.int32, device=DEVICE)
    tensors = inputs(90, C=16, N=7)
    before = run(tensors, 16, "none", borders=borders.long(), backend="triton")
    for x in tensors[:3]:
        x[:, :40] += 3
    after = run(tensors, 16, "none", borders=borders, backend="triton")
    assert torch.equal(before[:, 40:], after[:, 40:])
    assert not torch.equal(before[:, :40], after[:, :40])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of keys that the mask then hides
@pytest.mark.parametrize("mode", ["none", "derivative", "insertion"])
@pytest.mark.parametrize("size", [30.0, 90.0, 200.0, 1e3, -1e3], ids=lambda x: f"{x:g}-above")
def test_scores_far_from_the_visible_ones(size: float, mode: str) -> None:
    """A chunk that was left out may score far above everything visible: nothing overflows, insertion stays exact."""
    q, k, v, route = inputs(60, C=16, G=2)
    q, k = ((x * 8).round() / 8 for x in (q, k))
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :16, :, 0] = size
    route.zero_()
    scale = math.log(2) / 4  # scores, in base 2, that float32 holds exactly
    do = torch.randn_like(v)

    def both(ts: list[Tensor], backend: str) -> tuple[Tensor, list[Tensor]]:
        q, k, v, route = ts
        o = routed_softmax(q, k, v, route, chunk_size=16, scale=scale, counterfactual=mode, backend=backend)
        return o, list(torch.autograd.grad((o * do.to(o.dtype)).sum(), ts))

    o, found = both(leaves([q, k, v, route]), "triton")
    expected, wanted = both(leaves([q, k, v, route], torch.float64), "torch")
    assert all(x.isfinite().all() for x in found)
    assert_near(o, expected)
    if mode == "insertion":
        assert_near(found[3], wanted[3])
        assert found[3].abs().max() < 1e3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in the first try
@pytest.mark.parametrize("size", [20.0, 70.0, 100.0])
@pytest.mark.parametrize("own", [True, False], ids=["own", "earlier"])
def test_one_logit_far_above_the_others(size: float, own: bool, dtype: torch.dtype) -> None:
    """The forward pass subtracts the logit of a query's own key; far below the largest one it has to start again."""
    tensors = inputs(100, R=4, C=16)  # four heads set the scale of the route's gradient, a sum that may cancel in one
    q, k, _, route = tensors
    route.fill_(1)
    q[..., 0], k[..., 0] = 0, 0
    k[:, 52 if own else 3, :, 0] = 16  # the tiles after it differ: some rows start again, some tiles do not
    q[:, 50:70, :, 0] = size / 4
    compare(tensors, 16, "insertion", dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls inside the interpreted kernel")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_tiles_start_again_only_where_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[bool] = []
    attend = softmax_kernels._attend_all

    class Counted:
        def __call__(self, *arguments: object) -> object:
            tries.append(bool(arguments[-2]))  # FIXED
            return attend(*arguments)

        def __getattr__(self, name: str) -> object:
            return getattr(attend, name)

    monkeypatch.setattr(softmax_kernels, "_attend_all", Counted())

    def restarts(T: int, borders: list[int] | None = None, far: float = 0.0, value: float = 1.0) -> int:
        tries.clear()
        lengths = [T] if borders is None else [b - a for a, b in pairwise(borders)]
        N = sum(chunk_count(length, 16) for length in lengths)
        q, k, v = (torch.randn(1, T, 1, 16) for _ in range(3))
        q[..., 0], k[..., 0], k[:, 0, :, 0] = 4, 0, far
        route, packed = torch.ones(1, N, 1), None if borders is None else torch.tensor(borders)
        blocks = {"BLOCK_M": 32, "BLOCK_N": 16}
        with parameters.forced({"softmax_forward": blocks}):
            o = run([q, k, v * value, route], 16, "none", borders=packed, backend="triton")
        exact = run([x.double() for x in (q, k, v * value, route)], 16, "none", borders=packed, backend="torch")
        assert_near(o / value, exact / value, torch.float32)
        assert tries.count(True) == (len(lengths) if borders else chunk_count(T, 32))
        return tries.count(False)

    assert [restarts(T) for T in (1, 5, 20, 32, 52, 70)] == [0] * 6
    assert restarts(60, [0, 20, 40, 60]) == 0
    assert restarts(70, far=40.0) == 0
    assert restarts(70, far=100.0) == 3
    assert restarts(70, value=1e30) == 0
    assert restarts(70, far=40.0, value=1e30) == 3  # the sum of P is small enough, their products with values are not


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_values_that_are_not_finite_stay_in_their_column() -> None:
    tensors = inputs(70, C=16)
    tensors[2][:, 40, :, 0], tensors[2][:, 50, :, 1] = math.nan, math.inf
    tensors[3].fill_(1)
    o, expected = (run(tensors, 16, "none", backend=backend) for backend in ("triton", "torch"))
    assert_near(o[..., 2:], expected[..., 2:])
    assert o[:, 40:, :, 0].isnan().all()
    assert not o[:, 50:, :, 1].isfinite().any()


def test_non_contiguous_inputs() -> None:
    q, k, v, route = inputs(70, R=2, C=16)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    columns_apart = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]
    batch_of_views = torch.cat((q, k, v), 2).split(2, 2)
    route = route.transpose(1, 2).contiguous().transpose(1, 2)
    expected = run([q, k, v, route], 16, "none", backend="triton")
    ts = leaves([q, k, v, route])
    wanted = torch.autograd.grad(run(ts, 16, "insertion", backend="triton").sum(), ts)
    for views in (heads_first, columns_apart, list(batch_of_views)):
        assert not views[0].is_contiguous()
        strided = [x.detach().requires_grad_() for x in (*views, route)]
        o = run(strided, 16, "insertion", backend="triton")
        assert torch.equal(o, expected)
        for x, y in zip(torch.autograd.grad(o.sum(), strided), wanted, strict=True):
            assert torch.equal(x, y)


def test_scale_and_empty_batch() -> None:
    tensors = inputs(40, C=16)
    options = {"chunk_size": 16, "scale": 0.7}
    ours = routed_softmax(*tensors, **options, backend="triton")  # type: ignore[arg-type]
    assert_near(ours, routed_softmax(*tensors, **options, backend="torch"))  # type: ignore[arg-type]
    ts = leaves([x[:0] for x in tensors])
    o = run(ts, 16, "insertion", backend="triton")
    o.sum().backward()
    assert o.shape == (0, 40, 1, 16)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in ts)


def test_only_the_requested_gradients() -> None:
    tensors = inputs(40, C=16)
    ts = leaves(tensors)
    wanted = torch.autograd.grad(run(ts, 16, "insertion", backend="triton").sum(), ts)
    for i, x in enumerate(tensors):
        alone = [*tensors[:i], x.clone().requires_grad_(), *tensors[i + 1 :]]
        (found,) = torch.autograd.grad(run(alone, 16, "insertion", backend="triton").sum(), [alone[i]])
        assert torch.equal(found, wanted[i])


def test_repeat_runs_are_bit_equal() -> None:
    tensors = inputs(130, R=2, G=2, C=32)
    first, second = leaves(tensors), leaves(tensors)
    do = torch.randn(1, 130, 4, 16, device=DEVICE)
    o, again = (run(ts, 32, "insertion", backend="triton") for ts in (first, second))
    assert torch.equal(o, again)
    grads = (torch.autograd.grad((o * do).sum(), ts) for o, ts in ((o, first), (again, second)))
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("mode", ["derivative", "insertion"])
def test_sampled_chunks_are_unbiased(mode: str) -> None:
    """Each draw is the exact gradient / rate on a share of the chunks that were left out, and exact on the kept."""
    tensors = inputs(16 * 6, R=2, C=16)
    tensors[3] = torch.tensor([1.0, 0, 0, 1, 0, 0], device=DEVICE)[None, :, None].repeat(1, 1, 2)
    kept = tensors[3] == 1
    do = torch.randn_like(tensors[2])

    def gradient(rate: float) -> Tensor:
        ts = leaves(tensors)
        return torch.autograd.grad((run(ts, 16, mode, rate=rate, backend="triton") * do).sum(), ts[3])[0]

    exact, seen = gradient(1.0), torch.zeros_like(kept)
    for _ in range(5):
        drawn = gradient(0.5)
        assert torch.equal(drawn[kept], exact[kept])
        is_zero = drawn == 0
        torch.testing.assert_close(torch.where(is_zero, 2 * exact, drawn)[~kept], 2 * exact[~kept])
        seen |= ~is_zero & ~kept
    assert seen[:, 1:5].sum() > 2


def test_weights_of_the_sample() -> None:
    unchosen = torch.rand(4, 50, 100, device=DEVICE) < 0.5
    assert not softmax_triton.sample_unchosen(unchosen, "none", 1.0).any()
    assert torch.equal(softmax_triton.sample_unchosen(unchosen, "insertion", 1.0), unchosen.float())
    weight = softmax_triton.sample_unchosen(unchosen, "derivative", 0.1)
    assert not weight[~unchosen].any()
    assert set(weight.unique().tolist()) == {0.0, 10.0}
    assert abs(float(weight[unchosen].mean()) - 1) < 0.15  # 5 standard deviations of 10,000 draws


def test_custom_ops() -> None:
    """Schema, fake implementations and autograd registration, as torch.compile relies on them."""
    q, k, v, route = inputs(40, C=16, J=2)
    sampled = softmax_triton.sample_unchosen(route <= 0.5, "insertion", 1.0)
    arguments = (q, k, v, route, None, 16, 0.25)
    torch.library.opcheck(torch.ops.natsl.routed_softmax.default, arguments)
    o, lse, starts, count = (x.detach() for x in torch.ops.natsl.routed_softmax(*arguments))
    held = [x.detach() for x in (torch.randn_like(o), q, k, v, o, lse, route, starts, count, sampled)]
    torch.library.opcheck(torch.ops.natsl.routed_softmax_backward.default, (*held, None, 16, 0.25, "insertion", True))


@pytest.mark.parametrize("value", [0.5, float("nan")], ids=str)
def test_routes_that_are_neither_0_nor_1_break_nothing(value: float) -> None:
    tensors = inputs(80, C=16, R=2)
    tensors[3][0, :, 0] = value  # a router that met NaN: read as left out
    ts = leaves(tensors)
    o = run(ts, 16, "insertion", backend="triton")
    gradients = torch.autograd.grad(o.sum(), ts)
    tensors[3][0, :, 0] = 0.0
    clean = leaves(tensors)
    expected = run(clean, 16, "insertion", backend="triton")
    assert torch.equal(o, expected)
    for x, y in zip(gradients[:3], torch.autograd.grad(expected.sum(), clean), strict=False):
        assert torch.equal(x, y)


def test_strided_borders() -> None:
    tensors = inputs(40, C=16, N=4)
    borders = torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE)
    strided = torch.stack((borders, borders + 7), 1)[:, 0]
    expected = run(tensors, 16, "none", borders=borders, backend="triton")
    assert torch.equal(run(tensors, 16, "none", borders=strided, backend="triton"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64 is not supported by the triton backend"),
        ({"C": 8}, "chunk_size = 8 is not supported"),
        ({"C": 256}, "chunk_size = 256 is not supported"),
        ({"K": 257}, "Ks = 257 is not supported by the triton backend: at most 256"),
        ({"V": 513}, "Vs = 513 is not supported by the triton backend: at most 512"),
        ({"scale": -1.0}, "scale = -1.0 is not supported"),
        ({"N": 4}, "route has shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_limits_name_the_value(change: dict[str, object], message: str) -> None:
    shape = {"K": 16, "V": 16, "C": 16, "N": 0, **{k: v for k, v in change.items() if k in "KVCN"}}
    tensors = [x.to(change.get("dtype", torch.float32)) for x in inputs(33, **shape)]  # type: ignore[arg-type,call-overload]
    with pytest.raises(ValueError, match=message):
        routed_softmax(*tensors, chunk_size=shape["C"], scale=change.get("scale"), backend="triton")  # type: ignore[arg-type]
