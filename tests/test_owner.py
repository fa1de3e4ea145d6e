"""A study has one owner, wherever the run folders are; a process that is gone does not block it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from natsl.errors import UserError
from natsl.search import owner
from natsl.search.config import SearchConfig
from natsl.search.owner import OWNER, Owner, claim
from natsl.search.study import PolicyStudy, open_policy_study
from tests.search_helpers import problem, synthetic

HOLDER = """
import sys, time
from pathlib import Path
from natsl.search.study import open_policy_study
from natsl.search.config import SearchConfig
from tests.search_helpers import problem
config = SearchConfig(n_trials=4, storage=sys.argv[1])
study = open_policy_study(Path(sys.argv[2]) / "study.db", "first", config, problem(config), 0, {"model": "m"})
study.propose()
print("running", flush=True)
time.sleep(600)
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database that two run folders share."""
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    return f"sqlite:///{tmp_path}/shared.db"


def opened(url: str, folder: Path) -> PolicyStudy:
    config = SearchConfig(n_trials=4, storage=url)
    return open_policy_study(folder / "study.db", "first", config, problem(config), 0, {"model": "m"})


@pytest.fixture
def holder(url: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, with a run folder of its own, in the middle of the first trial."""
    line = [sys.executable, "-c", HOLDER, url, str(tmp_path / "theirs")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        yield process
        process.kill()


def states(url: str) -> list[TrialState]:
    return [trial.state for trial in optuna.load_study(storage=url, study_name="first").trials]


def test_a_second_process_is_refused_until_the_first_is_gone(
    url: str, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(UserError, match=f"the study 'first' is in use by process {holder.pid} on .*another name$"):
        opened(url, tmp_path / "ours")
    assert states(url) == [TrialState.RUNNING]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    study = opened(url, tmp_path / "ours")
    study.run(synthetic)
    assert [record.index for record in study.records] == [0, 1, 2, 3]


def test_a_study_that_was_closed_has_no_owner(url: str, tmp_path: Path) -> None:
    study = opened(url, tmp_path / "ours")
    attributes = optuna.load_study(storage=url, study_name="first").user_attrs
    assert attributes[OWNER]["pid"] == os.getpid()
    study.close()
    assert OWNER not in optuna.load_study(storage=url, study_name="first").user_attrs
    assert opened(url, tmp_path / "theirs").remaining == 4


def test_an_owner_that_cannot_be_read_does_not_block(url: str, tmp_path: Path) -> None:
    opened(url, tmp_path / "ours").close()
    optuna.load_study(storage=url, study_name="first").set_user_attr(OWNER, {"pid": 1})
    assert opened(url, tmp_path / "ours").remaining == 4


def test_of_two_processes_that_claim_at_once_one_succeeds(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=url, study_name="first")
    storage = RDBStorage(url)
    other = replace(Owner.this_process(tmp_path / "theirs"), pid=1, started=owner._started(1) or "")
    stored = owner._stored

    def late(*arguments: object) -> str | None:
        before = stored(storage, study._study_id)
        if before is None:  # the other one is faster
            study.set_user_attr(OWNER, vars(other))
        return before

    monkeypatch.setattr(owner, "_stored", late)
    with pytest.raises(UserError, match="in use by process 1 on"):
        claim(storage, study._study_id, "first", tmp_path / "ours")
    assert optuna.load_study(storage=url, study_name="first").user_attrs[OWNER]["pid"] == 1


def test_a_machine_that_is_gone_is_freed_by_the_command_of_the_message(url: str, tmp_path: Path) -> None:
    opened(url, tmp_path / "theirs").close()
    gone = {"host": "gone", "machine": "gone", "boot": "gone"}
    other = replace(Owner.this_process(tmp_path / "theirs"), **gone)  # type: ignore[arg-type]
    optuna.load_study(storage=url, study_name="first").set_user_attr(OWNER, vars(other))
    with pytest.raises(UserError, match=r"on gone: wait .* if that machine is gone, free the study: optuna") as caught:
        opened(url, tmp_path / "ours")
    program, *arguments = shlex.split(str(caught.value).partition("free the study: ")[2].partition(" (")[0])
    arguments[arguments.index("URL")] = url
    subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True, capture_output=True)
    assert opened(url, tmp_path / "ours").remaining == 4


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, True),
        ({"folder": "ours"}, True),
        ({"pid": 2**22 + 1}, False),
        ({"started": "0"}, False),
        ({"boot": "before"}, False),
        ({"host": "other", "machine": "other", "boot": "other"}, True),
        ({"host": "other", "machine": "other", "boot": "other", "folder": "ours"}, False),
        ({"pids": "other container"}, True),
    ],
    ids=[
        "alive",
        "alive in our folder",
        "ended",
        "its pid is another process's by now",
        "before a reboot",
        "other machine",
        "other machine that had our folder",
        "other container",
    ],
)
def test_who_blocks(change: dict[str, str], blocks: bool, tmp_path: Path) -> None:
    mine = replace(Owner.this_process(tmp_path), folder="ours")
    alive = replace(mine, pid=1, started=owner._started(1) or "", folder="theirs")
    assert not mine.blocks(mine)
    assert replace(alive, **change).blocks(mine) == blocks  # type: ignore[arg-type]


def test_a_run_folder_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    mine = Owner.this_process(tmp_path)
    assert mine.folder
    assert Owner.this_process(tmp_path) == mine == Owner.parse(mine.dump())
    assert Owner.this_process(tmp_path / "other").folder != mine.folder
