"""The checks that configurations and policies make of their values; ``InvalidValueError`` names value and bound.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

E = TypeVar("E", bound=Enum)


class InvalidValueError(ValueError):
    """A value of the user's that is not allowed; the text names the value and the bound."""


def shown(value: object) -> str:
    """A value as one short line for an error text."""
    text = repr(value.value if isinstance(value, Enum) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming a value and what is allowed unless ``ok``."""
    if not ok:
        raise InvalidValueError(f"{name} = {shown(value)} is not allowed: {allowed}")


def check_choice(name: str, value: object, choices: type[E]) -> E:
    """A member of ``choices`` from itself or its value; ``ValueError`` listing the values for anything else."""
    if isinstance(value, choices):
        return value
    values = [item.value for item in choices]
    check(value in values, name, value, f"it must be one of {', '.join(values)}")
    return choices(value)


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """A float from an int or float within [``low``, ``high``]; ``ValueError`` for anything else, NaN included.

    ``-0.0`` becomes ``0.0``, so that equal numbers also have equal JSON.
    """
    if math.isinf(low) and math.isinf(high):
        allowed = "it must be a number"
    else:
        allowed = f"it must be a number ≥ {low:g}" if math.isinf(high) else f"it must lie in [{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        check(False, name, value, allowed)
        raise AssertionError  # for the type checker: the line above raises
    check(abs(value) <= 1e308 or (isinstance(value, float) and math.isinf(value)), name, value, allowed)
    check(low <= value <= high, name, value, allowed)
    return float(value) + 0.0


def check_count(name: str, value: object, low: int) -> int:
    """An int ≥ ``low``; ``ValueError`` for anything else, bool included."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    check(ok, name, value, f"it must be an integer ≥ {low}")
    return int(value)  # type: ignore[call-overload,no-any-return]


def check_counts(low: int, values: Mapping[str, object]) -> None:
    """Raise ``ValueError`` unless every named value is an integer ≥ ``low``."""
    for name, value in values.items():
        check_count(name, value, low)


def check_at_least(bound: float, values: Mapping[str, float]) -> None:
    """Raise ``ValueError`` unless every named value is a finite number ≥ ``bound``."""
    for name, value in values.items():
        check(math.isfinite(value) and value >= bound, name, value, f"it must be ≥ {bound:g}")
