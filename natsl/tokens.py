"""Token ids on disk: a ``.npy`` file with the ids that a tokenizer made of a text. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from natsl.errors import UserError

LARGEST_ID = 2**30 - 1  # leaves room in int32 for moving ids behind the tokens of tasks


def is_token_file(path: Path) -> bool:
    """Whether a file holds token ids, by its name."""
    return path.suffix.lower() == ".npy"


def read_ids(path: Path) -> tuple[bytes, str]:
    """The ids in a file, in the smallest of ``uint8``, ``int16`` and ``int32`` that holds them, and that dtype's name.

    The ids are the same whatever dtype they were saved in. Nothing is unpickled. Raises ``UserError`` unless the file
    is a one-dimensional array of integers in [0, 2³⁰), with at least one of them.
    """
    import numpy as np

    try:
        ids = np.lib.format.open_memmap(path, mode="r")  # mapped: an int64 array is never in memory as a whole
    except OSError:
        raise
    except Exception:  # a damaged header raises errors of many types
        raise _refusal(path, "is cut off, is no .npy file, or holds Python objects") from None
    if ids.dtype.kind not in "ui":
        raise _refusal(path, f"holds numbers of type {ids.dtype}")
    if ids.ndim != 1:
        raise _refusal(path, f"holds an array of shape {ids.shape}")
    if ids.size == 0:
        raise _refusal(path, "is empty")
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest > LARGEST_ID:
        raise _refusal(path, f"holds the id {smallest if smallest < 0 else largest}")
    dtype = "uint8" if largest < 2**8 else "int16" if largest < 2**15 else "int32"
    return ids.astype(dtype).tobytes(), dtype


def _refusal(path: Path, problem: str) -> UserError:
    return UserError(
        f"data.path: {path} {problem}: a file of token ids is a one-dimensional array of integers from 0 to "
        f"{LARGEST_ID}, saved with numpy.save"
    )
