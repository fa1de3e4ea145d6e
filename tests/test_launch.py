"""Launches: variants that are remembered, and host functions that are replayed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from natsl.kernels.launch import parameters, replay
from natsl.kernels.launch.launcher import Launcher
from natsl.kernels.launch.library import on_own_device
from natsl.kernels.launch.replay import Replayed
from natsl.kernels.registry import OPS, Options, layer_inputs
from natsl.kernels.routing import cap_limits, route_margins
from natsl.kernels.shape import Case, Shape
from tests.oracles import triton_modules


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU, at an address of its own choice."""

    device = torch.device("cuda", 0)
    address = 1 << 20

    def data_ptr(self) -> int:
        return self.address


def test_launcher_remembers_what_triton_specialises_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slow: list[tuple[object, ...]] = []
    fast: list[tuple[object, ...]] = []
    kernel = SimpleNamespace(function="f", packed_metadata="m", run=lambda *arguments: fast.append(arguments))

    class Function:
        arg_names = ("x", "T", "stride", "row", "scale", "C")
        params = tuple(
            SimpleNamespace(do_not_specialize=name == "T", is_constexpr=name in ("row", "C")) for name in arg_names
        )

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            def launch(*arguments: object, **constants: object) -> object:
                slow.append(arguments)
                return kernel

            return launch

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    launcher = Launcher(Function())
    x, half = (torch.zeros(4, dtype=dtype).as_subclass(OnGPU) for dtype in (torch.float32, torch.float16))

    def lookups(x: torch.Tensor, T: int, stride: int, C: int = 64, row: int = 3) -> int:
        """How often Triton has to find the variant."""
        before = len(slow)
        launcher[3, 2](x, T, stride, row, 0.5, C=C, num_warps=4)
        return len(slow) - before

    assert lookups(x, 10, 48) == 1
    assert lookups(x, 10, 48) == 0
    assert fast.pop() == (3, 2, 1, 7, "f", "m", None, None, None, 1 << 20, 10, 48, 3, 0.5, 64)
    assert [lookups(x, 11, 48), lookups(x, 1, 480), lookups(x, 16, 16)] == [0, 0, 0]  # of the same kind
    assert [lookups(x, 10, stride) for stride in (1, 3, 1 << 40, 1, 5, 1 << 41)] == [1, 1, 1, 0, 0, 0]
    assert [lookups(x, 10, 48, C=32), lookups(half, 10, 48), lookups(half, 10, 48, C=32)] == [1, 1, 1]
    assert [lookups(x, 10, 48, row=row) for row in (3, 5, 7, 5, 3)] == [0, 1, 1, 0, 0]  # a constant
    assert lookups(x, 1 << 31, 48) == lookups(x, 1 << 31, 48) == 1
    x.address += 4
    assert lookups(x, 10, 48) == lookups(x, 10, 48) == 1


class Adder:
    """A kernel on plain memory: target[i] = x[i] + factor · y[i], float32, for i < n."""

    function, packed_metadata = "f", "m"

    def run(self, *arguments: Any) -> None:
        *_, x, y, target, n, factor = arguments
        first, second, out = ((ctypes.c_float * n).from_address(pointer) for pointer in (x, y, target))
        for i in range(n):
            out[i] = first[i] + factor * second[i]


def add(x: Tensor, y: Tensor, target: Tensor, n: int, factor: float, special: bool = False) -> None:
    """A launch as ``Launcher`` makes it."""
    pointers = [x.data_ptr(), y.data_ptr(), target.data_ptr()]
    replay.run(Adder(), (1,), 0, [*pointers, n, factor])
    recorder = replay.recorder()
    if recorder is not None:
        recorder.record(Adder(), (1,), [x, y, target], (n, factor), special)


class Host:
    """A host function that counts its runs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.runs = function, 0
        self.replayed = Replayed(self._run)

    def _run(self, *arguments: Any) -> Any:
        self.runs += 1
        return self.function(*arguments)

    def check(self, *arguments: Any, runs: int) -> None:
        """Fail unless the replayed function gives what a plain call does, after so many runs in all."""
        expected, actual = self.function(*arguments), self.replayed(*arguments)
        assert self.runs == runs
        assert isinstance(actual, Tensor) == isinstance(expected, Tensor)
        pairs = [(actual, expected)] if isinstance(actual, Tensor) else list(zip(actual, expected, strict=True))
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor counts as one on a GPU."""
    monkeypatch.setattr(replay, "_on_gpu", lambda x: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(Replayed, "replay_at_once", False)


def chain(x: Tensor, others: list[Tensor], n: int, factor: float, unused: None) -> list[Tensor]:
    """x + (1 + factor) · y and x + y with y the sum of the others, by way of temporaries and views."""
    total, between, first = torch.empty(n), x.new_empty(2, n + 3), torch.empty_like(x)
    y = between[1, 2:]  # not at the start of what is allocated
    add(others[0], others[1], y, n, 1.0)
    add(x, y, total, n, 1.0)
    add(total, y, first, n, factor)
    return [first, total, torch.empty(0)]


def numbers(n: int = 8) -> Tensor:
    return torch.randint(-9, 9, (n,)).float()


@pytest.mark.usefixtures("_no_gpu")
def test_later_calls_replay_the_first() -> None:
    host = Host(chain)
    for _ in range(3):
        host.check(numbers(), [numbers(), numbers()], 8, 0.5, None, runs=1)
    kept = host.replayed(numbers(), [numbers(), numbers()], 8, 0.5, None)
    before = [x.clone() for x in kept]
    host.replayed(numbers(), [numbers(), numbers()], 8, 0.5, None)
    assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))  # outputs are nobody else's memory


