"""Weights & Biases as a guest: whatever it raises becomes one warning, and the run goes on without it.

Offline by default: records go to the run's folder and can be sent later with ``wandb sync``. No account, no network and
no wandb package is needed. Secrets are removed from all that is sent.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from natsl.files import to_plain, write_text
from natsl.run import Run
from natsl.secrets import redact
from natsl.space.check import check

T = TypeVar("T")
_INIT_SECONDS = 20  # how long a start may wait for the network
_FINISH_SECONDS = 60  # how long the end may wait for uploads
# A growing table is sent in pieces of so many rows, or this part of what was sent: a few dozen pieces at any length,
# which is what wandb shows of a table, and no row is sent twice.
_FEWEST_ROWS, _ROWS_PART = 8, 8
_staging: dict[str, str] = {}  # the folder that this process has made wandb stage artifacts in


class TrackingMode(Enum):
    """Where Weights & Biases keeps its records."""

    disabled = "disabled"
    offline = "offline"  # in the run's folder; no account, no network
    online = "online"


@dataclass
class TrackingConfig:
    """Weights & Biases: ``mode``, and the project, group and tags under which a run is listed."""

    mode: TrackingMode = TrackingMode.offline
    project: str = "natsl"
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(len(self.project) > 0, "tracking.project", self.project, "it must not be empty")


Rows = Callable[[], Sequence[Sequence[Any]]]


class Tracker:
    """Where curves, tables and files of a run are shown; this one shows nothing and serves as the null object."""

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row of numbers. Names such as ``train/loss`` are drawn over ``train/step``."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final numbers of the run."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table."""

    def rows(self, name: str, columns: Sequence[str], make: Rows, earlier: bool = False) -> bool:
        """Add the rows that ``make`` gives to a table that grows, and say whether it was sent; the rest is, at the end.

        ``earlier``: they are of calls before this one, which an online run that goes on has already.
        """
        return False

    def image(self, name: str, source: Path | Callable[[], bytes]) -> None:
        """Show a picture: a file, or the content of one."""

    def html(self, name: str, path: Path) -> None:
        """Show a page, such as the report."""

    def file(self, name: str, path: Path, kind: str = "result") -> None:
        """Store a file or a folder as an artifact."""

    def finish(self, ok: bool = True) -> None:
        """End the record; ``ok`` false marks it as failed."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.finish(ok=kind is None)


def start_tracker(config: TrackingConfig, run: Run, settings: Mapping[str, Any]) -> Tracker:
    """Begin to record a run whose configuration is ``settings`` (plain data, already checked).

    Never raises: what goes wrong becomes one warning and a tracker that does nothing.
    """
    if config.mode is TrackingMode.disabled:
        return Tracker()
    try:
        return WandbTracker(config, run, settings)
    except Exception as error:
        _warn(error)
        return Tracker()


class WandbTracker(Tracker):
    """Records into Weights & Biases; after the first failure it does nothing."""

    def __init__(self, config: TrackingConfig, run: Run, settings: Mapping[str, Any]) -> None:
        run.wandb.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=run.wandb):  # wandb would go to /tmp without a word
            pass
        # Artifacts are staged there until they are sent; the default is the home directory. Each job of a sweep has its
        # own folder, unless the user has named one.
        if os.environ.get("WANDB_DATA_DIR") in (None, _staging.get("folder")):
            os.environ["WANDB_DATA_DIR"] = _staging["folder"] = str(run.wandb.absolute())
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))
        if config.mode is TrackingMode.online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("there is no API key: run `wandb login` or use tracking.mode=offline")
        self._wandb = wandb
        self._folder = run.wandb
        self._stages: set[str] = set()
        self._tables: dict[str, _Growing] = {}
        self._run: Any = wandb.init(
            id=_wandb_id(run),
            resume="allow" if config.mode is TrackingMode.online else None,
            project=redact(config.project),
            group=redact(config.group),
            tags=redact(config.tags),
            name=run.name,
            dir=str(run.path),
            mode=config.mode.value,
            config=redact(to_plain(settings)),
            settings=wandb.Settings(
                silent=True,
                # Not the terminal, which may show a key, nor command line and git remote, which may hold a password.
                console="off",
                x_disable_meta=True,
                disable_git=True,
                save_code=False,
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
            ),
        )

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        self._try(lambda: self._log(values, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._try(lambda: self._run.summary.update(redact(to_plain(values))))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        def send() -> None:
            cells = [redact(to_plain(row)) for row in rows]
            # Cells of a column may be text in one row and missing or a number in the next.
            self._run.log({name: self._wandb.Table(columns=list(columns), data=cells, allow_mixed_types=True)})

        self._try(send)

    def rows(self, name: str, columns: Sequence[str], make: Rows, earlier: bool = False) -> bool:
        return bool(self._try(lambda: self._add_rows(name, columns, make, earlier)))

    def image(self, name: str, source: Path | Callable[[], bytes]) -> None:
        def send() -> None:
            from PIL import Image

            file = source if isinstance(source, Path) else io.BytesIO(source())
            with Image.open(file) as picture:
                self._run.log({name: self._wandb.Image(picture)})

        self._try(send)

    def html(self, name: str, path: Path) -> None:
        def send() -> None:
            text = path.read_text(encoding="utf-8")
            self._run.log({name: self._wandb.Html(redact(text), inject=False)})

        self._try(send)

    def file(self, name: str, path: Path, kind: str = "result") -> None:
        def send() -> None:
            artifact = self._wandb.Artifact(name, type=kind)
            # Linked, not copied: checkpoints are large, and stay where they are.
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), skip_cache=True, policy="immutable")
            self._run.log_artifact(artifact)

        self._try(send)

    def finish(self, ok: bool = True) -> None:
        for name in self._tables:
            self._try(partial(self._send_rows, name))
        self._try(lambda: self._run.finish(exit_code=0 if ok else 1))
        self._run = None

    def _add_rows(self, name: str, columns: Sequence[str], make: Rows, earlier: bool) -> bool:
        if earlier and self._run.resumed:
            return False
        if name not in self._tables:
            # Incremental: each time it is logged, only the rows since the last time are sent.
            table = self._wandb.Table(columns=list(columns), log_mode="INCREMENTAL", allow_mixed_types=True)
            self._tables[name] = _Growing(table)
        growing = self._tables[name]
        for row in make():
            growing.table.add_data(*redact(to_plain(row)))
            growing.waiting += 1
        if growing.waiting < max(_FEWEST_ROWS, growing.sent // _ROWS_PART):
            return False
        self._send_rows(name)
        return True

    def _send_rows(self, name: str) -> None:
        growing = self._tables[name]
        if growing.waiting:
            self._run.log({name: growing.table})
            growing.sent, growing.waiting = growing.sent + growing.waiting, 0

    def _log(self, values: Mapping[str, Any], step: int | None) -> None:
        record = dict(redact(to_plain(values)))
        if step is not None:
            # Each stage counts its own steps; wandb's one counter must never go back.
            for stage in dict.fromkeys(name.rpartition("/")[0] for name in values):
                axis = f"{stage}/step" if stage else "step"
                if stage not in self._stages:
                    self._stages.add(stage)
                    self._run.define_metric(f"{stage}/*" if stage else "*", step_metric=axis)
                record[axis] = step
        self._run.log(record)

    def _try(self, action: Callable[[], T]) -> T | None:
        """What the action returns, or None: it fails, or one has failed before."""
        if self._run is None:
            return None
        try:
            return action()
        except Exception as error:
            self._run = None
            _warn(error)
            # Its hook at exit would print a traceback; and it may wait for a network that is gone.
            ending = threading.Thread(target=self._tear_down, daemon=True)
            ending.start()
            ending.join(5)
            return None

    def _tear_down(self) -> None:
        with contextlib.suppress(Exception):
            self._wandb.teardown(exit_code=1)


@dataclass
class _Growing:
    """A table of wandb to which rows are added, how many were sent, and how many wait for that."""

    table: Any
    sent: int = 0
    waiting: int = 0


def _wandb_id(run: Run) -> str:
    """The id of a run at wandb, the same whenever it is resumed."""
    path = run.wandb / "id"
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


def _warn(error: Exception) -> None:
    text = " ".join(str(redact(str(error))).split()) or type(error).__name__
    warnings.warn(f"wandb failed ({text}); the run goes on without it", stacklevel=3)
