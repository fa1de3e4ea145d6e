"""Both branches in one call: equal to two calls, on both backends."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from natsl.kernels.branches import _gradient_weights, routed_branches
from natsl.kernels.delta import routed_delta_rule
from natsl.kernels.softmax import routed_softmax
from tests.oracles import assert_compiles, assert_near, chunk_count, leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C = 16


def make(
    T: int, dtype: torch.dtype, *, B: int = 2, R: int = 2, K: int = 16, V: int = 32, G: int = 2, N: int = 0
) -> list[Tensor]:
    """q, k, v, the queries and keys of the softmax heads, g, beta and routes (of ``N`` chunks, if T are packed)."""
    wide = [torch.randn(B, T, h, w) for h, w in ((R, K), (R, K), (R, V), (R * G, K // G), (R * G, K // G))]
    scalars = [-torch.rand(B, T, R), torch.rand(B, T, R), (torch.rand(B, N or chunk_count(T, C), R) < 0.5).float()]
    return [*(x.to(DEVICE, dtype) for x in wide), *(x.to(DEVICE) for x in scalars)]


def make_two_routes(T: int, dtype: torch.dtype, **shape: int) -> list[Tensor]:
    """The same, and the routes of the delta rule; the first chunks have all four combinations."""
    inputs = make(T, dtype, **shape)
    route = inputs[7]
    delta_route = (torch.rand_like(route) < 0.5).float()
    for n, (kept, erased) in enumerate(((0, 1), (1, 0), (0, 0), (1, 1))[: route.shape[1]]):
        route[:, n, 0], delta_route[:, n, 0] = kept, erased
    return [*inputs, delta_route]


def make_packed(lengths: list[int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The same for packed sequences, and their borders."""
    borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    return make_two_routes(sum(lengths), dtype, B=1, N=sum(chunk_count(n, C) for n in lengths)), borders