@pytest.mark.usefixtures("_no_gpu")
def test_every_kind_of_call_is_one_of_its_own() -> None:
    host = Host(chain)
    wide = torch.randint(-9, 9, (16,)).float()
    calls: list[tuple[Tensor, list[Tensor], int, float]] = [
        (numbers(), [numbers(), numbers()], 8, 0.5),
        (numbers(), [numbers(), numbers()], 8, 0.25),
        (numbers(), [numbers(), numbers()], 7, 0.5),
        (numbers(9), [numbers(), numbers()], 8, 0.5),
        (numbers(), [numbers(), numbers(), numbers()], 8, 0.5),
        (wide[::2].clone(), [wide[::2], numbers()], 8, 0.5),
    ]
    for i, call in enumerate(calls):
        host.check(*call, None, runs=i + 1)
        host.check(*call, None, runs=i + 1)
    parameters.forget()
    host.check(*calls[0], None, runs=len(calls) + 1)


@pytest.mark.usefixtures("_no_gpu")
def test_arguments_that_share_memory() -> None:
    host = Host(chain)
    both = numbers(32)
    x, y, z = numbers(), both[:8], both[16:24]
    host.check(x, [x, y], 8, 0.5, None, runs=1)
    host.check(x, [x, z], 8, 0.5, None, runs=1)
    host.check(x, [y, y], 8, 0.5, None, runs=2)  # another pattern: the first one says nothing of it
    host.check(x, [y, z], 8, 0.5, None, runs=3)
    host.check(z, [x, y], 8, 0.5, None, runs=3)
    host.check(numbers(), [numbers(), numbers()], 8, 0.5, None, runs=3)


