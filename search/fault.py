"""Whether an evaluation that failed says something about its policy, or only about the machine at that moment."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Sequence

import torch

from natsl.errors import UserError
from natsl.search.config import SearchConfig

PERMANENT = (ArithmeticError, ValueError)  # not finite, or the policy does not fit the model
TRANSIENT = (MemoryError, OSError, RuntimeError)  # device, memory, I/O; torch's errors are RuntimeErrors
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
# What versions that stored no kind of fault wrote before the message.
_OLDER = re.compile(r"(RuntimeError|MemoryError|OutOfMemoryError|AcceleratorError): ")


class WorkerError(RuntimeError):
    """A worker ended over an evaluation, twice, or one took too long: that may be the machine's fault."""


class SearchFailedError(UserError):
    """Too many trials failed for the search to go on."""


class DeviceLostError(UserError):
    """The device failed and is of no use for the rest of this process."""


def describe(error: Exception) -> str:
    """The reason that is stored with a failed trial, on one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, FloatingPointError | WorkerError) else f"{type(error).__name__}: {text}"


def was_transient(reason: str) -> bool:
    """Whether a stored reason of unknown kind, written by an older version, is a fault of the machine."""
    return _OLDER.match(reason) is not None


def check_machine(error: Exception, probe: Callable[[], None]) -> None:
    """Return if the next evaluation may succeed after a transient error.

    ``probe`` raises ``RuntimeError`` if the device does not work any more, as after a CUDA error that stays until the
    process ends: then ``DeviceLostError`` is raised. An ``OSError`` that the next call would meet too, such as a full
    disk, is raised again.
    """
    if isinstance(error, OSError) and error.errno in _LASTING:
        raise error
    try:
        probe()
    except RuntimeError:
        raise DeviceLostError(
            f"the device does not work any more ({describe(error)}): run the same command again; "
            "it goes on with the trial that was cut off"
        ) from None


def check_failures(reasons: Sequence[str], made: int, config: SearchConfig) -> None:
    """Raise ``SearchFailedError`` if, of so many trials ``made``, those that failed for these reasons are too many."""
    failed, limit = len(reasons), config.max_failure_rate
    if failed >= config.min_failures and failed > limit * made:
        raise SearchFailedError(
            f"{failed} of {made} trials failed, more than search.max_failure_rate = {limit:g}; "
            f"the last one: {reasons[-1]}"
        )


@contextlib.contextmanager
def reported_faults() -> Iterator[None]:
    """Report a fault of device or memory outside a trial as a ``UserError``: what is stored so far is used again."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, WorkerError) as error:
        slow = isinstance(error, WorkerError) and "search.trial_timeout" in str(error)
        raise UserError(
            f"an evaluation was cut off by {'its limit' if slow else 'a fault of the machine'} ({describe(error)}): "
            f"{'raise that, unless it hung, and ' if slow else ''}run the same command again; "
            "it goes on where it stopped"
        ) from None
