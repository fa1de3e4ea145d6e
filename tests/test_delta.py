"""The delta branch against its token-by-token form, against Qwen3-Next's torch code, and in its invariants."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from natsl.kernels.delta import routed_delta_rule
from tests.oracles import DTYPES, assert_near, chunk_count, delta_inputs, leaves, token_delta, where_kernels_run

C = 4


def run(tensors: list[Tensor], mode: str = "derivative", rate: float = 1.0) -> tuple[Tensor, Tensor]:
    """Output and final state; the seventh tensor, if given, is the initial state."""
    state = tensors[6] if len(tensors) > 6 else None
    o, final = routed_delta_rule(
        *tensors[:6],
        chunk_size=C,
        initial_state=state,
        output_final_state=True,
        counterfactual=mode,
        counterfactual_rate=rate,
    )
    assert isinstance(final, Tensor)
    return o, final


def route_gradient(inputs: list[Tensor], mode: str, do: Tensor, rate: float = 1.0) -> Tensor:
    ts = leaves(inputs)
    # a single chunk's route plays no part in the output at all
    return torch.autograd.grad((run(ts, mode, rate)[0] * do).sum(), ts[5], materialize_grads=True)[0]


@pytest.mark.parametrize("routes", ["binary", "real", "ones", "zeros"])
@pytest.mark.parametrize("start", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("T", [1, 3, 4, 5, 8, 18])
def test_token_form(T: int, start: bool, routes: str) -> None:
    inputs = delta_inputs(T)
    options = {"binary": inputs[5], "real": torch.rand_like(inputs[5])}
    inputs[5] = options.get(routes, torch.full_like(inputs[5], float(routes == "ones")))
    if start:
        inputs.append(torch.randn(2, 2, 4, 3).double())
    ours, theirs = leaves(inputs), leaves(inputs)
    o, state = run(ours)
    expected, expected_state = token_delta(*theirs, chunk_size=C)
    assert_near(o, expected)
    assert_near(state, expected_state)
    do, ds = torch.randn_like(o), torch.randn_like(state)
    gradients = torch.autograd.grad((expected * do).sum() + (expected_state * ds).sum(), theirs)
    for actual, wanted in zip(torch.autograd.grad((o * do).sum() + (state * ds).sum(), ours), gradients, strict=True):
        assert_near(actual, wanted)


def test_without_norm_and_with_a_scale() -> None:
    inputs = delta_inputs(10)
    inputs[:2] = [x / 2 for x in inputs[:2]]
    o, state = routed_delta_rule(*inputs, chunk_size=C, scale=1.0, qk_l2norm=False)
    expected, _ = token_delta(*inputs, chunk_size=C, qk_l2norm=False)
    assert_near(o, expected * 4**0.5)
    assert state is None


@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 63, 64, 65])
def test_float32_equals_qwen3_next(T: int) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, g, beta, route = (x.float() for x in delta_inputs(T, C=16, K=16, V=8))
    start = torch.randn(2, 2, 16, 8)
    o, state = routed_delta_rule(
        q, k, v, g, beta, torch.zeros_like(route), chunk_size=16, initial_state=start, output_final_state=True
    )
    assert isinstance(state, Tensor)
    plain = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)  # transformers wraps it where fla-core is installed
    expected, expected_state = plain(
        q, k, v, g, beta, 16, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=4e-6)


def test_setting_beta_to_zero_is_not_routing() -> None:
    """A query inside a chunk that softmax keeps still sees the delta rule of its own chunk."""
    inputs = delta_inputs(8)
    inputs[5] = torch.ones_like(inputs[5])
    kept, _ = run(inputs)
    inputs[4] = torch.zeros_like(inputs[4])
    assert not run(inputs)[0].any()
    assert kept.abs().min() > 0


@pytest.mark.parametrize("T", [4, 6, 9])
def test_gradcheck(T: int) -> None:
    inputs = delta_inputs(T, B=1, K=3, V=2)
    inputs[5] = torch.rand_like(inputs[5])
    inputs.append(torch.randn(1, 2, 3, 2).double())
    assert torch.autograd.gradcheck(lambda *ts: run(list(ts)), leaves(inputs))


def test_gradcheck_packed() -> None:
    inputs = delta_inputs(11, B=1, K=3, V=2)
    borders = torch.tensor([0, 5, 5, 11], dtype=torch.int32)
    inputs[5] = torch.rand(1, 4, 2).double()
    inputs.append(torch.randn(3, 2, 3, 2).double())

    def packed(*ts: Tensor) -> tuple[Tensor, ...]:
        o, state = routed_delta_rule(
            *ts[:6],
            chunk_size=C,
            initial_state=ts[6],
            output_final_state=True,
            cu_seqlens=borders,
            counterfactual="derivative",
        )
        assert isinstance(state, Tensor)
        return o, state

    assert torch.autograd.gradcheck(packed, leaves(inputs))


@pytest.mark.parametrize("start", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("lengths", [[13], [4, 8], [1, 0, 5, 7], [0, 9, 0]], ids=str)
def test_packed_sequences_equal_running_alone(lengths: list[int], start: bool) -> None:
    chunks = [chunk_count(n, C) for n in lengths]
    inputs = delta_inputs(sum(lengths), B=1)
    inputs[5] = (torch.rand(1, sum(chunks), 2) < 0.5).double()
    if start:
        inputs.append(torch.randn(len(lengths), 2, 4, 3).double())
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    ts = leaves(inputs)
    o, state = routed_delta_rule(
        *ts[:6],
        chunk_size=C,
        cu_seqlens=borders,
        initial_state=ts[6] if start else None,
        output_final_state=True,
        counterfactual="insertion",
    )
    assert isinstance(state, Tensor)
    assert state.shape == (len(lengths), 2, 4, 3)
    assert state.dtype is torch.float64
    do, ds = torch.randn_like(o), torch.randn_like(state)
    packed = torch.autograd.grad((o * do).sum() + (state * ds).sum(), ts)
    chunk_borders = torch.tensor([0, *chunks]).cumsum(0).tolist()
    spans = zip(pairwise(borders.tolist()), pairwise(chunk_borders), strict=True)
    for i, ((a, b), (m, n)) in enumerate(spans):
        if a == b:
            assert torch.equal(state[i], inputs[6][i] if start else torch.zeros_like(state[i]))
            if start:
                assert_near(packed[6][i], ds[i])
            continue
        own = [*(x[:, a:b] for x in inputs[:5]), inputs[5][:, m:n], *(x[i : i + 1] for x in inputs[6:])]
        alone = leaves(own)
        expected, expected_state = run(alone, "insertion")
        assert_near(o[:, a:b], expected)
        assert_near(state[i : i + 1], expected_state)
        wanted = torch.autograd.grad((expected * do[:, a:b]).sum() + (expected_state * ds[i]).sum(), alone)
        got = [*(x[:, a:b] for x in packed[:5]), packed[5][:, m:n], *(x[i : i + 1] for x in packed[6:])]
        for x, y in zip(got, wanted, strict=True):
            assert_near(x, y)


@pytest.mark.parametrize("cuts", [[4], [8, 12], [4, 8, 12, 16, 20]], ids=str)
def test_whole_chunks_then_the_rest_equal_one_shot(cuts: list[int]) -> None:
    inputs = delta_inputs(23)
    whole, final = run(inputs)
    state: Tensor | None = None
    for a, b in pairwise([0, *cuts, 23]):
        part = [*(x[:, a:b] for x in inputs[:5]), inputs[5][:, a // C : chunk_count(b, C)]]
        o, state = run(part if state is None else [*part, state])
        assert_near(o, whole[:, a:b])
    assert isinstance(state, Tensor)
    assert_near(state, final)


# The route's gradient


def test_none_is_the_derivative_on_written_chunks_and_zero_elsewhere() -> None:
    inputs = delta_inputs(18)
    do = torch.randn(2, 18, 2, 3).double()
    none, derivative, insertion = (route_gradient(inputs, m, do) for m in ("none", "derivative", "insertion"))
    written = inputs[5] == 0
    assert torch.equal(none[written], derivative[written])
    assert not none[~written].any()
    assert derivative[~written].any()
    assert torch.equal(insertion, derivative)


def test_derivative_is_the_exact_effect_of_the_other_side() -> None:
    """The output is affine in one chunk's route, so that flipping it moves a linear loss by exactly the derivative."""
    inputs = delta_inputs(18)
    do = torch.randn(2, 18, 2, 3).double()
    grad = route_gradient(inputs, "insertion", do)
    for b, n, r in (inputs[5] >= 0).nonzero().tolist():
        flipped = inputs[5].clone()
        flipped[b, n, r] = 1 - flipped[b, n, r]
        effect = ((run([*inputs[:5], flipped])[0] - run(inputs)[0]) * do).sum() * (1 - 2 * inputs[5][b, n, r])
        assert abs(float(effect - grad[b, n, r])) < 1e-12


