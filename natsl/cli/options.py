"""Options of the commands: Hydra composes them, this file makes that strict and safe.

Config files are read as data only: no tags, no ``_target_``, no settings of Hydra itself, limits on size and on what
aliases expand to. Every key must exist in the config dataclasses, also one given with ``+``. Part of this follows
Hydra's internal loader, which is why pyproject.toml pins Hydra below 1.4.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import textwrap
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from natsl.cli.text import Text, TextKind, as_typed, restore_text
from natsl.command import option_line
from natsl.errors import UserError
from natsl.files import check_text, read_yaml

# Settings of Hydra that do no harm, since nothing reads them: Hydra makes no folder, no log and launches nothing here.
IGNORED_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.job.chdir")


def check_yaml(path: Path) -> Any:
    """Root node of a config file; ``UserError`` unless it is small, plain YAML without tags, ``_target_`` or settings
    of Hydra."""
    text, root = read_yaml(path)
    if isinstance(root, yaml.MappingNode) and any(key.value == "hydra" for key, _ in root.value):
        raise UserError(f"{path}: 'hydra' is not allowed: Hydra's own settings are fixed")
    header = text[:4096]
    if "@package" in header and "hydra" in header.split("@package", 1)[1].split("\n", 1)[0]:
        raise UserError(f"{path}: '@package hydra' is not allowed: Hydra's own settings are fixed")
    return root


class Repository(ConfigRepository):
    """Config files, each checked before it is parsed. Only those of the package itself may set Hydra's options.

    kind: which options are text, which files hold as typed.
    """

    def __init__(self, search_path: ConfigSearchPath, kind: TextKind) -> None:
        super().__init__(search_path)
        self._kind = kind

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is not None and source.scheme() == "file":
            name = config_path if config_path.endswith((".yaml", ".yml")) else config_path + ".yaml"
            root = check_yaml(Path(source.path) / name)
            result = super().load_config(config_path)
            if result is not None:
                restore_text(result.config, root, _package(config_path, result.header.get("package")), self._kind)
            return result
        return super().load_config(config_path)


def _package(config_path: str, header: str | None) -> str:
    """Dotted name of the section that a config file fills, "" for the whole config."""
    group = config_path.rpartition("/")[0].replace("/", ".")
    return "" if header == "_global_" else group if header in (None, "_group_") else str(header)


class Loader(ConfigLoaderImpl):
    """Hydra's loader for one config class: unknown keys are refused, entries of free dictionaries need no ``+``."""

    def __init__(self, search_path: ConfigSearchPath, config_class: type) -> None:
        super().__init__(search_path)
        self.config_class = config_class
        self.repository = Repository(search_path, self.text_kind)

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a config; the settings of dictionaries are applied last, and in order."""
        overrides = self.as_typed(overrides, sweep=run_mode is RunMode.MULTIRUN)
        parsed = OverridesParser.create(config_loader=self).parse_overrides(overrides)
        composed: list[Override] = []
        free: list[Override] = []
        for override in parsed:
            (free if self._is_free(override) else composed).append(override)
        lines = [str(override.input_line) for override in composed]
        config = super().load_configuration(config_name, lines, run_mode, from_shell, validate_sweep_overrides)
        if config_name is None:  # what --hydra-help shows has no options of ours
            return config
        for override in free:
            if override.is_sweep_override():  # while a command line is completed; a job of a sweep has one value
                continue
            value = override.value()
            if override.is_delete():
                with open_dict(config):
                    parent, _, last = override.key_or_group.rpartition(".")
                    OmegaConf.select(config, parent).pop(last, None)
            else:
                # A whole dictionary replaces the default; with + it is merged into it.
                merge = not isinstance(value, Mapping) or override.is_add() or override.is_force_add()
                OmegaConf.update(config, override.key_or_group, value, merge=merge, force_add=True)
            if not override.is_hydra_override():
                config.hydra.overrides.task.append(override.input_line)
        self._check_keys(config)
        return config

    def as_typed(self, overrides: list[str], sweep: bool) -> list[str]:
        """Overrides in which Hydra reads text options as they were typed; sweep: commas separate values.

        ``UserError`` for one without ``=`` that removes nothing.
        """
        for override in overrides:
            if "=" not in override and not override.startswith("~"):
                needed = [item.name for item in dataclasses.fields(self.config_class) if item.default == "???"]
                such = f", such as {needed[0]}=..." if len(needed) == 1 else ""
                raise UserError(
                    f"{override!r} is not an option: options are written name=value{such} (--help lists all)"
                )
        return [as_typed(override, self.text_kind, sweep) for override in overrides]

    def text_kind(self, key: str) -> Text | None:
        """How an option holds text, None if it does not."""
        if self.repository.group_exists(key):
            return Text.preset
        current: Any = self.config_class
        for part in key.split("."):
            if not _is_config(current):
                return None
            current = _field_types(current).get(part)
        if current is str:
            return Text.single
        return Text.many if typing.get_origin(current) is list and typing.get_args(current) == (str,) else None

    def _is_free(self, override: Override) -> bool:
        """Check one override; True if it sets a dictionary or an entry of one."""
        line, key = str(override.input_line), override.key_or_group
        if "_target_" in key.split(".") or _has_target(None if override.is_sweep_override() else override.value()):
            raise UserError(f"{line}: '_target_' is not allowed: nothing in a config is ever executed")
        if override.is_hydra_override():
            if key not in ("hydra.mode", "hydra.verbose", *IGNORED_HYDRA):
                raise UserError(f"{key} is not allowed: Hydra's own settings are fixed")
            return False
        if override.package is None and not self.repository.group_exists(key):
            return self._find(key, line)
        self._check_preset(override)
        return False

    def _check_preset(self, override: Override) -> None:
        group, value = override.key_or_group, None if override.is_sweep_override() else override.value()
        if isinstance(value, str) and value not in self.presets(group):
            raise UserError(f"{group} = {value!r} is not allowed: the presets are {', '.join(self.presets(group))}")

    def presets(self, group: str) -> list[str]:
        """Names of the presets of a group that suit this command, sorted."""
        fields = _field_types(self.config_class)

        def suits(name: str) -> bool:
            found = self.repository.load_config(f"{group}/{name}")
            return (
                found is None or found.header.get("package") != "_global_" or all(key in fields for key in found.config)
            )

        return sorted(name for name in self.repository.get_group_options(group) if suits(name))

    def _find(self, key: str, line: str) -> bool:
        """Raise ``UserError`` unless ``key`` names an option; True if it is in a dictionary or is one."""
        current: Any = self.config_class
        done: list[str] = []
        for part in key.split("."):
            if not _is_config(current):
                if typing.get_origin(current) is dict:
                    return True
                if typing.get_origin(current) is list and part.isdigit():
                    return False
                raise UserError(f"{line}: {'.'.join(done)} is a single value and has no option {part!r}")
            types = _field_types(current)
            if part not in types:
                raise UserError(self._unknown(".".join([*done, part])))
            current = types[part]
            done.append(part)
        if line.startswith("~") and typing.get_origin(current) is not dict:
            raise UserError(f"{line}: only entries of dictionaries can be removed")
        return typing.get_origin(current) is dict

    def _unknown(self, key: str) -> str:
        known = [name for name, _ in option_types(self.config_class)]
        groups = [] if "." in key else sorted({name.partition(".")[0] for name in known})
        close = difflib.get_close_matches(key, groups, n=1, cutoff=0.7)
        close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        last = key.rpartition(".")[2]
        close = close or [name for name in known if name.rpartition(".")[2] == last]
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"unknown option {key!r}{hint} (--help lists all)"

    def _check_keys(self, config: DictConfig) -> None:
        """Refuse what a config file, or a dictionary as a value, has added beside the fields of the dataclasses."""
        if OmegaConf.get_type(config) is not self.config_class:
            raise UserError(
                "the config must build on a preset: begin the file with 'defaults: [search, _self_]' (or the command's "
                "own preset)"
            )
        stack: list[tuple[str, Any]] = [("", config)]
        while stack:
            prefix, node = stack.pop()
            kind = OmegaConf.get_type(node)
            fields = set(_field_types(kind)) if _is_config(kind) else None
            for key in node:
                if not prefix and key == "hydra":
                    continue
                name = f"{prefix}{key}"
                if key == "_target_":
                    raise UserError(f"{name} is not allowed: nothing in a config is ever executed")
                if fields is not None and key not in fields:
                    raise UserError(self._unknown(name))
                child = node._get_node(key)
                if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                    stack.append((name + ".", child))


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(str(key) == "_target_" or _has_target(item) for key, item in value.items())
    return isinstance(value, list) and any(_has_target(item) for item in value)


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _field_types(config_class: Any) -> dict[str, Any]:
    """Types of a dataclass's fields, ``X | None`` as ``X``."""
    hints = typing.get_type_hints(config_class)
    return {f.name: _strip_none(hints[f.name]) for f in dataclasses.fields(config_class)}


