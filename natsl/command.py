"""Commands of natsl as lines to paste into a shell: quoted for the shell and for the options' own syntax."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from enum import Enum

from natsl.files import to_plain


def command(verb: str, options: Mapping[str, object]) -> str:
    """``natsl <verb> name=value ...`` for a shell; see ``option_text``."""
    return f"natsl {verb} {option_text(options)}".rstrip()


def option_text(options: Mapping[str, object]) -> str:
    """Options for a shell, without those that are None. Pasted, each gives the value that it has here."""
    return shlex.join(option_line(name, value) for name, value in options.items() if value is not None)


def option_line(name: str, value: object) -> str:
    """``name=value`` as Hydra reads it, not quoted for a shell. Text options are taken as typed."""
    return f"{name}={_value(value)}"


def run_options(run: str, root: str) -> dict[str, object]:
    """The options with which other commands find a run."""
    return {"run": run, "root": None if root == "runs" else root}


def changed_options(value: object, default: object, prefix: str) -> dict[str, object]:
    """Dotted names and values of the fields in which a config differs from its default."""
    ours, theirs = to_plain(value), to_plain(default)
    return _changes(ours, theirs, prefix)


def _changes(ours: dict[str, object], theirs: dict[str, object], prefix: str) -> dict[str, object]:
    changes: dict[str, object] = {}
    for name, item in ours.items():
        other = theirs.get(name)
        if item == other:
            continue
        if isinstance(item, dict) and isinstance(other, dict) and item.keys() == other.keys():
            changes |= _changes(item, other, f"{prefix}.{name}")
        else:
            changes[f"{prefix}.{name}"] = item
    return changes


def _value(value: object) -> str:
    if isinstance(value, str):
        special = value.lower() == "null" or value[:1] in ("'", '"') or "${" in value
        return _quoted(value) if special else value
    if isinstance(value, Enum):
        return str(value.name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_inner(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_inner, value))}]"
    return "null" if value is None else str(value)


def _inner(value: object) -> str:
    return _quoted(value) if isinstance(value, str) else _value(value)


def _quoted(text: str) -> str:
    """Text in Hydra's single quotes: backslashes count only before a quote, and ``${`` would begin a reference."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"
