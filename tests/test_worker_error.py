"""Errors of workers: what is stored of them is what the search meets."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from natsl.errors import UserError
from natsl.search.fault import WorkerError
from natsl.search.worker.error import ended_worker, is_known, load_error, store_error


class NotFiniteError(FloatingPointError):
    """Of a kind that is stored as its base."""


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FloatingPointError("val_loss is nan"), FloatingPointError, "val_loss is nan"),
        (NotFiniteError("nan"), FloatingPointError, "nan"),
        (ZeroDivisionError("by zero"), ArithmeticError, "by zero"),
        (UserError("the text has changed"), UserError, "the text has changed"),
        (ValueError("no such layer"), ValueError, "no such layer"),
        (MemoryError("host"), MemoryError, "host"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
        (torch.AcceleratorError("assert"), torch.AcceleratorError, "assert"),
        (RuntimeError("of the device"), RuntimeError, "of the device"),
        (KeyError("layer"), RuntimeError, "KeyError: 'layer'"),
        (OSError("without a number"), OSError, "without a number"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_an_error_keeps_the_nearest_known_kind(error: Exception, kind: type[Exception], text: str) -> None:
    loaded = load_error(json.loads(json.dumps(store_error(error))))
    assert (type(loaded), str(loaded)) == (kind, text)
    assert is_known(error) == (type(error) is kind)


def test_the_number_of_an_error_of_the_system_stays() -> None:
    loaded = load_error(json.loads(json.dumps(store_error(OSError(errno.ENOSPC, "No space left on device")))))
    assert isinstance(loaded, OSError)
    assert (loaded.errno, str(loaded)) == (errno.ENOSPC, "[Errno 28] No space left on device")


def test_a_worker_that_ended_is_an_error_of_its_own() -> None:
    loaded = load_error(json.loads(json.dumps(ended_worker("worker ended with exit code 7"))))
    assert (type(loaded), str(loaded)) == (WorkerError, "worker ended with exit code 7")
