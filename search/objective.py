"""What a search can be asked to minimise: a registry of objectives by name. Imports no torch.

Every objective is a number of one evaluated policy, smaller is better. Quality comes from the evaluation on held-out
data; costs are analytic (``natsl.space.cost``) or come from a table of times (``natsl.space.latency``), both from the
fractions of chunks that were measured to be kept. An objective also says how it is shown, so an entry of ``OBJECTIVES``
is all that files, charts and report need. The error of every task of ``natsl.tasks.TASKS`` is one of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal

from natsl.errors import UserError
from natsl.space import cost
from natsl.space.cost import LayerShape
from natsl.space.latency import LatencyTable, Step
from natsl.space.policy import RoutingPolicy
from natsl.tasks import metrics

if TYPE_CHECKING:
    from natsl.evaluate import Evaluation


Direction = Literal["minimize", "maximize"]  # Optuna's words
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CostContext:
    """For whom a cost is counted: the shapes of the layers and the length of the text in tokens.

    ``bytes_per_element``: of what the model computes in, for what its cache really holds. ``latency``: times of the
    layers (null: there is no such objective).
    """

    shapes: tuple[LayerShape, ...]
    context: int
    bytes_per_element: int = 2
    latency: LatencyTable | None = None


class Role(Enum):
    """What an objective measures."""

    quality = "quality"
    cost = "cost"


@dataclass(frozen=True)
class Format:
    """How values are written: ``show`` in text, ``tick`` at an axis. ``bare``: ticks do not carry the unit."""

    show: Callable[[float], str]
    tick: Callable[[float], str]
    bare: bool = False


def _prefixed(unit: str) -> Format:
    """Three digits, a decimal prefix and the unit."""

    def show(value: float) -> str:
        for prefix in ("", "k", "M", "G", "T"):
            if abs(value) < 1000:
                return f"{value:.3g}\N{NO-BREAK SPACE}{prefix}{unit}"
            value /= 1000
        return f"{value:.3g}\N{NO-BREAK SPACE}P{unit}"

    return Format(show, show)


NUMBER = Format(lambda value: f"{value:.3f}", lambda value: f"{value:.4g}", bare=True)
PERCENT = Format(lambda value: f"{100 * value:.1f}\N{NO-BREAK SPACE}%", lambda value: f"{100 * value:.3g} %")
BYTES = _prefixed("B")
FLOP = _prefixed("FLOP")
MILLISECONDS = Format(lambda value: f"{value:.4g}\N{NO-BREAK SPACE}ms", lambda value: f"{value:.4g}", bare=True)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One number to minimise, and how it is shown.

    ``task``: the task that must be part of the data for it to exist (null: any). ``of_bytes``: it exists only where the
    text is bytes, not token ids. ``timed``: it is read from a table of times. On an axis, ``zero`` is always in sight,
    and with ``root`` the square root of the value is what is linear, which spreads small fractions.
    """

    name: str
    label: str
    unit: str
    role: Role
    value: Callable[[Evaluation, RoutingPolicy, CostContext], float | None]
    format: Format = NUMBER
    zero: bool = False
    root: bool = False
    task: str | None = None
    of_bytes: bool = False
    timed: bool = False
    direction: Direction = "minimize"

    def show(self, value: float | None) -> str:
        """A value as text, with its unit where the format has one."""
        return "–" if value is None else self.format.show(value)

    @property
    def axis_label(self) -> str:
        """The label of an axis: with the unit if ticks do not carry it."""
        return f"{self.label} ({self.unit})" if self.format.bare else self.label


