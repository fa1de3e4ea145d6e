"""Where the trials of a study are kept: an SQLite file by default, any Optuna database on request."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from natsl.errors import UserError
from natsl.files import follow_umask, sync_folder
from natsl.search.objective import Direction
from natsl.search.owner import Owner, check_owner, claim, release
from natsl.search.worker.table import BUSY_SECONDS, METADATA, TASKS, sqlite_connector
from natsl.secrets import redact_text

FINGERPRINT = "natsl_fingerprint"  # study attribute: what the trials belong to
THREADS = "natsl_threads"  # study attribute: how many each of its evaluations has
SHARED = "natsl_shared"  # study attribute: settings of its owner that processes which join it have to share
BEAT = "natsl_beat"  # study attribute: a number that its owner changes while it works
_ADVICE = "move it away or choose another name"


@dataclass(frozen=True)
class Identity:
    """What a study is: its name, the directions of its objectives, and all else that its trials depend on.

    ``fingerprint``: of the fingerprint that the study has, or of {} for a new one, makes the one that it should have;
    what was chosen when it was made is taken from there.
    """

    name: str
    directions: Sequence[Direction]
    fingerprint: Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class OpenStudy:
    """A study that this process owns, and its storage; ``where`` names it in messages."""

    study: optuna.Study
    storage: RDBStorage
    owner: Owner
    where: str

    def check_owner(self) -> None:
        """Raise ``UserError`` unless this process still owns the study, which may have been taken from it."""
        check_owner(self.storage, self.study._study_id, self.study.study_name, self.owner)

    def close(self) -> None:
        """Give the study up and close the storage, which cannot be used any more."""
        with contextlib.suppress(UserError), reported_errors(self.where):  # a process that is gone owns nothing
            release(self.storage, self.study._study_id, self.owner)
        _close(self.storage)


def open_study(path: Path, url: str | None, identity: Identity) -> OpenStudy:
    """The study in the database at ``url``, or else in the SQLite file ``path``; made if it is not there.

    Raises ``UserError`` for a file that is damaged or holds something else, which is left as it is, for a database that
    cannot be reached, for a study whose trials were made under another fingerprint (naming the differences), and for
    one that another process owns.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where = str(path) if url is None else "search.storage"
    with reported_errors(where):
        storage = _open_storage(path, url, identity)
        try:
            study = optuna.load_study(storage=storage, study_name=identity.name)
            stored = study.user_attrs.get(FINGERPRINT, {})
            changes = difference(stored, json.loads(json.dumps(identity.fingerprint(stored))))
            directions = [direction.name.lower() for direction in study.directions]
            changes = changes or difference({"directions": directions}, {"directions": list(identity.directions)})
            if changes:
                of_another_version = [change.partition(":")[0] for change in changes] == ["natsl"]
                advice = f"use natsl {stored.get('natsl')}" if of_another_version else "restore them"
                raise UserError(
                    f"the study {identity.name!r} was made under other settings ({'; '.join(changes)}): "
                    f"{advice} or choose another name (supernet_from=<this run> searches its supernet anew)"
                )
            owner = claim(storage, study._study_id, identity.name, path.parent)
        except BaseException:
            _close(storage)
            raise
    return OpenStudy(study, storage, owner, where)


def _open_storage(path: Path, url: str | None, identity: Identity) -> RDBStorage:
    if url is not None:
        storage = connect(url)
        if identity.name not in optuna.get_all_study_names(storage):
            _create(storage, identity)
    else:
        if not path.exists() or path.stat().st_size == 0:
            _create_file(path, identity)
        _check_file(path, identity.name)
        # Readers do not block the writer, and a commit is one write: a killed process loses nothing.
        storage = _sqlite(path, "WAL")
    return storage


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


