"""Routing policies: what every layer of a routed model does, as frozen values with a canonical JSON form.

A policy is passed to ``forward``; it is never module state. Its legality is decided here and nowhere else:
``LayerPolicy`` and ``RoutingPolicy`` check their own fields, ``RoutingPolicy.check`` that they fit a model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
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
    budget: fraction of chunks that softmax may keep, in [0, 1]; the calibration table turns it into a threshold.
    threshold: margin in logits above which a chunk is kept (may be ±inf). ``routed`` takes either a budget or a
        threshold, the other ops neither.
    cap, burst: hard causal limit, only for ``routed``: chunk n may be kept only if the number kept so far is
        < ceil(cap·(n + 1)) + burst. cap in [0, 1], burst an integer ≥ 0 that needs a cap.
    mix_temperature: finite, > 0; divides the logits that weigh the outputs of the two branches.

    Raises ``ValueError`` naming the value and what is allowed.
    """

    op: Op = Op.routed
    budget: float | None = None
    threshold: float | None = None
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
            self._set("budget", check_number("budget", self.budget, 0, 1))
        if self.threshold is not None:
            self._set("threshold", check_number("threshold", self.threshold))
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields: ``op``, then those that differ from their defaults (infinite thresholds as strings)."""
        plain: dict[str, Any] = {"op": self.op.value}
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if value != item.default:
                plain[item.name] = value
        if self.threshold is not None and math.isinf(self.threshold):
            plain["threshold"] = "inf" if self.threshold > 0 else "-inf"
        return plain

    @classmethod
    def from_dict(cls, plain: object) -> LayerPolicy:
        """The inverse of ``to_dict``; ``ValueError`` for unknown keys and wrong types or values."""
        values = _keys(plain, "layer policy", tuple(item.name for item in fields(cls)))
        threshold = values.get("threshold")
        if isinstance(threshold, str):
            check(threshold in _INFINITIES, "threshold", threshold, "it must be a number, 'inf' or '-inf'")
            values["threshold"] = _INFINITIES[threshold]
        return cls(**values)

    def describe(self) -> str:
        """Short text: ``D``, ``S``, a budget ``.25`` or a threshold ``θ1.5``; then ``≤cap+burst`` and ``/mix``."""
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

    def check(self, kinds: Sequence[Op], chunk_size: int) -> None:
        """Raise ``ValueError`` unless the policy fits a model with these layer kinds and this chunk size."""
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


def _short(value: float) -> str:
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