@pytest.mark.usefixtures("_no_gpu")
def test_a_view_of_an_argument() -> None:
    def reshaped(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty(2, 2)
        add(x.view(2, -1)[0], y.view(4, -1).flatten(), out, 4, 2.0)
        return out

    host = Host(reshaped)
    for _ in range(3):
        host.check(numbers(), numbers(), runs=1)


@pytest.mark.usefixtures("_no_gpu")
def test_the_middle_of_an_argument() -> None:
    def shifted(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty(4)
        add(x[4:], y, out, 4, 1.0)
        return out

    shared = numbers(16)
    host = Host(shifted)
    for i in range(2):  # each may begin where the other's middle is
        host.check(shared[:8], shared[4:12], runs=i + 1)
    host = Host(shifted)
    host.check(numbers(), numbers(), runs=1)
    host.check(numbers(), numbers(), runs=1)
    host.check(shared[:8], shared[4:12], runs=1)


def computes(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    add(x, y * 2, out, 8, 1.0)
    return out


def reads(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    add(x, y, out, 8, float(y[0]))
    return out


def fills(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x).zero_()
    add(x, y, out, 4, 1.0)
    return out


def returns_its_argument(x: Tensor, y: Tensor) -> list[Tensor]:
    return [x]


def returns_twice(x: Tensor, y: Tensor) -> list[Tensor]:
    out = torch.empty_like(x)
    add(x, y, out, 8, 1.0)
    return [out, out]


def returns_a_part(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    add(x, y, out, 8, 1.0)
    return out[:4]


def needs_a_variant(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    add(x, y, out, 8, 1.0, special=True)
    return out


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(
    "function",
    [
        computes,
        reads,
        fills,
        returns_its_argument,
        returns_twice,
        returns_a_part,
        needs_a_variant,
    ],
    ids=lambda function: function.__name__,
)
def test_what_cannot_be_replayed_runs_every_time(function: Callable[..., Any]) -> None:
    host = Host(function)
    for i in range(3):
        host.check(numbers(), numbers(), runs=i + 1)


@pytest.mark.usefixtures("_no_gpu")
def test_memory_that_does_not_start_at_16_bytes_is_not_replayed() -> None:
    host = Host(chain)
    for i in range(2):
        host.check(numbers(9)[1:], [numbers(), numbers()], 8, 0.5, None, runs=i + 1)


@pytest.mark.usefixtures("_no_gpu")
def test_forced_parameters_are_not_replayed() -> None:
    host = Host(chain)
    host.check(numbers(), [numbers(), numbers()], 8, 0.5, None, runs=1)
    with parameters.forced({"kernel": {"BLOCK": 1}}):
        host.check(numbers(), [numbers(), numbers()], 8, 0.5, None, runs=2)
    with parameters.observed():
        host.check(numbers(), [numbers(), numbers()], 8, 0.5, None, runs=3)
    host.check(numbers(), [numbers(), numbers()], 8, 0.5, None, runs=3)


@pytest.mark.usefixtures("_no_gpu")
def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_PLANS", 4)
    host = Host(chain)
    for n in range(1, 12):
        host.check(numbers(), [numbers(), numbers()], n % 8 + 1, 1.0 * n, None, runs=n)
        assert len(host.replayed.plans) <= 4


@pytest.mark.usefixtures("_no_gpu")
def test_a_function_that_fails_leaves_nothing_behind() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    host = Host(fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            host.replayed(numbers())
    assert replay.recorder() is None
    assert host.runs == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are only recorded")
@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize("T", [128, 100])
def test_every_op_can_be_replayed(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: else it would run its host code in every call, and nothing would show."""

    def record(self: Launcher, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        recorder = replay.recorder()
        assert recorder is not None
        kernel = SimpleNamespace(run=lambda *_: None, function="f", packed_metadata="m")
        recorder.record(kernel, grid, tensors, arguments[len(tensors) :], False)

    monkeypatch.setattr(Launcher, "_launch", record)
    replayed = [x for module in triton_modules() for x in vars(module).values() if isinstance(x, Replayed)]
    assert len(replayed) >= 8
    for function in replayed:
        monkeypatch.setattr(function, "plans", {})
    inputs = layer_inputs(Shape(2, 32, 32, 1, 16, "float32"), Case(2, T, 0.4), torch.device("cpu"))
    for spec in OPS.values():
        spec.differentiate(inputs, Options(16, "insertion", 0.5, "triton"))
    for function in replayed:
        assert function.plans
        assert None not in function.plans.values()


def test_the_device_of_the_tensors_is_current_inside_and_the_callers_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current, switches = [0], []

    @contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        switches.append(device.index)
        current.append(device.index)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1], raising=False)
    monkeypatch.setattr(torch.cuda, "device", switch)
    tensors = [SimpleNamespace(is_cuda=True, get_device=lambda i=i: i, device=torch.device("cuda", i)) for i in (0, 1)]
    function = on_own_device(lambda x, divisor: (current[-1], 1 // divisor))
    assert [function(x, 1) for x in tensors] == [(0, 1), (1, 1)]
    for x in tensors:
        with pytest.raises(ZeroDivisionError):
            function(x, 0)
    assert current == [0]
    assert switches == [1, 1]  # none where the device is current anyway


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is launched")
def test_every_launch_is_made_by_a_registered_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which makes the device of its tensors the current one, in the forward pass and in the backward pass."""
    inside = on_own_device(print).__code__
    launches: list[bool] = []

    def launch(self: Launcher, *arguments: Any, **constants: Any) -> None:
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code is not inside:
            frame = frame.f_back
        launches.append(frame.f_code is inside)

    monkeypatch.setattr(Launcher, "_launch", launch)
    inputs = layer_inputs(Shape(2, 32, 32, 1, 16, "float32"), Case(1, 64, 0.4), torch.device("cpu"))
    for spec in OPS.values():
        spec.differentiate(inputs, Options(16, "insertion", 0.5, "triton"))
    margins = torch.randn(1, 4, 2)
    route_margins(margins, 0.0, cap_limits(4, 0.5, 1, margins.device), backend="triton")
    assert len(launches) > 30
    assert all(launches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("counterfactual", ["none", "derivative", "insertion"])
@pytest.mark.parametrize("op", OPS)
def test_replayed_ops_equal_plain_ones(op: str, counterfactual: str) -> None:
    """Bit by bit, with other memory and other values than in the call that was captured."""
    device = torch.device("cuda", 0)
    options = Options(64, counterfactual, 1.0, "triton")
    for seed in range(4):
        inputs = layer_inputs(Shape(), Case(2, 320, 0.4), device, seed=seed)
        outputs, gradients = OPS[op].differentiate(inputs, options)
        with parameters.observed():  # nothing is replayed
            expected = OPS[op].differentiate(inputs, options)
        pairs = [*zip(outputs, expected[0], strict=True), *((x, expected[1][name]) for name, x in gradients.items())]
        assert all(torch.equal(x, y) for x, y in pairs)
        held = [torch.empty_like(x) for x in inputs.values()]  # the next ones are elsewhere
    assert held
