"""What commands read: points of a front, policy files, exported folders, data settings, and all that is refused."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from natsl.checkpoint import file_sha256
from natsl.errors import UserError
from natsl.export import export_point
from natsl.files import read_json, write_json
from natsl.load import (
    EXPORT_FILES,
    Choice,
    check_model,
    file_faults,
    load_choice,
    load_exported,
    read_point,
    stored_data,
)
from natsl.run import Run
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from tests.run_helpers import BUDGET, KINDS, SOFTMAX, make_model, make_run, point, save, write_front


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run that a test may damage."""
    (tmp_path / "runs").mkdir()
    return make_run(tmp_path / "runs")


@pytest.fixture
def exported(run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export of its point t0013, without the fresh process."""
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    return export_point(run, "t0013")


@pytest.mark.parametrize(
    ("pick", "name"),
    [("knee", "t0002"), ("t0013", "t0013"), ("t001", "t0013"), (SOFTMAX.digest()[:5], "t0013")],
    ids=["knee", "id", "beginning of an id", "beginning of a digest"],
)
def test_picks(pick: str, name: str, run: Run) -> None:
    assert read_point(run, pick)["id"] == name


def test_an_ablation_has_no_point(tmp_path: Path) -> None:
    run = Run.open("compared", str(tmp_path))
    (run.path / "ablation.json").write_text("[]")
    with pytest.raises(UserError, match="'compared' is an ablation, which has no front"):
        read_point(run, "knee")


def test_an_exact_id_wins_over_a_beginning(run: Run) -> None:
    write_front(run, [point("t1", BUDGET), point("t10", SOFTMAX)], None)
    assert read_point(run, "t1")["id"] == "t1"
    with pytest.raises(UserError, match="has no knee: pick one of t1, t10"):
        read_point(run, "knee")


OTHER_FILES = (
    "README.md",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "verification.json",
    "verification.safetensors",
)


@pytest.mark.parametrize("name", [*EXPORT_FILES, *OTHER_FILES])
def test_a_flipped_bit(name: str, exported: Path) -> None:
    path = exported / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"checksum error: .*{name} has changed"):
        load_exported(exported)


def test_every_flipped_bit_of_the_manifest(exported: Path) -> None:
    path = exported / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            faults = file_faults(exported)
        except UserError:
            continue
        assert faults, (place, data[place - 10 : place + 10])


def test_a_manifest_that_leads_out_of_the_folder(exported: Path) -> None:
    manifest = read_json(exported / "manifest.json")
    (exported.parent / "x").write_text("x")
    manifest["files"]["../x"] = file_sha256(exported.parent / "x")
    write_json(exported / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"is incomplete: \.\./x is missing"):
        load_exported(exported)


def seal(folder: Path) -> None:
    """Make the manifest fit what lies in the folder, as somebody who means harm would."""
    manifest = read_json(folder / "manifest.json")
    manifest["files"] = {name: file_sha256(folder / name) for name in manifest["files"]}
    write_json(folder / "manifest.json", manifest)


def make_older(folder: Path, form: int, weights: dict[str, Tensor], policy: RoutingPolicy) -> None:
    """Turn an export into one as natsl wrote it before transformers could load it."""
    config = read_json(folder / "config.json")["natsl"]
    manifest = {**read_json(folder / "manifest.json"), "format": form}
    for name in OTHER_FILES:
        (folder / name).unlink()
        del manifest["files"][name]
    shape = {"format": form, "natsl": "0.1.0", "precision": config["precision"], "model": config["model"]}
    write_json(folder / "config.json", shape)
    write_json(folder / "policy.json", policy.to_dict())
    save_file(weights, folder / "model.safetensors")
    write_json(folder / "manifest.json", manifest)
    seal(folder)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_posing_as_weights_is_never_executed(exported: Path, tmp_path: Path) -> None:
    folder = exported
    for write in (pickle.dump, torch.save):
        with (folder / "model.safetensors").open("wb") as file:
            write(Trap(tmp_path / "executed"), file)
        seal(folder)
        with pytest.raises(UserError, match="cannot be used"):
            load_exported(folder)
    assert not (tmp_path / "executed").exists()


DAMAGES: dict[str, tuple[str, str, str]] = {
    "no policy": ("policy.json", "{}", "policy has no"),
    "other policy": ("policy.json", BUDGET.to_json(), "different policies"),
    "no shape": ("config.json", "{}", "model"),
    "a list": ("config.json", "[]", "list"),
    "unknown shape": ("config.json", '{"model": {"foo": 1}}', "foo"),
    "bad shape": ("config.json", '{"model": {"chunk_size": 48}}', "chunk_size = 48"),
    "other shape": ("config.json", '{"model": {"width": 8}}', "do not fit"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_sealed_nonsense(name: str, content: str, message: str, exported: Path) -> None:
    folder = exported
    (folder / name).write_text(content)
    seal(folder)
    with pytest.raises(UserError, match=f"cannot be used: .*{message}"):
        load_exported(folder)


def test_a_policy_that_does_not_fit_in_every_file(exported: Path) -> None:
    policy = RoutingPolicy.all_softmax([Op.routed] * 3, 8).to_dict()
    config = read_json(exported / "config.json")
    write_json(exported / "config.json", {**config, "natsl": {**config["natsl"], "policy": policy}})
    write_json(exported / "policy.json", policy)
    seal(exported)
    with pytest.raises(UserError, match=r"cannot be used: .*of kind delta"):
        load_exported(exported)


def weights_of(folder: Path) -> dict[str, Tensor]:
    """By the names that they have in the model."""
    return {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}


def test_an_export_of_format_1_gives_its_thresholds(exported: Path) -> None:
    tensors = {name: t for name, t in weights_of(exported).items() if not name.startswith("calibration.")}
    row = torch.linspace(-0.02, 0.03, 65)
    make_older(exported, 1, {**tensors, "calibration": row.expand(3, 2, 65).contiguous()}, BUDGET)
    model, policy = load_exported(exported)
    first = model.compile_policy(policy, 1).threshold[0, 0]
    place = 0.7 * 64  # of the budget .3
    expected = torch.lerp(row[int(place)], row[int(place) + 1], place - int(place))
    assert first.tolist() == [float(expected)] * 2
    lists = RoutingPolicy((LayerPolicy(budget=(0.3, 0.3)), *policy.layers[1:]), 8)
    with pytest.raises(UserError, match="only for whole layers: make a table with natsl calibrate"):
        check_model(model, lists)
    check_model(model, RoutingPolicy((LayerPolicy(budget=(0.0, 1.0)), *policy.layers[1:]), 8))


def test_an_export_of_format_2_mixes_without_a_bias(exported: Path) -> None:
    model, policy = load_exported(exported)
    x = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mix_bias"):
                parameter.zero_()
        expected = model(x, policy).logits
    weights = {name: t for name, t in weights_of(exported).items() if not name.endswith("mix_bias")}
    make_older(exported, 2, weights, policy)
    older, policy = load_exported(exported)
    with torch.no_grad():
        assert torch.equal(older(x, policy).logits, expected)


def test_folders_that_are_no_exports(exported: Path, tmp_path: Path) -> None:
    folder = exported
    (folder / "policy.json").unlink()
    with pytest.raises(UserError, match=r"is incomplete: policy\.json is missing"):
        load_exported(folder)
    write_json(folder / "manifest.json", {"format": 5, "natsl": "9.0"})
    with pytest.raises(UserError, match=r"the export format 5, this natsl reads 1 to 4: use natsl 9\.0"):
        load_exported(folder)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"is not an exported model: it has no manifest\.json"):
            load_exported(path)


def test_a_run_is_no_export_but_holds_them(exported: Path, tmp_path: Path) -> None:
    run = exported.parents[1]
    with pytest.raises(UserError, match=rf"it is a run, whose exports are in {run}/export: {exported.name}$"):
        load_exported(run)
    (exported / "manifest.json").unlink()
    with pytest.raises(UserError, match=rf"a run without exports: natsl export run={run.name} root={run.parent} makes"):
        load_exported(run)


def test_choices(run: Run, exported: Path) -> None:
    root = str(run.path.parent)
    assert load_choice(Choice(run="r", root=root))[1] == BUDGET
    assert load_choice(Choice(run="r", root=root, pick="t0013"))[1] == SOFTMAX
    assert load_choice(Choice(export=str(exported)))[1] == SOFTMAX
    uniform = RoutingPolicy.uniform(KINDS, 8, 0.25)
    assert load_choice(Choice(run="r", root=root, budget=0.25))[1] == uniform
    assert load_choice(Choice(export=str(exported), budget=0.25))[1] == uniform
    with pytest.raises(UserError, match="there is no run 'x'"):
        load_choice(Choice(run="x", root=root))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "run, export = (None, None) is not allowed: give either run=<name> or export=<folder>"),
        ({"run": "r", "export": "x"}, "run, export = ('r', 'x') is not allowed"),
        ({"run": "r", "pick": "knee", "policy": "p"}, "pick, policy = ('knee', 'p') is not allowed: give only one"),
        ({"run": "r", "policy": "p", "budget": 0.5}, "policy, budget = ('p', 0.5) is not allowed: give only one"),
        ({"run": "r", "pick": "t1", "budget": 0.0}, "pick, budget = ('t1', 0.0) is not allowed: give only one"),
        ({"run": "r", "budget": 1.5}, "budget = 1.5 is not allowed: it must lie in [0, 1]"),
        ({"export": "x", "calibration": "c"}, "calibration = 'c' is not allowed: an export has its own"),
        ({"export": "x", "pick": "t1"}, "pick = 't1' is not allowed: an export has its own"),
    ],
    ids=[
        "no source",
        "two sources",
        "pick and policy",
        "policy and budget",
        "pick and budget",
        "range",
        "calibration",
        "pick and export",
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Choice(**options)


@pytest.mark.parametrize("options", [{"run": "r", "budget": 0.5}, {"export": "x"}], ids=["budget", "export"])
def test_the_default_pick_may_be_written_out(options: dict[str, Any]) -> None:
    assert Choice(pick="knee", **options).pick == "knee"


def test_a_policy_file_needs_no_front(run: Run, exported: Path, tmp_path: Path) -> None:
    run.front_json.unlink()
    policy = RoutingPolicy.uniform(KINDS, 8, 0.25)
    (tmp_path / "p.json").write_text(policy.to_json())
    model, loaded, record = load_choice(Choice(run="r", root=str(run.path.parent), policy=str(tmp_path / "p.json")))
    assert loaded == policy
    assert record["digest"] == policy.digest()
    other, loaded, _ = load_choice(Choice(export=str(exported), policy=str(tmp_path / "p.json")))
    assert loaded == policy
    assert model.state_dict().keys() == other.state_dict().keys()


POLICIES = {
    "missing": (None, "cannot be read: No such file or directory"),
    "not JSON": ("{", r"is not JSON \(line 1, column 2\): it must be such as {\"chunk_size\": 16, "),
    "not UTF-8": ("\udcff", "is not JSON: it must be such as"),
    "another file": ("root:x:0:0:root:/root:/bin/sh\n", r"is not JSON \(line 1, column 1\): it must be such as"),
    "another JSON": ('{"points": []}', "is not a policy: it must be such as"),
    "text in JSON": ('"root:x:0:0"', "is not a policy: it must be such as"),
    "no layers": ('{"chunk_size": 8, "points": []}', "unknown key 'points' in the policy"),
    "wrong value": ('{"chunk_size": 8, "layers": [{"op": "routed", "budget": 2}]}', "budget = 2 is not allowed"),
    "layers": (RoutingPolicy.all_softmax(KINDS[:2], 8).to_json(), "does not fit the model: .*the model has 3 layers"),
    "chunk size": (RoutingPolicy.all_softmax(KINDS, 16).to_json(), "does not fit the model: .*chunk size is 8"),
}


@pytest.mark.parametrize(("text", "message"), POLICIES.values(), ids=POLICIES.keys())
def test_policy_files_that_cannot_be_used(text: str | None, message: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"policy: .*p\.json.*{message}") as error:
        load_choice(Choice(run="r", root=str(run.path.parent), policy=str(path)))
    assert "root:" not in str(error.value)


def test_a_policy_with_budgets_needs_calibration(run: Run, tmp_path: Path) -> None:
    model = make_model()
    model.calibration.by_layer.fill_(float("nan"))
    save(run, model)
    (tmp_path / "p.json").write_text(BUDGET.to_json())
    with pytest.raises(UserError, match="the model is not calibrated: budgets need a calibration table"):
        load_choice(Choice(run="r", root=str(run.path.parent), policy=str(tmp_path / "p.json")))


def test_stored_data_settings_are_those_of_the_run(run: Run, exported: Path) -> None:
    root = str(run.path.parent)
    for settings in (stored_data("r", root, None), stored_data(None, root, str(exported))):
        assert settings.tasks == {"bytes": 1.0}  # and not the default one too
        assert (settings.seq_len, settings.search_sequences) == (44, 8)


def test_a_training_that_has_not_ended_has_no_settings(run: Run) -> None:
    run.config.unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing: the training of run 'r' has not ended; the same"):
        stored_data(run.name, str(run.path.parent), None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{seq_len: 2.5}", "holds no data settings"),
        ("{mqar: {easy_pairs: ['${data.mqar.easy_pairs}']}}", "interpolations are not allowed"),
        ("&a [*a]", "alias to itself"),
    ],
    ids=["value", "interpolation", "alias"],
)
def test_stored_data_settings_that_cannot_be_used(data: str, message: str, run: Run) -> None:
    run.config.write_text(f"data: {data}\n")
    with pytest.raises(UserError, match=message):
        stored_data(run.name, str(run.path.parent), None)
