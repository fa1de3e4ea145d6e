"""The space of routing policies that a search draws from, and the anchors that it starts with.

Parameters of routed layer i, as an optimiser sees them (name → value):
    ``op.{i}``     which op, where there is more than one;
    ``u.{i}``      in [0, 1], if routed by budget: budget = min + (max − min)·u². Squaring spends half of the range on
                   the smallest quarter of the budgets, where quality changes fastest;
    ``theta.{i}``  if routed by threshold: the threshold in logits;
    ``mix.{i}``    log scale, if both branches run and the range is not a point: the mix temperature.
A parameter exists only where it has an effect, and always with the same range, as grouped samplers want it. Drawn
numbers are rounded to 3 decimals and bounds have no more, so every policy of the space can be written back as
parameters exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Protocol

from natsl.space.check import check, check_choice, check_count, check_number
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy

DECIMALS = 3
ANCHOR_BUDGETS = (0.25, 0.5, 0.05, 0.1, 0.125)
SINGLE_BUDGET = 0.25


class Control(Enum):
    """What fixes how much a routed layer keeps."""

    budget = "budget"  # a fraction of chunks, through the calibration table
    threshold = "threshold"  # a margin in logits


class Trial(Protocol):
    """What proposes parameters: an Optuna trial, or anything with its two methods."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str: ...


