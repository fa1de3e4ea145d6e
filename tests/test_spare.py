"""Worker processes that are started before their job is known."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from natsl import api
from natsl.search.config import Launcher, SearchConfig, SearchRunConfig
from natsl.search.worker import spare
from natsl.search.worker.child import kill, reap, start
from natsl.search.worker.process import EXIT_ORPHAN
from natsl.search.worker.spare import Spares
from tests.fake_search import FAKE, search
from tests.test_workers import calls, config, outcome, pids, runs


@pytest.mark.parametrize("device", ["cpu", "none", "broken"])
def test_a_search_begins_with_them(device: str, tmp_path: Path) -> None:
    """What fails while they import has no effect on the search: another process takes the place."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    expected = outcome(search(tmp_path / "without", config()).records)
    with Spares(3, device, FAKE) as spares:
        first = [process.pid for process in spares._processes]
        study = search(tmp_path / "with", config(), spares)
        assert all(runs(pid) == (pid == first[2]) for pid in first)  # the others ended with the search
    assert not runs(first[2])
    assert outcome(study.records) == expected
    assert len(calls(tmp_path / "with")) == len(set(calls(tmp_path / "with")))
    assert (pids(tmp_path / "with") == set(first[:2])) == (device != "broken")


def test_what_they_print_once_they_have_a_job_is_in_the_log(tmp_path: Path) -> None:
    with Spares(1, "cpu", FAKE) as spares, pytest.raises(ValueError, match=r"^the text has changed$"):
        search(tmp_path, config(workers=1), spares, broken=True)
    assert (tmp_path / "workers" / "0.log").read_text() == "the text has changed\n"


def test_one_ends_when_it_will_get_no_job() -> None:
    process = start(None, subprocess.DEVNULL, [FAKE, "cpu"])
    try:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == EXIT_ORPHAN
    finally:
        kill(process)
        reap(process)


def counted(monkeypatch: pytest.MonkeyPatch, options: SearchRunConfig) -> int:
    """How many processes a search begins with; none is started."""
    begun: list[str] = []
    monkeypatch.setattr(spare, "start", lambda threads, errors, arguments: begun.append(arguments[1]))
    Spares.for_search(options)
    assert begun == [options.device] * len(begun)
    return len(begun)


def test_a_search_has_as_many_as_it_is_sure_to_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(**changes: Any) -> SearchRunConfig:
        return SearchRunConfig("new", str(tmp_path), search=SearchConfig(**{"workers": 2, **changes}))

    assert counted(monkeypatch, options()) == 0  # a supernet is trained first
    assert counted(monkeypatch, replace(options(), supernet_from="missing")) == 0
    (tmp_path / "done" / "supernet").mkdir(parents=True)
    ready = replace(options(), supernet_from="done")
    assert counted(monkeypatch, ready) == 2
    for i in range(4):
        (tmp_path / f"nvidia{i}").touch()
    monkeypatch.setattr(spare, "_DEVICES", tmp_path)
    for device, gpus in {"auto": 4, "cuda": 4, "cuda:1": 1, "cpu": 1}.items():
        assert counted(monkeypatch, replace(options(workers=None), supernet_from="done", device=device)) == gpus
    for visible, gpus in {"1,2": 2, "": 1, "0,1,2,3,4": 4}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert counted(monkeypatch, replace(options(workers=None), supernet_from="done")) == gpus
    inline = options(launcher=Launcher.inline, workers=None)
    assert counted(monkeypatch, replace(inline, supernet_from="done")) == 0
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "study.db").touch()
    assert counted(monkeypatch, options()) == 2  # it goes on
    (tmp_path / "new" / "report.html").touch()
    assert counted(monkeypatch, ready) == 0  # it is finished, or nearly


def test_a_mistake_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []

    def noted(*arguments: Any) -> subprocess.Popen[bytes]:
        begun.append(start(*arguments))
        return begun[-1]

    monkeypatch.setattr(spare, "start", noted)
    (tmp_path / "empty" / "supernet").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty"):
        api.search(name="new", root=str(tmp_path), supernet_from="empty", search={"workers": 2}, device="cpu")
    assert len(begun) == 2
    assert not any(runs(process.pid) for process in begun)