def test_sampled_counterfactual_is_unbiased() -> None:
    inputs = delta_inputs(18)
    do = torch.randn(2, 18, 2, 3).double()
    exact = route_gradient(inputs, "insertion", do)
    draws = torch.stack([route_gradient(inputs, "insertion", do, rate=0.25) for _ in range(400)])
    written = inputs[5] == 0
    assert torch.equal(draws[:, written], exact[written].expand(400, -1)), "the chosen side is never sampled"
    sampled, wanted = draws[:, ~written], exact[~written]
    is_zero = sampled == 0
    torch.testing.assert_close(torch.where(is_zero, 4 * wanted, sampled), (4 * wanted).expand_as(sampled))
    share = 1 - is_zero[:, wanted != 0].double().mean(0)
    assert (share - 0.25).abs().max() < 0.1  # 4.6 standard deviations of 400 draws


# Invariants


def test_no_output_before_a_token_depends_on_it() -> None:
    for t in (1, 3, 4, 11, 17):
        inputs = delta_inputs(18)
        before, _ = run(inputs)
        for x in inputs[:3]:
            x[:, t] += 10
        inputs[3][:, t] -= 1
        inputs[4][:, t] /= 2
        after, _ = run(inputs)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.isclose(before[:, t], after[:, t]).all()


