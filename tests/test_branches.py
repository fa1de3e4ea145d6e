"""Both branches in one call: equal to two calls, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natsl.kernels.branches import _gradient_weights, routed_branches
from natsl.kernels.delta import routed_delta_rule
from natsl.kernels.softmax import routed_softmax
from tests.oracles import assert_compiles, assert_near, chunk_count, leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C = 16


def make(T: int, dtype: torch.dtype, *, B: int = 2, R: int = 2, K: int = 16, V: int = 32, G: int = 2) -> list[Tensor]:
    """q, k, v, the queries and keys of the softmax heads, g, beta and routes."""
    wide = [torch.randn(B, T, h, w) for h, w in ((R, K), (R, K), (R, V), (R * G, K // G), (R * G, K // G))]
    scalars = [-torch.rand(B, T, R), torch.rand(B, T, R), (torch.rand(B, chunk_count(T, C), R) < 0.5).float()]
    return [*(x.to(DEVICE, dtype) for x in wide), *(x.to(DEVICE) for x in scalars)]


def apart(ts: list[Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """The two public ops on the torch backend."""
    q, k, v, qs, ks, g, beta, route = ts
    o_delta, _ = routed_delta_rule(q, k, v, g, beta, route, chunk_size=C, counterfactual=mode, backend="torch")
    values = v.reshape(*qs.shape[:3], -1)
    return o_delta, routed_softmax(qs, ks, values, route, chunk_size=C, counterfactual=mode, backend="torch")


@pytest.mark.parametrize("mode", ["none", "derivative", "insertion"])
@pytest.mark.parametrize("T", [1, 16, 51])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_two_calls(backend: str, T: int, mode: str) -> None:
    inputs = make(T, torch.float32)
    ours, exact = leaves(inputs), leaves(inputs, torch.float64)
    got = routed_branches(*ours, chunk_size=C, counterfactual=mode, backend=backend)
    expected = apart(exact, mode)
    weights = [torch.randn_like(x) for x in got]
    loss, exact_loss = (
        sum((o * w.to(o.dtype)).sum() for o, w in zip(os, weights, strict=True)) for os in (got, expected)
    )
    assert isinstance(loss, Tensor)
    assert isinstance(exact_loss, Tensor)
    for x, y in zip(
        (*got, *torch.autograd.grad(loss, ours)), (*expected, *torch.autograd.grad(exact_loss, exact)), strict=True
    ):
        assert_near(x, y, torch.float32)


def test_only_one_output_and_no_route_gradient() -> None:
    ts = leaves(make(40, torch.float32))
    ts[7].requires_grad_(False)
    for i, unused in ((0, ts[3]), (1, ts[0])):
        out = routed_branches(*ts, chunk_size=C, backend="triton")[i]
        grads = torch.autograd.grad(out.sum(), ts[:7])
        assert not next(g for g, t in zip(grads, ts, strict=False) if t is unused).any()
        assert grads[2].any()


def test_bit_equal_repeats() -> None:
    inputs = make(51, torch.float16)
    results = []
    for _ in range(2):
        ts = leaves(inputs)
        got = routed_branches(*ts, chunk_size=C, counterfactual="insertion", backend="triton")
        results.append([*got, *torch.autograd.grad(sum(o.float().square().sum() for o in got), ts)])  # type: ignore[arg-type]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_whole_graph_compiles() -> None:
    inputs = make(20, torch.float32, B=1)

    def layer(*ts: Tensor) -> Tensor:
        o_delta, o_softmax = routed_branches(*ts, chunk_size=C, counterfactual="insertion", backend="triton")
        return (o_delta.reshape(o_softmax.shape) * o_softmax.sigmoid()).sum()

    assert_compiles(layer, inputs)


def test_compiles_for_any_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(routed_branches, backend="aot_eager", dynamic=True)
    for T in (20, 35):
        ts = leaves(make(T, torch.float32, B=1))
        got, expected = (f(*ts, chunk_size=C, backend="triton") for f in (compiled, routed_branches))
        for x, y in zip(got, expected, strict=True):
            assert_near(x, y)
        found, wanted = (torch.autograd.grad(x.sum() + y.sum(), ts[2])[0] for x, y in (got, expected))
        assert_near(found, wanted)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_weights_of_the_route_gradient(rate: float) -> None:
    """The chosen side weighs 1, the other an unbiased sample; a route of one half counts as left out."""
    route = torch.tensor([0.0, 0.5, 1.0], device=DEVICE).expand(1, 20000, 3)
    sampled, written = _gradient_weights(route, "insertion", rate)
    assert sampled.dtype is written.dtype is torch.float32
    assert not sampled[..., 2].any()
    assert (written[..., :2] == 1).all()
    for weight in (sampled[..., 0], sampled[..., 1], written[..., 2]):
        values = torch.tensor([1.0]) if rate == 1.0 else torch.tensor([0.0, 1 / rate])
        torch.testing.assert_close(weight.unique().cpu(), values)
        assert abs(float(weight.mean()) - 1) < 0.06  # 5 standard deviations of 20,000 draws
    left, kept = (route <= 0.5), route > 0.5
    read, mode_none = _gradient_weights(route, "none", rate)
    assert torch.equal(mode_none, left)
    assert read is route
    assert not (mode_none & kept).any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_replay_of_a_cuda_graph_equals_eager() -> None:
    ts = leaves(make(300, torch.bfloat16))

    def step() -> list[Tensor]:
        got = routed_branches(*ts, chunk_size=C, counterfactual="derivative")
        grads = torch.autograd.grad(sum(o.float().square().sum() for o in got), ts)  # type: ignore[arg-type]
        return [*(o.detach() for o in got), *grads]  # a graph kept alive would tie the leaves to this stream

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (3, (2, 9, 3, 8), "3 softmax heads must be a multiple of 2 heads"),
        (1, (2, 9, 2, 8), "k has shape"),
        (4, (2, 9, 4, 4), "k_softmax has shape"),
        (7, (2, 2, 2), "route has shape"),
        (5, (2, 9, 1), "g has shape"),
    ],
    ids=["heads", "k", "k_softmax", "route", "g"],
)
def test_mistakes_name_the_argument(index: int, shape: tuple[int, ...], message: str) -> None:
    inputs = make(9, torch.float32)
    inputs[index] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        routed_branches(*inputs, chunk_size=C)
