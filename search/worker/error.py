"""Errors that evaluations are known to meet, as workers store them in the table of tasks. No torch at import."""

from __future__ import annotations

from typing import Any

from natsl.errors import UserError

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (FloatingPointError, ArithmeticError, UserError, ValueError, MemoryError, OSError, RuntimeError)
}
_OF_TORCH = ("OutOfMemoryError", "AcceleratorError")
_ENDED = "WorkerError"  # of ``natsl.search.fault``, which loads torch: nobody is left to store an error
_LONGEST = 2000  # characters of a text


def is_known(error: Exception) -> bool:
    """Whether an error is of one of these kinds itself; any other is a defect."""
    return type(error).__name__ in (*_KINDS, *_OF_TORCH)


def store_error(error: Exception) -> dict[str, Any]:
    """What is stored of an error, JSON-ready: the nearest kind that it is one of."""
    kinds = [item.__name__ for item in type(error).__mro__ if item.__name__ in (*_KINDS, *_OF_TORCH)]
    kind, text = kinds[0] if kinds else "RuntimeError", str(error)
    if kind == "RuntimeError" and type(error) is not RuntimeError:
        text = f"{type(error).__name__}: {text}"
    return {"type": kind, "text": text[:_LONGEST], "errno": getattr(error, "errno", None)}


def ended_worker(why: str) -> dict[str, Any]:
    """What is stored where workers ended over a task, or were ended."""
    return {"type": _ENDED, "text": why}


def load_error(plain: dict[str, Any]) -> Exception:
    """The inverse of ``store_error`` and ``ended_worker``."""
    import torch

    from natsl.search.fault import WorkerError

    kind, text = str(plain["type"]), str(plain["text"])
    if kind == "OSError":
        error = OSError(text)
        error.errno = plain.get("errno")
        return error
    kinds: dict[str, type[Exception]] = {**_KINDS, _ENDED: WorkerError}
    kinds |= {name: getattr(torch, name) for name in _OF_TORCH}
    return kinds.get(kind, RuntimeError)(text)
