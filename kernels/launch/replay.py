"""Launches of whole host functions: recorded once, replayed without the host code; two functions on two streams."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natsl.kernels.launch import parameters
from natsl.kernels.launch.layout import aligned

A = TypeVar("A")
B = TypeVar("B")

MOST_PLANS = 256  # per function

_active = threading.local()  # .recorder: the one that records the launches of this thread


def recorder() -> Recorder | None:
    """The recorder of this thread's launches, None unless a host function is being captured."""
    return getattr(_active, "recorder", None)


def run(kernel: Any, grid: tuple[int, ...], stream: int, arguments: list[Any]) -> None:
    """Launch a compiled kernel as kernel[grid](…) does, without the hooks of Triton's own profiler."""
    across, down, deep = (*grid, 1, 1)[:3]
    kernel.run(
        across, down, deep, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments
    )  # fmt: skip


_Streams = tuple[torch.cuda.Stream, torch.cuda.Stream, torch.cuda.Event, torch.cuda.Event]


@cache
def _streams(index: int, calling: int) -> _Streams:
    """The calling stream, a side stream and the events of fork and join, of each calling stream its own: what is
    allocated on a side stream must only ever be used by the one that calls it."""
    here = torch.cuda.current_stream(index)
    there = torch.cuda.Stream(index, priority=-1)  # its few blocks go first
    return here, there, torch.cuda.Event(), torch.cuda.Event()


def _fork(here: torch.cuda.Stream, there: torch.cuda.Stream, fork: torch.cuda.Event, join: torch.cuda.Event) -> None:
    fork.record(here)
    there.wait_event(fork)


def _end(here: torch.cuda.Stream, there: torch.cuda.Stream, fork: torch.cuda.Event, join: torch.cuda.Event) -> None:
    join.record(there)


def _join(here: torch.cuda.Stream, there: torch.cuda.Stream, fork: torch.cuda.Event, join: torch.cuda.Event) -> None:
    here.wait_event(join)


def side_by_side(
    device: torch.device, side: Callable[[], A], main: Callable[[A, Callable[[], None]], B]
) -> tuple[A, B]:
    """Results of both functions, whose kernels run at the same time on a GPU, which is the current device.

    ``main`` gets the side's results and a function that makes it wait for them, which it must call before it reads
    them. What the side stream allocates needs no record: it is used after the join, and the next fork waits for its
    users.
    """
    if device.type != "cuda":
        first = side()
        return first, main(first, lambda: None)
    index = torch.cuda.current_device() if device.index is None else device.index
    streams = _streams(index, torch._C._cuda_getCurrentRawStream(index))
    active = recorder()

    def do(step: Callable[..., None]) -> None:
        step(*streams)
        if active is not None:
            active.steps.append(step)

    do(_fork)
    torch.cuda.set_stream(streams[1])
    if active is not None:
        active.on_side = True
    try:
        first = side()
        do(_end)
    finally:
        torch.cuda.set_stream(streams[0])
        if active is not None:
            active.on_side = False
    second = main(first, lambda: do(_join))
    do(_join)
    return first, second


@dataclass(frozen=True)
class _Launch:
    """A launch with pointers as (base, offset); the bases are inputs, outputs, the scratch buffer, and 0."""

    kernel: Any
    grid: tuple[int, ...]
    on_side: bool
    pointers: tuple[tuple[int, int], ...]
    numbers: tuple[Any, ...]


@dataclass(frozen=True)
class _Plan:
    """Steps of one captured call; they are replayed on new outputs and a new scratch buffer."""

    steps: list[_Launch | Callable[..., None]]
    outputs: list[tuple[torch.Size, torch.dtype]]
    is_list: bool  # whether the function returns a list, or one tensor
    scratch: int  # bytes of everything that is allocated beside the outputs
    forks: bool


_UNKNOWN = _Plan([], [], True, 0, False)


