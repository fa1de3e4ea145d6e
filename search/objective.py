"""What a search can be asked to minimise: a registry of objectives by name. Imports no torch.

Every objective is a number of one evaluated policy, smaller is better. Quality comes from the evaluation on held-out
data; costs are analytic (``natsl.space.cost``), from the fractions of chunks that were measured to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from natsl.space import cost
from natsl.space.cost import LayerShape
from natsl.space.policy import RoutingPolicy

if TYPE_CHECKING:
    from natsl.evaluate import Evaluation


Direction = Literal["minimize", "maximize"]  # Optuna's words


@dataclass(frozen=True)
class CostContext:
    """For whom a cost is counted: the shapes of the layers and the length of the text in tokens."""

    shapes: tuple[LayerShape, ...]
    context: int


@dataclass(frozen=True)
class Objective:
    """One number to minimise. ``task``: the task that must be part of the data for it to exist (null: any)."""

    name: str
    label: str
    unit: str
    value: Callable[[Evaluation, RoutingPolicy, CostContext], float | None]
    task: str | None = None
    direction: Direction = "minimize"


def _kv_bytes(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> float:
    return float(cost.kv_bytes_per_token(at.shapes, policy, evaluation.kept_by_layer, at.context))


def _decode_bytes(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> float:
    return float(cost.decode_bytes(at.shapes, policy, evaluation.kept_by_layer, at.context))


def _prefill_flops(evaluation: Evaluation, policy: RoutingPolicy, at: CostContext) -> float:
    return float(cost.prefill_flops(at.shapes, policy, evaluation.kept_by_layer, at.context))


OBJECTIVES: dict[str, Objective] = {
    item.name: item
    for item in (
        Objective("val_loss", "loss on held-out text", "nats/token", lambda e, p, c: e.val_loss),
        Objective("bits_per_byte", "bits per byte of held-out text", "bits", lambda e, p, c: e.bits_per_byte),
        Objective("recall_error", "recall error", "1 − accuracy", lambda e, p, c: e.recall_error, task="mqar"),
        Objective("needle_error", "needle error", "1 − accuracy", lambda e, p, c: e.needle_error, task="needle"),
        Objective("kept_fraction", "chunks kept for softmax", "fraction", lambda e, p, c: e.kept_fraction),
        Objective("kv_bytes_per_token", "KV cache", "bytes/token", _kv_bytes),
        Objective("decode_bytes", "memory read per decoded token", "bytes", _decode_bytes),
        Objective("prefill_flops", "compute of a prefill", "FLOP", _prefill_flops),
    )
}


def find_objectives(
    names: Sequence[str], tasks: Collection[str], constraints: Mapping[str, float]
) -> tuple[Objective, ...]:
    """The objectives of these names; ``ValueError`` for an unknown name or one that the data cannot answer.

    ``tasks``: names of the tasks that are evaluated. The names of ``constraints`` are checked the same way.
    """
    for name in (*names, *constraints):
        if name not in OBJECTIVES:
            raise ValueError(f"objective {name!r} is unknown: the objectives are {', '.join(OBJECTIVES)}")
        task = OBJECTIVES[name].task
        if task is not None and task not in tasks:
            raise ValueError(
                f"objective {name!r} needs the task {task}, the data have {', '.join(sorted(tasks))}: "
                f"add data.tasks.{task} or choose other objectives"
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
