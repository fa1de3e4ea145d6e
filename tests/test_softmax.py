"""The softmax branch against a dense formula, against SDPA, and in its invariants."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from natsl.kernels import reference
from natsl.kernels.softmax import routed_softmax
from tests.oracles import (
    DTYPES,
    assert_near,
    chunk_count,
    dense_softmax,
    leaves,
    softmax_inputs,
    visible,
    where_kernels_run,
)

C = 4


def run(tensors: list[Tensor], mode: str = "derivative", rate: float = 1.0) -> Tensor:
    q, k, v, route = tensors
    return routed_softmax(q, k, v, route, chunk_size=C, counterfactual=mode, counterfactual_rate=rate)


def masked(q: Tensor, k: Tensor, v: Tensor, route: Tensor) -> Tensor:
    """SDPA with the mask written out; routes of 0 and 1."""
    mask = visible(route, q.shape[1], C, k.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def route_gradient(inputs: list[Tensor], mode: str, do: Tensor, rate: float = 1.0) -> Tensor:
    ts = leaves(inputs)
    return torch.autograd.grad((run(ts, mode, rate) * do).sum(), ts[3])[0]


@pytest.mark.parametrize("routes", ["binary", "real", "ones", "zeros"])
@pytest.mark.parametrize(("G", "J"), [(1, 1), (2, 1), (1, 3), (2, 2)], ids=lambda n: str(n))
@pytest.mark.parametrize("T", [1, 3, 4, 5, 8, 18])
def test_dense_formula(T: int, G: int, J: int, routes: str) -> None:
    inputs = softmax_inputs(T, G=G, J=J)
    options = {"binary": inputs[3], "real": torch.rand_like(inputs[3])}
    inputs[3] = options.get(routes, torch.full_like(inputs[3], float(routes == "ones")))
    ours, theirs = leaves(inputs), leaves(inputs)
    o, expected = run(ours), dense_softmax(*theirs, chunk_size=C, scale=0.5)
    do = torch.randn_like(o)
    assert_near(o, expected)
    gradients = torch.autograd.grad((expected * do).sum(), theirs)
    for actual, wanted in zip(torch.autograd.grad((o * do).sum(), ours), gradients, strict=True):
        assert_near(actual, wanted)


@pytest.mark.parametrize("rows", [1, 40, 1000], ids=lambda n: f"{n}-scores")
def test_blocks_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = softmax_inputs(22, G=2, J=2)
    whole = leaves(inputs)
    expected = run(whole)
    do = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * do).sum(), whole)
    monkeypatch.setattr(reference, "SCORE_BLOCK", rows)
    ts = leaves(inputs)
    o = run(ts)
    assert_near(o, expected)
    for actual, other in zip(torch.autograd.grad((o * do).sum(), ts), wanted, strict=True):
        assert_near(actual, other)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 63, 64, 65])
@pytest.mark.parametrize("routes", ["random", "ones", "zeros"])
def test_float32_equals_sdpa(routes: str, T: int) -> None:
    q, k, v = (torch.randn(2, T, 4, w) for w in (16, 16, 8))
    N = chunk_count(T, 16)
    route = {"random": (torch.rand(2, N, 2) < 0.5).float(), "ones": torch.ones(2, N, 2)}.get(
        routes, torch.zeros(2, N, 2)
    )
    o = routed_softmax(q, k, v, route, chunk_size=16)
    mask = visible(route, T, 16, heads=4)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-6)
    if routes == "ones":
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(o, causal, rtol=0, atol=1e-6)


def test_scale() -> None:
    q, k, v, route = softmax_inputs(10)
    o = routed_softmax(q, k, v, route, chunk_size=C, scale=0.1)
    assert_near(o, dense_softmax(q, k, v, route, chunk_size=C, scale=0.1))


@pytest.mark.parametrize(("T", "G", "J"), [(4, 1, 1), (10, 1, 1), (9, 2, 1), (9, 1, 2)])
def test_gradcheck(T: int, G: int, J: int) -> None:
    inputs = softmax_inputs(T, B=1, G=G, J=J)
    inputs[3] = 0.2 + 0.7 * torch.rand_like(inputs[3])
    assert torch.autograd.gradcheck(lambda *ts: run(list(ts)), leaves(inputs))


def test_gradcheck_packed() -> None:
    inputs = softmax_inputs(11, B=1)
    borders = torch.tensor([0, 5, 5, 11], dtype=torch.int32)
    route = 0.2 + 0.7 * torch.rand(1, 4, 2).double()

    def packed(*ts: Tensor) -> Tensor:
        q, k, v, route = ts
        return routed_softmax(q, k, v, route, chunk_size=C, cu_seqlens=borders, counterfactual="derivative")

    assert torch.autograd.gradcheck(packed, leaves([*inputs[:3], route]))


def test_gradient_of_the_gradient_is_refused() -> None:
    ts = leaves(softmax_inputs(9))
    (dq,) = torch.autograd.grad(run(ts).square().sum(), ts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("lengths", [[13], [4, 8], [1, 0, 5, 7], [0, 9, 0]], ids=str)
def test_packed_sequences_equal_running_alone(lengths: list[int]) -> None:
    T, chunks = sum(lengths), [chunk_count(n, C) for n in lengths]
    inputs = softmax_inputs(T, B=1, G=2, J=2)
    inputs[3] = (torch.rand(1, sum(chunks), 2) < 0.5).double()
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    ts = leaves(inputs)
    o = routed_softmax(*ts, chunk_size=C, cu_seqlens=borders, counterfactual="insertion")
    do = torch.randn_like(o)
    packed = torch.autograd.grad((o * do).sum(), ts)
    chunk_borders = torch.tensor([0, *chunks]).cumsum(0).tolist()
    for (a, b), (m, n) in zip(pairwise(borders.tolist()), pairwise(chunk_borders), strict=True):
        if a == b:
            continue
        alone = leaves([*(x[:, a:b] for x in inputs[:3]), inputs[3][:, m:n]])
        expected = run(alone, "insertion")
        assert_near(o[:, a:b], expected)
        wanted = torch.autograd.grad((expected * do[:, a:b]).sum(), alone)
        for x, y in zip([*(x[:, a:b] for x in packed[:3]), packed[3][:, m:n]], wanted, strict=True):
            assert_near(x, y)


# The route's gradient


def test_none_is_the_derivative_on_kept_chunks_and_zero_elsewhere() -> None:
    inputs = softmax_inputs(18, G=2)
    do = torch.randn(2, 18, 4, 3).double()
    none, derivative = (route_gradient(inputs, mode, do) for mode in ("none", "derivative"))
    kept = inputs[3] == 1
    assert torch.equal(none[kept], derivative[kept])
    assert not none[~kept].any()
    assert derivative[~kept].any()


def test_derivative_equals_finite_difference() -> None:
    inputs = softmax_inputs(18, G=2)
    do = torch.randn(2, 18, 4, 3).double()
    grad = route_gradient(inputs, "derivative", do)
    step = 1e-6
    for index in [(0, 0, 0), (1, 1, 1), (0, 2, 1), (1, 3, 0)]:
        moved = inputs[3].clone()
        inside = step if moved[index] == 0 else -step  # log(a) has no value below 0
        moved[index] += inside
        change = ((run([*inputs[:3], moved]) - run(inputs)) * do).sum() / inside
        assert abs(float(change - grad[index])) < 1e-4 * max(1.0, abs(float(grad[index])))


def test_insertion_is_the_exact_effect_of_keeping_one_more_chunk() -> None:
    inputs = softmax_inputs(18, G=2, J=2)
    do = torch.randn(2, 18, 8, 3).double()
    grad, derivative = (route_gradient(inputs, mode, do) for mode in ("insertion", "derivative"))
    kept = inputs[3] == 1
    assert torch.equal(grad[kept], derivative[kept])
    left_out = (~kept).nonzero().tolist()
    assert len(left_out) > 5
    for b, n, r in left_out:
        inserted = inputs[3].clone()
        inserted[b, n, r] = 1
        effect = ((run([*inputs[:3], inserted]) - run(inputs)) * do).sum()
        assert abs(float(effect - grad[b, n, r])) < 1e-12


@pytest.mark.parametrize("mode", ["none", "derivative", "insertion"])
@pytest.mark.parametrize("size", [30.0, 90.0, 200.0, 1e3, -1e3], ids=lambda x: f"{x:g}-above")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scores_far_from_the_visible_ones(dtype: torch.dtype, size: float, mode: str) -> None:
    """A chunk that was left out may score far above everything visible: nothing overflows, insertion stays exact."""
    q, k, v, route = softmax_inputs(16, G=2)
    q, k = ((x * 8).round() / 8 for x in (q, k))  # scores that float32 holds exactly
    q[..., 0], k[..., 0] = 2.0, 0.0
    k[:, :C, :, 0] = size  # · 2 · scale 0.5
    route.zero_()
    do = torch.randn(2, 16, 4, 3).double()
    ts = leaves([q, k, v, route], dtype)
    o = run(ts, mode)
    grads = torch.autograd.grad((o * do.to(dtype)).sum(), ts)
    assert_near(o, masked(q, k, v, route), dtype)
    assert all(g.isfinite().all() for g in grads)
    if mode == "insertion":
        inserted = route.clone()
        inserted[:, 0] = 1
        effect = (masked(q, k, v, inserted) - masked(q, k, v, route)) * do
        by_head = effect.sum((1, 3)).unflatten(1, (2, 2)).sum(2)  # [B,R]: G heads share a route
        assert_near(grads[3][:, 0], by_head, torch.float32)
        assert grads[3].abs().max() < 1e3


@pytest.mark.parametrize("mode", ["derivative", "insertion"])
def test_sampled_counterfactual_is_unbiased(mode: str) -> None:
    inputs = softmax_inputs(18, R=2)
    do = torch.randn(2, 18, 2, 3).double()
    exact = route_gradient(inputs, mode, do)
    draws = torch.stack([route_gradient(inputs, mode, do, rate=0.25) for _ in range(600)])
    kept = inputs[3] == 1
    assert torch.equal(draws[:, kept], exact[kept].expand(600, -1)), "the chosen side is never sampled"
    sampled, wanted = draws[:, ~kept], exact[~kept]
    is_zero = sampled == 0
    torch.testing.assert_close(torch.where(is_zero, 4 * wanted, sampled), (4 * wanted).expand_as(sampled))
    some = wanted != 0
    share = 1 - is_zero[:, some].double().mean(0)
    assert (share - 0.25).abs().max() < 0.08  # 4.5 standard deviations of 600 draws
    error = (sampled.mean(0) - wanted).abs()[some] / wanted[some].abs()
    assert error.max() < 4 * 0.08


# Invariants


def test_no_output_before_a_token_depends_on_it() -> None:
    for t in (1, 3, 4, 11, 17):
        q, k, v, route = softmax_inputs(18, G=2)
        before = run([q, k, v, route])
        for x in (q, k, v):
            x[:, t] += 100
        after = run([q, k, v, route])
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.isclose(before[:, t], after[:, t]).all()


@pytest.mark.parametrize("T", [1, 4, 16, 18])
def test_the_route_of_the_last_chunk_changes_nothing(T: int) -> None:
    inputs = softmax_inputs(T)
    flipped = inputs[3].clone()
    flipped[:, -1] = 1 - flipped[:, -1]
    do = torch.randn(2, T, 2, 3).double()
    assert torch.equal(run(inputs), run([*inputs[:3], flipped]))
    for mode in ("none", "derivative", "insertion"):
        assert not route_gradient(inputs, mode, do)[:, -1].any()


def test_a_prefix_of_the_sequence_gives_a_prefix_of_the_output() -> None:
    q, k, v, route = softmax_inputs(23, G=2)
    whole = run([q, k, v, route])
    for n in (1, 3, 4, 5, 8, 20, 22):
        part = run([q[:, :n], k[:, :n], v[:, :n], route[:, : chunk_count(n, C)]])
        assert_near(part, whole[:, :n])


def test_batch_and_head_permutations() -> None:
    q, k, v, route = softmax_inputs(18, B=3, R=3, G=2)
    o = run([q, k, v, route])
    batch, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    assert_near(run([x[batch] for x in (q, k, v, route)]), o[batch])
    wide = (2 * heads[:, None] + torch.arange(2)).flatten()
    assert_near(run([*(x[:, :, wide] for x in (q, k, v)), route[:, :, heads]]), o[:, :, wide])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 31, 65])
def test_dtypes(T: int, dtype: torch.dtype) -> None:
    q, k, v, route = softmax_inputs(T, C=16, G=2, K=16, V=8)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    exact, ts = leaves([q, k, v, route], torch.float64), leaves([q, k, v, route.float()])
    do = torch.randn(2, T, 4, 8).to(dtype)
    options = {"chunk_size": 16, "counterfactual": "insertion"}
    expected = routed_softmax(*exact, **options)  # type: ignore[arg-type]
    o = routed_softmax(*ts, **options)  # type: ignore[arg-type]
    assert o.dtype is dtype
    assert_near(o, expected)
    wanted = torch.autograd.grad((expected * do.double()).sum(), exact)
    for actual, other, x in zip(torch.autograd.grad((o * do).sum(), ts), wanted, ts, strict=True):
        assert actual.dtype is x.dtype
        assert_near(actual, other, dtype if dtype is not torch.float64 else torch.float32)


def test_non_contiguous_inputs() -> None:
    inputs = softmax_inputs(13, G=2)
    strided = leaves([x.transpose(0, 1).contiguous().transpose(0, 1).flip(-1).flip(-1) for x in inputs[:3]])
    strided = [x.detach().permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1).requires_grad_() for x in strided]
    assert not any(x.is_contiguous() for x in strided)
    route = inputs[3].transpose(1, 2).contiguous().transpose(1, 2)
    expected, o = leaves(inputs), run([*strided, route])
    other = run(expected)
    assert_near(o, other)
    for x, y in zip(torch.autograd.grad(o.sum(), strided), torch.autograd.grad(other.sum(), expected[:3]), strict=True):
        assert_near(x, y)


def test_empty_batch() -> None:
    ts = leaves(softmax_inputs(9, B=0))
    o = run(ts)
    assert o.shape == (0, 9, 2, 3)
    o.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in ts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 9, 2, 4, dtype=torch.int64)}, "q must be a floating point tensor, found torch.int64"),
        ({"v": [[1.0]]}, "v must be a floating point tensor, found list"),
        ({"route": torch.ones(2, 3, 2, dtype=torch.bool)}, "route must be a floating point tensor"),
        ({"k": torch.ones(2, 9, 2, 4, device="meta")}, "k is on meta, but q is on cpu"),
        ({"route": torch.ones(2, 3, 2, device="meta")}, "route is on meta, but q is on cpu"),
        ({"k": torch.ones(2, 9, 2, 4)}, "k is torch.float32, but q is torch.float64"),
        ({"q": torch.ones(2, 9, 4).double()}, "q must be .* found \\(2, 9, 4\\)"),
        ({"k": torch.ones(2, 8, 2, 4).double()}, "k has shape \\(2, 8, 2, 4\\), expected \\(2, 9, 2, 4\\)"),
        ({"k": torch.ones(2, 9, 2, 5).double()}, "k has shape"),
        ({"v": torch.ones(1, 9, 2, 3).double()}, "v has shape"),
        ({"v": torch.ones(2, 9, 1, 3).double()}, "v has shape"),
        ({"q": torch.ones(2, 9, 3, 4).double()}, "3 query heads are not a multiple of 2"),
        ({"route": torch.ones(2, 3).double()}, "route \\(2, 3\\) must be"),
        ({"route": torch.ones(2, 3, 3).double()}, "heads dividing 2"),
        ({"route": torch.ones(2, 2, 2).double()}, "route has shape \\(2, 2, 2\\), expected \\(2, 3, 2\\)"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"counterfactual": "both"}, "counterfactual = 'both' must be one of none, derivative, insertion"),
        ({"counterfactual_rate": 0.0}, "counterfactual_rate = 0.0"),
        ({"counterfactual_rate": 1.5}, "counterfactual_rate = 1.5"),
        ({"backend": "cuda"}, "backend = 'cuda' is not allowed: it must be one of auto, triton, torch"),
        ({"backend": "triton"}, "torch.float64 is not supported by the triton backend"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens packs sequences into batch 1, found batch 2"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_mistakes_name_the_argument(change: dict[str, object], message: str) -> None:
    q, k, v, route = softmax_inputs(9)
    arguments: dict[str, object] = {"q": q, "k": k, "v": v, "route": route, "chunk_size": C, **change}
    if change.get("backend") == "triton":
        arguments = where_kernels_run(arguments)
    with pytest.raises(ValueError, match=message):
        routed_softmax(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "borders",
    [[0, 5], [1, 9], [0, 6, 3, 9], [9], [[0, 9]], [0.0, 9.0], None],
    ids=["short", "late", "falling", "single", "2-d", "float", "list"],
)
def test_borders_of_packed_sequences_are_checked(borders: list[object] | None) -> None:
    q, k, v, route = softmax_inputs(9, B=1)
    cu_seqlens = torch.tensor(borders) if borders is not None else [0, 9]
    with pytest.raises(ValueError, match="cu_seqlens"):
        routed_softmax(q, k, v, route, chunk_size=C, cu_seqlens=cu_seqlens)  # type: ignore[arg-type]


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match=r"q must be .* each ≥ 1"):
        run([torch.ones(1, 0, 2, 4), torch.ones(1, 0, 2, 4), torch.ones(1, 0, 2, 3), torch.ones(1, 0, 2)])


@pytest.mark.parametrize("T", [0, 9])
def test_packing_needs_the_chunks_of_every_sequence(T: int) -> None:
    q, k, v, route = softmax_inputs(9, B=1)
    borders = torch.tensor([0, T // 3, 9])  # 3 + 6 tokens make 3 chunks, as 9 do; 0 + 9 too
    assert routed_softmax(q, k, v, route, chunk_size=C, cu_seqlens=borders).shape == q.shape[:3] + v.shape[3:]
    with pytest.raises(ValueError, match="route has shape \\(1, 3, 2\\), expected \\(1, 4, 2\\)"):
        routed_softmax(q, k, v, route, chunk_size=C, cu_seqlens=torch.tensor([0, 1, 2, 9]))
