"""Text on disk: which files below a path are read, and what they hold. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from natsl.errors import UserError
from natsl.tokens import is_token_file, read_ids

# Tests are missing from some distributions and hold broken text on purpose; the tables in `encodings` are near copies
# of one another, so that a split by file would show a model its own held-out text.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})

_JSON_LINES = (".jsonl", ".ndjson")
_HEAD = 1 << 16  # bytes that tell a large binary from text before all of it is read
_SHOWN = 3  # names in a summary


@dataclass(frozen=True)
class TextFile:
    """One file that was read: relative name, sha256 of the text in it, bytes, and the part of the data it is in.

    Of a file of token ids, sha256 and bytes are those of the ids in the smallest dtype that holds them.
    """

    name: str
    sha256: str
    size: int
    part: str


@dataclass(frozen=True)
class TextRules:
    """Which files below a path are text, and by what they are split; see ``DataConfig``.

    ``runs``: folders that are never entered.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    field: str | None = None
    runs: tuple[str, ...] = ()
    split_depth: int = 0

    def unit(self, name: str) -> str:
        """What a file of this relative name is split by: names of one unit stay in one part."""
        folders = name.split("/")[:-1][: self.split_depth]
        return "/".join(folders) or name

    def allows(self, name: str) -> bool:
        """Whether the patterns let a file of this relative name in."""
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)


@dataclass
class TextFiles:
    """Contents of the files below ``folder`` by relative name, in a fixed order, and what was not read, by reason.

    ``source`` says in words where they were read. ``id_type``: dtype of the token ids that the contents are (None: they
    are text).
    """

    source: str
    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)
    left_out: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    id_type: str | None = None

    def leave_out(self, reason: str, name: str, size: int) -> None:
        """Count a file that was not read, of ``size`` bytes."""
        self.left_out.setdefault(reason, []).append((name, size))

    @property
    def left_out_line(self) -> str:
        """How many files and bytes were left out, and why, with the first names ("": none)."""
        if not self.left_out:
            return ""
        count = sum(map(len, self.left_out.values()))
        size = sum(size for group in self.left_out.values() for _, size in group)
        reasons = "; ".join(
            f"{len(group)} {reason} ({first_names([name for name, _ in group])})"
            for reason, group in self.left_out.items()
        )
        return f"left out {count} file{'s' * (count != 1)}, {shown_size(size)}: {reasons}"


class _NotTextError(Exception):
    """Why a file is not read: ``args`` are the reason to count it under, and the details."""


def first_names(names: Sequence[str]) -> str:
    """The first few of many names, each fit to be printed."""
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + more


def shown_size(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e6:.3g} MB" if size >= 100_000 else f"{size:,} bytes"


