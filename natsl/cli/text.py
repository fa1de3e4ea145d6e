"""Options whose type is text, taken as typed: ``name=1.10``, ``name=true`` and ``prompt=f(a, b)`` are text.

Hydra would read such values as numbers, lists or calls, and YAML does so as well. What keeps its meaning: a value in
quotes, ``null``, an interpolation ``${...}``, and with ``-m`` the commas between the values of a sweep.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import Container, OmegaConf

from natsl.errors import UserError

_OVERRIDE = re.compile(r"(\+{0,2}([^=+~@]+))=(.*)", re.DOTALL)
_UNREADABLE = object()


class Text(Enum):
    """How an option holds text."""

    single = "single"
    many = "many"  # a list of text
    preset = "preset"  # the name of a file of a config group


TextKind = Callable[[str], Text | None]  # of an option by its dotted name; None: it is no text


def as_typed(override: str, kind: TextKind, sweep: bool) -> str:
    """An override in which Hydra reads text as it was typed; all others are returned as they are.

    sweep: whether commas separate the values of a sweep. ``UserError`` for a function of a sweep whose values Hydra
    would rewrite.
    """
    match = _OVERRIDE.fullmatch(override)
    form = kind(match[2]) if match else None
    if match is None or form is None:
        return override
    start, raw = match[1], match[3]
    if form is Text.many:
        parts = [_many(part) for part in _split(raw)] if sweep else [_many(raw)]
    elif form is Text.preset:
        parts = [_quoted(part) if re.fullmatch(r"[\w.+-]+", part) else part for part in _split(raw)]
    else:
        parts = [_single(part, start) for part in _split(raw)] if sweep else [_quoted(raw)]
    return f"{start}={','.join(parts)}"


def _single(raw: str, option: str) -> str:
    """One value of a sweep, or a function such as ``choice(a,b)`` that gives several."""
    value = _read(raw)
    if not isinstance(value, ChoiceSweep):
        return raw if _is_sweep(value) else _quoted(raw)
    if not all(isinstance(item, str | QuotedString) or item is None for item in value.list):
        raise UserError(
            f"{option}={raw} is not allowed: it would turn text into numbers; give the values separated by commas, as "
            f"in {option}=a,b, or in quotes"
        )
    return raw


def _is_sweep(value: Any) -> bool:
    return type(value).__name__ in ("ChoiceSweep", "RangeSweep", "IntervalSweep", "Glob")


def _many(raw: str) -> str:
    text = raw.strip()
    if not (text.startswith("[") and text.endswith("]")) or not text[1:-1].strip():
        return raw
    parts = _split(text[1:-1])
    return f"[{','.join(part if isinstance(_read(part), dict | list) else _quoted(part) for part in parts)}]"


def _quoted(raw: str) -> str:
    """``raw`` in Hydra's quotes, in which nothing but an interpolation has a meaning, unless it is in some already."""
    if not raw:
        return raw
    value = _read(raw)
    return raw if value is None or isinstance(value, QuotedString) else QuotedString(raw, Quote.single).with_quotes()


def _read(raw: str) -> Any:
    """What Hydra makes of a value."""
    try:
        return OverridesParser.create().parse_override(f"x={raw}")._value
    except (HydraException, ValueError, TypeError):
        return _UNREADABLE


def _split(text: str) -> list[str]:
    """Parts between the commas that are in no brackets and no quotes, without the spaces around them."""
    parts, depth, start, quote = [], 0, 0, ""
    for i, character in enumerate(text):
        if quote:
            if character == quote and text[i - 1] != "\\":
                quote = ""
        elif character in "'\"" and not text[start:i].strip():
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts] if len(parts) > 1 else parts


def restore_text(config: Container, root: Any, package: str, kind: TextKind) -> None:
    """Give the text options of a config file back what YAML has read as numbers, truth values or dates.

    root: the file's root node. package: dotted name of the section that the file fills ("" for the whole config).
    """
    for key, node in _entries(root):
        name = f"{package}.{key}" if package else key
        form = kind(name)
        if isinstance(node, yaml.MappingNode) and form in (None, Text.preset):
            child = OmegaConf.select(config, key)
            if isinstance(child, Container):
                restore_text(child, node, name, kind)
        elif form is Text.single and isinstance(node, yaml.ScalarNode):
            _set(config, key, _typed(node))
        elif form is Text.many and isinstance(node, yaml.SequenceNode):
            items = [_typed(item) if isinstance(item, yaml.ScalarNode) else item for item in node.value]
            if all(item is None or isinstance(item, str) for item in items):
                _set(config, key, items)


def _entries(root: Any) -> Iterator[tuple[str, Any]]:
    """Keys and nodes of a mapping, with those that ``<<`` merges into it first."""
    if not isinstance(root, yaml.MappingNode):
        return
    own = []
    for key, value in root.value:
        if key.tag.endswith(":merge"):
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from _entries(source)
        elif isinstance(key, yaml.ScalarNode):
            own.append((str(key.value), value))
    yield from own


def _typed(node: Any) -> str | None:
    return None if node.tag.endswith(":null") else str(node.value)


def _set(config: Container, key: str, value: Any) -> None:
    OmegaConf.update(config, key, value, merge=False)
