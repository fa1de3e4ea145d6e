"""``natsl verify``: a line for each check, and every kind of damage is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from natsl.card import card
from natsl.cli.commands import VerifyConfig, run_verification
from natsl.cli.main import run_verb
from natsl.errors import UserError
from natsl.export import export_choice
from natsl.files import read_json, write_json
from natsl.load import Choice
from natsl.verify import Result, checks, verify
from tests.run_helpers import make_run
from tests.test_load import seal

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_run(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("natsl.export.verify", lambda folder: [])
        return export_choice(Choice(run="r", root=str(root)), sequences=3)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """An export that a test may damage, away from its run."""
    return Path(shutil.copytree(made, tmp_path / "export"))


def natsl_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsl.verify.transformers_version", lambda: None)


def faults(folder: Path) -> list[str]:
    return [result.line() for result in checks(folder) if result.fault is not None]


def test_a_sound_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    natsl_only(monkeypatch)
    results = list(checks(folder))
    assert faults(folder) == []
    names = [result.check for result in results]
    assert names == ["files", "logits", "cache", "batch", "padding", "padding", "generation", *names[7:]]
    assert set(names[7:]) == {"val_loss", "bits_per_byte", "kept_fraction"}
    assert read_json(folder / "verification.json")["tasks"] == ["bytes"]
    assert len(load_file(folder / "verification.safetensors")["bytes.tokens"]) == 3


def test_both_loaders_are_checked(folder: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    results = verify(folder)
    loaders = {result.loader for result in results}
    assert loaders == {"natsl", f"transformers {transformers.__version__}"}
    assert sum(result.loader == "natsl" for result in results) == len(results) // 2 + 1  # and the files


def test_no_text_goes_along(made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    root = made.parents[2]
    without = export_choice(Choice(run="r", root=str(root)), "without", sequences=0)
    assert set(load_file(without / "verification.safetensors")) == {"probe", "logits"}
    natsl_only(monkeypatch)
    assert [result.check for result in checks(without)][-1] == "generation"
    text = (root / "letters.txt").rename(root / "elsewhere.txt")
    with caplog.at_level("INFO"):
        gone = export_choice(Choice(run="r", root=str(root)), "gone")
    text.rename(root / "letters.txt")
    assert "no sequences go along with the export: data.path = " in caplog.text
    assert read_json(gone / "verification.json")["scores"] is None
    assert "The folder holds no sequences: the text of the run was not there" in (gone / "README.md").read_text()


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    seal(folder)


def test_damage_that_checksums_do_not_show(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    natsl_only(monkeypatch)
    change_weights(folder, lambda weights: weights["model.blocks.0.mixer.qkv_proj.weight"].mul_(1.2))
    found = [line.split(": ")[1] for line in faults(folder)]
    assert found[0] == "logits"
    assert "val_loss" in found


def test_a_calibration_table_of_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    natsl_only(monkeypatch)
    change_weights(folder, lambda weights: weights["model.calibration.by_layer"].add_(0.01))
    assert "kept_fraction" in [line.split(": ")[1] for line in faults(folder)]


@pytest.mark.parametrize("loader", ["natsl", "transformers"])
def test_weights_that_are_not_finite(loader: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if loader == "natsl":
        natsl_only(monkeypatch)
    else:
        pytest.importorskip("transformers", minversion="5.23")
    change_weights(folder, lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    (line, *others) = [line for line in faults(folder) if f" {loader}" in line]
    assert re.search(": loading: .*the weights norm.weight hold numbers that are not finite", line)
    assert others == []


def test_what_is_stored_of_the_scores_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    natsl_only(monkeypatch)
    record = read_json(folder / "verification.json")
    record["scores"]["val_loss"] += 0.01
    write_json(folder / "verification.json", record)
    seal(folder)
    (line,) = faults(folder)
    assert line.startswith("FAILED natsl: val_loss: ")


def test_an_export_of_before(folder: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    for name in ("verification.json", "verification.safetensors"):
        (folder / name).unlink()
        del manifest["files"][name]
    write_json(folder / "manifest.json", manifest)
    assert faults(folder) == [
        "FAILED natsl: sample: the folder has nothing to compare with: it was made by an older natsl"
    ]


def test_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    natsl_only(monkeypatch)
    text = card(folder, list(checks(folder)))
    assert "AutoModelForCausalLM.from_pretrained" in text
    kept = read_json(folder / "verification.json")["scores"]["kept_by_head"]
    for start, share in (
        ("layer  0  .3          head 0    ", kept[0][0]),
        ("layer  2  .6≤.5       head 0    ", kept[2][0]),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        assert line == start + "█" * round(20 * share) + "·" * (20 - round(20 * share)) + f" {100 * share:5.1f} %"
    assert "layer  1  D           all heads ····················   0.0 %" in text.splitlines()
    assert "- run: r\n- point: t0002\n" in text
    assert "- natsl: logits: the supernet's differ by 0" in text
    assert "transformers was not installed: only natsl's own loader was checked." in text
    both = [Result("natsl", "files", "good"), Result("transformers 5.23.0", "logits", "good")]
    assert "transformers was not installed" not in card(folder, both)


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not an exported model: it has no manifest\.json"):
        run_verification(VerifyConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("verification.safetensors", b"no tensors", "SafetensorError"),
        ("verification.json", b'{"tasks": ["other"], "in_bytes": true, "scores": null}', "KeyError: 'other.tokens'"),
        ("verification.json", b"[]", "TypeError"),
        ("verification.json", b"{", "is not valid JSON"),
    ],
    ids=["tensors", "task", "list", "JSON"],
)
def test_a_sample_that_cannot_be_read_is_one_line(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    seal(folder)
    found = list(checks(folder))
    assert [result.check for result in found] == ["files", "sample"]
    assert message in str(found[1].fault)
    assert "\n" not in found[1].line()


def test_a_sample_of_another_shape_is_one_line_for_each_loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    natsl_only(monkeypatch)
    stored = load_file(folder / "verification.safetensors")
    stored["probe"] = stored["probe"][:1].contiguous()
    save_file(stored, folder / "verification.safetensors")
    seal(folder)
    found = list(checks(folder))
    assert found[-1].check == "comparing"
    assert "\n" not in found[-1].line()


def test_the_sample_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from natsl import verify as module

    calls: list[Path] = []
    read = module._Sample.read

    def counted(path: Path) -> object:
        calls.append(path)
        return read(path)

    monkeypatch.setattr(module._Sample, "read", counted)
    monkeypatch.setattr(module, "transformers_version", lambda: "any")
    monkeypatch.setattr(module, "_load_with_transformers", module._load)
    assert {result.loader for result in checks(folder)} == {"natsl", "transformers any"}
    assert calls == [folder]


def test_lines() -> None:
    assert Result("natsl", "logits", "equal").line() == "ok     natsl: logits: equal"
    assert Result("natsl", "logits", "", "differ").line() == "FAILED natsl: logits: differ"


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "natsl", "verify", "export=export"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.startswith("ok     ") for line in done.stdout.splitlines())
    for name in ("README.md", "provenance.json"):
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 4
        (folder / name).write_bytes(data)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(SystemExit, match="1"):
        run_verb("verify", ["export=export"])
    lines = [
        f"FAILED natsl: files: checksum error: export/{name} has changed since it was exported"
        for name in (
            "provenance.json",
            "README.md",
        )
    ]
    assert capsys.readouterr().out.splitlines() == lines