@pytest.mark.parametrize("T", [1, 4, 16, 18])
def test_the_route_of_the_last_chunk_changes_no_output_but_the_state(T: int) -> None:
    inputs = delta_inputs(T)
    flipped = inputs[5].clone()
    flipped[:, -1] = 1 - flipped[:, -1]
    o, state = run(inputs)
    other, other_state = run([*inputs[:5], flipped])
    assert torch.equal(o, other)
    assert not torch.isclose(state, other_state).all()
    do = torch.randn_like(o)
    for mode in ("none", "derivative", "insertion"):
        assert not route_gradient(inputs, mode, do)[:, -1].any()


@pytest.mark.parametrize("gate", [-60.0, -1e4, float("-inf")], ids=str)
def test_a_full_decay_isolates_what_follows(gate: float) -> None:
    """g → −∞ at a token: outputs from there on are those of a sequence that starts there; gradients stay finite."""
    for t in (1, 4, 6, 9):
        inputs = [*delta_inputs(14), torch.randn(2, 2, 4, 3).double()]
        inputs[3][:, t] = gate
        ts = leaves(inputs)
        o, state = run(ts)
        cut = [x.clone() for x in inputs]
        cut[2][:, :t] = 100.0
        cut[6] = cut[6] * 50
        other, other_state = run(cut)
        assert_near(other[:, t:], o[:, t:])
        assert_near(other_state, state)
        grads = torch.autograd.grad(o[:, t:].sum() + state.sum(), ts)
        assert all(x.isfinite().all() for x in grads)
        assert grads[2][:, :t].abs().max() < 1e-12
        assert grads[2][:, t:].abs().max() > 0


def test_every_token_decayed_to_nothing_is_alone() -> None:
    inputs = delta_inputs(9)
    inputs[3] = torch.full_like(inputs[3], float("-inf"))
    ts = leaves(inputs)
    o, state = run(ts)
    q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in inputs[:2])
    weight = (q * k).sum(-1, keepdim=True) * inputs[4][..., None] / 2
    assert_near(o, weight * inputs[2])
    grads = torch.autograd.grad(o.sum() + state.sum(), ts)
    assert all(x.isfinite().all() for x in grads)


def test_batch_and_head_permutations() -> None:
    inputs = delta_inputs(18, B=3, R=3)
    o, state = run(inputs)
    batch, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    by_batch, by_head = run([x[batch] for x in inputs]), run([x[:, :, heads] for x in inputs])
    assert_near(by_batch[0], o[batch])
    assert_near(by_batch[1], state[batch])
    assert_near(by_head[0], o[:, :, heads])
    assert_near(by_head[1], state[:, heads])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 31, 65])
def test_dtypes(T: int, dtype: torch.dtype) -> None:
    inputs = [*delta_inputs(T, C=16, K=16, V=8), torch.randn(2, 2, 16, 8).double()]
    rounded = [*(x.to(dtype) for x in inputs[:3]), *(x.float() for x in inputs[3:])]
    exact, ts = leaves(rounded, torch.float64), leaves(rounded)
    (expected, expected_state), (o, state) = (
        routed_delta_rule(
            *x[:6], chunk_size=16, initial_state=x[6], output_final_state=True, counterfactual="derivative"
        )
        for x in (exact, ts)
    )
    assert isinstance(state, Tensor)
    assert isinstance(expected_state, Tensor)
    assert o.dtype is dtype
    assert state.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert_near(o, expected)
    assert_near(state, expected_state, torch.float32)
    do, ds = torch.randn(2, T, 2, 8).to(dtype), torch.randn(2, 2, 16, 8)
    wanted = torch.autograd.grad((expected * do.double()).sum() + (expected_state * ds.double()).sum(), exact)
    actual = torch.autograd.grad((o * do).sum() + (state * ds).sum(), ts)
    for x, y, leaf in zip(actual, wanted, ts, strict=True):
        assert x.dtype is leaf.dtype
        assert_near(x, y, torch.float32 if dtype is torch.float64 else dtype)