@dataclass
class SearchSpace:
    """Which policies a search may propose.

    ops: what a routed layer may do. control: how routed layers are steered; budgets lie in
    [``budget_min``, ``budget_max``] ⊂ [0, 1], thresholds (logits) in [``threshold_min``, ``threshold_max``].
    mix_temperature_min, mix_temperature_max: > 0; equal bounds fix it. cap, burst: hard limit put on every layer of op
    routed (``LayerPolicy``); op softmax is not limited by it: leave softmax out of ``ops`` where the limit must hold.
    Bounds have at most 3 decimals. Raises ``ValueError`` naming the value and what is allowed.
    """

    ops: list[Op] = field(default_factory=lambda: [Op.delta, Op.softmax, Op.routed])
    control: Control = Control.budget
    budget_min: float = 0.0
    budget_max: float = 1.0
    threshold_min: float = -4.0
    threshold_max: float = 4.0
    mix_temperature_min: float = 1.0
    mix_temperature_max: float = 1.0
    cap: float | None = None
    burst: int = 0

    def __post_init__(self) -> None:
        p = "search.space."
        check(
            isinstance(self.ops, list | tuple) and len(self.ops) > 0, p + "ops", self.ops, "at least one op is needed"
        )
        ops = [check_choice(p + "ops", op, Op) for op in self.ops]
        names = [op.value for op in ops]
        check(len(set(ops)) == len(ops), p + "ops", names, "each op may come once")
        self.ops = [op for op in Op if op in ops]  # one order: the order of choices is part of the space
        self.control = check_choice(p + "control", self.control, Control)
        self.budget_min, self.budget_max = self._range("budget", 0, 1)
        self.threshold_min, self.threshold_max = self._range("threshold", -math.inf, math.inf)
        self.mix_temperature_min, self.mix_temperature_max = self._range("mix_temperature", 10**-DECIMALS, math.inf)
        if self.cap is not None:
            self.cap = check_number(p + "cap", self.cap, 0, 1)
        self.burst = check_count(p + "burst", self.burst, 0)
        check(self.burst == 0 or self.cap is not None, p + "burst", self.burst, "it must be 0 without a cap")

    def suggest(self, trial: Trial, kinds: Sequence[Op], chunk_size: int) -> RoutingPolicy:
        """The policy that a trial proposes for layers of these kinds; layers that are not routed need no parameter."""
        return RoutingPolicy(
            tuple(
                self._suggest_layer(trial, i) if kind is Op.routed else LayerPolicy(kind)
                for i, kind in enumerate(kinds)
            ),
            chunk_size,
        )

    def params(self, policy: RoutingPolicy, kinds: Sequence[Op]) -> dict[str, Any]:
        """The parameters under which ``suggest`` gives exactly this policy (to enqueue it).

        Raises ``ValueError`` if the policy does not fit the kinds or is not in the space: an op that is not listed, a
        number out of range or with more than 3 decimals, another control, cap or burst.
        """
        policy.check(kinds, policy.chunk_size)
        params: dict[str, Any] = {}
        for i, (layer, kind) in enumerate(zip(policy.layers, kinds, strict=True)):
            if kind is Op.routed:
                params |= self._layer_params(f"policy.layers[{i}].", i, layer)
        again = self.from_params(params, kinds, policy.chunk_size)
        if again != policy:  # what is left: settings without effect, such as a mix temperature of op delta
            i = next(i for i, pair in enumerate(zip(again.layers, policy.layers, strict=True)) if pair[0] != pair[1])
            allowed = f"in this space it is {again.layers[i].to_dict()}"
            check(False, f"policy.layers[{i}]", policy.layers[i].to_dict(), allowed)
        return params

    def from_params(self, params: Mapping[str, Any], kinds: Sequence[Op], chunk_size: int) -> RoutingPolicy:
        """The policy of fixed parameters; ``ValueError`` for an unknown or missing one and for values out of range."""
        trial = _FixedTrial(params)
        policy = self.suggest(trial, kinds, chunk_size)
        for name in params:
            if name not in trial.used:
                used = ", ".join(sorted(trial.used)) or "none"
                raise ValueError(f"unknown parameter {name!r}: with the other values the parameters are {used}")
        return policy

    def anchors(self, kinds: Sequence[Op], chunk_size: int) -> list[RoutingPolicy]:
        """Policies worth trying first, as far as this space can express them; each once, broad ones first.

        All delta; all softmax; uniform budgets; each single routed layer at a budget of .25, then all softmax, the
        others delta.
        """
        delta, softmax = self._fixed(Op.delta), self._fixed(Op.softmax)
        uniform = [self._fixed(Op.routed, budget) for budget in ANCHOR_BUDGETS]
        wanted = [RoutingPolicy.fill(kinds, chunk_size, layer) for layer in (delta, softmax, *uniform)]
        for single in (self._fixed(Op.routed, SINGLE_BUDGET), softmax):
            for i, kind in enumerate(kinds):
                if kind is Op.routed:
                    layers = list(wanted[0].layers)
                    layers[i] = single
                    wanted.append(RoutingPolicy(tuple(layers), chunk_size))
        return [policy for policy in dict.fromkeys(wanted) if self._holds(policy, kinds)]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what parameters mean, JSON-ready: studies of equal fingerprints may be mixed."""
        plain = asdict(self) | {"ops": [op.value for op in self.ops], "control": self.control.value}
        return plain | {"budget_scale": "u^2", "decimals": DECIMALS}

    def _range(self, name: str, low: float, high: float) -> tuple[float, float]:
        ends = []
        for end in (f"{name}_min", f"{name}_max"):
            value = check_number("search.space." + end, getattr(self, end), low, high)
            ok = math.isfinite(value) and round(value, DECIMALS) == value
            check(ok, "search.space." + end, value, f"it must be finite with at most {DECIMALS} decimals")
            ends.append(value)
        check(ends[0] <= ends[1], f"search.space.{name}_min", ends[0], f"it must be ≤ {name}_max = {ends[1]:g}")
        return ends[0], ends[1]

    def _fixed(self, op: Op, budget: float | None = None) -> LayerPolicy:
        """A layer policy of anchors: the cap of this space and a mix temperature as near to 1 as it allows."""
        if op is Op.delta:
            return LayerPolicy(op)
        mix = min(max(1.0, self.mix_temperature_min), self.mix_temperature_max)
        if op is Op.softmax:
            return LayerPolicy(op, mix_temperature=mix)
        return LayerPolicy(op, budget=budget, cap=self.cap, burst=self.burst, mix_temperature=mix)

    def _suggest_layer(self, trial: Trial, i: int) -> LayerPolicy:
        op = self.ops[0]
        if len(self.ops) > 1:
            op = Op(trial.suggest_categorical(f"op.{i}", [choice.value for choice in self.ops]))
        if op is Op.delta:
            return LayerPolicy(op)
        budget = threshold = None
        if op is Op.routed and self.control is Control.budget:
            budget, span = self.budget_min, self.budget_max - self.budget_min
            if span > 0:
                budget = round(budget + span * trial.suggest_float(f"u.{i}", 0.0, 1.0) ** 2, DECIMALS)
        elif op is Op.routed:
            threshold = self.threshold_min
            if self.threshold_max > threshold:
                theta = trial.suggest_float(f"theta.{i}", self.threshold_min, self.threshold_max)
                threshold = round(theta, DECIMALS)
        mix = self.mix_temperature_min
        if self.mix_temperature_max > mix:
            mix = trial.suggest_float(f"mix.{i}", self.mix_temperature_min, self.mix_temperature_max, log=True)
            mix = round(mix, DECIMALS)
        if op is Op.softmax:
            return LayerPolicy(op, mix_temperature=mix)
        return LayerPolicy(op, budget, threshold, self.cap, self.burst, mix)

    def _layer_params(self, name: str, i: int, layer: LayerPolicy) -> dict[str, Any]:
        allowed = f"the space has {', '.join(op.value for op in self.ops)}"
        check(layer.op in self.ops, name + "op", layer.op, allowed)
        params: dict[str, Any] = {f"op.{i}": layer.op.value} if len(self.ops) > 1 else {}
        if layer.op is Op.routed:
            for limit in ("cap", "burst"):
                value, fixed = getattr(layer, limit), getattr(self, limit)
                check(value == fixed, name + limit, value, f"the space fixes it at {fixed}")
            if self.control is Control.budget:
                low, high = self.budget_min, self.budget_max
                budget = self._within(name + "budget", layer.budget, low, high)
                if high > low:
                    params[f"u.{i}"] = math.sqrt((budget - low) / (high - low))
            else:
                low, high = self.threshold_min, self.threshold_max
                threshold = self._within(name + "threshold", layer.threshold, low, high)
                if high > low:
                    params[f"theta.{i}"] = threshold
        if layer.op is not Op.delta:
            low, high = self.mix_temperature_min, self.mix_temperature_max
            mix = self._within(name + "mix_temperature", layer.mix_temperature, low, high)
            if high > low:
                params[f"mix.{i}"] = mix
        return params

    @staticmethod
    def _within(name: str, value: float | tuple[float, ...] | None, low: float, high: float) -> float:
        check(not isinstance(value, tuple), name, value, "the space has one number per layer")
        number = check_number(name, value, low, high)
        ok = round(number, DECIMALS) == number
        check(ok, name, number, f"the space has numbers of at most {DECIMALS} decimals")
        return number

    def _holds(self, policy: RoutingPolicy, kinds: Sequence[Op]) -> bool:
        try:
            self.params(policy, kinds)
        except ValueError:
            return False
        return True


class _FixedTrial:
    """A trial that answers from fixed parameters and checks them against each suggestion."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.used: set[str] = set()

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return check_number(f"parameter {name}", self._take(name), low, high)

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        value = self._take(name)
        ok = isinstance(value, str) and value in choices
        check(ok, f"parameter {name}", value, f"it must be one of {', '.join(choices)}")
        return str(value)

    def _take(self, name: str) -> Any:
        if name not in self.params:
            raise ValueError(f"parameter {name} is missing")
        self.used.add(name)
        return self.params[name]
