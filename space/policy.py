"""Routing policies: what every layer of a routed model does, as frozen values with a canonical JSON form.

A policy is passed to ``forward``; it is never module state. Its legality is decided here and nowhere else:
``LayerPolicy`` and ``RoutingPolicy`` check their own fields, ``RoutingPolicy.check`` that they fit a model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NoReturn

from natsl.space.check import InvalidValueError, check, check_choice, check_count, check_number, shown


class Op(Enum):
    """What a layer is (its kind) and what a policy makes it do."""

    delta = "delta"  # only Gated DeltaNet: nothing is kept for softmax
    softmax = "softmax"  # every chunk stays visible to softmax
    routed = "routed"  # the router decides per chunk and head


# Which ops a layer of each kind can perform.
ALLOWED_OPS = {Op.delta: (Op.delta,), Op.softmax: (Op.softmax,), Op.routed: tuple(Op)}

# JSON has no infinities; a threshold may be one (never keep, always keep).
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class LayerPolicy:
    """What one layer does.

    op: ``delta``, ``softmax`` or ``routed``.
    budget: fraction of chunks that softmax may keep, in [0, 1], for the layer or a list with one per routing head; the
        calibration table turns it into thresholds: one number by the quantiles of the scope that was calibrated, a
        list by those of each head. 0 keeps nothing and 1 everything, without a table: static heads are policies.
    threshold: margin in logits above which a chunk is kept (may be ±inf), one or one per routing head. ``routed`` takes
        either a budget or a threshold, the other ops neither.
    cap, burst: hard causal limit, only for ``routed``: chunk n may be kept only if the number kept so far is
        < ceil(cap·(n + 1)) + burst. cap in [0, 1], burst an integer ≥ 0 that needs a cap.
    mix_temperature: finite, > 0; divides the logits that weigh the outputs of the two branches.

    Raises ``ValueError`` naming the value and what is allowed.
    """

    op: Op = Op.routed
    budget: float | tuple[float, ...] | None = None
    threshold: float | tuple[float, ...] | None = None
    cap: float | None = None
    burst: int = 0
    mix_temperature: float = 1.0

    def __post_init__(self) -> None:
        self._set("op", check_choice("op", self.op, Op))
        if self.op is Op.routed:
            if self.budget is None and self.threshold is None:
                check(False, "budget", None, "op routed needs a budget or a threshold")
            if self.budget is not None and self.threshold is not None:
                check(False, "threshold", self.threshold, f"budget = {shown(self.budget)} is set: give one of the two")
        else:
            for name in ("budget", "threshold", "cap"):
                value = getattr(self, name)
                check(value is None, name, value, f"op {self.op.value} takes none (only op routed does)")
        if self.budget is not None:
            self._set("budget", _per_head("budget", self.budget, 0, 1))
        if self.threshold is not None:
            self._set("threshold", _per_head("threshold", self.threshold))
        if self.cap is not None:
            self._set("cap", check_number("cap", self.cap, 0, 1))
        self._set("burst", check_count("burst", self.burst, 0))
        check(self.burst == 0 or self.cap is not None, "burst", self.burst, "it must be 0 without a cap")
        temperature = check_number("mix_temperature", self.mix_temperature)
        ok = temperature > 0 and math.isfinite(temperature)
        check(ok, "mix_temperature", temperature, "it must be finite and > 0")
        self._set("mix_temperature", temperature)

    def _set(self, name: str, value: object) -> None:
        # Frozen, yet numbers are stored in one form (1 as 1.0), so that equal policies have equal JSON.
        object.__setattr__(self, name, value)

    def heads(self) -> int | None:
        """For how many routing heads it says something of their own (None: it says the same for all)."""
        value = self.threshold if self.budget is None else self.budget
        return len(value) if isinstance(value, tuple) else None

    def mean_budget(self) -> float | None:
        """The budget, of a list the mean over the heads (None: a threshold, or another op)."""
        return sum(self.budget) / len(self.budget) if isinstance(self.budget, tuple) else self.budget

    def needs_calibration(self) -> bool:
        """Whether a budget lies strictly between 0 and 1, so that it takes a table to become a threshold."""
        budgets = self.budget if isinstance(self.budget, tuple) else (self.budget or 0.0,)
        return any(0 < budget < 1 for budget in budgets)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields: ``op``, then those that differ from their defaults (infinite thresholds as strings)."""
        plain: dict[str, Any] = {"op": self.op.value}
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if value != item.default:
                plain[item.name] = list(value) if isinstance(value, tuple) else value
        if "threshold" in plain:
            plain["threshold"] = _map(plain["threshold"], _infinity_to_text)
        return plain

    @classmethod
    def from_dict(cls, plain: object) -> LayerPolicy:
        """The inverse of ``to_dict``; ``ValueError`` for unknown keys and wrong types or values."""
        values = _keys(plain, "layer policy", tuple(item.name for item in fields(cls)))
        if "threshold" in values:
            values["threshold"] = _map(values["threshold"], _text_to_infinity)
        return cls(**values)

    def describe(self) -> str:
        """Short text: ``D``, ``S``, a budget ``.25``, budgets of heads ``[.1,0]`` or a threshold ``θ1.5``; then
        ``≤cap+burst`` and ``/mix``.
        """
        if self.op is Op.routed:
            text = _short(self.budget) if self.budget is not None else "θ" + _short(self.threshold or 0.0)
        else:
            text = "D" if self.op is Op.delta else "S"
        if self.cap is not None:
            text += "≤" + _short(self.cap) + (f"+{self.burst}" if self.burst else "")
        return text + ("" if self.mix_temperature == 1 else "/" + _short(self.mix_temperature))


