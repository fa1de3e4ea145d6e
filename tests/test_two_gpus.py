"""Tensors on a GPU that is not the current one: results are those of the current one, and the caller's device and
streams stay as they were."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from natsl.config import RouteGradient
from natsl.kernels.branches import routed_branches
from natsl.kernels.registry import OPS, OpSpec, Options, layer_inputs
from natsl.kernels.routing import cap_limits, chunk_means, route_margins
from natsl.kernels.shape import Case, Shape
from natsl.kernels.warmup import warm_up
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.oracles import assert_compiles, assert_near, fill_calibration, tiny_model

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)
C = 16
SHAPE = Shape(2, 32, 32, 2, C, "bfloat16")

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True, params=[True, False], ids=["autograd-threads", "one-thread"])
def _caller(request: pytest.FixtureRequest) -> Iterator[None]:
    """A caller whose current device is the first one, and who finds it and all streams unchanged."""
    torch.cuda.set_device(HERE)
    before = [torch.cuda.current_stream(device) for device in (HERE, THERE)]
    with torch.autograd.set_multithreading_enabled(request.param):
        yield
    assert torch.cuda.current_device() == HERE.index
    assert [torch.cuda.current_stream(device) for device in (HERE, THERE)] == before


def assert_same(there: list[Tensor], here: list[Tensor]) -> None:
    """Fail unless results are on the second GPU and equal those of the first one."""
    assert len(there) == len(here)
    for x, y in zip(there, here, strict=True):
        assert x.device == THERE
        assert_near(x.cpu(), y.cpu())


def results(spec: OpSpec, inputs: dict[str, Tensor], options: Options, device: torch.device) -> list[Tensor]:
    """Outputs and gradients of an op on copies of the inputs on a device."""
    tensors = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    outputs = spec.forward(tensors, options)
    gradients = tuple(torch.ones_like(x) for x in outputs)
    assert torch.cuda.current_device() == HERE.index
    return [*outputs, *spec.backward(tensors, outputs, gradients).values()]


@pytest.mark.parametrize("counterfactual", ["none", "insertion"])
@pytest.mark.parametrize("op", OPS)
def test_ops(op: str, counterfactual: str) -> None:
    """In the calls that are captured and in those that replay them."""
    options = Options(C, counterfactual, backend="triton")
    for seed in range(3):
        inputs = layer_inputs(SHAPE, Case(2, 100, 0.4), HERE, seed=seed)
        here = results(OPS[op], inputs, options, HERE)
        assert_same(results(OPS[op], inputs, options, THERE), here)


@pytest.mark.parametrize("op", [name for name, spec in OPS.items() if spec.packs])
def test_packed_sequences(op: str) -> None:
    borders = torch.tensor([0, 40, 40, 41, 90], device=HERE)
    inputs = layer_inputs(SHAPE, Case(1, 90, 0.4), HERE, chunks=3 + 1 + 4)
    options = Options(C, "derivative", backend="triton", cu_seqlens=borders)
    here = results(OPS[op], inputs, options, HERE)
    assert_same(results(OPS[op], inputs, replace(options, cu_seqlens=borders.to(THERE)), THERE), here)


def test_limits_and_chunk_means() -> None:
    margins, x = torch.randn(2, 40, 3), torch.randn(2, 70, 8)
    found = []
    for device in (THERE, HERE):
        limits = cap_limits(40, 0.3, 1, device)
        route = route_margins(margins.to(device), 0.0, limits, backend="triton")
        found.append([route, chunk_means(x.to(device), C, torch.tensor([70, 33], device=device))])
    assert_same(*found)


def test_a_stream_of_the_callers() -> None:
    """The one that is current on the tensors' device counts, though another device is current."""
    inputs = layer_inputs(SHAPE, Case(2, 100, 0.4), HERE)
    options = Options(C, "insertion", backend="triton")
    here = results(OPS["layer"], inputs, options, HERE)
    stream = torch.cuda.Stream(THERE)
    with torch.cuda.stream(stream), torch.cuda.device(HERE):
        there = results(OPS["layer"], inputs, options, THERE)
        assert torch.cuda.current_stream(THERE) == stream
    stream.synchronize()
    assert_same(there, here)


def test_replay_of_a_cuda_graph() -> None:
    inputs = layer_inputs(SHAPE, Case(2, 100, 0.4), HERE)
    options = Options(C, "insertion", backend="triton")
    spec = OPS["layer"]
    here = results(spec, inputs, options, HERE)
    tensors = {name: x.detach().to(THERE).requires_grad_() for name, x in inputs.items()}

    def step() -> list[Tensor]:
        with torch.cuda.device(HERE):
            outputs = spec.forward(tensors, options)
            gradients = tuple(torch.ones_like(x) for x in outputs)
            return [*(x.detach() for x in outputs), *spec.backward(tensors, outputs, gradients).values()]

    with torch.cuda.device(THERE):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        graph.replay()
        torch.cuda.synchronize()
    assert_same(captured, here)


def test_compiled_code() -> None:
    inputs = layer_inputs(SHAPE, Case(2, 50, 0.4), THERE)
    names = OPS["branches"].inputs

    def layer(*ts: Tensor) -> Tensor:
        o_delta, o_softmax = routed_branches(*ts, chunk_size=C, backend="triton")
        return o_delta.float().square().sum() + o_softmax.float().sum()

    assert_compiles(layer, [inputs[name] for name in names])


def test_warm_up_compiles_for_the_device_of_the_tensors() -> None:
    """A second one has nothing left to do."""
    shape = Shape(1, 16, 48, 1, 32, "float16")
    warm_up(shape, THERE, tokens=256)
    assert warm_up(shape, THERE, tokens=256) == 0


@pytest.mark.parametrize("kinds", ["rdr", "rsd"])
def test_a_model(kinds: str) -> None:
    """Its losses and the gradients of all weights, on the library's kernels where they are installed."""
    model = tiny_model(kinds, width=64, mlp_width=96, key_dim=32, value_dim=32, chunk_size=C)
    fill_calibration(model)
    tokens = torch.randint(0, 384, (2, 70))
    routed, delta, softmax = LayerPolicy(Op.routed, budget=0.4), LayerPolicy(Op.delta), LayerPolicy(Op.softmax)
    policy = RoutingPolicy(tuple({"r": routed, "d": delta, "s": softmax}[letter] for letter in kinds), C)
    found = []
    for device in (THERE, HERE):
        model.to(device)
        model.zero_grad()
        x = tokens.to(device)
        losses = model(x, policy, targets=torch.roll(x, -1, 1), route_gradient=RouteGradient())
        losses.loss.mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([losses.loss.detach(), *gradients])
    assert len(found[0]) > 20
    assert_same(*found)
