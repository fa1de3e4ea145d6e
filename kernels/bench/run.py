"""The benchmark itself: rows of times and floors, the profile of the kernels, their report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natsl.kernels.bench import rivals, timing
from natsl.kernels.bench.report import FLEX, HEADER, SDPA, KernelRow, Row, draw, kernel_table, line
from natsl.kernels.bench.roofline import Ceilings, for_dtype, kernel_work, op_work
from natsl.kernels.registry import OPS, OpSpec, Options, Tensors, kernels, layer_inputs, output_gradients
from natsl.kernels.shape import Case, Shape

TORCH_LONGEST = 8192
FLEX_LONGEST = 32768  # its block mask grows with the square of the length
INSERTION_RATE = 0.1  # of the row with a router gradient, where the ops are timed without one


@dataclass(frozen=True)
class Plan:
    """What is timed: every op on every case, the rivals where the middle fraction is kept."""

    shape: Shape
    cases: tuple[Case, ...]
    options: Options
    rivals: tuple[str, ...]
    budget_ms: float  # for the repeats of one time
    out: Path

    @property
    def middle(self) -> float:
        fractions = sorted({case.fraction for case in self.cases})
        return fractions[len(fractions) // 2]


@dataclass(frozen=True)
class Point:
    """One case of a plan on one device, and what the device reaches."""

    plan: Plan
    case: Case
    ceilings: Ceilings
    device: torch.device

    def inputs(self) -> dict[str, Tensor]:
        return layer_inputs(self.plan.shape, self.case, self.device)

    def floors(self, op: str, case: Case) -> tuple[float, float]:
        """Milliseconds of ``op`` at best: forward, and forward and backward."""
        forward, backward = (self.ceilings.floor_ms(work) for work in op_work(op, self.plan.shape, case))
        return forward, forward + backward


@dataclass(frozen=True)
class Subject:
    """One thing to time: a function with a graph, the backward pass of what it returns, its inputs and its floors."""

    forward: Callable[[], Any]
    backward: Callable[[Any], object]
    inputs: Sequence[Tensor]
    floors: tuple[float, float]


def bench(plan: Plan, device: torch.device) -> None:
    """Time everything of the plan; print the tables, write ``bench.json`` and ``bench.png`` to its folder.

    Raises ``OSError`` if the folder cannot be written.
    """
    import triton

    begin = time.perf_counter()
    plan.out.mkdir(parents=True, exist_ok=True)
    ceilings = for_dtype(timing.ceilings(), plan.shape.dtype)
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}\n{plan.shape}")
    print(
        f"floor at {ceilings.flops / 1e12:.0f} TFLOP/s and {ceilings.bandwidth / 1e12:.2f} TB/s ({ceilings.source})\n"
    )
    print(HEADER, flush=True)
    rows: list[Row] = []
    kernel_rows: list[KernelRow] = []
    for case in plan.cases:
        point = Point(plan, case, ceilings, device)
        for row in case_rows(point):
            rows.append(row)
            print(line(row), flush=True)
        if case.fraction == plan.middle:
            kernel_rows += profile(point)
    print(kernel_table(kernel_rows))
    result = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python -m natsl.kernels.bench", *sys.argv[1:]]),
        "shape": asdict(plan.shape),
        "ceilings": asdict(ceilings),
        "seconds": round(time.perf_counter() - begin, 1),
        "rows": [asdict(row) for row in rows],
        "kernels": [asdict(row) for row in kernel_rows],
    }
    (plan.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"{name}, {plan.shape.dtype}, {plan.middle:g} of the chunks kept"
    draw(plan.out / "bench.png", rows, plan.middle, title)
    print(f"\nWritten: {plan.out / 'bench.json'}\nWritten: {plan.out / 'bench.png'}")


def case_rows(point: Point) -> Iterator[Row]:
    """Rows of one case: every op with a least work, the layer called in other ways, and the rivals."""
    plan, case = point.plan, point.case
    tensors = point.inputs()

    def op_row(name: str, spec: OpSpec, options: Options) -> Row:
        subject = _op_subject(point, spec, tensors, options)
        return _measure(Row(name, case.batch, case.tokens, case.fraction), subject, plan.budget_ms)

    for spec in OPS.values():
        if spec.work is not None:
            yield op_row(spec.name, spec, plan.options)
    layer = OPS["layer"]
    if plan.options.counterfactual == "none":
        options = replace(plan.options, counterfactual="insertion", rate=INSERTION_RATE)
        yield op_row(f"layer, insertion {INSERTION_RATE:g}", layer, options)
    if case.fraction != plan.middle:
        return
    if "torch" in plan.rivals and case.tokens <= TORCH_LONGEST and case.batch == 1:
        yield op_row("layer, torch backend", layer, replace(plan.options, backend="torch"))
    for name in ("sdpa", "flex"):
        if name in plan.rivals and not (name == "flex" and case.tokens > FLEX_LONGEST):
            yield _rival_row(point, name, tensors)


def _op_subject(point: Point, spec: OpSpec, tensors: Tensors, options: Options) -> Subject:
    with torch.no_grad():
        do = output_gradients(spec.forward(tensors, options))
    return Subject(
        lambda: spec.forward(tensors, options),
        lambda outputs: spec.backward(tensors, outputs, do),
        [tensors[name] for name in spec.inputs],
        point.floors(spec.name, point.case),
    )


def _rival_row(point: Point, name: str, tensors: Tensors) -> Row:
    plan, case = point.plan, point.case
    dense = name == "sdpa"
    row = Row(SDPA if dense else FLEX, case.batch, case.tokens, None if dense else case.fraction)
    floors = point.floors("routed_softmax", replace(case, fraction=1.0) if dense else case)
    try:
        attend, inputs = rivals.prepare(name, tensors, plan.shape.chunk_size)
        (do,) = output_gradients((attend().detach(),))
        subject = Subject(attend, lambda o: torch.autograd.grad(o, inputs, do), inputs, floors)
        return _measure(row, subject, plan.budget_ms)
    except Exception as error:  # another library's limits: the row says so and the others go on
        return replace(row, note=f"skipped: {(str(error).splitlines() or [type(error).__name__])[0][:70]}")


def _measure(row: Row, subject: Subject, budget_ms: float) -> Row:
    """The row with its times, memory and floors, or with a note where the device has too little memory."""

    def both() -> object:
        return subject.backward(subject.forward())

    try:
        both()
        return replace(
            row,
            peak_gib=timing.peak_gib(both, subject.inputs),
            forward_ms=timing.time_ms(subject.forward, budget_ms=budget_ms),
            both_ms=timing.time_ms(both, budget_ms=budget_ms),
            queued_ms=timing.time_ms(both, queued=True, budget_ms=budget_ms),
            floor_forward_ms=subject.floors[0],
            floor_both_ms=subject.floors[1],
        )
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return replace(row, note="skipped: out of memory")


def profile(point: Point) -> list[KernelRow]:
    """Time of each kernel in one forward and backward of the ops that launch it, and of torch's own in each op."""
    plan, case = point.plan, point.case
    tensors = point.inputs()
    work = kernel_work(plan.shape, case)
    names = {f"{kernel.name}_kernel": kernel.name for kernel in kernels()}
    rows = []

    def add(name: str, ms: float, launches: int, floor_ms: float | None) -> None:
        rows.append(KernelRow(name, case.batch, case.tokens, case.fraction, ms, launches, floor_ms))

    for spec in OPS.values():
        if not spec.kernels or spec.work is None:
            continue
        other_ms, other_launches = 0.0, 0
        run = partial(spec.differentiate, tensors, plan.options)
        for symbol, (ms, launches) in timing.kernel_times(run).items():
            name = names.get(symbol)
            if name is None:
                other_ms, other_launches = other_ms + ms, other_launches + launches
            else:
                add(name, ms, launches, point.ceilings.floor_ms(work[name]) if name in work else None)
        add(f"torch, in {spec.name}", other_ms, other_launches, None)
    return rows
