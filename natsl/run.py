"""The folder of a run: names that cannot leave it, atomic files, its log, and the removal of secrets.

``runs/<name>/`` holds everything that a search or a training writes. This module imports neither torch nor optuna.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from natsl.config import to_plain

FORMAT = 1  # of the run folder; raise it when a reader of older folders would go wrong
FORMAT_VERSIONS = {1: "0.1"}  # format → first natsl version that writes it
MASK = "<removed>"
MAX_FILE_BYTES = 1 << 20
MAX_NODES = 100_000  # of one config file, after its aliases are expanded
_TAG_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG_PREFIX + t for t in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "value")}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Keys whose text values are secrets. Only text is masked, so that counts such as max_new_tokens stay readable; kv cost
# names end in per_token.
_SECRET_KEY = re.compile(
    r"secret|passw(or)?d|passphrase|credential|(^|_)(api|access|private|auth|signing|encryption|ssh)_?key(s|_id)?$"
    r"|(^|(?<!per)_)token$|_?authorization$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(API|ACCESS|PRIVATE|AUTH)_?KEY|TOKEN(?!S|IZ)|SECRET|PASSW(OR)?D|CREDENTIAL", re.IGNORECASE
)
_NOT_SECRET_VARIABLE = re.compile(r"_(FILE|PATH|DIR|URL)$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w://[^/\s:@]*):[^/\s@]+@")
# A parameter of a URL ("&amp;" in HTML ends with ";"). Its value ends where that of a URL does, in HTML or in JSON.
_URL_PARAMETER = re.compile(
    r"([?&;][\w.-]*(?:passw(?:or)?d|passphrase|pwd|secret|token|credentials?|sig(?:nature)?"
    r"|(?:api|access|private|auth)[_-]?key)=)[^&#\s<>\"]+",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 8  # shorter values ("1", "true", "none") would blot out ordinary text


class UserError(ValueError):
    """A mistake of the user or a state of the machine to be told in one line, without a traceback."""


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


def child_folder(parent: Path, name: str, what: str) -> Path:
    """Path of the folder ``name`` inside ``parent``; refuses names and links that lead out of ``parent``."""
    path = parent / check_name(name, what)
    if path.is_symlink() or path.exists():
        resolved, root = path.resolve(), parent.resolve()
        if not resolved.is_relative_to(root) or resolved == root:
            raise UserError(f"{what} = {name!r} is not allowed: {path} is a link that leads out of {parent}")
    return path


def redact(value: Any) -> Any:
    """Copy of plain data without secrets: text under secret keys, values of secret variables, passwords in URLs."""
    return _redact(value, _secrets())


def redact_text(text: str) -> str:
    """``text`` without the values of secret environment variables and passwords in URLs."""
    return str(_redact(text, _secrets()))


def _secrets() -> list[str]:
    """Values of environment variables that look like secrets, longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name) and not _NOT_SECRET_VARIABLE.search(name)
    }
    return sorted(found, key=len, reverse=True)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
        return _URL_PARAMETER.sub(rf"\1{MASK}", _URL_PASSWORD.sub(rf"\1:{MASK}@", value))
    if isinstance(value, Mapping):
        return {
            _redact(key, secrets): MASK
            if isinstance(key, str) and isinstance(item, str | bytes) and item and _is_secret_key(key)
            else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    return value


def _is_secret_key(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # apiKey → api_Key
    return _SECRET_KEY.search(re.sub(r"[\s.-]", "_", words)) is not None


def plain(value: Any) -> Any:
    """``value`` as data for JSON: dataclasses and enums by value, paths as text, NaN and infinities as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(to_plain(value))
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key.value if isinstance(key, Enum) else key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, nothing between."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """``write_text`` for bytes."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only the owner can read
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``plain(redact(value))`` as indented JSON, atomically."""
    write_text(path, json.dumps(plain(redact(plain(value))), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


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


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


class Run:
    """Folder of one run. Made by ``Run.open``; paths are attributes, nothing is created before it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.config = path / "config.yaml"
        self.version = path / "run.json"
        self.supernet = path / "supernet"
        self.calibration = path / "calibration.json"
        self.study_db = path / "study.db"
        self.front_json = path / "front.json"
        self.front_csv = path / "front.csv"
        self.front_png = path / "front.png"
        self.report = path / "report.html"
        self.log_file = path / "log.jsonl"
        self.wandb = path / "wandb"
        self.exports = path / "export"

    @classmethod
    def open(cls, name: str, root: str | Path = "runs", create: bool = True) -> Run:
        """The run ``name`` below ``root``, ready to be written (``create``) or read.

        Raises ``UserError`` for a name that leaves the root, an unknown name (``create=False``; lists the known ones),
        a folder that cannot be written, one that is no run, or one of another format.
        """
        base = Path(root)
        path = child_folder(base, name, "name" if create else "run")
        if not create:
            if not path.is_dir():
                known = ", ".join(cls.names(base)) or "none"
                raise UserError(f"there is no run {name!r} in {base}; known: {known}")
            run = cls(path)
            run._check_version()
            return run
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UserError(f"the run folder {path} cannot be written: {error.strerror or error}") from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"the run folder {path} cannot be written: Permission denied")
        run = cls(path)
        if not run.version.exists() and all(item.name.startswith(".") for item in path.iterdir()):
            write_json(run.version, {"format": FORMAT, "natsl": FORMAT_VERSIONS[FORMAT]})
        run._check_version()
        return run

    @staticmethod
    def names(root: str | Path = "runs") -> list[str]:
        """Names of the runs below ``root`` that hold anything, sorted."""
        base = Path(root)
        if not base.is_dir():
            return []
        found = [item for item in base.iterdir() if (item / "run.json").is_file()]
        return sorted(
            item.name
            for item in found
            if any(file.name != "run.json" and not file.name.startswith(".") for file in item.iterdir())
        )

    def _check_version(self) -> None:
        if not self.version.is_file():
            raise UserError(f"{self.path} is not a folder of a run (run.json is missing): choose another name")
        record = read_json(self.version)
        found = record.get("format") if isinstance(record, dict) else None
        if found != FORMAT:
            needed = FORMAT_VERSIONS.get(found) if isinstance(found, int) else None
            needed = needed or (record.get("natsl") if isinstance(record, dict) else None) or "unknown"
            raise UserError(
                f"{self.path} has the format {found!r}, this version of natsl reads {FORMAT}: use natsl {needed}"
            )

    def write_json(self, path: Path, value: Any) -> None:
        """``write_json`` for a file of this run: atomic, without secrets, numbers that are not finite as null."""
        write_json(path, value)

    def write_config(self, config: Any) -> None:
        """Write a config dataclass to ``config.yaml``, resolved and without secrets."""
        write_text(self.config, yaml.safe_dump(plain(redact(plain(config))), sort_keys=False, allow_unicode=True))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to ``log.jsonl`` as a whole line, without secrets."""
        line = json.dumps(plain(redact(plain(record))), ensure_ascii=False, allow_nan=False) + "\n"
        handle = os.open(self.log_file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            end = os.lseek(handle, 0, os.SEEK_END)
            if end and os.pread(handle, 1, end - 1) != b"\n":
                line = "\n" + line  # a killed process or a full disk left half a line: keep ours whole
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run; ``UserError`` if another process holds it. The lock ends with its process, come what may."""
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"the run {self.name!r} is in use by another process") from None
            yield
        finally:
            os.close(handle)
