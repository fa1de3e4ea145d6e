"""Files: names that cannot leave their folder, atomic writes, JSON, and YAML that is safe to load."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from natsl.errors import UserError

# What a file system says to a call that it does not have, such as fsync of a folder on CIFS.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOTTY)
MAX_FILE_BYTES = 1 << 20
MAX_NODES = 100_000  # of one config file, after its aliases are expanded
_TAG_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG_PREFIX + t for t in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "value")}
D = TypeVar("D")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can be the name of a folder inside another one, else raise ``UserError``.

    Allowed: 1–64 letters, digits, ``.``, ``_``, ``-``, beginning with a letter or digit, without ``..``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"{what} = {name!r} is not allowed: 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or "
            "digit, without '..'"
        )
    return name


def check_text(text: str, what: str) -> str:
    """Return ``text`` if it can be stored and shown as one line, else raise ``UserError``.

    Not allowed: bytes that are not UTF-8, which Python keeps as surrogates, and control characters, also line ends.
    """
    for character in text:
        kind = unicodedata.category(character)
        if kind in ("Cc", "Cs"):
            fault = "a control character" if kind == "Cc" else "a byte that is not UTF-8"
            raise UserError(f"{what} = {text!r} is not allowed: it has {fault}, {character!r}")
    return text


def user_path(text: str | Path, what: str) -> Path:
    """The path that a user has typed, where ``~`` is the home folder (``./~``: a folder of that name).

    ``UserError`` for a user without a home folder and for what ``check_text`` refuses.
    """
    typed = check_text(str(text), what)
    path = Path(typed if isinstance(text, Path) else os.path.expanduser(typed))
    if str(path).startswith("~"):  # pathlib has removed the "./"
        if typed.startswith("~") and not isinstance(text, Path):
            raise UserError(f"{what} = {typed!r} is not allowed: there is no such user (./~... is a folder)")
        path = path.absolute()
    return path


def output_folder(text: str | Path, option: str = "out") -> Path:
    """The folder that a user has typed, made if it is not there; ``UserError`` where it cannot be."""
    folder = user_path(text, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {folder} cannot be written: {error.strerror or error}") from None
    return folder


def child_folder(parent: Path, name: str, what: str) -> Path:
    """Path of the folder ``name`` inside ``parent``; refuses names and links that lead out of ``parent``."""
    path = parent / check_name(name, what)
    if path.is_symlink() or path.exists():
        resolved, root = path.resolve(), parent.resolve()
        if not resolved.is_relative_to(root) or resolved == root:
            raise UserError(f"{what} = {name!r} is not allowed: {path} is a link that leads out of {parent}")
    return path


def to_plain(value: Any) -> Any:
    """``value`` as data for JSON: dataclasses and enums by value, paths as text, NaN and infinities as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, Mapping):
        return {str(key.value if isinstance(key, Enum) else key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_plain(kind: type[D], plain: Mapping[str, Any]) -> D:
    """The inverse of ``to_plain`` for a dataclass of finite values, also after JSON."""
    hints = get_type_hints(kind)
    return kind(**{item.name: _from_plain(hints[item.name], plain[item.name]) for item in fields(kind)})  # type: ignore[arg-type]


def _from_plain(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    arguments = [item for item in get_args(hint) if item is not type(None)]
    if isinstance(hint, UnionType):
        return _from_plain(arguments[0], value) if len(arguments) == 1 else value
    if get_origin(hint) is list:
        return [_from_plain(arguments[0], item) for item in value]
    if get_origin(hint) is dict:
        return {_from_plain(arguments[0], key): _from_plain(arguments[1], item) for key, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    return hint(value) if isinstance(hint, type) and issubclass(hint, Enum) else value


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, nothing between."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """``write_text`` for bytes."""
    temporary = temporary_path(path)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk: say where
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line (without its end) to a text file: as a whole, or not at all if the disk is full."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.lseek(handle, 0, os.SEEK_END)
        # A killed process left half a line: keep ours whole.
        data = ("\n" if end and os.pread(handle, 1, end - 1) != b"\n" else "").encode() + f"{line}\n".encode()
        try:
            while data:
                data = data[os.write(handle, data) :]
        except OSError as error:
            os.ftruncate(handle, end)
            error.filename = str(path)
            raise
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """A hidden name beside ``path`` that nobody else uses, for what is then renamed to it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def follow_umask(path: Path) -> None:
    """Give a file that a library has made for its owner only the modes of any other file."""
    umask = os.umask(0)
    os.umask(umask)
    try:
        path.chmod(0o666 & ~umask)
    except OSError as error:
        if error.errno not in (errno.EPERM, *_UNSUPPORTED):  # where there is no chmod, the mount decides
            raise


def write_json(path: Path, value: Any) -> None:
    """Write ``to_plain(value)`` as indented JSON, atomically. Nothing is masked: it may be read back."""
    write_text(path, json.dumps(to_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file; ``UserError`` naming the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def read_yaml(path: Path) -> tuple[str, Any]:
    """Text and root node (None: empty) of a YAML file that is safe to load.

    ``UserError`` naming the file unless it is small, also with its aliases expanded, and has no tags or ``_target_``.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAX_FILE_BYTES} bytes, the limit for a config file")
    try:
        text = content.decode()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        size = _node_size(root, path, {}) if root is not None else 0
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    if size > MAX_NODES:
        raise UserError(f"{path} expands to more than {MAX_NODES} values through its aliases")
    return text, root


def _node_size(node: Any, path: Path, known: dict[int, int | None]) -> int:
    """Values below a YAML node once aliases are expanded; checks tags and keys on the way."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise UserError(f"{path} holds an alias to itself")
        return size
    known[id(node)] = None
    if node.tag not in _PLAIN_TAGS and node.tag != _TAG_PREFIX + "timestamp":
        raise UserError(f"{path}: the YAML tag {node.tag!r} is not allowed")
    size = 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "_target_":
                raise UserError(f"{path}: '_target_' is not allowed: nothing in a config is ever executed")
            size += _node_size(key, path, known) + _node_size(value, path, known)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_node_size(value, path, known) for value in node.value)
    known[id(node)] = size
    return size


def read_config(path: Path) -> dict[str, Any]:
    """Content of a run's ``config.yaml``; ``UserError`` naming the file if it is missing or no safe YAML mapping."""
    if not path.exists():
        raise UserError(f"{path} is missing")
    text, _ = read_yaml(path)
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a configuration")
    return config


def sync(handle: int) -> None:
    """Make what was written to an open file, or renamed in an open folder, durable where the file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EISDIR, *_UNSUPPORTED):  # a folder that is written but not listed
            return
        raise
    try:
        sync(handle)
    finally:
        os.close(handle)
