"""The folder of a run: ``runs/<name>/`` holds everything that a search or a training writes.

Imports neither torch nor optuna.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from natsl.errors import UserError
from natsl.files import append_line, child_folder, read_json, to_plain, user_path, write_json, write_text
from natsl.secrets import redact

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
FORMAT = 1  # of the run folder; raise it when a reader of older folders would go wrong
FORMAT_VERSIONS = {1: "0.1"}  # format → first natsl version that writes it


class Run:
    """Folder of one run. Made by ``Run.open``; paths are attributes, nothing is created before it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.config = path / "config.yaml"
        self.version = path / "run.json"
        self.text = path / "text.json"
        self.supernet = path / "supernet"
        self.calibration = path / "calibration.json"
        self.specialised = path / "specialise.json"
        self.latency = path / "latency.json"
        self.study_db = path / "study.db"
        self.hours = path / "hours.json"
        self.workers = path / "workers"
        self.scores = path / "scores.jsonl"
        self.front_json = path / "front.json"
        self.front_csv = path / "front.csv"
        self.front_png = path / "front.png"
        self.report = path / "report.html"
        self.log_file = path / "log.jsonl"
        self.wandb = path / "wandb"
        self.exports = path / "export"
        self.trials = path / "trials"  # of an outer search, each a run

    @classmethod
    def open(cls, name: str, root: str | Path = "runs", create: bool = True) -> Run:
        """The run ``name`` below ``root``, ready to be written (``create``) or read.

        Raises ``UserError`` for a name that leaves the root, an unknown name (``create=False``; lists the known ones),
        a folder that cannot be written, one that is no run, or one of another format.
        """
        base = user_path(root, "root")
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
        base = user_path(root, "root")
        if not base.is_dir():
            return []
        runs = [item for item in base.iterdir() if (item / "run.json").is_file()]
        return sorted(
            item.name
            for item in runs
            if any(file.name != "run.json" and not file.name.startswith(".") for file in item.iterdir())
        )

    def best_trial(self) -> str:
        """Name of the best trial of this outer search; of the first one while there is no best."""
        file = self.path / "outer.json"
        best = read_json(file)["best"] if file.exists() else None
        return "t0000" if best is None else str(best["id"])

    def _check_version(self) -> None:
        if not self.version.is_file():
            raise UserError(f"{self.path} is not a folder of a run (run.json is missing): choose another name")
        record = read_json(self.version)
        version = record.get("format") if isinstance(record, dict) else None
        if version != FORMAT:
            needed = FORMAT_VERSIONS.get(version) if isinstance(version, int) else None
            needed = needed or (record.get("natsl") if isinstance(record, dict) else None) or "unknown"
            raise UserError(
                f"{self.path} has the format {version!r}, this version of natsl reads {FORMAT}: use natsl {needed}"
            )

    def write_json(self, path: Path, value: Any) -> None:
        """``write_json`` for a file that is only shown: atomic, without secrets, what is not finite as null."""
        write_json(path, redact(to_plain(value)))

    def write_config(self, config: Any) -> None:
        """Write a config dataclass to ``config.yaml``, resolved.

        Paths, names and settings are as typed, whatever the environment holds: they are read back. Nothing reads
        ``tracking`` and ``search.storage``, which are without secrets.
        """
        plain = to_plain(config)
        for section, names in (("tracking", None), ("search", ("storage",))):
            fields = plain.get(section, {})
            fields |= redact(fields if names is None else {name: fields[name] for name in names if name in fields})
        write_text(self.config, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to ``log.jsonl`` as a whole line, without secrets."""
        append_line(self.log_file, json.dumps(redact(to_plain(record)), ensure_ascii=False, allow_nan=False))

    def is_held(self) -> bool:
        """Whether a process holds the run, as far as its file system has locks."""
        try:
            handle = os.open(self.path / ".lock", os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(handle)
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run; ``UserError`` if another process holds it. A process that ends releases it.

        A file system without locks gets a warning instead.
        """
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"the run {self.name!r} is in use by another process") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                warnings.warn(
                    f"the file system of {self.path} has no locks ({error.strerror}): see to it that no other process "
                    "works on this run",
                    stacklevel=3,
                )
            yield
        finally:
            os.close(handle)
