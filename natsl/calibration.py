"""The calibration table of a model: quantiles of its routers' margins, which turn budgets into thresholds.

Shapes: L layers, G groups of the batch with a policy each, R routing heads, P points of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natsl.config import CalibrationScope
from natsl.kernels.routing import budget_threshold
from natsl.space.policy import RoutingPolicy

_SCOPES = (CalibrationScope.layer, CalibrationScope.head)  # the buffer holds the index
_BUFFERS = ("levels", "by_head", "by_layer", "scope")


def spread_levels(points: int) -> Tensor:
    """Levels of the quantiles: ``points`` from 0 to 1, dense towards both ends, where budgets are; float64 [P]."""
    return torch.sin(torch.linspace(0.0, math.pi / 2, points, dtype=torch.float64)).square()


class _Known(NamedTuple):
    """Which layers have quantiles, single and per head, and the state of the buffers that this was read from."""

    buffers: list[Tensor]
    versions: list[int]
    single: list[bool]
    by_head: list[bool]


class Calibration(nn.Module):
    """Quantiles of the margins of complete chunks, per routing head and pooled over the heads of a layer.

    Buffers: ``levels`` float64 [P], ascending from 0 to 1; ``by_head`` float32 [L,R,P] and ``by_layer`` float32 [L,P],
    NaN where there is none; ``scope`` int64 [], which of the two a single number uses. A list of budgets, one per head,
    always uses ``by_head``.
    """

    levels: Tensor
    by_head: Tensor
    by_layer: Tensor
    scope: Tensor

    def __init__(self, layers: int, heads: int, points: int) -> None:
        super().__init__()
        self.register_buffer("levels", spread_levels(points))
        self.register_buffer("by_head", torch.full((layers, heads, points), math.nan))
        self.register_buffer("by_layer", torch.full((layers, points), math.nan))
        self.register_buffer("scope", torch.tensor(0))
        self._known: _Known | None = None

    @property
    def points(self) -> int:
        """Number of levels."""
        return self.levels.shape[0]

    def set_scope(self, scope: CalibrationScope) -> None:
        """Choose which quantiles a single number uses."""
        self.scope.fill_(_SCOPES.index(scope))

    def thresholds(self, budget: Tensor, single: Tensor) -> Tensor:
        """Thresholds of budgets [L,G,R] (float64), float32 [L,G,R]; ``single`` [L,G]: one number for the layer.

        NaN where there is no table; budget 0 gives +inf and 1 gives −inf without one. Does not wait for the device.
        """
        pooled = single & (self.scope == 0)
        table = torch.where(pooled[..., None, None], self.by_layer[:, None, None], self.by_head[:, None])  # [L,G,R,P]
        return budget_threshold(table, self.levels, budget)

    def check(self, policies: Sequence[RoutingPolicy], layers: Sequence[int]) -> None:
        """Raise ``ValueError`` if one of ``layers`` gets a budget that it has no quantiles for."""
        for i in layers:
            for policy in policies:
                layer = policy.layers[i]
                if not layer.needs_calibration():
                    continue
                single, by_head = self._available()
                if not single[i] and (layer.heads() is None or not by_head[i]):
                    raise ValueError(
                        "the model is not calibrated: budgets need a calibration table, which is made at the end of "
                        "training; thresholds do not"
                    )
                if layer.heads() is not None and not by_head[i]:
                    raise ValueError(
                        f"layer {i} has budgets per head, but the model is calibrated only for whole layers: make a "
                        "table with natsl calibrate"
                    )

    def _available(self) -> tuple[list[bool], list[bool]]:
        """Which layers have quantiles for single numbers and which per head; looked at again only after a change."""
        buffers = [getattr(self, name) for name in _BUFFERS]
        if any(x.is_inference() for x in buffers):  # they do not count their changes
            return self._look()
        versions = [x._version for x in buffers]
        known = self._known
        same = known is not None and all(a is b for a, b in zip(known.buffers, buffers, strict=True))
        if known is None or not same or known.versions != versions:
            known = self._known = _Known(buffers, versions, *self._look())
        return known.single, known.by_head

    def _look(self) -> tuple[list[bool], list[bool]]:
        by_head = self.by_head.isfinite().all(2).all(1).tolist()
        return (by_head if int(self.scope) else self.by_layer.isfinite().all(1).tolist()), by_head

    def to_plain(self) -> dict[str, Any]:
        """The table, JSON-ready once NaN has become null."""
        return {
            "levels": self.levels.tolist(),
            "by_head": self.by_head.tolist(),
            "by_layer": self.by_layer.tolist(),
            "scope": _SCOPES[int(self.scope)].value,
        }

    def load_plain(self, plain: Mapping[str, Any]) -> None:
        """The inverse of ``to_plain``, also of what versions with even levels wrote ("margins").

        ``KeyError``, ``TypeError``, ``ValueError`` or ``RuntimeError`` for anything else.
        """
        if "margins" in plain:
            state = upgraded({"calibration": _numbers(plain["margins"])})
            state = {name.removeprefix("calibration."): value for name, value in state.items()}
        else:
            state = {name: _numbers(plain[name]) for name in ("levels", "by_head", "by_layer")}
            state["levels"] = state["levels"].double()
            state["scope"] = torch.tensor(_SCOPES.index(CalibrationScope(plain["scope"])))
        levels = state["levels"]
        if levels.dim() != 1 or not (levels[0] == 0 and levels[-1] == 1 and bool((levels.diff() > 0).all())):
            raise ValueError("levels must rise from 0 to 1")
        self.load_state_dict(state)


def _numbers(rows: Any) -> Tensor:
    """A tensor from nested lists in which null stands for NaN; float64 first, so that levels stay exact."""

    def number(value: Any) -> Any:
        return [number(item) for item in value] if isinstance(value, list) else math.nan if value is None else value

    return torch.tensor(number(rows), dtype=torch.float64)


def upgraded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model with its calibration in the present form.

    Before, it was one tensor [L,R,P] at even levels. Equal rows were pooled over the heads of a layer, unequal ones
    were of each head.
    """
    result = dict(state)
    if "calibration" not in result:
        return result
    table = result.pop("calibration").float()
    R, P = table.shape[1:]
    pooled = bool((table.isnan() | (table == table[:, :1])).all())
    none = torch.full_like(table, math.nan)
    result["calibration.levels"] = torch.linspace(0.0, 1.0, P, dtype=torch.float64)
    result["calibration.by_head"] = table if R == 1 or not pooled else none
    result["calibration.by_layer"] = table[:, 0] if pooled else none[:, 0]
    result["calibration.scope"] = torch.tensor(0 if pooled else 1)
    return result
