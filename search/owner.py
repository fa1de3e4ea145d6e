"""Which process owns a study: one at a time, wherever its run folder is.

The owner is an attribute of the study, so it holds for every process that can reach the storage. A process that ended
without giving it up does not block: on the same machine its pid, start time and boot id tell that it is gone, and its
own run folder, which only one process can hold, may take the study from anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, Insert, Update, column, select, table
from sqlalchemy.exc import IntegrityError

from natsl.errors import UserError
from natsl.files import write_text

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

OWNER = "natsl_owner"  # study attribute
_ATTRIBUTES = table("study_user_attributes", column("study_id"), column("key"), column("value_json"))  # Optuna's
_PROC = Path("/proc")


@dataclass(frozen=True)
class Owner:
    """A process, and the run folder that it holds.

    ``boot`` is the id of the running kernel, ``pids`` its space of process ids (containers have their own), ``started``
    the start of the process in clock ticks since the boot, ``folder`` a random name of the run folder.
    """

    host: str
    machine: str
    boot: str
    pids: str
    pid: int
    started: str
    folder: str

    @classmethod
    def this_process(cls, folder: Path) -> Owner:
        """This process, with the run folder ``folder``, which gets its name unless it has one."""
        name = folder / ".owner"
        if not _read(name):
            write_text(name, secrets.token_hex(8))
        return cls.named(f"{_read(name)}:{name.stat().st_ino}")  # a copy of the folder is another one

    @classmethod
    def named(cls, folder: str) -> Owner:
        """This process, under a name for what it holds."""
        pids = ""
        with contextlib.suppress(OSError):
            pids = os.readlink(_PROC / "self/ns/pid")
        boot, machine = _read(_PROC / "sys/kernel/random/boot_id"), _read(Path("/etc/machine-id"))
        pid = os.getpid()
        return cls(platform.node(), machine, boot, pids, pid, _started(pid) or "", folder)

    @classmethod
    def parse(cls, plain: str | None) -> Owner | None:
        """The owner of a stored text; None if it names none."""
        try:
            return cls(**json.loads(plain or ""))
        except (TypeError, ValueError):
            return None

    def dump(self) -> str:
        """The text to store."""
        return json.dumps(vars(self), sort_keys=True)

    def is_visible(self, here: Owner) -> bool:
        """Whether ``here``, a process that runs, can tell whether this one does; without /proc, none can."""
        return self.started != "" and (self.boot, self.pids) == (here.boot, here.pids)

    def is_gone(self, here: Owner) -> bool:
        """Whether the process is known to have ended, as far as ``here``, one that runs, can see."""
        if not self.started:
            return False
        if self.is_visible(here):
            return _started(self.pid) != self.started
        return (self.host, self.machine) == (here.host, here.machine) and self.boot != here.boot

    def blocks(self, other: Owner) -> bool:
        """Whether ``other``, a process on this machine that holds its run folder, has to stay away from the study."""
        if self.is_visible(other):
            itself = (self.pid, self.started) == (other.pid, other.started)
            return not itself and not self.is_gone(other)
        return not self.is_gone(other) and self.folder != other.folder


def claim(storage: RDBStorage, study_id: int, name: str, folder: Path) -> Owner:
    """Make this process the owner of a study; ``UserError`` if another one is."""
    mine = Owner.this_process(folder)
    while True:
        stored = _stored(storage, study_id)
        owner = None if stored is None else Owner.parse(stored)
        if owner is not None and owner.blocks(mine):
            options = ["--study-name", name, "--key", OWNER, "--value", "none"]
            command = shlex.join(["optuna", "study", "set-user-attr", "--storage", "URL", *options])
            advice = (
                ""
                if owner.is_visible(mine)
                else f"; if that machine is gone, free the study: {command} (URL: search.storage)"
            )
            raise UserError(
                f"the study {name!r} is in use by process {owner.pid} on {owner.host}: wait until it has ended, "
                f"or choose another name{advice}"
            )
        if _replace(storage, study_id, stored, mine.dump()):
            return mine


def release(storage: RDBStorage, study_id: int, owner: Owner) -> None:
    """Give a study up, unless another process has taken it by now."""
    with storage.engine.begin() as connection:
        connection.execute(_ATTRIBUTES.delete().where(*_of(study_id), _ATTRIBUTES.c.value_json == owner.dump()))


def check_owner(storage: RDBStorage, study_id: int, name: str, mine: Owner) -> None:
    """Raise ``UserError`` unless ``mine``, this process, still owns a study.

    One that is stopped for long, as by SIGSTOP or with its machine, is taken for dead, and the study may be another's.
    """
    stored = _stored(storage, study_id)
    if stored == mine.dump():
        return
    owner = None if stored is None else Owner.parse(stored)
    if owner is None:
        what = "was freed while this process stood still: run the same command again, and it goes on"
    else:
        what = f"is process {owner.pid}'s on {owner.host}, which took it over: this process has stopped"
    raise UserError(f"the study {name!r} {what}")


def _stored(storage: RDBStorage, study_id: int) -> str | None:
    with storage.engine.begin() as connection:
        row = connection.execute(select(_ATTRIBUTES.c.value_json).where(*_of(study_id))).fetchone()
    return None if row is None else str(row[0])


def _replace(storage: RDBStorage, study_id: int, old: str | None, new: str) -> bool:
    """Store ``new`` if ``old`` is still what is stored: of several processes that try, one succeeds."""
    change: Insert | Update
    if old is None:
        change = _ATTRIBUTES.insert().values(study_id=study_id, key=OWNER, value_json=new)
    else:
        change = _ATTRIBUTES.update().where(*_of(study_id), _ATTRIBUTES.c.value_json == old).values(value_json=new)
    try:
        with storage.engine.begin() as connection:
            return connection.execute(change).rowcount == 1
    except IntegrityError:  # a study has each attribute once
        return False


def _of(study_id: int) -> tuple[ColumnElement[bool], ...]:
    return _ATTRIBUTES.c.study_id == study_id, _ATTRIBUTES.c.key == OWNER


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since the boot; None if it does not run."""
    fields = _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()  # its name may hold anything
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
