"""The space of routing policies that a search draws from, and the anchors that it starts with.

Parameters of routed layer i (and routing head h), as an optimiser sees them (name → value):
    ``u.{i}``      in [0, 1], of a layer (``granularity=layer``) or
    ``u.{i}.{h}``  of a head (``granularity=head``): how much it keeps. u ≤ .05 is op delta and u ≥ .95 op softmax;
                   between them t = (u − .05) / .9 gives budget = min + (max − min)·t², or
                   threshold = max − (max − min)·t. Squaring spends half of the range on the smallest quarter of the
                   budgets, where quality changes fastest. An end that the space does not have is not snapped: the map
                   then stretches over it;
    ``mix.{i}``    log scale, unless the range is a point: the mix temperature, if both branches run.
Every parameter exists in every trial and always with the same range: samplers that model numbers together ignore
those that come and go. Budgets, thresholds and temperatures are rounded to 3 decimals and bounds have no more, so every
policy of the space can be written back as parameters exactly.
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
SNAP = 0.05  # share of the range of u that each end takes
ANCHOR_BUDGETS = (0.25, 0.5, 0.05, 0.1, 0.125)
SINGLE_BUDGETS = (0.25, 1.0, 0.1, 0.05, 0.5, 0.025)  # of the layer or head that keeps something; 1 is softmax


class Control(Enum):
    """What fixes how much a routed layer keeps."""

    budget = "budget"  # a fraction of chunks, through the calibration table
    threshold = "threshold"  # a margin in logits


class Granularity(Enum):
    """What has a number of its own."""

    layer = "layer"
    head = "head"  # every routing head of every layer


class Trial(Protocol):
    """What proposes parameters: an Optuna trial, or anything with its method."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


