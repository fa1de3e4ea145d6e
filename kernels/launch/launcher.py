"""How kernels reach the device, at a fraction of the host's time that Triton alone would take.

``Launcher`` finds the compiled variant of one kernel, ``side_by_side`` runs two functions on two streams, ``Layout``
keeps many tensors in one allocation, and ``Repeated`` repeats all that a host function launches without running it
again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, reduce
from operator import or_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natsl.kernels.launch import parameters as tuning

A = TypeVar("A")
B = TypeVar("B")

ALIGNMENT = 512  # bytes, as torch's own allocations
MOST_PLANS = 256  # per function

_active = threading.local()  # .recorder: what notes the launches of this thread


def _recorder() -> _Recorder | None:
    return getattr(_active, "recorder", None)


class Launcher:
    """A Triton kernel that is launched as ``kernel[grid](*arguments, **constants)``: tensors first, then numbers.

    Triton works out anew at every launch which variant of the kernel the arguments need, and asks the driver about
    every pointer. Here the variant is remembered by what it depends on, and pointers are passed as numbers. What needs
    variants of its own takes Triton's way: tensors not aligned to 16 bytes, sizes of more than 31 bits.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._variants: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # → kernel, constants it is called with

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].device
        if device.type != "cuda" or tuning.collecting():
            self.function[grid](*arguments, **constants)
            return
        tensors = [x for x in arguments if isinstance(x, Tensor)]  # the first ones
        pointers, numbers = [x.data_ptr() for x in tensors], arguments[len(tensors) :]
        kinds: list[Any] = []  # what Triton asks of a whole number: whether it is 1, divisible by 16 or long
        odd = reduce(or_, pointers) & 15
        for n, parameter in zip(numbers, self.function.params[len(tensors) :], strict=False):
            if parameter.is_constexpr:
                kinds.append(n)
            elif type(n) is int:
                if parameter.do_not_specialize:
                    odd |= n >> 31
                else:
                    kinds.append((n == 1, n % 16 == 0, n >> 31 > 0))
        key = (device.index, *[x.dtype for x in tensors], *constants.values(), *kinds)
        variant = None if odd else self._variants.get(key)
        if variant is None:
            if any(isinstance(n, Tensor) for n in numbers):
                raise TypeError(f"{self.function}: tensors must be its first arguments")
            kernel = self.function[grid](*arguments, **constants)
            names = self.function.arg_names[len(arguments) :]
            variant = kernel, tuple(constants[name] for name in names)
            if not odd:
                self._variants[key] = variant
        else:
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            _run(variant[0], grid, stream, [*pointers, *numbers, *variant[1]])
        recorder = _recorder()
        if recorder is not None:
            recorder.note(variant[0], grid, tensors, (*numbers, *variant[1]), bool(odd))


def _run(kernel: Any, grid: tuple[int, ...], stream: int, arguments: list[Any]) -> None:
    """What kernel[grid](…) does, without the hooks of Triton's own profiler."""
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
    """Results of both functions, whose kernels run at the same time on a GPU.

    ``main`` gets the side's results and what makes it wait for them, which it must call before it reads them. What the
    side stream allocates needs no record: it is used after the join, and the next fork waits for its users.
    """
    if device.type != "cuda":
        first = side()
        return first, main(first, lambda: None)
    index = torch.cuda.current_device() if device.index is None else device.index
    streams = _streams(index, torch._C._cuda_getCurrentRawStream(index))
    recorder = _recorder()

    def do(step: Callable[..., None]) -> None:
        step(*streams)
        if recorder is not None:
            recorder.steps.append(step)

    do(_fork)
    torch.cuda.set_stream(streams[1])
    if recorder is not None:
        recorder.aside = True
    try:
        first = side()
        do(_end)
    finally:
        torch.cuda.set_stream(streams[0])
        if recorder is not None:
            recorder.aside = False
    second = main(first, lambda: do(_join))
    do(_join)
    return first, second


