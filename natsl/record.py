"""What a run was trained and judged on: ``text.json`` in the run's folder lists the files. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.errors import UserError
from natsl.files import read_json, write_json
from natsl.text import TextFile, first_names

if TYPE_CHECKING:
    from natsl.data import Corpus

EVERY_PART = "all"  # of a text that is cut into spans, every file may be in every part


@dataclass(frozen=True)
class TrainedText:
    """The files that a supernet was trained on.

    ``text``: fingerprint of the whole text and its split. ``files``: names below ``folder`` and sha256 of the contents.
    ``tokens``: they are ids of a tokenizer instead of text. ``hidden``: names are digests, and there is no folder.
    """

    text: str
    folder: str
    files: tuple[tuple[str, str], ...]
    tokens: bool = False
    hidden: bool = False

    @classmethod
    def of(cls, corpus: Corpus) -> TrainedText:
        """What training on a corpus reads: its training part, or every file where spans are cut."""
        files = [file for file in corpus.contents if file.part in ("train", EVERY_PART)]
        return cls(corpus.fingerprint, corpus.folder, tuple((file.name, file.sha256) for file in files), corpus.tokens)

    def check_kind(self, corpus: Corpus) -> None:
        """Raise ``UserError`` for token ids where the supernet was trained on text, and the other way round."""
        if self.tokens != corpus.tokens:
            then, now = ("token ids", "text") if self.tokens else ("text", "token ids")
            raise UserError(
                f"{corpus.source} holds {now}, the supernet was trained on {then}: it can be judged on {then} only"
            )

    def matches(self, folder: str, files: Mapping[str, str]) -> set[str]:
        """Names, of ``files`` (name below ``folder`` → sha256), that are the name or hold the contents of one here."""
        names = {name for name, _ in self.files}
        contents = {sha256 for _, sha256 in self.files}
        if self.hidden:
            return {name for name, sha256 in files.items() if _digest(name) in names or sha256 in contents}
        places = {os.path.join(self.folder, name) for name in names}
        return {
            name
            for name, sha256 in files.items()
            if name in names or sha256 in contents or os.path.join(folder, name) in places
        }

    def without_names(self) -> TrainedText:
        """The same without names of files and folders; ``matches`` still knows a file by its name or contents."""
        if self.hidden:
            return self
        return replace(self, folder="", files=tuple((_digest(name), sha) for name, sha in self.files), hidden=True)


@dataclass(frozen=True)
class DataRecord:
    """The data of a run, as ``text.json`` and the provenance of an export hold it.

    ``data``: fingerprint of text and task settings, ``text``: of the text and its split. ``source``: where it was read.
    ``runs``: the folder of runs, which is never data. ``trained``: what the supernet was trained on. ``others``: how
    the text differed when a search went on with another one because its user allowed it.
    """

    data: str
    text: str
    source: str
    runs: str
    files: tuple[TextFile, ...]
    trained: TrainedText
    others: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, plain: Any, path: Path) -> DataRecord:
        """The inverse of ``to_plain``; ``UserError`` naming ``path`` for anything else."""
        try:
            trained = plain["trained"]
            return cls(
                data=str(plain["data"]),
                text=str(plain["text"]),
                source=str(plain["source"]),
                runs=str(plain["runs"]),
                files=tuple(TextFile(**file) for file in plain["files"]),
                trained=TrainedText(
                    str(trained["text"]),
                    str(trained["folder"]),
                    tuple((str(n), str(s)) for n, s in trained["files"]),
                    bool(trained.get("tokens", False)),  # older records have neither
                    bool(trained.get("hidden", False)),
                ),
                others=tuple(map(str, plain["others"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path} does not say which text was read: it was not written by natsl") from None

    @classmethod
    def read(cls, path: Path) -> DataRecord | None:
        """The record in a file (None: there is no such file)."""
        return cls.from_dict(read_json(path), path) if path.exists() else None

    def without_names(self) -> DataRecord:
        """The record for others: only the last name of the source, and of files the digests of their names."""
        if self.trained.hidden:
            return self
        files = tuple(replace(file, name=_digest(file.name)) for file in self.files)
        trained, source = self.trained.without_names(), os.path.basename(self.source)
        return replace(self, source=source, runs="", files=files, trained=trained, others=())

    def write(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, self)

    def difference(self, corpus: Corpus) -> str | None:
        """How a corpus differs from what was recorded, in one line (None: it is the same text with the same split)."""
        if corpus.fingerprint == self.text:
            return None
        then = {file.name: file for file in self.files}
        now = {_digest(file.name) if self.trained.hidden else file.name: file for file in corpus.contents}
        changed = [key for key in then if key in now and then[key].sha256 != now[key].sha256]
        source = os.path.basename(corpus.source) if self.trained.hidden else corpus.source
        parts = [] if self.source == source else [f"{self.source} then, {source} now"]
        if len(changed) == 1:
            sizes = f"{then[changed[0]].size:,} bytes then, {now[changed[0]].size:,} now"
            parts.append(f"{now[changed[0]].name} changed ({sizes})")
        else:
            parts += _listed([now[key].name for key in changed], "files changed")
        parts += _listed([file.name for key, file in now.items() if key not in then], "added")
        missing = [key for key in then if key not in now]
        parts += [f"{len(missing)} missing"] if missing and self.trained.hidden else _listed(missing, "missing")
        return "; ".join(parts) or "the files are the same, but other parts of them are held out"


def _digest(name: str) -> str:
    """What stands for the name of a file that others are not to know."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _listed(names: Sequence[str], what: str) -> list[str]:
    return [f"{len(names)} {what} ({first_names(names)})"] if names else []
