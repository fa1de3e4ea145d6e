"""Launch parameters of the Triton kernels: block sizes, warps and pipeline stages per device and shape.

They come from, in this order: what a caller forces (benchmarks, tests), the table that the user's own tuning stored,
the table that is shipped for the device, the default that the kernel passes. ``python -m natsl.kernels.bench --tune``
measures and stores.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from natsl.kernels.launch.compilation import collecting

Table = dict[str, dict[str, dict[str, dict[str, int]]]]  # device name → kernel → key → parameters

SHIPPED = Path(__file__).with_name("tuned.json")
_forced: dict[str, dict[str, int]] = {}
_observed: dict[str, tuple[str, dict[str, int]]] | None = None
_use_tables = True
_generation = 0  # counts how often the tables were read anew


class InvalidTableError(ValueError):
    """A file that should hold launch parameters holds something else."""


def stored_path() -> Path:
    """File of the user's own tuning results."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "natsl" / "tuned.json"


def read_table(path: Path) -> Table:
    """A stored table, empty where there is no file; ``InvalidTableError`` naming a file that holds something else."""
    if not path.exists():
        return {}
    try:
        table: Table = json.loads(path.read_text(encoding="utf-8"))
        for kernels in table.values():
            for keys in kernels.values():
                for parameters in keys.values():
                    if not all(isinstance(value, int) for value in parameters.values()):
                        raise ValueError("a launch parameter is no integer")
    except (AttributeError, ValueError) as error:
        raise InvalidTableError(
            f"{path} is not a table of launch parameters ({error}): delete it or tune again"
        ) from error
    return table


def store(path: Path, device_name: str, results: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Merge kernel → key → parameters into the table at ``path``, which is replaced in one step.

    They go under ``device_name`` or, if the table has it, under a shorter name of the same device ("H100").
    """
    table = read_table(path)
    name = next((name for name in table if name in device_name), device_name)
    device = table.setdefault(name, {})
    for kernel, keys in results.items():
        device.setdefault(kernel, {}).update({key: dict(parameters) for key, parameters in keys.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(file.name, path)
    forget()


def forget() -> None:
    """Read the tables again when they are needed next."""
    global _generation
    _generation += 1
    _tables.cache_clear()
    _stored.cache_clear()


def generation() -> int:
    """A number that changes whenever ``pick`` may choose anew."""
    return _generation


def overridden() -> bool:
    """Whether anything but the tables decides what is launched: parameters forced, observed or untuned, or kernels
    that are only compiled."""
    return bool(_forced) or _observed is not None or not _use_tables or collecting()


@cache
def _tables() -> list[Table]:
    """The user's table, then the shipped one."""
    return [read_table(path) for path in (stored_path(), SHIPPED)]


@cache
def _stored(kernel: str, key: str, index: int) -> dict[str, int]:
    """What the first table that knows the device, the kernel and the key says; nothing if none does."""
    name = torch.cuda.get_device_name(index)
    for table in _tables():
        entry = next((entry for device_name, entry in table.items() if device_name in name), {})
        if key in entry.get(kernel, {}):
            return entry[kernel][key]
    return {}


@cache
def shape_key(dtype: torch.dtype, chunk_size: int, K: int, V: int) -> str:
    """Key of the tables for a kernel that depends on these: ``"bfloat16 C64 K64 V128"``."""
    return f"{str(dtype).removeprefix('torch.')} C{chunk_size} K{K} V{V}"


def pick(kernel: str, key: str, device: torch.device, default: Mapping[str, int]) -> dict[str, int]:
    """Launch parameters of ``kernel`` for ``key``, for example ``"bfloat16 C64 K64 V128"``: those of ``default``, each
    with the value that is forced, stored or shipped, if there is one."""
    choice = dict(default)
    if device.type == "cuda" and _use_tables:
        stored = _stored(kernel, key, torch.cuda.current_device() if device.index is None else device.index)
        choice |= {name: value for name, value in stored.items() if name in default}
    choice |= _forced.get(kernel, {})
    if _observed is not None:
        _observed[kernel] = (key, dict(choice))
    return choice


@contextmanager
def forced(parameters: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Force launch parameters per kernel inside the ``with`` block."""
    before = dict(_forced)
    _forced.update({kernel: dict(values) for kernel, values in parameters.items()})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def observed() -> Iterator[dict[str, tuple[str, dict[str, int]]]]:
    """Collect kernel → (key, parameters) of whatever is picked inside the ``with`` block."""
    global _observed
    before, _observed = _observed, {}
    try:
        yield _observed
    finally:
        _observed = before


@contextmanager
def untuned() -> Iterator[None]:
    """Inside the ``with`` block no table counts: what is forced, else the kernels' own defaults."""
    global _use_tables
    before, _use_tables = _use_tables, False
    try:
        yield
    finally:
        _use_tables = before