class Layout:
    """Where tensors of given shapes and dtypes lie in one buffer of ``size`` bytes."""

    def __init__(self, *parts: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._parts = []
        self.size = 0
        for shape, dtype in parts:
            length = math.prod(shape) * dtype.itemsize
            self._parts.append((slice(self.size, self.size + length), shape, dtype))
            self.size += _aligned(length)

    def split(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in ``buffer``, uint8 [size]."""
        return [buffer[where].view(dtype).view(shape) for where, shape, dtype in self._parts]


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Launch:
    """A launch with pointers as (base, offset); the bases are inputs, outputs, the buffer of the rest, and 0."""

    kernel: Any
    grid: tuple[int, ...]
    aside: bool
    pointers: tuple[tuple[int, int], ...]
    numbers: tuple[Any, ...]


@dataclass(frozen=True)
class _Plan:
    steps: list[_Launch | Callable[..., None]]
    outputs: list[tuple[torch.Size, torch.dtype]]
    alone: bool  # whether the function returns one tensor instead of a list
    rest: int  # bytes of everything that is allocated beside the outputs
    forks: bool


_UNKNOWN = _Plan([], [], False, 0, False)


class _Recorder(TorchDispatchMode):
    """Notes launches, and every tensor that is allocated; ``refused`` says what cannot be repeated."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = inputs
        self.steps: list[Any] = []  # launches as (kernel, grid, aside, tensors, numbers), and steps of the streams
        self.buffers: list[Tensor] = []  # kept, so that no address comes twice
        self.aside = False
        self.refused = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            self.buffers.append(out)
        elif func._schema.is_mutable or not isinstance(out, Tensor) or not self._is_view(out, args):
            self.refused = str(func)
        return out

    def _is_view(self, out: Tensor, args: tuple[Any, ...]) -> bool:
        """Whether ``out`` is a view of which it is known into what."""
        storage = out.untyped_storage().data_ptr()
        for x in args:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() == storage:
                own = any(storage == buffer.data_ptr() for buffer in self.buffers)
                return own or x.data_ptr() == out.data_ptr() or self._only(storage) is not None
        return False

    def _only(self, storage: int) -> int | None:
        """Which input lies in that memory, if no other does: of several, any may begin inside another."""
        found = [i for i, x in enumerate(self._inputs) if x.untyped_storage().data_ptr() == storage]
        return found[0] if len({self._inputs[i].data_ptr() for i in found}) == 1 else None

    def note(self, kernel: Any, grid: tuple[int, ...], tensors: list[Tensor], numbers: Any, odd: bool) -> None:
        self.steps.append((kernel, grid, self.aside, tensors, numbers))
        if odd:
            self.refused = "a launch with a variant of its own"

    def plan(self, results: list[Tensor] | Tensor) -> _Plan | None:
        """What to repeat, or None if a pointer comes from elsewhere or something was refused."""
        inputs = self._inputs
        outputs = [results] if isinstance(results, Tensor) else results
        bases = {x.data_ptr(): (i, 0) for i, x in reversed(list(enumerate(inputs)))}
        bases[0] = (len(inputs) + len(outputs) + 1, 0)
        whole: dict[int, tuple[int, int]] = {}  # the storages that are allocated here
        for i, x in enumerate(outputs, len(inputs)):
            own = any(x.data_ptr() == buffer.data_ptr() and x.numel() == buffer.numel() for buffer in self.buffers)
            if x.numel() and (not own or not x.is_contiguous() or x.data_ptr() in whole):
                return None
            whole[x.data_ptr()] = (i, 0)
        rest = 0
        for buffer in self.buffers:
            if buffer.data_ptr() not in whole:
                whole[buffer.data_ptr()] = (len(inputs) + len(outputs), rest)
                rest += _aligned(buffer.numel() * buffer.element_size())

        def locate(x: Tensor) -> tuple[int, int] | None:
            pointer, storage = x.data_ptr(), x.untyped_storage().data_ptr()
            if pointer in bases:
                return bases[pointer]
            if storage in whole:
                base, offset = whole[storage]
                return base, offset + pointer - storage
            only = self._only(storage)
            return None if only is None else (only, pointer - inputs[only].data_ptr())

        steps: list[_Launch | Callable[..., None]] = []
        for step in self.steps:
            if callable(step):
                steps.append(step)
                continue
            kernel, grid, aside, tensors, numbers = step
            places = [locate(x) for x in tensors]
            if None in places:
                return None
            steps.append(_Launch(kernel, grid, aside, tuple(p for p in places if p is not None), numbers))
        if self.refused:
            return None
        shapes = [(x.shape, x.dtype) for x in outputs]
        return _Plan(steps, shapes, isinstance(results, Tensor), rest, any(map(callable, steps)))


_ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class Repeated:
    """A host function that allocates tensors and launches kernels, repeated on CUDA without running its code again.

    What it launches may depend on its options and on the shapes, strides and dtypes of its tensors (arguments or lists
    of them; the first argument is one, on the current device), never on their values; it returns new tensors alone, or
    one. The first call of a kind runs it and notes the launches, and for every pointer where it points to. Later ones
    allocate the outputs and one buffer for all the rest and launch the same kernels. A function that computes with
    torch itself, as packed sequences make it, runs every time, and so does any function while launch parameters are
    forced or observed.
    """

    repeat_at_once = False  # for tests: the first call of a kind, too, gives what the repetition computes

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.plans: dict[tuple[Any, ...], _Plan | None] = {}  # None: not to be repeated

    def __call__(self, *arguments: Any) -> Any:
        first = arguments[0]
        if not _on_gpu(first) or _recorder() is not None or tuning.overridden():
            return self.function(*arguments)
        tensors: list[Tensor] = []
        kind: list[Any] = [tuning.generation(), first.device.index]
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
        if len(set(pointers)) < len(pointers):  # which of two equal ones is meant shows in the first call alone
            kind += map(pointers.index, pointers)
        key = tuple(kind)
        plan = self.plans.get(key, _UNKNOWN)
        if plan is not _UNKNOWN:
            return self.function(*arguments) if plan is None else _repeat(plan, first.device, pointers)
        recorder = _active.recorder = _Recorder(tensors)
        try:
            with recorder:
                results = self.function(*arguments)
        finally:
            _active.recorder = None
        plan = recorder.plan(results)
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        self.plans[key] = plan
        return _repeat(plan, first.device, pointers) if plan is not None and self.repeat_at_once else results


def _repeat(plan: _Plan, device: torch.device, pointers: list[int]) -> Any:
    outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.outputs]
    rest = torch.empty(plan.rest, dtype=torch.uint8, device=device)
    bases = [*pointers, *[x.data_ptr() for x in outputs], rest.data_ptr(), 0]
    stream = aside = torch._C._cuda_getCurrentRawStream(device.index)
    if plan.forks:
        streams = _streams(device.index, stream)
        aside = streams[1].cuda_stream
    for step in plan.steps:
        if isinstance(step, _Launch):
            arguments = [bases[i] + offset for i, offset in step.pointers]
            _run(step.kernel, step.grid, aside if step.aside else stream, [*arguments, *step.numbers])
        else:
            step(*streams)
    return outputs[0] if plan.alone else outputs