def printable(name: str) -> str:
    """A name without bytes that are no UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def absolute(path: str) -> str:
    """A path that means the same from every folder."""
    return os.path.abspath(os.path.expanduser(path)) if path else path


def read_text(path: str | None, rules: TextRules) -> TextFiles:
    """Read a text file or the text files below a folder (None: the sources of the interpreter's standard library).

    A path to a ``.npy`` file names token ids instead; below a folder such files are binaries like others. Links are
    followed, each folder is entered once. Hidden names and folders of runs are skipped; copies are read once. Raises
    ``ValueError`` for a path that is missing or unreadable, that holds no text, or is a file that is no text.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        if not root.is_dir():
            raise UserError(
                f"data.path = None: this Python has no library sources in {root}; name a text file or folder"
            )
        text = TextFiles(f"standard library of Python {platform.python_version()}", root)
        _read_all(text, [path for path in _walk(text, STDLIB_SKIPPED, rules) if path.suffix == ".py"], rules)
    else:
        text = _read_user(path, rules)
    if not text.files:
        raise UserError(f"data.path = {path!r} holds no text" + (f"; {text.left_out_line}" if text.left_out else ""))
    return text


def _read_user(path: str, rules: TextRules) -> TextFiles:
    root = Path(path).expanduser()
    try:
        if path and root.exists():
            _check_outside_runs(path, root)
        if path and root.is_dir():
            text = TextFiles(printable(path), root)
            _read_all(text, _walk(text, frozenset(), rules), rules)
            return text
        if path and root.is_file():
            text = TextFiles(printable(path), root.parent)
            _read_all(text, [root], rules, refuse=True)
            return text
        reason = "is neither a file nor a folder" if path and root.exists() else "does not exist"
    except OSError as error:
        reason = f"cannot be read: {error.strerror} ({error.filename})"
    raise UserError(f"data.path = {path!r} {reason}")


def _check_outside_runs(path: str, root: Path) -> None:
    for folder in (root, *root.absolute().parents):
        if _is_run(folder):
            raise UserError(f"data.path = {path!r} is in {folder}, the folder of a run, whose files are never data")


def _is_run(folder: Path) -> bool:
    try:
        record = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"format", "natsl"} <= record.keys()


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _walk(text: TextFiles, skipped: frozenset[str], rules: TextRules) -> list[Path]:
    """Regular files in a fixed order, without hidden ones and caches.

    A folder that is reached by its own name and by links is entered by its own name; of several links the first one
    counts, so that the order in which a file system lists them has no effect.
    """
    root = text.folder
    entered = {_identity(folder) for folder in map(Path, rules.runs) if folder.is_dir()} - {_identity(root)}
    paths: list[Path] = []
    folders, links = [root], list[Path]()
    while folders or links:
        if folders:
            folder = folders.pop()
        else:
            folder = min(links, key=lambda link: link.relative_to(root).as_posix())
            links.remove(folder)
        identity = _identity(folder)
        if identity in entered or _is_run(folder):
            continue
        entered.add(identity)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                if path.is_dir():  # unlike entry.is_dir(), it takes links that go in a circle
                    if entry.name not in skipped and entry.name != "__pycache__":
                        (links if entry.is_symlink() else folders).append(path)
                elif path.is_file():
                    paths.append(path)
                else:
                    reason = "links that lead nowhere" if entry.is_symlink() else "that are no files"
                    text.leave_out(reason, path.relative_to(root).as_posix(), 0)
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _read_all(text: TextFiles, paths: Sequence[Path], rules: TextRules, refuse: bool = False) -> None:
    """Read files, without empty ones and without copies, which could fall into two parts.

    ``refuse``: a file that is no text raises ``ValueError`` instead of being left out, and token ids are read.
    """
    known: set[bytes] = set()
    for path in paths:
        name = path.relative_to(text.folder).as_posix()
        if not rules.allows(name):
            text.leave_out("by data.include and data.exclude", name, path.stat().st_size)
            continue
        try:
            if refuse and is_token_file(path):
                contents, text.id_type = read_ids(path)
            else:
                contents = _contents(path, rules)
        except _NotTextError as error:
            reason, details = error.args
            if refuse:
                raise UserError(f"data.path: {path} {details}") from None
            text.leave_out(reason, name, path.stat().st_size)
            continue
        digest = hashlib.sha256(contents).digest()
        if not contents or digest in known:
            text.leave_out("copies" if contents else "empty", name, len(contents))
            continue
        known.add(digest)
        text.files[name] = contents


def _contents(path: Path, rules: TextRules) -> bytes:
    json_lines = path.suffix.lower() in _JSON_LINES and rules.field != ""
    if json_lines and rules.field is None:
        raise _NotTextError(
            "of JSON lines without data.field",
            "holds JSON lines: data.field=<name> says which of their fields is the text ('': as they are)",
        )
    with path.open("rb") as file:
        _check_bytes(file.read(_HEAD))
    contents = path.read_bytes()
    if json_lines:
        contents = _json_text(contents, str(rules.field))
    _check_bytes(contents)
    try:
        contents.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _NotTextError(
            "not UTF-8", f"is not UTF-8 text: byte 0x{contents[error.start]:02x} at offset {error.start}"
        ) from None
    return contents


def _check_bytes(contents: bytes) -> None:
    place = contents.find(0)
    if place >= 0:
        raise _NotTextError("binary", f"is not text: a NUL byte at offset {place} (UTF-16? convert it to UTF-8)")


def _json_text(contents: bytes, key: str) -> bytes:
    """The text in the field ``key`` of every line, each beginning on a new line."""
    texts = []
    for number, line in enumerate(contents.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise _NotTextError("not JSON lines", f"line {number} is not JSON") from None
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, str):
            fields = ", ".join(sorted(map(repr, record))[:8]) if isinstance(record, dict) else ""
            raise _NotTextError(
                f"without text in data.field = {key!r}",
                f"has no text in data.field = {key!r} in line {number}; fields there: {fields or 'none'}",
            )
        texts.append(value if value.endswith("\n") else value + "\n")
    try:
        return "".join(texts).encode()
    except UnicodeEncodeError:
        raise _NotTextError("not UTF-8", f"holds lone surrogates in data.field = {key!r}") from None