@contextlib.contextmanager
def reported_errors(where: str) -> Iterator[None]:
    """Report an error of the database at ``where``, such as a full disk, as a ``UserError``."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        text = _first_line(getattr(cause, "orig", None) or cause)  # SQLAlchemy's own text quotes the statement
        raise UserError(
            redact_text(
                f"{where} cannot be read or written ({text}): if the disk is full, free space, then run the same "
                "command again; it goes on where it stopped"
            )
        ) from None


def connect(url: str) -> RDBStorage:
    """The database at ``url``; ``UserError`` if it cannot be reached, and for a password that hides where it ends."""
    password = re.match(r"[^:]+://[^:@/]*:(.*)@", url.partition("?")[0])
    if password is not None and re.search(r"[/@\s]", password.group(1)):  # could not be removed from what is written
        raise UserError("search.storage: write / as %2F, @ as %40 and a space as %20 in its password")
    if _in_memory(url):
        raise UserError(
            f"search.storage = {url!r} is a database in memory, which no other process sees: name a file, as in "
            "sqlite:///studies.db"
        )
    options = {"connect_args": {"timeout": BUSY_SECONDS}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, engine_kwargs=options)
    except ImportError as error:
        driver = getattr(error.__cause__, "name", None)
        advice = ": pip install 'natsl[postgres]'" if driver == "psycopg" else ""
        raise UserError(f"search.storage cannot be opened: its driver {driver} is not installed{advice}") from None
    except Exception as error:  # drivers raise errors of their own
        raise UserError(redact_text(f"search.storage cannot be opened: {_first_line(error)}")) from None


def _in_memory(url: str) -> bool:
    try:
        parsed = make_url(url)
    except ArgumentError:
        return False
    database = parsed.database or ""
    nowhere = database in ("", "file:") or ":memory:" in database or parsed.query.get("mode") == "memory"
    return nowhere and parsed.get_backend_name() == "sqlite"


def check_connection(url: str) -> None:
    """Raise ``UserError`` as ``connect`` does, and keep no connection."""
    _close(connect(url))


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested mappings, one text ``key: old → new`` each."""
    first, second = _flat(old), _flat(new)
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return [f"{key}: {_shown(first, key)} → {_shown(second, key)}" for key in keys]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    if key not in flat:
        return "absent"
    text = json.dumps(flat[key], ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _create(storage: RDBStorage, identity: Identity) -> None:
    study = optuna.create_study(storage=storage, study_name=identity.name, directions=identity.directions)
    METADATA.create_all(storage.engine)
    with storage.engine.begin() as connection:  # of a deleted study that had the same number
        connection.execute(TASKS.delete().where(TASKS.c.study_id == study._study_id))
    study.set_user_attr(FINGERPRINT, identity.fingerprint({}))


def _create_file(path: Path, identity: Identity) -> None:
    """Make the file with its study under another name first, so that it is there as a whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    _remove_leftovers(fresh)
    try:
        # Without a write-ahead log, which SQLite would write back when the last connection closes, saying nothing if
        # the disk is full by then: what is committed here is in the file.
        storage = _sqlite(fresh, "DELETE")
        try:
            _create(storage, identity)
        finally:
            _close(storage)
        _check_file(fresh, identity.name)
        follow_umask(fresh)  # SQLite lets only its owner write
        fresh.replace(path)
    finally:
        _remove_leftovers(fresh)
    sync_folder(path.parent)


def _remove_leftovers(fresh: Path) -> None:
    for leftover in fresh.parent.glob(f"{fresh.name}*"):
        leftover.unlink()


def _sqlite(path: Path, journal: str) -> RDBStorage:
    # The path is the connector's: in a URL, Optuna and SQLAlchemy would give {, ? and % a meaning.
    return RDBStorage("sqlite:///study.db", engine_kwargs={"creator": sqlite_connector(path, journal)})


def _check_file(path: Path, name: str) -> None:
    """Raise ``UserError`` unless the file is a sound SQLite database that holds our study. Reads only."""
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise UserError(f"{path} cannot be used as a study (it is no SQLite database): {_ADVICE}")
    # Without a log of pending writes the file is all there is, and reading it must not create one beside it.
    pending = path.with_name(f"{path.name}-wal").exists()
    address = f"file:{urllib.parse.quote(str(path.resolve()))}?{'mode=ro' if pending else 'mode=ro&immutable=1'}"
    try:
        connection = sqlite3.connect(address, uri=True)
        try:
            problem = _problem(connection, name)
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        problem = f"it is damaged: {_first_line(error)}"
    if problem is not None:
        raise UserError(f"{path} cannot be used as a study ({problem}): {_ADVICE}")


def _problem(connection: sqlite3.Connection, name: str) -> str | None:
    state = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if state != "ok":
        return f"it is damaged: {_first_line(state)}"
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"studies", "study_user_attributes", "trials", "version_info"} <= tables:
        return "it was not made by Optuna"
    marked = (
        "SELECT s.study_name, a.key FROM studies s LEFT JOIN study_user_attributes a "
        "ON a.study_id = s.study_id AND a.key = ?"
    )
    studies = dict(connection.execute(marked, (FINGERPRINT,)).fetchall())
    if name not in studies:
        return f"it holds {', '.join(map(repr, sorted(studies))) or 'no study'}, not {name!r}"
    return None if studies[name] else f"its study {name!r} was not made by natsl"


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
