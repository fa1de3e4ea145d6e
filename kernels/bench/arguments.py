"""Types of the arguments that benchmarks take on their command lines."""

from __future__ import annotations

import argparse

from natsl.kernels.shape import CHUNK_SIZES, Shape


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


def add_shape(command: argparse.ArgumentParser) -> None:
    """The options of a layer's shape, whose defaults are those of the 340M model."""
    add = command.add_argument
    add("--heads", type=positive, default=Shape.heads, metavar="R", help="routing heads (%(default)s)")
    add("--key-dim", type=positive, default=Shape.key_dim, metavar="K", help="key width (%(default)s)")
    add("--value-dim", type=positive, default=Shape.value_dim, metavar="V", help="value width (%(default)s)")
    add("--softmax-per-head", type=positive, default=Shape.softmax_per_head, metavar="G",
        help="softmax heads per routing head (%(default)s)")  # fmt: skip
    add("--chunk", type=int, choices=CHUNK_SIZES, default=Shape.chunk_size, help="tokens per chunk (%(default)s)")