@dataclass(frozen=True)
class RoutingPolicy:
    """One ``LayerPolicy`` per layer, and the chunk size (tokens) of the model it belongs to."""

    layers: tuple[LayerPolicy, ...]
    chunk_size: int

    def __post_init__(self) -> None:
        ok = isinstance(self.layers, list | tuple) and len(self.layers) > 0
        check(ok, "policy.layers", self.layers, "it must list at least one LayerPolicy")
        for i, layer in enumerate(self.layers):
            check(isinstance(layer, LayerPolicy), f"policy.layers[{i}]", layer, "it must be a LayerPolicy")
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "chunk_size", check_count("policy.chunk_size", self.chunk_size, 1))

    def check(self, kinds: Sequence[Op], chunk_size: int, heads: int | None = None) -> None:
        """Raise ``ValueError`` unless the policy fits a model with these layer kinds and this chunk size.

        ``heads``: routing heads of a layer, which a list of budgets or thresholds must have one for each of (None: that
        is not checked).
        """
        check(
            self.chunk_size == chunk_size,
            "policy.chunk_size",
            self.chunk_size,
            f"the model's chunk size is {chunk_size}",
        )
        check(len(self.layers) == len(kinds), "policy layers", len(self.layers), f"the model has {len(kinds)} layers")
        for i, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            allowed = ALLOWED_OPS[kind]
            check(
                layer.op in allowed,
                f"policy.layers[{i}].op",
                layer.op,
                f"this layer is of kind {kind.value}, which takes {', '.join(op.value for op in allowed)}",
            )
            own = layer.heads()
            if heads is not None and own not in (None, heads):
                name = "threshold" if layer.budget is None else "budget"
                values = getattr(layer, name)
                check(False, f"policy.layers[{i}].{name}", values, f"the layer has {heads} routing heads, not {own}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: ``{"chunk_size": 64, "layers": [{"op": "softmax"}, {"op": "routed", "budget": 0.25}]}``."""
        return {"chunk_size": self.chunk_size, "layers": [layer.to_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, plain: object) -> RoutingPolicy:
        """The inverse of ``to_dict``; ``ValueError`` for unknown or missing keys and wrong types or values."""
        values = _keys(plain, "policy", ("chunk_size", "layers"))
        for name in ("chunk_size", "layers"):
            if name not in values:
                raise InvalidValueError(f"policy has no {name!r}: it must have chunk_size and layers")
        items = values["layers"]
        check(isinstance(items, list | tuple), "policy.layers", items, "it must be a list")
        layers = []
        for i, item in enumerate(items):
            try:
                layers.append(LayerPolicy.from_dict(item))
            except ValueError as error:
                raise InvalidValueError(f"policy.layers[{i}]: {error}") from None
        return cls(tuple(layers), values["chunk_size"])

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, shortest exact floats, no defaults. Equal policies, equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RoutingPolicy:
        """The policy written by ``to_json``; ``ValueError`` for anything else (NaN and repeated keys included)."""
        try:
            plain = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidValueError(f"policy JSON {shown(text)} cannot be read: {error}") from None
        return cls.from_dict(plain)

    def digest(self) -> str:
        """12 hex digits of the SHA-256 of the canonical JSON: the identity of the policy."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def describe(self) -> str:
        """Short text for tables, one item per layer, such as ``S .25 D`` (see ``LayerPolicy.describe``)."""
        return " ".join(layer.describe() for layer in self.layers)

    @classmethod
    def all_softmax(cls, kinds: Sequence[Op], chunk_size: int) -> RoutingPolicy:
        """The largest policy: every routed layer keeps every chunk; the others do what their kind says."""
        return cls.fill(kinds, chunk_size, LayerPolicy(Op.softmax))

    @classmethod
    def all_delta(cls, kinds: Sequence[Op], chunk_size: int) -> RoutingPolicy:
        """The smallest policy: every routed layer is only Gated DeltaNet; the others do what their kind says."""
        return cls.fill(kinds, chunk_size, LayerPolicy(Op.delta))

    @classmethod
    def uniform(cls, kinds: Sequence[Op], chunk_size: int, budget: float) -> RoutingPolicy:
        """The same budget in every routed layer; 0 gives ``all_delta`` and 1 ``all_softmax``."""
        budget = check_number("budget", budget, 0, 1)
        if budget in (0, 1):
            return cls.fill(kinds, chunk_size, LayerPolicy(Op.softmax if budget else Op.delta))
        return cls.fill(kinds, chunk_size, LayerPolicy(Op.routed, budget=budget))

    @classmethod
    def fill(cls, kinds: Sequence[Op], chunk_size: int, layer: LayerPolicy) -> RoutingPolicy:
        """The same layer policy in every routed layer; the others do what their kind says."""
        return cls(tuple(layer if kind is Op.routed else LayerPolicy(kind) for kind in kinds), chunk_size)


def _per_head(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float | tuple[float, ...]:
    """A number, or a tuple of numbers from a list of at least one; ``ValueError`` for anything else."""
    if not isinstance(value, list | tuple):
        return check_number(name, value, low, high)
    check(len(value) > 0, name, value, "a list needs one number for each routing head")
    return tuple(check_number(f"{name}[{i}]", item, low, high) for i, item in enumerate(value))


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply ``change`` to a value, or to each item of a list."""
    return [change(item) for item in value] if isinstance(value, list | tuple) else change(value)


def _infinity_to_text(value: float) -> float | str:
    return value if math.isfinite(value) else "inf" if value > 0 else "-inf"


def _text_to_infinity(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    check(value in _INFINITIES, "threshold", value, "it must be a number, 'inf' or '-inf'")
    return _INFINITIES[value]


def _short(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(_short, value)) + "]"
    text = f"{value:.4g}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _keys(plain: object, what: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(plain, Mapping):
        raise InvalidValueError(f"{what} = {shown(plain)} is not allowed: it must be a mapping with {', '.join(known)}")
    for key in plain:
        if key not in known:
            raise InvalidValueError(f"unknown key {shown(key)} in the {what}: the keys are {', '.join(known)}")
    return dict(plain)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) < len(pairs):
        keys = [key for key, _ in pairs]
        raise InvalidValueError(f"key {shown(next(k for k in keys if keys.count(k) > 1))} appears twice")
    return plain


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidValueError(f"{name} is not a JSON number")