def test_non_contiguous_inputs() -> None:
    inputs = delta_inputs(13)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    ours, theirs = [x.requires_grad_() for x in strided], leaves(inputs)
    (o, state), (expected, expected_state) = run(ours), run(theirs)
    assert_near(o, expected)
    assert_near(state, expected_state)
    gradients = torch.autograd.grad(expected.sum(), theirs)
    for x, y in zip(torch.autograd.grad(o.sum(), ours), gradients, strict=True):
        assert_near(x, y)


def test_empty_batch() -> None:
    ts = leaves([*delta_inputs(9, B=0), torch.zeros(0, 2, 4, 3).double()])
    o, state = run(ts)
    assert o.shape == (0, 9, 2, 3)
    assert state.shape == (0, 2, 4, 3)
    (o.sum() + state.sum()).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in ts)


def test_same_key_again_and_again() -> None:
    """Equal keys with beta 1 make I + L as ill-conditioned as it gets; the memory then holds the last value alone."""
    q, k, v, g, beta, route = (x.float() for x in delta_inputs(64, C=64))
    k, g, beta, route = k[:, :1].expand_as(k), g.zero_(), beta.fill_(1), route.zero_()
    _, state = routed_delta_rule(q, k, v, g, beta, route, chunk_size=64, output_final_state=True)
    assert isinstance(state, Tensor)
    unit = k[:, -1] / k[:, -1].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.einsum("brkv,brk->brv", state, unit), v[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 9, 2, 4, dtype=torch.int64)}, "q must be a floating point tensor, found torch.int64"),
        ({"beta": 1.0}, "beta must be a floating point tensor, found float"),
        ({"route": torch.ones(2, 3, 2, dtype=torch.int32)}, "route must be a floating point tensor"),
        ({"g": torch.ones(2, 9, 2, device="meta")}, "g is on meta, but q is on cpu"),
        ({"initial_state": torch.ones(2, 2, 4, 3, device="meta")}, "initial_state is on meta, but q is on cpu"),
        ({"initial_state": torch.ones(2, 2, 4, 3, dtype=torch.int64)}, "initial_state must be a floating point"),
        ({"v": torch.ones(2, 9, 2, 3)}, "v is torch.float32, but q is torch.float64"),
        ({"q": torch.ones(2, 9, 4).double()}, "q must be .* found \\(2, 9, 4\\)"),
        ({"k": torch.ones(2, 9, 2, 5).double()}, "k has shape \\(2, 9, 2, 5\\), expected \\(2, 9, 2, 4\\)"),
        ({"v": torch.ones(2, 9, 1, 3).double()}, "v has shape"),
        ({"g": torch.ones(2, 9, 2, 1)}, "g has shape"),
        ({"beta": torch.ones(2, 8, 2)}, "beta has shape"),
        ({"route": torch.ones(2, 2, 2)}, "route has shape \\(2, 2, 2\\), expected \\(2, 3, 2\\)"),
        ({"route": torch.ones(2, 3)}, "route has shape"),
        (
            {"initial_state": torch.ones(1, 2, 4, 3)},
            "initial_state has shape \\(1, 2, 4, 3\\), expected \\(2, 2, 4, 3\\)",
        ),
        ({"chunk_size": -1}, "chunk_size = -1"),
        ({"counterfactual": "all"}, "counterfactual = 'all'"),
        ({"counterfactual_rate": -0.1}, "counterfactual_rate = -0.1"),
        ({"backend": "triton"}, "torch.float64 is not supported by the triton backend"),
        ({"backend": ""}, "backend = '' is not allowed"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens packs sequences into batch 1, found batch 2"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_mistakes_name_the_argument(change: dict[str, object], message: str) -> None:
    names = ("q", "k", "v", "g", "beta", "route")
    arguments: dict[str, object] = {**dict(zip(names, delta_inputs(9), strict=True)), "chunk_size": C, **change}
    if change.get("backend") == "triton":
        arguments = where_kernels_run(arguments)
    with pytest.raises(ValueError, match=message):
        routed_delta_rule(**arguments)  # type: ignore[arg-type]


def test_packing_needs_a_state_per_sequence() -> None:
    inputs = delta_inputs(8, B=1)
    with pytest.raises(ValueError, match="initial_state has shape \\(1, 2, 4, 3\\), expected \\(2, 2, 4, 3\\)"):
        routed_delta_rule(
            *inputs, chunk_size=C, cu_seqlens=torch.tensor([0, 4, 8]), initial_state=torch.zeros(1, 2, 4, 3)
        )


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match=r"q must be .* each ≥ 1"):
        run([x[:, :0] for x in delta_inputs(4)])