def _strip_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (UnionType, typing.Union):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return kinds[0] if len(kinds) == 1 else kind
    return kind


def option_types(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every option below a config class."""
    for name, kind in _field_types(config_class).items():
        if _is_config(kind):
            yield from option_types(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def override_lines(config_class: type, options: Mapping[str, object], prefix: str = "") -> list[str]:
    """Options given as Python values, as lines of a command line.

    A mapping or a dataclass as the value of a section gives options of that section, as dotted names do.
    """
    types = _field_types(config_class)
    lines: list[str] = []
    for name, value in options.items():
        kind = types.get(name)
        section = vars(value) if _is_config(type(value)) else value
        if kind is not None and _is_config(kind) and isinstance(section, Mapping):
            lines += override_lines(kind, section, f"{prefix}{name}.")
        else:
            lines.append(option_line(f"{prefix}{name}", str(value) if isinstance(value, Path) else value))
    return lines


def check_texts(config_class: type, config: DictConfig) -> None:
    """Raise ``UserError`` for text that cannot be stored or shown as a line; a prompt can be any bytes."""
    for name, kind in option_types(config_class):
        value = OmegaConf.select(config, name) if name != "prompt" else None
        for text in value if typing.get_origin(kind) is list and value is not None else [value]:
            if isinstance(text, str):
                check_text(text, name)


def help_text(loader: Loader, config: DictConfig, command: str) -> str:
    """The page of ``--help``: usage, examples, presets, and every option with its value and what it accepts."""
    page = config.hydra.help
    examples = "\n".join(f"  {line}" for line in page.footer.replace("COMMAND", command).strip().splitlines())
    groups = [
        f"  {group}={' | '.join(loader.presets(group))}"
        for group in sorted(config.hydra.runtime.choices)
        if not group.startswith("hydra/")
    ]
    parts = [
        page.header.strip(),
        f"Usage: {command} [flags] [option=value ...]",
        f"Examples:\n{examples}",
        "Flags:\n"
        "  --help               this page; options given beside it show their effect\n"
        "  --cfg job            print the composed config and stop\n"
        "  -m, --multirun       one job per combination of values: seed=0,1,2 name=a,b,c\n"
        "  --config-dir FOLDER  config files of your own; --config-name NAME starts from one of them\n"
        '  -sc install=bash     print shell completion: eval "$(... -sc install=bash)"\n'
        "  --version, --info, --hydra-help",
    ]
    if groups:
        parts.append("Presets:\n" + "\n".join(groups))
    parts.append("Options and their values here:\n" + "\n".join(_help_section(loader.config_class, config, "")))
    return "\n\n".join(parts) + "\n"


def _help_section(config_class: Any, node: Any, prefix: str) -> list[str]:
    doc = " ".join((config_class.__doc__ or "").replace("``", "").split())
    width = min(os.get_terminal_size().columns if os.isatty(1) else 120, 120)
    lines = textwrap.wrap(doc, width - 2, initial_indent="  # ", subsequent_indent="  # ")
    sections = []
    for name, kind in _field_types(config_class).items():
        if _is_config(kind):
            sections.append((name, kind))
        else:
            lines.append(f"  {f'{prefix}{name}={_shown(node._get_node(name))}':<48} {_accepts(kind)}".rstrip())
    for name, kind in sections:
        lines += ["", *_help_section(kind, node[name], f"{prefix}{name}.")]
    return lines


def _shown(node: Any) -> str:
    value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.name)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        items = [_scalar(item) for item in value]
        if len(items) > 6 and len(set(items)) < len(items):
            return f"[{','.join(items[:4])},...] ({len(items)})"
        return f"[{','.join(items)}]"
    return str(value)


def _accepts(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(member.name for member in kind)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return f"list of {_accepts(arguments[0])}"
    if typing.get_origin(kind) is dict:
        return f"{{name:{_accepts(arguments[1])},...}}"
    return {Any: "anything", str: "text", int: "integer", float: "number", bool: "true | false"}.get(kind, str(kind))
