"""Reads what wandb has recorded offline: a log in the format of LevelDB, whose records are protocol buffers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32_768, 7


def read_records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file, in order."""
    data, place, parts = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # the rest of a block that no header fits in
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        parts += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined] # it has no stubs
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged to a ``.wandb`` file, without wandb's own columns."""
    rows = []
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows
