"""Which owner of a study keeps another process away; what that means for a study: ``tests/test_storage.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from natsl.search import owner
from natsl.search.owner import Owner


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


def test_without_proc_a_process_counts_as_alive_and_its_run_folder_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "_PROC", tmp_path / "none")
    mine = Owner.named("ours")
    other = replace(mine, pid=mine.pid + 1)
    assert not mine.is_gone(mine)
    assert not other.is_gone(mine)
    assert not other.blocks(mine)
    assert replace(other, folder="theirs").blocks(mine)


def test_a_run_folder_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    mine = Owner.this_process(tmp_path)
    assert mine.folder
    assert Owner.this_process(tmp_path) == mine == Owner.parse(mine.dump())
    assert Owner.this_process(tmp_path / "other").folder != mine.folder
