"""A PostgreSQL server of the tests' own, in a temporary folder, reached by its Unix socket; stopped by its pid.

Needs Debian's ``postgresql`` (or ``initdb`` on the path) and the driver psycopg; where one is missing, ``start`` says
which. The server refuses to run as root, so root starts it as an unprivileged user.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import sqlalchemy

DRIVER = "psycopg"
USER, PASSWORD = "natsl", "p@ss word/%1"  # what a URL has to quote
_INSTALLED = Path("/usr/lib/postgresql")  # of Debian: a folder for each version
_SECONDS = 60.0  # for a server to start on a busy machine


@dataclass(frozen=True)
class Server:
    """A running server; ``folder`` holds its socket."""

    folder: Path

    def url(self, database: str, password: str = PASSWORD, folder: Path | None = None) -> str:
        """The URL of a database for ``search.storage``."""
        where = quote(str(folder or self.folder), safe="")
        return f"postgresql+{DRIVER}://{USER}:{quote(password, safe='')}@/{quote(database, safe='')}?host={where}"

    def execute(self, statement: str) -> None:
        """Run a statement as the superuser, outside of transactions."""
        engine = sqlalchemy.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql(statement)
        finally:
            engine.dispose()


def missing() -> str | None:
    """What has to be installed before a server can be started; None: nothing."""
    if importlib.util.find_spec(DRIVER) is None:
        return f"{DRIVER} is not installed: pip install 'natsl[postgres]'"
    if _binaries() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if os.geteuid() == 0 and _user() is None:
        return "PostgreSQL does not run as root, and there is neither a user postgres nor nobody"
    return None


@contextlib.contextmanager
def start() -> Iterator[Server]:
    """A server for the length of the block, without durability."""
    binaries = _binaries()
    assert binaries is not None, missing()
    folder = Path(tempfile.mkdtemp(prefix="natsl-pg-", dir="/tmp"))  # the path of a socket has at most 107 bytes
    try:
        user = _user() if os.geteuid() == 0 else None
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        data, log = folder / "data", folder / "log"
        options = ["--username", USER, "--pwfile", str(password), "--auth", "scram-sha-256", "--no-sync"]
        _run([str(binaries / "initdb"), "-D", str(data), *options, "--encoding", "UTF8", "--no-locale"], user)
        settings = ("listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "full_page_writes=off")
        line = [str(binaries / "postgres"), "-D", str(data), *(text for item in settings for text in ("-c", item))]
        with log.open("wb") as output, _popen(line, user, output.fileno()) as process:
            try:
                server = Server(folder)
                _wait(server, process, log)
                yield server
            finally:
                process.send_signal(signal.SIGINT)  # connections are closed, nothing waits for them
                process.wait(_SECONDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _SECONDS
    while True:
        try:
            server.execute("SELECT 1")
            return
        except sqlalchemy.exc.OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}") from None
            time.sleep(0.1)


def _binaries() -> Path | None:
    """The folder of the server's programs, of the newest version."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = [path.parent for path in _INSTALLED.glob("*/bin/initdb")]
    return max(folders, key=lambda path: float(path.parent.name), default=None)


def _user() -> pwd.struct_passwd | None:
    """A user that is not root."""
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def _popen(line: list[str], user: pwd.struct_passwd | None, output: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        line,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
        extra_groups=None if user is None else [],
    )


def _run(line: list[str], user: pwd.struct_passwd | None) -> None:
    process = _popen(line, user, subprocess.PIPE)
    output, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, output.decode(errors="replace")
