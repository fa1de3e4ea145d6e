"""Files: atomic writes, plain data, JSON, and YAML that is safe to load."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from natsl.checkpoint import load_model
from natsl.errors import UserError
from natsl.export import export_point
from natsl.files import read_config, read_json, to_plain, write_json, write_text
from natsl.load import load_exported
from tests.run_helpers import BUDGET, make_run


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "front.json"
    write_json(path, {"a": 1})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    write_json(path, {"a": 3})
    assert read_json(path) == {"a": 3}


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
def test_every_file_of_a_run_follows_the_umask(umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    before = os.umask(umask)
    try:
        run = make_run(tmp_path)
        export_point(run)
        for path in [run.path, *run.path.rglob("*")]:
            mode = (0o777 if path.is_dir() else 0o666) & ~umask
            assert oct(path.stat().st_mode & 0o777) == oct(mode), path
    finally:
        os.umask(before)


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_without_fsync_chmod_and_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    for module, name in ((os, "fsync"), (os, "chmod"), (Path, "chmod"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, failing(number))
    run = make_run(tmp_path)
    with (
        pytest.warns(UserWarning, match=r"the file system of .*/r has no locks .*: see to it that no other"),
        run.lock(),
    ):
        export_point(run)
    model, policy = load_exported(run.exports / "t0002")
    assert policy == BUDGET
    assert torch.equal(model.embed.weight, load_model(run.supernet)[0].embed.weight)


@pytest.mark.parametrize("call", ["fsync", "flock"])
def test_other_faults_of_a_disk_are_not_passed_over(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr(fcntl if call == "flock" else os, call, failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), run.lock():
        write_text(tmp_path / "a", "x")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr("natsl.checkpoint.file_sha256", failing(number))
    with pytest.raises(UserError) as caught:
        load_model(run.supernet)
    text = f"{run.supernet}/step-000003.safetensors cannot be read: {os.strerror(number)}"
    assert str(caught.value) == text


class Colour(Enum):
    red = "r"


@dataclass
class Settings:
    colour: Colour = Colour.red
    name: str | None = None
    tags: list[str] = field(default_factory=list)


def test_plain_data() -> None:
    value = {"a": (1, float("nan")), Colour.red: Colour.red, "p": Path("x"), "s": Settings(), "i": -float("inf")}
    assert to_plain(value) == {
        "a": [1, None],
        "r": "r",
        "p": "x",
        "s": {"colour": "r", "name": None, "tags": []},
        "i": None,
    }
    json.dumps(to_plain(value), allow_nan=False)


@pytest.mark.parametrize("content", [None, "", "{", "\udcff"], ids=["missing", "empty", "torn", "not UTF-8"])
def test_unreadable_json_names_the_file(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"front\.json is"):
        read_json(path)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n"
BOMB += "\n".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
BAD_CONFIGS = {
    "bomb": (BOMB, "expands to more than 100000 values"),
    "alias to itself": ("a: &a [*a]", "alias to itself"),
    "tag": ("a: !!python/name:os.system", "the YAML tag .* is not allowed"),
    "target": ("data: {_target_: os.system}", "'_target_' is not allowed"),
    "large": ("name: " + "x" * (1 << 20), "is larger than 1048576 bytes"),
    "deep": ("name: " + "[" * 20000, "nested too deeply"),
    "not UTF-8": ("name: \udcff", "is not UTF-8"),
    "date": ("name: 2001-99-99", "cannot be read"),
    "list": ("- a", "is not a configuration"),
    "empty": ("", "is not a configuration"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_config_that_is_not_safe_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        read_config(path)
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_config(path)
