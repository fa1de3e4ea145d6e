"""One suite for every kind of storage: what a study needs of it, whoever else reads and writes it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pytest
from optuna.trial import TrialState

from natsl.errors import UserError
from natsl.search import owner
from natsl.search.config import SearchConfig
from natsl.search.owner import OWNER, Owner, claim
from natsl.search.storage import _sqlite, connect
from natsl.search.study import PolicyStudy, open_policy_study
from natsl.space.policy import RoutingPolicy
from tests import postgres
from tests.search_helpers import problem, synthetic

KINDS = ("SQLite file", "SQLite URL", "PostgreSQL")
ODD = "it's a%20b ä日本 #1 @:x"  # of folders and databases

OTHER = """
import os, sys, time
from pathlib import Path
import optuna
from tests.test_storage import Place, opened
place = Place(*map(lambda text: text or None, sys.argv[1:4]))
if sys.argv[4] == "hold":  # in the middle of the first trial
    study = opened(place, "theirs")
    study.propose()
    print("running", flush=True)
    time.sleep(600)
theirs = place.study()
print("running", flush=True)
for _ in range(12):
    theirs.add_trial(optuna.trial.create_trial(values=[0.0, 0.0]))
"""


@dataclass(frozen=True)
class Place:
    """Where a study is kept: in the database at ``url``, or in a file of the run folder. ``folder``: of the runs."""

    folder: str
    url: str | None = None
    name: str = "first"

    def run_folder(self, name: str) -> Path:
        """A run folder; those of a file are one."""
        path = Path(self.folder, "ours" if self.url is None else name)
        path.mkdir(exist_ok=True)
        return path

    def storage(self) -> optuna.storages.RDBStorage:
        """The storage, as another program opens it."""
        return _sqlite(self.run_folder("ours") / "study.db", "WAL") if self.url is None else connect(self.url)

    def study(self) -> optuna.Study:
        """The study, as another program sees it."""
        return optuna.load_study(storage=self.storage(), study_name=self.name)


def opened(place: Place, folder: str = "ours", n_trials: int = 4, **changes: Any) -> PolicyStudy:
    """The study of a synthetic search."""
    config = SearchConfig(n_trials=n_trials, anchors=2, rungs=[1.0], storage=place.url, **changes)
    path = place.run_folder(folder) / "study.db"
    return open_policy_study(path, place.name, config, problem(config), 0, {"model": "m"})


def outcome(study: PolicyStudy) -> list[tuple[object, ...]]:
    return [(r.index, r.policy.digest(), r.values, r.reason, r.feasible) for r in study.records]


def states(place: Place) -> list[TrialState]:
    return [trial.state for trial in place.study().trials]


@contextlib.contextmanager
def another(place: Place, does: str) -> Iterator[subprocess.Popen[str]]:
    """Another process at work on the study: ``hold`` owns it, ``add`` puts in 12 trials without asking."""
    line = [sys.executable, "-c", OTHER, place.folder, place.url or "", place.name, does]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "running\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    """A PostgreSQL server, started for the first test that needs it."""
    lacking = postgres.missing()
    if lacking is not None:
        pytest.skip(lacking)
    with postgres.start() as server:
        yield server


_numbers = itertools.count()


def make_place(kind: str, folder: Path, request: pytest.FixtureRequest, name: str = "db") -> Place:
    """A new, empty storage of a kind. ``name``: of its folder or database."""
    if kind == "PostgreSQL":
        server: postgres.Server = request.getfixturevalue("server")
        database = f"{name} {next(_numbers)}"
        server.execute(f'CREATE DATABASE "{database}"'.replace("%", "%%"))
        return Place(str(folder), server.url(database))
    path = folder / name
    path.mkdir()
    return Place(str(path), f"sqlite:///{quote(str(path))}/shared.db" if kind == "SQLite URL" else None)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A storage of every kind."""
    return make_place(request.param, tmp_path, request)


