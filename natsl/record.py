"""What a run was trained and judged on: ``text.json`` in the run's folder lists the files. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    ``tokens``: they are ids of a tokenizer instead of text.
    """

    text: str
    folder: str
    files: tuple[tuple[str, str], ...]
    tokens: bool = False

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
        places = {os.path.join(self.folder, name) for name in names}
        contents = {sha256 for _, sha256 in self.files}
        return {
            name
            for name, sha256 in files.items()
            if name in names or sha256 in contents or os.path.join(folder, name) in places
        }


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
                    bool(trained.get("tokens", False)),  # older records do not have it
                ),
                others=tuple(map(str, plain["others"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path} does not say which text was read: it was not written by natsl") from None

    @classmethod
    def read(cls, path: Path) -> DataRecord | None:
        """The record in a file (None: there is no such file)."""
        return cls.from_dict(read_json(path), path) if path.exists() else None

    def write(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, self)

    def difference(self, corpus: Corpus) -> str | None:
        """How a corpus differs from what was recorded, in one line (None: it is the same text with the same split)."""
        if corpus.fingerprint == self.text:
            return None
        then = {file.name: file for file in self.files}
        now = {file.name: file for file in corpus.contents}
        changed = [name for name in then if name in now and then[name].sha256 != now[name].sha256]
        parts = [] if self.source == corpus.source else [f"{self.source} then, {corpus.source} now"]
        if len(changed) == 1:
            sizes = f"{then[changed[0]].size:,} bytes then, {now[changed[0]].size:,} now"
            parts.append(f"{changed[0]} changed ({sizes})")
        else:
            parts += _listed(changed, "files changed")
        parts += _listed([name for name in now if name not in then], "added")
        parts += _listed([name for name in then if name not in now], "missing")
        return "; ".join(parts) or "the files are the same, but other parts of them are held out"


def _listed(names: Sequence[str], what: str) -> list[str]:
    return [f"{len(names)} {what} ({first_names(names)})"] if names else []