def together(
    ts: list[Tensor], mode: str = "none", rate: float = 1.0, backend: str = "triton", borders: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``routed_branches`` of the eight inputs, or of these and the routes of the delta rule."""
    delta_route = ts[8] if len(ts) > 8 else None
    options = {"counterfactual": mode, "counterfactual_rate": rate, "backend": backend, "cu_seqlens": borders}
    return routed_branches(*ts[:8], chunk_size=C, delta_route=delta_route, **options)  # type: ignore[arg-type]


def apart(ts: list[Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """The two public ops on the torch backend."""
    q, k, v, qs, ks, g, beta, route = ts[:8]
    delta_route = ts[8] if len(ts) > 8 else route
    o_delta, _ = routed_delta_rule(q, k, v, g, beta, delta_route, chunk_size=C, counterfactual=mode, backend="torch")
    values = v.reshape(*qs.shape[:3], -1)
    return o_delta, routed_softmax(qs, ks, values, route, chunk_size=C, counterfactual=mode, backend="torch")


def assert_equal_two_calls(inputs: list[Tensor], mode: str, backend: str) -> None:
    """Outputs and all gradients are those of the two ops in float64."""
    ours, exact = leaves(inputs), leaves(inputs, torch.float64)
    got = together(ours, mode, backend=backend)
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


@pytest.mark.parametrize("mode", ["none", "derivative", "insertion"])
@pytest.mark.parametrize("T", [1, 16, 51])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_two_calls(backend: str, T: int, mode: str) -> None:
    assert_equal_two_calls(make(T, torch.float32), mode, backend)


@pytest.mark.parametrize("mode", ["none", "derivative", "insertion"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_routes_equal_two_calls(backend: str, mode: str) -> None:
    assert_equal_two_calls(make_two_routes(67, torch.float32), mode, backend)


@pytest.mark.parametrize("mode", ["none", "derivative", "insertion"])
@pytest.mark.parametrize(
    ("lengths", "routes"), [([40], 2), ([1, 0, 15, 16, 17], 2), ([1, 0, 15, 16, 17], 1), ([0, 33, 0], 2)], ids=str
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_sequences_equal_single_ones(backend: str, lengths: list[int], routes: int, mode: str) -> None:
    dtype = torch.float64 if backend == "torch" else torch.float32
    inputs, borders = make_packed(lengths, dtype)
    inputs = [x.to(dtype) for x in inputs[: 7 + routes]]
    ts = leaves(inputs)
    packed = together(ts, mode, backend=backend, borders=borders)
    weights = [torch.randn_like(x) for x in packed]
    loss = sum((o * w).sum() for o, w in zip(packed, weights, strict=True))
    gradients = torch.autograd.grad(loss, ts)  # type: ignore[arg-type]
    chunk_borders = torch.tensor([0, *(chunk_count(n, C) for n in lengths)]).cumsum(0).tolist()
    for (a, b), (m, n) in zip(pairwise(borders.tolist()), pairwise(chunk_borders), strict=True):
        if a == b:
            continue
        places = [slice(a, b)] * 7 + [slice(m, n)] * routes
        single = leaves([x[:, place] for x, place in zip(inputs, places, strict=True)], torch.float64)
        expected = apart(single, mode)
        loss = sum((o * w[:, a:b]).sum() for o, w in zip(expected, weights, strict=True))
        # in one chunk alone no output depends on the route of the delta rule
        wanted = torch.autograd.grad(loss, single, materialize_grads=True)  # type: ignore[arg-type]
        for x, y in zip(packed, expected, strict=True):
            assert_near(x[:, a:b], y)
        for x, y, place in zip(gradients, wanted, places, strict=True):
            assert_near(x[:, place], y)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_borders_of_any_integers_and_strides(backend: str) -> None:
    inputs, borders = make_packed([5, 20], torch.float32)
    expected = together(inputs, backend=backend, borders=borders)
    for same in (borders.int(), borders.repeat_interleave(2)[::2]):
        for x, y in zip(together(inputs, backend=backend, borders=same), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("mode", ["none", "insertion"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_route_equal_to_the_first_changes_nothing(backend: str, mode: str) -> None:
    inputs = make(51, torch.float32, B=1)
    one, two, same = leaves(inputs), leaves([*inputs, inputs[7]]), leaves(inputs)
    results = []
    for ts in (one, two, [*same, same[7]]):
        got = together(ts, mode, backend=backend)
        results.append([*got, *torch.autograd.grad(sum(o.square().sum() for o in got), ts)])  # type: ignore[arg-type]
    expected, split, passed_twice = results
    for x, y in zip(split[:9], expected[:9], strict=True):
        assert torch.equal(x, y)
    assert_near(split[9] + split[10], expected[9])
    for x, y in zip(passed_twice[:10], expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("wanted", [7, 8], ids=["route", "delta_route"])
def test_gradient_of_only_one_of_two_routes(wanted: int) -> None:
    ts = leaves(make_two_routes(51, torch.float32, B=1))
    expected = torch.autograd.grad(sum(o.square().sum() for o in together(ts, "insertion")), ts[wanted])  # type: ignore[arg-type]
    ts[15 - wanted].requires_grad_(False)
    got = torch.autograd.grad(sum(o.square().sum() for o in together(ts, "insertion")), ts[wanted])  # type: ignore[arg-type]
    assert torch.equal(*got, *expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_draw_samples_both_sides_of_a_chunk(backend: str) -> None:
    inputs = make(16 * 6, torch.float32, B=1)
    weights = []
    for rate in (1.0, 0.5):
        ts = leaves([*inputs[:7], torch.zeros_like(inputs[7]), torch.ones_like(inputs[7])])  # kept nowhere
        loss = sum(o.square().sum() for o in together(ts, "insertion", rate, backend))
        weights.append([grad[:, :-1] for grad in torch.autograd.grad(loss, ts[7:])])  # type: ignore[arg-type]
    for exact in weights[0]:
        assert exact.all()
    softmax, delta = (sampled / exact for exact, sampled in zip(*weights, strict=True))
    torch.testing.assert_close(softmax, delta)
    assert 0 < float((delta > 1).float().mean()) < 1
    torch.testing.assert_close(softmax, 2.0 * (softmax > 1))


def test_gradients_of_real_routes_are_exact() -> None:
    inputs = [x.double() for x in make(9, torch.float64, B=1, K=4, V=4)]
    routes = leaves([torch.rand(1, 3, 2, device=DEVICE).double(), torch.rand(1, 3, 2, device=DEVICE).double()])

    def outputs(route: Tensor, delta_route: Tensor) -> tuple[Tensor, Tensor]:
        ts = [*inputs[:7], route]
        return routed_branches(*ts, chunk_size=4, delta_route=delta_route, counterfactual="derivative", backend="torch")

    assert torch.autograd.gradcheck(outputs, routes)


def test_only_one_output_and_no_route_gradient() -> None:
    ts = leaves(make(40, torch.float32, B=1))
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


@pytest.mark.parametrize("routes", [1, 2])
def test_whole_graph_compiles(routes: int) -> None:
    def layer(*ts: Tensor) -> Tensor:
        o_delta, o_softmax = together(list(ts), "insertion")
        return (o_delta.reshape(o_softmax.shape) * o_softmax.sigmoid()).sum()

    assert_compiles(layer, make_two_routes(20, torch.float32, B=1)[: 7 + routes])


def test_packed_sequences_compile() -> None:
    inputs, borders = make_packed([5, 0, 20], torch.float32)

    def layer(*ts: Tensor) -> Tensor:
        o_delta, o_softmax = together(list(ts), "insertion", borders=borders)
        return (o_delta.reshape(o_softmax.shape) * o_softmax.sigmoid()).sum()

    assert_compiles(layer, inputs)


@pytest.mark.parametrize(("routes", "packed"), [(1, False), (2, False), (2, True)], ids=str)
def test_the_ops_keep_the_rules_of_custom_ops(routes: int, packed: bool) -> None:
    inputs, borders = make_packed([5, 20], torch.float32) if packed else (make_two_routes(20, torch.float32, B=1), None)
    delta_route = inputs[8] if routes == 2 else None
    options = (C, 0.25, 0.35)
    ops = torch.ops.natsl
    torch.library.opcheck(ops.routed_branches.default, (*inputs[:8], delta_route, borders, *options))
    *softmax, o_delta, saved = ops.routed_branches(*inputs[:8], delta_route, borders, *options)
    gradients = (inputs[7] < 0.5, torch.randn_like(o_delta), torch.randn_like(softmax[0]))
    arguments = (*gradients, *inputs[:8], delta_route, borders, inputs[7], softmax, o_delta, saved, *options)
    for wanted in ((True, True), (False, False)):
        checks = ("test_schema", "test_faketensor")[: 2 if all(wanted) else 1]
        torch.library.opcheck(
            ops.routed_branches_backward.default, (*arguments, "insertion", *wanted), test_utils=checks
        )


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
    sampled, written = _gradient_weights(route, None, "insertion", rate)
    assert sampled.dtype is written.dtype is torch.float32
    assert not sampled[..., 2].any()
    assert (written[..., :2] == 1).all()
    for weight in (sampled[..., 0], sampled[..., 1], written[..., 2]):
        values = torch.tensor([1.0]) if rate == 1.0 else torch.tensor([0.0, 1 / rate])
        torch.testing.assert_close(weight.unique().cpu(), values)
        assert abs(float(weight.mean()) - 1) < 0.06  # 5 standard deviations of 20,000 draws
    left, kept = (route <= 0.5), route > 0.5
    read, mode_none = _gradient_weights(route, None, "none", rate)
    assert torch.equal(mode_none, left)
    assert torch.equal(read, route)
    assert not (mode_none & kept).any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_replay_of_a_cuda_graph_equals_eager(packed: bool) -> None:
    inputs, borders = make_packed([100, 0, 177], torch.bfloat16) if packed else (make(300, torch.bfloat16), None)
    ts = leaves(inputs)

    def step() -> list[Tensor]:
        got = together(ts, "derivative", borders=borders)
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


def test_a_wrong_second_route_is_named() -> None:
    inputs = make(9, torch.float32)
    for delta_route, message in (
        (torch.zeros(2, 2, 2), "delta_route has shape"),
        (torch.zeros(2, 1, 2).int(), "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            routed_branches(*inputs, chunk_size=C, delta_route=delta_route.to(DEVICE))


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([0, 5, 20], "cu_seqlens = \\[0, 5, 20\\] must rise from 0 to the number of tokens, 25"),
        ([1, 5, 25], "cu_seqlens = \\[1, 5, 25\\] must rise"),
        ([0, 20, 5, 25], "cu_seqlens = .* must rise"),
        ([25], "cu_seqlens has 1 entries"),
        ([[0, 25]], "cu_seqlens must be a 1-D integer tensor"),
        ([0.0, 25.0], "cu_seqlens must be a 1-D integer tensor, int32 or int64, found torch.float32"),
        ([0, 16, 25], "route has shape \\(1, 3, 2\\), expected \\(1, 2, 2\\)"),
        ([0, 5, 25, 25], "delta_route has shape \\(1, 4, 2\\), expected \\(1, 3, 2\\)"),
    ],
    ids=["short", "late", "falling", "single", "2-d", "float", "chunks", "chunks of delta_route"],
)
def test_borders_that_do_not_fit_are_named(borders: list[object], message: str) -> None:
    inputs, _ = make_packed([5, 20], torch.float32)
    if "delta_route" in message:
        inputs[8] = torch.zeros(1, 4, 2, device=DEVICE)
    with pytest.raises(ValueError, match=f"routed_branches: {message}"):
        together(inputs, backend="torch", borders=torch.tensor(borders, device=DEVICE))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mistakes_in_packing_show_without_reading_the_borders(backend: str) -> None:
    inputs, borders = make_packed([5, 20], torch.float32)
    with pytest.raises(ValueError, match="routed_branches: cu_seqlens packs sequences into batch 1, found batch 2"):
        together(make(25, torch.float32), backend=backend, borders=borders)
    for chunks in (1, 4):
        inputs[8] = torch.zeros(1, chunks, 2, device=DEVICE)
        with pytest.raises(ValueError, match=f"routed_branches: delta_route has shape \\(1, {chunks}, 2\\), expected"):
            together(inputs, backend=backend, borders=borders)


def test_too_many_sequences_for_the_kernels_are_named() -> None:
    lengths = [1] + [0] * 40000
    inputs, borders = make_packed(lengths, torch.float32)
    with pytest.raises(ValueError, match="sequences · heads = 80002 is not supported by the triton backend"):
        together(inputs, borders=borders)
