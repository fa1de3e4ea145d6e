"""Policies compiled to tensors: all that a layer reads of them.

Shapes: L layers, B batch, G groups (consecutive equal slices of the batch, each with a policy), R routing heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from natsl.calibration import Calibration
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy


@dataclass(frozen=True)
class Span:
    """Consecutive rows of the batch that share a computation: the delta rule only, or both memories.

    ``masked``: rows of op delta are among them, whose softmax branch weighs nothing. ``tempered``: the mix temperature
    is read (else it is 1 everywhere). ``learns``: the router decides something in them, so that routes carry a gradient
    in training.
    """

    rows: slice
    both: bool
    masked: bool
    tempered: bool
    learns: bool


@dataclass(frozen=True)
class LayerPlan:
    """What is decided on the host, once: how a layer's rows are computed. The rest is in ``CompiledLayer``.

    ``policies``: of the groups, whose budgets training turns into quantiles. ``capped``: whether caps are read.
    ``calibrated``: whether every budget has become a threshold.
    """

    policies: tuple[LayerPolicy, ...]
    spans: tuple[Span, ...]
    capped: bool
    calibrated: bool


class Fit(NamedTuple):
    """What a model must be for policies compiled for it: kinds of its layers, routing heads, tokens of a chunk."""

    kinds: tuple[Op, ...]
    heads: int
    chunk_size: int


@dataclass(frozen=True)
class _Tensors:
    """What is read of policies, [B,…] for one layer or [L,B,…] for all.

    ``threshold`` float32 [B,R]: the margin above which a chunk is kept; +inf for op delta, −inf for op softmax, NaN
    for a budget without calibration. ``budget`` float64 [B,R], NaN where a threshold was given. ``cap`` float64 [B] (1:
    none) and ``burst`` int64 [B]. ``temperature`` float32 [B]. ``delta_only`` bool [B]: the branches weigh (1, 0).
    """

    threshold: Tensor
    budget: Tensor
    cap: Tensor
    burst: Tensor
    temperature: Tensor
    delta_only: Tensor


@dataclass(frozen=True)
class CompiledLayer(_Tensors):
    """The policies of a batch for one layer: tensors [B,…] (see ``_Tensors``) and how its rows are computed."""

    plan: LayerPlan


@dataclass(frozen=True)
class CompiledPolicy(_Tensors):
    """Policies for a batch as tensors [L,B,…] (see ``_Tensors``), made by ``RoutedLM.compile_policy``.

    With one plan for all policies (``per_kind=False``) a captured CUDA graph that reads these tensors follows whatever
    ``copy_`` puts into them.
    """

    plans: tuple[LayerPlan, ...]
    fit: Fit
    per_kind: bool

    @property
    def batch(self) -> int:
        """Number of sequences that it is for."""
        return self.threshold.shape[1]

    def layer(self, i: int) -> CompiledLayer:
        """Views of what layer ``i`` reads."""
        return CompiledLayer(**{name: getattr(self, name)[i] for name in tensor_names()}, plan=self.plans[i])

    def copy_(self, other: CompiledPolicy) -> None:
        """Take over the policies of ``other`` in place, for evaluation.

        ``ValueError`` unless both were compiled with ``per_kind=False`` for the same model and batch, and calibrated.
        """
        same = self.fit == other.fit and self.batch == other.batch and not self.per_kind and not other.per_kind
        if not same or not all(plan.calibrated for policy in (self, other) for plan in policy.plans):
            raise ValueError(
                "only calibrated policies compiled with per_kind=False for one model and batch can be exchanged"
            )
        for name in tensor_names():
            getattr(self, name).copy_(getattr(other, name))

    def check(self, fit: Fit, batch: int, training: bool, fixed: Sequence[bool]) -> None:
        """Raise ``ValueError`` unless it may be used so; ``fixed``: for each layer whether its routes are given."""
        if self.fit != fit:
            raise ValueError(f"the policy was compiled for another model: {self.fit}, not {fit}")
        if self.batch != batch:
            raise ValueError(f"the policy was compiled for a batch of {self.batch}, not {batch}")
        if training and not self.per_kind:
            raise ValueError("the policy was compiled with per_kind=False, which is for evaluation")
        if not training and not all(plan.calibrated or given for plan, given in zip(self.plans, fixed, strict=True)):
            raise ValueError("the policy was compiled without calibration: its budgets are for training only")


def tensor_names() -> list[str]:
    """Names of the tensors of compiled policies."""
    return [item.name for item in fields(_Tensors)]


def compile_policies(
    policies: Sequence[RoutingPolicy],
    kinds: Sequence[Op],
    heads: int,
    calibration: Calibration,
    batch: int,
    per_kind: bool = True,
    unchecked: Sequence[int] = (),
) -> CompiledPolicy:
    """Compile one policy for each equal consecutive slice of ``batch`` rows, on the calibration's device.

    ``unchecked``: layers whose budgets may have no quantiles. ``per_kind``: rows that need only the delta rule are
    computed without softmax, and caps are read only if there are any. Without it every routed layer spans both memories
    for all rows. Nothing waits for the device.
    """
    columns = [[_numbers(layer, heads) for layer in (p.layers[i] for p in policies)] for i in range(len(kinds))]
    host = torch.tensor(columns, dtype=torch.float64)  # [L,G,2R+5]: one transfer
    device = calibration.levels.device
    if device.type == "cuda":
        host = host.pin_memory().to(device, non_blocking=True)
    budget, threshold, rest = host.split((heads, heads, 5), 2)
    cap, burst, temperature, single, delta_only = rest.unbind(2)
    theta = torch.where(budget.isnan(), threshold.float(), calibration.thresholds(budget, single > 0))

    def rows(x: Tensor) -> Tensor:
        return x.repeat_interleave(batch // len(policies), 1)

    return CompiledPolicy(
        threshold=rows(theta),
        budget=rows(budget),
        cap=rows(cap),
        burst=rows(burst.long()),
        temperature=rows(temperature.float()),
        delta_only=rows(delta_only > 0),
        plans=tuple(
            layer_plan([p.layers[i] for p in policies], kind, batch, per_kind, i not in unchecked)
            for i, kind in enumerate(kinds)
        ),
        fit=Fit(tuple(kinds), heads, policies[0].chunk_size),
        per_kind=per_kind,
    )


def _numbers(layer: LayerPolicy, heads: int) -> list[float]:
    """Budgets [R], thresholds [R], cap, burst, mix temperature, whether there is one budget for all, op delta."""
    budget: float | tuple[float, ...] = math.nan if layer.budget is None else layer.budget
    threshold: float | tuple[float, ...] = math.nan if layer.threshold is None else layer.threshold
    if layer.op is not Op.routed:
        threshold = math.inf if layer.op is Op.delta else -math.inf
    numbers: list[float] = []
    for value in (budget, threshold):
        numbers += value if isinstance(value, tuple) else [value] * heads
    cap = 1.0 if layer.cap is None else layer.cap
    single = not isinstance(layer.budget, tuple)
    return [*numbers, cap, min(layer.burst, 2**53), layer.mix_temperature, single, layer.op is Op.delta]


def layer_plan(
    policies: Sequence[LayerPolicy], kind: Op, batch: int, per_kind: bool = True, checked: bool = True
) -> LayerPlan:
    """How a layer computes ``batch`` rows, an equal slice for each policy; arguments as ``compile_policies``.

    ``checked``: its budgets have quantiles.
    """
    size = batch // len(policies)
    calibrated = checked or not any(policy.needs_calibration() for policy in policies)
    if not per_kind:
        spans = [Span(slice(0, batch), both=kind is Op.routed, masked=True, tempered=True, learns=True)]
        return LayerPlan(tuple(policies), tuple(spans), capped=True, calibrated=calibrated)
    spans = []
    for i, policy in enumerate(policies):
        both = kind is Op.routed and policy.op is not Op.delta
        tempered, learns = policy.mix_temperature != 1, _learns(policy)
        first = i * size
        if spans and spans[-1].both == both:
            first, tempered, learns = spans[-1].rows.start, tempered or spans[-1].tempered, learns or spans[-1].learns
            spans.pop()
        spans.append(Span(slice(first, (i + 1) * size), both, masked=False, tempered=tempered, learns=learns))
    capped = any(policy.cap is not None for policy in policies)
    return LayerPlan(tuple(policies), tuple(spans), capped, calibrated)


def most_kept(plan: LayerPlan, kind: Op, heads: int, batch: int, chunks: int) -> list[list[int]]:
    """Most of the first ``chunks`` chunks that each head of each row can keep, whatever the input: [B][R]."""
    rows = []
    for policy in plan.policies:
        numbers = _numbers(policy, heads)
        cap, burst = numbers[2 * heads : 2 * heads + 2]
        most = min(chunks, math.ceil(cap * chunks - 1e-9) + int(burst)) if policy.cap is not None else chunks
        never = [b == 0 or t == math.inf for b, t in zip(numbers[:heads], numbers[heads : 2 * heads], strict=True)]
        if kind is Op.softmax:
            never = [False] * heads
        rows.append([0 if is_never else most for is_never in never])
    return [row for row in rows for _ in range(batch // len(rows))]


def _learns(policy: LayerPolicy) -> bool:
    """Whether the router decides something: a budget strictly between 0 and 1, or a finite threshold."""
    if policy.budget is not None:
        return policy.needs_calibration()
    thresholds = policy.threshold if isinstance(policy.threshold, tuple) else (policy.threshold,)
    return any(value is not None and math.isfinite(value) for value in thresholds)