@pytest.fixture(params=KINDS[1:])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A storage of every kind that several run folders can use."""
    return make_place(request.param, tmp_path, request)


def test_a_study_is_made_and_resumed(place: Place) -> None:
    with contextlib.closing(opened(place)) as study:
        assert (study.records, study.remaining) == ([], 4)
        study.run(synthetic)
        before = outcome(study)
    with contextlib.closing(opened(place, n_trials=6)) as again:
        assert outcome(again) == before
        again.run(synthetic)
        assert outcome(again)[:4] == before
        assert len(again.records) == 6
    with contextlib.closing(opened(place, n_trials=6)) as study:
        assert study.remaining == 0
    assert (place.run_folder("ours") / "study.db").exists() == (place.url is None)


def test_an_interrupted_trial_is_made_again(place: Place, tmp_path: Path) -> None:
    def interrupted(policy: RoutingPolicy, share: float = 1.0) -> Any:
        if policy == third:
            raise KeyboardInterrupt
        return synthetic(policy, share)

    straight = opened(Place(str(tmp_path)))
    straight.run(synthetic)
    third = straight.records[2].policy
    with contextlib.closing(opened(place)) as study, pytest.raises(KeyboardInterrupt):
        study.run(interrupted)
    with contextlib.closing(opened(place)) as again:
        assert (again.cut_off, len(again.records)) == (1, 2)
        again.run(synthetic)
        assert outcome(again) == outcome(straight)


def test_another_fingerprint_is_refused(place: Place) -> None:
    with contextlib.closing(opened(place)) as study:
        study.run(synthetic)
    before = [(trial.state, trial.user_attrs) for trial in place.study().trials], place.study().user_attrs
    with pytest.raises(UserError, match=r"the study 'first' was made under other settings \(local_share: 0.35 → 0.5\)"):
        opened(place, local_share=0.5)
    assert before == ([(trial.state, trial.user_attrs) for trial in place.study().trials], place.study().user_attrs)
    assert OWNER not in place.study().user_attrs


def test_two_studies_share_a_database(shared: Place) -> None:
    other = replace(shared, name="v1.2_odd-NAME")
    with contextlib.closing(opened(shared)) as one, contextlib.closing(opened(other)) as two:
        for study in (one, two):
            study.run(synthetic)
        assert outcome(one) == outcome(two)
    assert optuna.get_all_study_names(shared.storage()) == ["first", "v1.2_odd-NAME"]


def test_trials_that_are_not_ours_are_skipped(place: Place) -> None:
    with contextlib.closing(opened(place, n_trials=3)) as study:
        study.run(synthetic)
    theirs = place.study()
    for attributes in ({}, {"policy": "mine", "evaluation": 1}):
        theirs.add_trial(optuna.trial.create_trial(values=[0.0, 0.0], user_attrs=attributes))
    theirs.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"reason": "bad luck"}))
    with contextlib.closing(opened(place, n_trials=5)) as study:
        assert (study.foreign, len(study.records)) == ([3, 4, 5], 3)
        study.run(synthetic)
        assert [record.index for record in study.records] == list(range(5))


def test_two_processes_that_write_at_once_lose_nothing(place: Place) -> None:
    with contextlib.closing(opened(place, n_trials=12)) as study:
        with another(place, "add") as process:
            study.run(synthetic)
            assert process.wait(120) == 0
        ours = outcome(study)
        assert [index for index, *_ in ours] == list(range(12))
    with contextlib.closing(opened(place, n_trials=12)) as again:
        assert outcome(again) == ours
        assert len(again.foreign) == 12
    assert states(place) == [TrialState.COMPLETE] * 24


def test_a_second_process_is_refused_until_the_first_is_gone(place: Place) -> None:
    with another(place, "hold") as process:
        with pytest.raises(UserError, match=f"study 'first' is in use by process {process.pid} on .*another name$"):
            opened(place)
        assert states(place) == [TrialState.RUNNING]
        process.send_signal(signal.SIGKILL)
        process.wait()
    with contextlib.closing(opened(place)) as study:
        study.run(synthetic)
        assert [record.index for record in study.records] == [0, 1, 2, 3]


def test_a_study_that_was_closed_has_no_owner(place: Place) -> None:
    study = opened(place)
    assert place.study().user_attrs[OWNER]["pid"] == os.getpid()
    study.close()
    assert OWNER not in place.study().user_attrs
    with contextlib.closing(opened(place, "theirs")) as study:
        assert study.remaining == 4


def test_an_owner_that_cannot_be_read_does_not_block(place: Place) -> None:
    opened(place).close()
    place.study().set_user_attr(OWNER, {"pid": 1})
    with contextlib.closing(opened(place)) as study:
        assert study.remaining == 4


@pytest.mark.parametrize("before", [None, "none"], ids=["no owner", "an owner that is gone"])
def test_of_two_processes_that_claim_at_once_one_succeeds(
    before: str | None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = place.storage()
    study = optuna.create_study(storage=storage, study_name="first")
    if before is not None:
        study.set_user_attr(OWNER, before)
    other = replace(Owner.this_process(place.run_folder("theirs")), pid=1, started=owner._started(1) or "")
    stored = owner._stored
    calls: list[None] = []

    def late(*arguments: object) -> str | None:
        found = stored(storage, study._study_id)
        if not calls:  # the other one is faster
            calls.append(None)
            study.set_user_attr(OWNER, vars(other))
        return found

    monkeypatch.setattr(owner, "_stored", late)
    with pytest.raises(UserError, match="in use by process 1 on"):
        claim(storage, study._study_id, "first", place.run_folder("ours"))
    assert place.study().user_attrs[OWNER]["pid"] == 1


def test_a_machine_that_is_gone_is_freed_by_the_command_of_the_message(shared: Place) -> None:
    opened(shared, "theirs").close()
    gone = {"host": "gone", "machine": "gone", "boot": "gone"}
    other = replace(Owner.this_process(shared.run_folder("theirs")), **gone)  # type: ignore[arg-type]
    shared.study().set_user_attr(OWNER, vars(other))
    with pytest.raises(UserError, match=r"on gone: wait .* if that machine is gone, free the study: optuna") as caught:
        opened(shared)
    program, *arguments = shlex.split(str(caught.value).partition("free the study: ")[2].partition(" (")[0])
    arguments[arguments.index("URL")] = str(shared.url)
    subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True, capture_output=True)
    with contextlib.closing(opened(shared)) as study:
        assert study.remaining == 4


@pytest.mark.parametrize("kind", KINDS)
def test_odd_characters_in_names(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = make_place(kind, tmp_path, request, ODD)
    with contextlib.closing(opened(place, n_trials=3)) as study:
        study.run(synthetic)
    with contextlib.closing(opened(place, n_trials=3)) as study:
        assert len(study.records) == 3


def refusal(url: str, folder: Path) -> str:
    """The line that a storage which cannot be used gets."""
    with pytest.raises(UserError, match=r"^search\.storage cannot be opened: ") as caught:
        opened(Place(str(folder), url))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_storage_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    assert "unable to open database file" in refusal("sqlite:////nowhere/x.db", tmp_path)
    refusal("nonsense://x", tmp_path)
    (tmp_path / "file.db").write_bytes(b"no database" * 100)
    assert "not a database" in refusal(f"sqlite:///{tmp_path}/file.db", tmp_path)


def test_a_driver_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    line = refusal("postgresql+psycopg://me:hunter22@localhost/none", tmp_path)
    assert line.endswith("its driver psycopg is not installed: pip install 'natsl[postgres]'")


@pytest.mark.parametrize("address", ["localhost:1/none", "nowhere.invalid/none"], ids=["port", "host"])
def test_a_password_is_not_in_the_line_about_a_server(address: str, tmp_path: Path) -> None:
    """Also without the driver."""
    assert "hunter22" not in refusal(f"postgresql+psycopg://me:hunter22@{address}", tmp_path)


def test_what_postgresql_refuses_is_one_line_without_the_password(server: postgres.Server, tmp_path: Path) -> None:
    wrong = refusal(server.url("postgres", password="hunter 22"), tmp_path)
    assert "password authentication failed" in wrong
    absent = refusal(server.url("none"), tmp_path)
    assert '"none" does not exist' in absent
    unreachable = refusal(server.url("postgres", folder=tmp_path / "nowhere"), tmp_path)
    for line in (wrong, absent, unreachable):
        for secret in ("hunter 22", postgres.PASSWORD):
            assert secret not in line
            assert quote(secret, safe="") not in line


def test_a_connection_that_is_lost_is_one_line_and_the_search_goes_on(
    server: postgres.Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = make_place("PostgreSQL", tmp_path, request)

    def cut_off(policy: RoutingPolicy, share: float = 1.0) -> Any:
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname <> 'postgres'")
        return synthetic(policy, share)

    with contextlib.closing(opened(place)) as study:
        with pytest.raises(
            UserError, match=r"^search.storage cannot be read or written \(.*same command again"
        ) as caught:
            study.run(cut_off)
        assert "\n" not in str(caught.value)
    with contextlib.closing(opened(place)) as again:
        again.run(synthetic)
        assert [record.index for record in again.records] == [0, 1, 2, 3]


@pytest.mark.parametrize("password", ["pa/ss", "hun ter", "s@cret"])
def test_a_password_that_cannot_be_told_from_the_url_is_refused(password: str) -> None:
    """Where it ends shows in no message or file, so that it could not be left out of them."""
    with pytest.raises(UserError, match="write / as %2F") as error:
        connect(f"postgresql+psycopg://me:{password}@localhost/studies")
    assert password not in str(error.value)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:?cache=shared",
            "sqlite:///file:x?mode=memory&uri=true", "sqlite:///file::memory:?cache=shared&uri=true",
            "sqlite:///file:?uri=true"],
)  # fmt: skip
def test_a_database_in_memory_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=rf"^search.storage = '{re.escape(url)}' is a database in memory"):
        connect(url)