def _kv_bytes(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> float:
    return float(cost.kv_bytes_per_token(at.shapes, policy, evaluation.kept_by_layer, at.context))


def _decode_bytes(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> float:
    return float(cost.decode_bytes(at.shapes, policy, evaluation.kept_by_layer, at.context))


def _prefill_flops(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> float:
    return float(cost.prefill_flops(at.shapes, policy, evaluation.kept_by_layer, at.context))


def _cache_bytes(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> float:
    shapes = cost.exported(at.shapes, policy)
    return cost.cache_bytes(shapes, policy, evaluation.kept_by_layer, at.context, at.bytes_per_element)


def _time(step: Step) -> Callable[[Evaluation, RoutingPolicy, CostContext], float | None]:
    """The time of a step; None without a table, and for a length that it does not cover."""

    def milliseconds(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> float | None:
        if at.latency is None or not at.latency.covers(at.context):
            return None
        return at.latency.milliseconds(step, at.shapes, policy, evaluation.kept_by_layer, at.context)

    return milliseconds


def _task_error(task: str, metric: str) -> Objective:
    """The share of wrong answers in a task, under the name that it has in evaluations."""
    return Objective(
        name=metric,
        label=metric.replace("_", " "),
        unit="1 − accuracy",
        role=Role.quality,
        value=lambda evaluation, policy, at: evaluation.errors.get(metric),
        format=PERCENT,
        zero=True,
        task=task,
    )


OBJECTIVES: dict[str, Objective] = {
    item.name: item
    for item in (
        Objective(
            name="val_loss",
            label="loss on held-out text",
            unit="nats/token",
            role=Role.quality,
            value=lambda evaluation, policy, at: evaluation.val_loss,
        ),
        Objective(
            name="bits_per_byte",
            label="bits per byte of held-out text",
            unit="bits",
            role=Role.quality,
            value=lambda evaluation, policy, at: evaluation.bits_per_byte,
            of_bytes=True,
        ),
        *(_task_error(task, metric) for task, metric in metrics().items()),
        Objective(
            name="kept_fraction",
            label="chunks kept for softmax",
            unit="fraction",
            role=Role.cost,
            value=lambda evaluation, policy, at: evaluation.kept_fraction,
            format=PERCENT,
            zero=True,
            root=True,
        ),
        Objective(
            name="kv_bytes_per_token",
            label="KV cache per token",
            unit="bytes/token",
            role=Role.cost,
            value=_kv_bytes,
            format=BYTES,
        ),
        Objective(
            name="decode_bytes",
            label="memory read per decoded token",
            unit="bytes",
            role=Role.cost,
            value=_decode_bytes,
            format=BYTES,
        ),
        Objective(
            name="prefill_flops",
            label="compute of a prefill",
            unit="FLOP",
            role=Role.cost,
            value=_prefill_flops,
            format=FLOP,
        ),
        Objective(
            name="cache_bytes",
            label="cache of a sequence",
            unit="bytes",
            role=Role.cost,
            value=_cache_bytes,
            format=BYTES,
        ),
        Objective(
            name="decode_ms",
            label="time of a decoding step",
            unit="ms",
            role=Role.cost,
            value=_time(Step.decode),
            format=MILLISECONDS,
            timed=True,
        ),
        Objective(
            name="prefill_ms",
            label="time of a prefill",
            unit="ms",
            role=Role.cost,
            value=_time(Step.prefill),
            format=MILLISECONDS,
            timed=True,
        ),
    )
}

_QUALITIES = [item for item in OBJECTIVES.values() if item.role is Role.quality]
# In the order in which a report prefers them: a task separates policies that the loss on text does not.
QUALITY = tuple(item.name for item in sorted(_QUALITIES, key=lambda item: item.task is None))


def find_objectives(
    names: Sequence[str], tasks: Collection[str], constraints: Mapping[str, float]
) -> tuple[Objective, ...]:
    """The objectives of these names; ``ValueError`` for an unknown name or one that the data cannot answer.

    ``tasks``: names of the tasks that are evaluated. The names of ``constraints`` are checked the same way. Costs
    without any quality, be it as a bound, are allowed with a warning.
    """
    for name in (*names, *constraints):
        if name not in OBJECTIVES:
            raise UserError(f"objective {name!r} is unknown: the objectives are {', '.join(OBJECTIVES)}")
        task = OBJECTIVES[name].task
        if task is not None and task not in tasks:
            raise UserError(
                f"objective {name!r} needs the task {task}, the data have {', '.join(sorted(tasks))}: "
                f"add data.tasks.{task} or choose other objectives"
            )
    if all(OBJECTIVES[name].role is Role.cost for name in (*names, *constraints)):
        _log.warning(
            "search.objectives = %s: nothing but costs, so the cheapest policy is best, whatever it gets wrong; add a "
            "quality, such as val_loss, or a bound on one in search.constraints",
            list(names),
        )
    return tuple(OBJECTIVES[name] for name in names)


def measure(names: Sequence[str], evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> dict[str, float]:
    """The values of objectives by name; ``FloatingPointError`` where one is missing or not finite."""
    values = {}
    for name in names:
        value = OBJECTIVES[name].value(evaluation, policy, at)
        if value is None or not math.isfinite(value):
            raise FloatingPointError(f"objective {name} is {value}")
        values[name] = float(value)
    return values
