"""Types of the arguments that benchmarks take on their command lines."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An integer ≥ 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: an integer ≥ 1")
    return value


def share(text: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a number in [0, 1]")
    return value
