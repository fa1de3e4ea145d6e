"""The Triton kernels of the delta branch against the torch backend in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from natsl.kernels.delta import routed_delta_rule
from natsl.kernels.dispatch import kernel_limit
from natsl.kernels.launch import parameters
from tests.oracles import assert_compiles, assert_near, chunk_count, delta_inputs, leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # no bfloat16 interpreted
NAMES = ("q", "k", "v", "g", "beta", "route", "initial_state")


def make(T: int, dtype: torch.dtype, *, B: int = 1, R: int = 2, C: int = 16, K: int = 16, V: int = 16) -> list[Tensor]:
    """Random inputs with an initial state; q, k, v of ``dtype``, the rest float32."""
    inputs = [*delta_inputs(T, B=B, R=R, C=C, K=K, V=V), torch.randn(B, R, K, V)]
    return [x.to(DEVICE, dtype if i < 3 else torch.float32) for i, x in enumerate(inputs)]


def run(ts: list[Tensor], C: int, backend: str, **options: object) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    settings = {"counterfactual": "derivative", "output_final_state": True, **options}
    o, state = routed_delta_rule(*ts[:6], initial_state=ts[6], chunk_size=C, backend=backend, **settings)  # type: ignore[arg-type]
    assert isinstance(state, Tensor)
    return o, state


def compare(inputs: list[Tensor], C: int, **options: object) -> None:
    """Outputs and all gradients on the kernels near those of the torch backend in float64 on the same inputs."""
    dtype = inputs[0].dtype
    ours, exact = leaves(inputs), leaves(inputs, torch.float64)
    (o, state), (expected, expected_state) = run(ours, C, "triton", **options), run(exact, C, "torch", **options)
    assert o.dtype is dtype
    assert state.dtype is torch.float32
    assert_near(o, expected)
    assert_near(state, expected_state, dtype)
    do, ds = (torch.randn(x.shape).to(x) for x in (o, state))  # the same on every device
    wanted = torch.autograd.grad((expected * do.double()).sum() + (expected_state * ds.double()).sum(), exact)
    actual = torch.autograd.grad((o * do).sum() + (state * ds).sum(), ours)
    for name, x, y, leaf in zip(NAMES, actual, wanted, ours, strict=True):
        assert x.dtype is leaf.dtype, name
        try:
            assert_near(x, y, dtype)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def refused(inputs: list[Tensor], C: int) -> None:
    """The kernels name their limit for a shape that does not fit on chip."""
    with pytest.raises(ValueError, match="is not supported by the triton backend: chunk_size · K is at most"):
        run(inputs, C, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 75, 85, 96])
def test_lengths(T: int, dtype: torch.dtype) -> None:
    compare(make(T, dtype, B=2), 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 127, 300, 340, 384])
def test_lengths_of_chunk_64(T: int, dtype: torch.dtype) -> None:
    compare(make(T, dtype, R=1, C=64), 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("C", "K", "V"),
    [(16, 32, 24), (32, 24, 40), (32, 192, 16), (64, 128, 48), (64, 64, 64), (128, 128, 32), (16, 256, 512)],
)
def test_shapes(C: int, K: int, V: int, dtype: torch.dtype) -> None:
    if kernel_limit(dtype, C, {}, delta_keys=K) is not None:
        refused(make(2 * C + 5, dtype, R=1, C=C, K=K, V=V), C)
        return
    compare(make(2 * C + 5, dtype, R=1, C=C, K=K, V=V), C)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("K", [16, 32, 64, 128, 192, 256])
@pytest.mark.parametrize("C", [16, 32, 64, 128])
def test_every_shape_compiles_right(C: int, K: int, V: int, dtype: torch.dtype) -> None:
    # The largest gradients of routes and decays are those of the last chunk where it is written: sums of K·V products
    # with random signs, as exact as their terms. Of few heads all may cancel, and would not set the scale of what is
    # allowed; so there are eight, and all of them write it.
    inputs = make(300, dtype, B=2, R=4, C=C, K=K, V=V)
    inputs[5][:, -1] = 0
    if kernel_limit(dtype, C, {}, delta_keys=K) is not None:
        refused(inputs, C)
        return
    compare(inputs, C)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_passes_of_the_backward(dtype: torch.dtype) -> None:
    with parameters.forced({"delta_backward": {"FUSED": 0, "BV": 16}}):
        compare(make(70, dtype, C=32, K=16, V=40), 32)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["all-delta", "all-softmax"])
def test_only_one_memory(value: float) -> None:
    inputs = make(70, torch.float32)
    inputs[5].fill_(value)
    compare(inputs, 16)


def test_without_normalisation() -> None:
    inputs = make(40, torch.float32)
    inputs[0], inputs[1] = inputs[0] / 4, inputs[1] / 4
    compare(inputs, 16, qk_l2norm=False)


def test_strided_inputs() -> None:
    inputs = make(37, torch.float32, B=2)
    wide = torch.randn(2, 37, 2, 48, device=DEVICE)
    inputs[:3] = wide[..., :16], wide[..., 16:32], wide[..., 32:]
    inputs[3] = inputs[3].transpose(0, 2).contiguous().transpose(0, 2)
    compare(inputs, 16)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize("lengths", [[40], [16, 32], [1, 0, 5, 37], [0, 33, 0]], ids=str)
def test_packed_sequences_equal_single_ones(lengths: list[int], state: bool) -> None:
    T, chunks = sum(lengths), [chunk_count(n, 16) for n in lengths]
    inputs = make(T, torch.float32)[:6]
    inputs[5] = (torch.rand(1, sum(chunks), 2, device=DEVICE) < 0.5).float()
    starts = torch.randn(len(lengths), 2, 16, 16, device=DEVICE)
    borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    ts = leaves([*inputs, *([starts] if state else [])])
    options: dict[str, Any] = {"chunk_size": 16, "output_final_state": True, "counterfactual": "derivative"}
    o, final = routed_delta_rule(
        *ts[:6], initial_state=ts[6] if state else None, cu_seqlens=borders, backend="triton", **options
    )
    assert isinstance(final, Tensor)
    do, ds = torch.randn_like(o), torch.randn_like(final)
    packed = torch.autograd.grad((o * do).sum() + (final * ds).sum(), ts)
    chunk_borders = torch.tensor([0, *chunks]).cumsum(0).tolist()
    for i, ((a, b), (m, n)) in enumerate(zip(pairwise(borders.tolist()), pairwise(chunk_borders), strict=True)):
        if a == b:
            assert_near(final[i], starts[i] * state)
            continue
        part = [*(x[:, a:b] for x in inputs[:5]), inputs[5][:, m:n], *([starts[i : i + 1]] if state else [])]
        alone = leaves(part, torch.float64)
        expected, expected_state = routed_delta_rule(
            *alone[:6], initial_state=alone[6] if state else None, backend="torch", **options
        )
        assert isinstance(expected_state, Tensor)
        assert_near(o[:, a:b], expected)
        assert_near(final[i : i + 1], expected_state, torch.float32)
        loss = (expected * do[:, a:b]).sum() + (expected_state * ds[i : i + 1]).sum()
        wanted = torch.autograd.grad(loss, alone)
        got = [*(x[:, a:b] for x in packed[:5]), packed[5][:, m:n], *([packed[6][i : i + 1]] if state else [])]
        for x, y in zip(got, wanted, strict=True):
            assert_near(x, y, torch.float32)


@pytest.mark.parametrize("decay", [-60.0, -1e4, -float("inf")], ids=str)
def test_total_forgetting_isolates_tokens(decay: float) -> None:
    inputs = make(40, torch.float32)
    inputs[3].fill_(decay)
    ts = leaves(inputs)
    o, state = run(ts, 16, "triton")
    q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in inputs[:2])
    expected = inputs[4][..., None] * (q * k).sum(-1, keepdim=True) / 4 * inputs[2]
    assert_near(o, expected)
    gradients = torch.autograd.grad(o.sum() + state.sum(), ts)
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[3].any()


@pytest.mark.parametrize("decay", [-16.0, -49.0], ids=str)
def test_many_strong_decays_do_not_blur_what_follows(decay: float) -> None:
    inputs = make(64, torch.float32, R=1, C=64)
    inputs[3][:, :56], inputs[3][:, 56:] = decay, -0.01
    compare(inputs, 64)


def test_nan_shows() -> None:
    inputs = make(20, torch.float32)
    inputs[3][0, 3, 0] = float("nan")
    ts = leaves(inputs)
    o, _ = run(ts, 16, "triton")
    assert o[0, 3:, 0].isnan().all()
    assert o[0, :, 1].isfinite().all()
    assert torch.autograd.grad(o.sum(), ts[3])[0].isnan().any()


def test_wrong_number_of_chunks_is_refused() -> None:
    inputs = make(40, torch.float32)[:6]
    borders = torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE)
    for chunks, message in ((2, "expected \\(1, 3 to 4 chunks, 2\\)"), (5, "route has shape")):
        inputs[5] = torch.zeros(1, chunks, 2, device=DEVICE)
        with pytest.raises(ValueError, match=message):
            routed_delta_rule(*inputs, chunk_size=16, cu_seqlens=borders, backend="triton")
    if DEVICE == "cpu":  # on a GPU a device assertion, which ends the process's use of it
        inputs[5] = torch.zeros(1, 3, 2)
        with pytest.raises(RuntimeError):
            routed_delta_rule(*inputs, chunk_size=16, cu_seqlens=borders, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="memory that is only reserved costs nothing on a CPU")
def test_heads_far_apart_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(16, torch.float32, R=3)
    expected = run(inputs, 16, "triton")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    wide = torch.empty(2**31 + 2**12)
    monkeypatch.undo()
    far = wide.as_strided((1, 16, 3, 16), (2**31, 16, 2**30 + 16, 1))
    far.copy_(inputs[0])
    for x, y in zip(run([far, *inputs[1:]], 16, "triton"), expected, strict=True):
        assert torch.equal(x, y)


def test_one_strong_decay_does_not_blur_what_follows() -> None:
    inputs = make(48, torch.float32)
    inputs[3][:, 4::16] = -float("inf")
    ours, finite = run(inputs, 16, "triton"), [x.clone() for x in inputs]
    finite[3][:, 4::16] = -200.0
    for x, y in zip(ours, run([x.double() for x in finite], 16, "torch"), strict=True):
        assert_near(x, y)


def test_same_key_again_and_again() -> None:
    q, k, v, g, beta, route, state = make(64, torch.float32, R=1, C=64)
    k, g, beta, route = k[:, :1].expand_as(k), g.zero_(), beta.fill_(1), route.zero_()
    _, state = run([q, k, v, g, beta, route, state], 64, "triton")
    unit = k[:, -1] / k[:, -1].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.einsum("brkv,brk->brv", state, unit), v[:, -1], rtol=0, atol=1e-4)


def test_modes_of_the_route_gradient() -> None:
    inputs = make(107, torch.float32)

    def gradient(mode: str, rate: float = 1.0) -> Tensor:
        ts = leaves(inputs)
        o, state = run(ts, 16, "triton", counterfactual=mode, counterfactual_rate=rate)
        return torch.autograd.grad(o.square().sum() + state.square().sum(), ts[5])[0]

    none, derivative, insertion = (gradient(mode) for mode in ("none", "derivative", "insertion"))
    written = inputs[5] == 0
    assert torch.equal(derivative, insertion)
    assert torch.equal(none[written], derivative[written])
    assert not none[~written].any()
    assert derivative[~written].any()
    sampled = gradient("derivative", 0.5)
    assert torch.equal(sampled[written], derivative[written])
    weights = (sampled[~written] / derivative[~written])[derivative[~written] != 0]
    assert set(weights.tolist()) == {0.0, 2.0}


def test_bit_equal_repeats() -> None:
    inputs = make(75, torch.float16, B=2)
    results = []
    for _ in range(2):
        ts = leaves(inputs)
        o, state = run(ts, 16, "triton")
        results.append([o, state, *torch.autograd.grad(o.float().square().sum() + state.square().sum(), ts)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_empty_batch_and_unused_outputs() -> None:
    ts = leaves(make(9, torch.float32, B=0))
    o, state = run(ts, 16, "triton")
    (o.sum() + state.sum()).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in ts)
    ts = leaves(make(20, torch.float32))
    _, state = run(ts, 16, "triton")
    (dq, dk) = torch.autograd.grad(state.sum(), ts[:2])
    assert not dq.any()
    assert dk.any()


@pytest.mark.parametrize("final", [True, False], ids=["state", "no-state"])
def test_whole_graph_compiles(final: bool) -> None:
    inputs = make(20, torch.float32)[:6]

    def layer(*ts: Tensor) -> Tensor:
        o, state = routed_delta_rule(*ts, chunk_size=16, output_final_state=final, backend="triton")
        return o.square().sum() + state.square().sum() if isinstance(state, Tensor) else o.square().sum()

    assert_compiles(layer, inputs)


def test_custom_ops_are_well_formed() -> None:
    *ts, state = make(20, torch.float32)
    for initial, borders in ((state.requires_grad_(), None), (None, torch.tensor([0, 4, 20], device=DEVICE).int())):
        xs = leaves(ts)
        xs[5] = torch.rand(1, 2, 2, device=DEVICE).round().requires_grad_()
        torch.library.opcheck(
            torch.ops.natsl.routed_delta_rule.default,
            (*xs, initial, borders, 16, 0.25, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"K": 272}, "K = 272 is not supported by the triton backend: at most 256"),
        ({"V": 513}, "V = 513 is not supported by the triton backend: at most 512"),
        ({"C": 128}, "chunk_size = 128 in torch.float32 is not supported by the triton backend: chunk_size"),
        ({"C": 8}, "chunk_size = 8 is not supported by the triton backend: 16, 32, 64, 128"),
        ({"B": 32768}, "sequences · heads = 65536 is not supported by the triton backend: at most 65535"),
    ],
    ids=["K", "V", "float32", "C", "sequences"],
)
def test_limits_are_named(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make(9, torch.float32, **shape), shape.get("C", 16), "triton")