@dataclass
class SearchSpace:
    """Which policies a search may propose.

    ops: what a routed layer may do. granularity: whether a number steers a layer or one of its routing heads. control:
    how routed layers are steered; budgets lie in [``budget_min``, ``budget_max``] ⊂ [0, 1], thresholds (logits) in
    [``threshold_min``, ``threshold_max``]. mix_temperature_min, mix_temperature_max: > 0; equal bounds fix it. cap,
    burst: hard limit put on every layer of op routed (``LayerPolicy``); op softmax, which it does not limit, is then no
    part of the space. Bounds have at most 3 decimals. Raises ``ValueError`` naming the value and what is allowed.
    """

    ops: list[Op] = field(default_factory=lambda: [Op.delta, Op.softmax, Op.routed])
    granularity: Granularity = Granularity.layer
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
        self.granularity = check_choice(p + "granularity", self.granularity, Granularity)
        self.control = check_choice(p + "control", self.control, Control)
        self.budget_min, self.budget_max = self._range("budget", 0, 1)
        self.threshold_min, self.threshold_max = self._range("threshold", -math.inf, math.inf)
        self.mix_temperature_min, self.mix_temperature_max = self._range("mix_temperature", 10**-DECIMALS, math.inf)
        if self.cap is not None:
            self.cap = check_number(p + "cap", self.cap, 0, 1)
            check(Op.routed in ops, p + "cap", self.cap, "only op routed has one: add it to search.space.ops")
        self.burst = check_count(p + "burst", self.burst, 0)
        check(self.burst == 0 or self.cap is not None, p + "burst", self.burst, "it must be 0 without a cap")
        by_head = self.granularity is Granularity.head
        check(not by_head or Op.routed in ops, p + "ops", names, "heads of their own need op routed")

    def suggest(self, trial: Trial, kinds: Sequence[Op], chunk_size: int, heads: int | None = None) -> RoutingPolicy:
        """The policy that a trial proposes for layers of these kinds; layers that are not routed need no parameter.

        ``heads``: routing heads of a layer, which only ``granularity=head`` needs.
        """
        count = self._count(heads)
        return RoutingPolicy(
            tuple(
                self._suggest_layer(trial, i, count) if kind is Op.routed else LayerPolicy(kind)
                for i, kind in enumerate(kinds)
            ),
            chunk_size,
        )

    def params(self, policy: RoutingPolicy, kinds: Sequence[Op], heads: int | None = None) -> dict[str, float]:
        """The parameters under which ``suggest`` gives exactly this policy (to enqueue it).

        Raises ``ValueError`` if the policy does not fit the kinds or is not in the space: an op that is not listed, a
        number out of range or with more than 3 decimals, another control, granularity, cap or burst.
        """
        count = self._count(heads)
        policy.check(kinds, policy.chunk_size, heads)
        params: dict[str, float] = {}
        for i, (layer, kind) in enumerate(zip(policy.layers, kinds, strict=True)):
            if kind is Op.routed:
                params |= self._layer_params(f"policy.layers[{i}].", i, layer, count)
        again = self.from_params(params, kinds, policy.chunk_size, heads)
        if again != policy:  # what is left: another form of the same, such as a list of zeros for op delta
            i = next(i for i, pair in enumerate(zip(again.layers, policy.layers, strict=True)) if pair[0] != pair[1])
            allowed = f"in this space it is {again.layers[i].to_dict()}"
            check(False, f"policy.layers[{i}]", policy.layers[i].to_dict(), allowed)
        return params

    def from_params(
        self, params: Mapping[str, Any], kinds: Sequence[Op], chunk_size: int, heads: int | None = None
    ) -> RoutingPolicy:
        """The policy of fixed parameters; ``ValueError`` for an unknown or missing one and for values out of range."""
        trial = _FixedTrial(params)
        policy = self.suggest(trial, kinds, chunk_size, heads)
        for name in params:
            if name not in trial.used:
                used = ", ".join(sorted(trial.used)) or "none"
                raise ValueError(f"unknown parameter {name!r}: the parameters are {used}")
        return policy

    def anchors(self, kinds: Sequence[Op], chunk_size: int, heads: int | None = None) -> list[RoutingPolicy]:
        """Policies worth trying first, as far as this space can express them; each once, broad ones first.

        All delta; all softmax; uniform budgets; each single layer (or head) at one budget after another, the others
        delta.
        """
        count = self._count(heads)
        routed = self.control is Control.budget  # what a threshold keeps is not known beforehand
        uniform = (0.0, 1.0, *(ANCHOR_BUDGETS if routed else ()))
        wanted = [RoutingPolicy.fill(kinds, chunk_size, self._fixed([budget] * count)) for budget in uniform]
        for budget in SINGLE_BUDGETS if routed else (1.0,):
            for i, kind in enumerate(kinds):
                for h in range(count) if kind is Op.routed else ():
                    layers = list(wanted[0].layers)
                    layers[i] = self._fixed([budget if h == other else 0.0 for other in range(count)])
                    wanted.append(RoutingPolicy(tuple(layers), chunk_size))
        return [policy for policy in dict.fromkeys(wanted) if self._holds(policy, kinds, heads)]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what parameters mean, JSON-ready: studies of equal fingerprints may be mixed."""
        plain = asdict(self) | {"ops": [op.value for op in self.ops]}
        plain |= {"granularity": self.granularity.value, "control": self.control.value}
        return plain | {"parameters": "one number, its ends snapped", "budget_scale": "t^2", "decimals": DECIMALS}

    def _range(self, name: str, low: float, high: float) -> tuple[float, float]:
        ends = []
        for end in (f"{name}_min", f"{name}_max"):
            value = check_number("search.space." + end, getattr(self, end), low, high)
            ok = math.isfinite(value) and round(value, DECIMALS) == value
            check(ok, "search.space." + end, value, f"it must be finite with at most {DECIMALS} decimals")
            ends.append(value)
        check(ends[0] <= ends[1], f"search.space.{name}_min", ends[0], f"it must be ≤ {name}_max = {ends[1]:g}")
        return ends[0], ends[1]

    def _count(self, heads: int | None) -> int:
        """How many numbers a layer has."""
        if self.granularity is Granularity.layer:
            return 1
        if heads is None:
            raise ValueError("granularity=head needs the number of routing heads")
        return check_count("heads", heads, 1)

    @property
    def _has_softmax(self) -> bool:
        return Op.softmax in self.ops and self.cap is None

    @property
    def _ends(self) -> tuple[float, float]:
        """The largest u that is delta and the smallest that is softmax; between them it is routed."""
        if Op.routed not in self.ops:
            middle = 0.5 if len(self.ops) == 2 else 1.0 if self.ops == [Op.delta] else -1.0
            return middle, middle
        return (SNAP if Op.delta in self.ops else -1.0), (1.0 - SNAP if self._has_softmax else 2.0)

    @property
    def _limits(self) -> tuple[float, float]:
        """The routed number at the smallest and at the largest u."""
        if self.control is Control.budget:
            return self.budget_min, self.budget_max
        return self.threshold_max, self.threshold_min

    @property
    def _static(self) -> tuple[float, float]:
        """The number of a head that keeps nothing, and of one that keeps everything."""
        return (0.0, 1.0) if self.control is Control.budget else (math.inf, -math.inf)

    def _names(self, i: int, count: int) -> list[str]:
        """Parameters that say how much layer i keeps; none where there is nothing to choose."""
        first, last = self._limits
        if len(self.ops) == 1 and (self.ops != [Op.routed] or first == last):
            return []
        return [f"u.{i}"] if self.granularity is Granularity.layer else [f"u.{i}.{h}" for h in range(count)]

    @property
    def _varies_mix(self) -> bool:
        return self.mix_temperature_max > self.mix_temperature_min and self.ops != [Op.delta]

    def _suggest_layer(self, trial: Trial, i: int, count: int) -> LayerPolicy:
        names = self._names(i, count)
        values = [self._read(trial.suggest_float(name, 0.0, 1.0)) for name in names] or [self._read(0.5)] * count
        mix = self.mix_temperature_min
        if self._varies_mix:
            mix = trial.suggest_float(f"mix.{i}", self.mix_temperature_min, self.mix_temperature_max, log=True)
            mix = round(mix, DECIMALS)
        return self._layer(values, mix)

    def _read(self, u: float) -> Op | float:
        """What one number means: op delta or softmax, or the budget or threshold of op routed."""
        low, high = self._ends
        if u <= low:
            return Op.delta
        if u >= high:
            return Op.softmax
        low, high = max(low, 0.0), min(high, 1.0)
        first, last = self._limits
        t = (u - low) / (high - low)
        share = t**2 if self.control is Control.budget else t
        return round(first + (last - first) * share, DECIMALS)

    def _write(self, value: Op | float, name: str) -> float:
        """The u that ``_read`` turns into this value; ``ValueError`` if there is none."""
        low, high = self._ends
        if isinstance(value, Op):
            return 0.0 if value is Op.delta else 1.0
        first, last = self._limits
        number = self._within(name, value, min(first, last), max(first, last))
        if first == last:
            return 0.5
        # A quarter of the last decimal inside of the limits: it is rounded to them, and not snapped.
        inside = 0.25 * 10**-DECIMALS / abs(last - first)
        share = min(max((number - first) / (last - first), inside), 1.0 - inside)
        t = math.sqrt(share) if self.control is Control.budget else share
        low, high = max(low, 0.0), min(high, 1.0)
        return round(low + (high - low) * t, 9)

    def _layer(self, values: Sequence[Op | float], mix: float) -> LayerPolicy:
        """The layer whose numbers (one, or one per head) mean this."""
        nothing, everything = self._static
        if self.granularity is Granularity.layer:
            (value,) = values
            if value is Op.delta:
                return LayerPolicy(value)
            if value is Op.softmax:
                return LayerPolicy(value, mix_temperature=mix)
            return self._routed(value, mix)
        numbers = tuple(nothing if v is Op.delta else everything if v is Op.softmax else v for v in values)
        if Op.delta in self.ops and set(numbers) == {nothing}:
            return LayerPolicy(Op.delta)
        if self._has_softmax and set(numbers) == {everything}:
            return LayerPolicy(Op.softmax, mix_temperature=mix)
        return self._routed(numbers, mix)

    def _routed(self, value: Any, mix: float) -> LayerPolicy:
        limit = {"cap": self.cap, "burst": self.burst, "mix_temperature": mix}
        if self.control is Control.budget:
            return LayerPolicy(Op.routed, budget=value, **limit)  # type: ignore[arg-type]
        return LayerPolicy(Op.routed, threshold=value, **limit)  # type: ignore[arg-type]

    def _fixed(self, budgets: Sequence[float]) -> LayerPolicy:
        """A layer of anchors: budgets of its heads (or one), with the neutral mix temperature."""
        values = [Op.delta if b == 0.0 else Op.softmax if b == 1.0 else b for b in budgets]
        return self._layer(values, self.neutral_mix)

    @property
    def neutral_mix(self) -> float:
        """The mix temperature as near to 1 as the space allows."""
        return min(max(1.0, self.mix_temperature_min), self.mix_temperature_max)

    def _layer_params(self, name: str, i: int, layer: LayerPolicy, count: int) -> dict[str, float]:
        allowed = f"the space has {', '.join(op.value for op in self.ops)}"
        check(layer.op in self.ops, name + "op", layer.op, allowed)
        limited = layer.op is Op.softmax and self.cap is not None
        check(not limited, name + "op", layer.op, "search.space.cap does not limit op softmax")
        params = dict(zip(self._names(i, count), self._positions(name, layer, count), strict=False))
        mix = self.neutral_mix
        if layer.op is not Op.delta:
            limits = self.mix_temperature_min, self.mix_temperature_max
            mix = self._within(name + "mix_temperature", layer.mix_temperature, *limits)
        if self._varies_mix:
            params[f"mix.{i}"] = mix
        return params

    def _positions(self, name: str, layer: LayerPolicy, count: int) -> list[float]:
        """The u of a layer, or of each of its heads."""
        if layer.op is not Op.routed:
            return [self._write(layer.op, name)] * count
        for limit in ("cap", "burst"):
            value, fixed = getattr(layer, limit), getattr(self, limit)
            check(value == fixed, name + limit, value, f"the space fixes it at {fixed}")
        name += self.control.value
        numbers = getattr(layer, self.control.value)
        if self.granularity is Granularity.layer:
            check(not isinstance(numbers, tuple), name, numbers, "the space has one number per layer")
            return [self._write(numbers, name)]
        check(isinstance(numbers, tuple), name, numbers, "the space has a list with one number per head")
        check(len(numbers) == count, name, numbers, f"the layer has {count} routing heads")
        low, high = self._ends
        ends = {
            n: op for n, op, has in zip(self._static, (Op.delta, Op.softmax), (low > 0, high < 1), strict=True) if has
        }
        return [self._write(ends.get(number, number), f"{name}[{h}]") for h, number in enumerate(numbers)]

    @staticmethod
    def _within(name: str, value: float, low: float, high: float) -> float:
        number = check_number(name, value, low, high)
        ok = round(number, DECIMALS) == number
        check(ok, name, number, f"the space has numbers of at most {DECIMALS} decimals")
        return number

    def _holds(self, policy: RoutingPolicy, kinds: Sequence[Op], heads: int | None) -> bool:
        try:
            self.params(policy, kinds, heads)
        except ValueError:
            return False
        return True


class _FixedTrial:
    """A trial that answers from fixed parameters and checks them against each suggestion."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.used: set[str] = set()

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if name not in self.params:
            raise ValueError(f"parameter {name} is missing")
        self.used.add(name)
        return check_number(f"parameter {name}", self.params[name], low, high)
