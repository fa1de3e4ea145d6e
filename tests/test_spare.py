"""Worker processes that are started before their job is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from natsl import api
from natsl.search.config import Launcher, SearchConfig, SearchRunConfig
from natsl.search.worker import answers, spare
from natsl.search.worker.child import kill, reap, start
from natsl.search.worker.process import EXIT_ORPHAN
from natsl.search.worker.spare import Spares
from tests.fake_search import FAKE, search
from tests.test_pipeline import tiny
from tests.test_workers import ROOT, calls, config, outcome, pids, runs, until


@pytest.mark.parametrize("device", ["cpu", "none", "broken"])
def test_a_search_begins_with_them(device: str, tmp_path: Path) -> None:
    """What fails while they import has no effect on the search: another process takes the place."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    expected = outcome(search(tmp_path / "without", config()).records)
    with Spares([device] * 3, FAKE) as spares:
        first = [process.pid for process in spares._processes]
        study = search(tmp_path / "with", config(), spares)
        assert not any(runs(pid) for pid in first), "also the one that was not needed"
    assert outcome(study.records) == expected
    assert len(calls(tmp_path / "with")) == len(set(calls(tmp_path / "with")))
    assert (pids(tmp_path / "with") == set(first[:2])) == (device != "broken")


def test_what_they_print_once_they_have_a_job_is_in_the_log(tmp_path: Path) -> None:
    with Spares(["cpu"], FAKE) as spares, pytest.raises(ValueError, match=r"^the text has changed$"):
        search(tmp_path, config(workers=1), spares, broken=True)
    assert (tmp_path / "workers" / "0.log").read_text() == "the text has changed\n"


def ended(*arguments: str) -> int:
    """The exit code of a process whose input ends before it gets a job."""
    process = start(None, subprocess.DEVNULL, arguments)
    try:
        assert process.stdin is not None
        process.stdin.close()
        return process.wait(60)
    finally:
        kill(process)
        reap(process)


def test_one_ends_when_it_will_get_no_job() -> None:
    assert ended(FAKE, "cpu", str(os.getpid())) == EXIT_ORPHAN


def test_one_whose_parent_is_gone_imports_nothing() -> None:
    assert ended(FAKE, "broken", str(os.getpid())) == 3
    assert ended(FAKE, "broken", "1") == EXIT_ORPHAN


def test_they_end_with_a_search_that_is_killed_while_they_import(tmp_path: Path) -> None:
    code = (
        "import sys, time; from tests.fake_search import FAKE; from natsl.search.worker.spare import Spares\n"
        "with Spares(['slow'] * 2, FAKE) as spares:\n"
        "    print(*(process.pid for process in spares._processes), flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert all(runs(pid) for pid in children)
        process.send_signal(signal.SIGKILL)
    assert len(children) == 2
    until(lambda: not any(runs(pid) for pid in children))


def test_a_search_has_as_many_as_it_likely_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(device: str = "cpu", source: str | None = "done", **changes: Any) -> SearchRunConfig:
        settings = SearchConfig(**{"workers": 2, **changes})
        return SearchRunConfig("new", str(tmp_path), device=device, supernet_from=source, search=settings)

    def devices(*arguments: Any, **changes: Any) -> list[str]:
        return list(Spares.for_search(options(*arguments, **changes))._devices)

    (tmp_path / "done" / "supernet").mkdir(parents=True)
    monkeypatch.setattr(spare, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices() == ["cpu", "cpu"]
    assert devices(source=None) == []  # a supernet is trained first
    assert devices(source="missing") == []
    assert devices(workers=None) == ["cpu"]
    assert devices(workers=None, launcher=Launcher.inline) == []
    assert devices("auto") == ["auto", "auto"]
    for i in range(3):
        (tmp_path / f"nvidia{i}").touch()
    assert devices("cpu") == ["cpu", "cpu"]
    assert devices("auto", workers=4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert devices("cuda", workers=None) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices("cuda:1", workers=None) == ["cuda:1"]
    for visible, gpus in {"1,2": 2, "": 0, "0,1,2,3,4": 3}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert devices("auto", workers=None) == ([f"cuda:{i}" for i in range(gpus)] or ["auto"])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "study.db").touch()
    assert devices(source=None) == ["cpu", "cpu"]  # it goes on
    (tmp_path / "new" / "report.html").touch()
    assert devices() == []  # it may be finished

    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    monkeypatch.setattr(Path, "is_dir", denied)
    assert devices() == []  # whoever needs the folder says what is wrong


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_those_already_started_are_not_lost(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def second_fails(*arguments: Any) -> subprocess.Popen[bytes]:
        if processes:
            raise error
        processes.append(start(*arguments))
        return processes[0]

    monkeypatch.setattr(spare, "start", second_fails)
    if error is OSError:
        with Spares(["cpu"] * 2, FAKE) as spares:
            assert spares._processes == processes
    else:
        with pytest.raises(KeyboardInterrupt), Spares(["cpu"] * 2, FAKE):
            pass
    assert len(processes) == 1
    assert not runs(processes[0].pid)


def test_a_search_of_a_supernet_that_is_there_starts_no_others(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tiny(tmp_path, text, n_trials=2)
    api.search(**vars(replace(options, name="mine")))
    again = replace(
        options, name="again", supernet_from="mine", search=replace(options.search, launcher=Launcher.local)
    )
    monkeypatch.setattr("natsl.search.worker.pool.start", lambda *_: pytest.fail("another one was started"))
    assert len(api.search(**vars(again)).front.history) == 2


def test_a_mistake_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def noted(*arguments: Any) -> subprocess.Popen[bytes]:
        processes.append(start(*arguments))
        return processes[-1]

    monkeypatch.setattr(spare, "start", noted)
    (tmp_path / "empty" / "supernet").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty"):
        api.search(name="new", root=str(tmp_path), supernet_from="empty", search={"workers": 2}, device="cpu")
    assert len(processes) == 2
    assert not any(runs(process.pid) for process in processes)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_with_a_gpu_the_library_is_imported_too(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imports: list[None] = []
    monkeypatch.setattr(answers, "resolve_device", torch.device)
    monkeypatch.setattr(answers, "import_library", lambda: imports.append(None))
    answers.import_ahead(device)
    assert len(imports) == (device == "cuda")