class Recorder(TorchDispatchMode):
    """Records launches, and every tensor that is allocated; ``refusal`` names what cannot be replayed."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = inputs
        self.steps: list[Any] = []  # launches as (kernel, grid, on_side, tensors, numbers), and steps of the streams
        self.buffers: list[Tensor] = []  # held, so that no address comes twice
        self.on_side = False
        self.refusal = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            self.buffers.append(out)
        elif func._schema.is_mutable or not isinstance(out, Tensor) or not self._is_view(out, args):
            self.refusal = str(func)
        return out

    def _is_view(self, out: Tensor, args: tuple[Any, ...]) -> bool:
        """Whether ``out`` is a view of which it is known into what."""
        storage = out.untyped_storage().data_ptr()
        for x in args:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() == storage:
                own = any(storage == buffer.data_ptr() for buffer in self.buffers)
                return own or x.data_ptr() == out.data_ptr() or self._only_input(storage) is not None
        return False

    def _only_input(self, storage: int) -> int | None:
        """Index of the input in that memory, if no other is there: of several, any may begin inside another."""
        indices = [i for i, x in enumerate(self._inputs) if x.untyped_storage().data_ptr() == storage]
        return indices[0] if len({self._inputs[i].data_ptr() for i in indices}) == 1 else None

    def record(self, kernel: Any, grid: tuple[int, ...], tensors: list[Tensor], numbers: Any, special: bool) -> None:
        """Add a launch; ``special``: of a variant that the next arguments of the same kind may not need."""
        self.steps.append((kernel, grid, self.on_side, tensors, numbers))
        if special:
            self.refusal = "a launch with a variant of its own"

    def plan(self, results: list[Tensor] | Tensor) -> _Plan | None:
        """What to replay, or None if a pointer comes from elsewhere or something was refused."""
        inputs = self._inputs
        outputs = [results] if isinstance(results, Tensor) else results
        bases = {x.data_ptr(): (i, 0) for i, x in reversed(list(enumerate(inputs)))}
        bases[0] = (len(inputs) + len(outputs) + 1, 0)
        storages: dict[int, tuple[int, int]] = {}  # those that are allocated here
        for i, x in enumerate(outputs, len(inputs)):
            own = any(x.data_ptr() == buffer.data_ptr() and x.numel() == buffer.numel() for buffer in self.buffers)
            if x.numel() and (not own or not x.is_contiguous() or x.data_ptr() in storages):
                return None
            storages[x.data_ptr()] = (i, 0)
        scratch = 0
        for buffer in self.buffers:
            if buffer.data_ptr() not in storages:
                storages[buffer.data_ptr()] = (len(inputs) + len(outputs), scratch)
                scratch += aligned(buffer.numel() * buffer.element_size())

        def locate(x: Tensor) -> tuple[int, int] | None:
            pointer, storage = x.data_ptr(), x.untyped_storage().data_ptr()
            if pointer in bases:
                return bases[pointer]
            if storage in storages:
                base, offset = storages[storage]
                return base, offset + pointer - storage
            index = self._only_input(storage)
            return None if index is None else (index, pointer - inputs[index].data_ptr())

        steps: list[_Launch | Callable[..., None]] = []
        for step in self.steps:
            if callable(step):
                steps.append(step)
                continue
            kernel, grid, on_side, tensors, numbers = step
            places = [locate(x) for x in tensors]
            if None in places:
                return None
            steps.append(_Launch(kernel, grid, on_side, tuple(p for p in places if p is not None), numbers))
        if self.refusal:
            return None
        shapes = [(x.shape, x.dtype) for x in outputs]
        return _Plan(steps, shapes, not isinstance(results, Tensor), scratch, any(map(callable, steps)))


_ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class Replayed:
    """Captures a host function's launches on the first call and replays them for equal shapes, strides, dtypes and
    options: a CUDA graph whose pointers are arguments.

    The arguments are tensors, lists of tensors and options; the first one is a tensor on the current device. What the
    function launches may not depend on values in the tensors; it returns one new tensor or a list of them. A replay
    allocates the outputs and one scratch buffer and launches the same kernels. A function that computes with torch
    itself, as packed sequences make it, runs every time, and so does any function while launch parameters are forced
    or observed.
    """

    replay_at_once = False  # for tests: the first call, too, returns what its replay computes

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.plans: dict[tuple[Any, ...], _Plan | None] = {}  # None: not to be replayed

    def __call__(self, *arguments: Any) -> Any:
        first = arguments[0]
        if not _on_gpu(first) or recorder() is not None or parameters.overridden():
            return self.function(*arguments)
        tensors: list[Tensor] = []
        kind: list[Any] = [parameters.generation(), first.device.index]
        for argument in arguments:
            if isinstance(argument, list):
                tensors += argument
                kind.append(len(argument))
            elif isinstance(argument, Tensor):
                tensors.append(argument)
                kind.append(Tensor)
            else:
                kind.append(argument)
        for x in tensors:
            kind += x.dtype, x.shape, x.stride()
        pointers = [x.data_ptr() for x in tensors]
        if reduce(or_, pointers) & 15:
            return self.function(*arguments)
        if len(set(pointers)) < len(pointers):  # which of two equal ones is meant shows in the first call only
            kind += map(pointers.index, pointers)
        key = tuple(kind)
        plan = self.plans.get(key, _UNKNOWN)
        if plan is not _UNKNOWN:
            return self.function(*arguments) if plan is None else _replay(plan, first.device, pointers)
        active = _active.recorder = Recorder(tensors)
        try:
            with active:
                results = self.function(*arguments)
        finally:
            _active.recorder = None
        plan = active.plan(results)
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        self.plans[key] = plan
        return _replay(plan, first.device, pointers) if plan is not None and self.replay_at_once else results


def _replay(plan: _Plan, device: torch.device, pointers: list[int]) -> Any:
    outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.outputs]
    scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=device)
    bases = [*pointers, *[x.data_ptr() for x in outputs], scratch.data_ptr(), 0]
    stream = side_stream = torch._C._cuda_getCurrentRawStream(device.index)
    if plan.forks:
        streams = _streams(device.index, stream)
        side_stream = streams[1].cuda_stream
    for step in plan.steps:
        if isinstance(step, _Launch):
            arguments = [bases[i] + offset for i, offset in step.pointers]
            run(step.kernel, step.grid, side_stream if step.on_side else stream, [*arguments, *step.numbers])
        else:
            step(*streams)
    return outputs if plan.is_list else outputs[0]
