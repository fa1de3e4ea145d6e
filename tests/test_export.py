"""Exports: what is written, the check in a fresh process, and everything that must be refused."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from natsl.cli.main import run_verb
from natsl.errors import UserError
from natsl.export import export_choice, export_point
from natsl.files import read_config, read_json
from natsl.load import EXPORT_FILES, Choice, load_exported
from natsl.model import RoutedLM
from natsl.run import Run
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.verify import verify, write_sample
from tests.run_helpers import BUDGET, KINDS, SOFTMAX, make_model, make_run, point, save, write_front

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run that a test may damage."""
    (tmp_path / "runs").mkdir()
    return make_run(tmp_path / "runs")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the fresh process where a test is about something else."""
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])


def tokens() -> torch.Tensor:
    return torch.randint(384, (2, 27), generator=torch.Generator().manual_seed(5))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_export_and_reload(run: Run) -> None:
    folder = export_point(run, "knee")
    assert folder == run.path / "export" / "t0002"
    files = read_json(folder / "manifest.json")["files"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "manifest.json"])
    assert {*EXPORT_FILES, "README.md", "generation_config.json", "tokenizer.json"} < {*files}
    assert [path.name for path in folder.parent.iterdir()] == ["t0002"]
    model, policy = load_exported(folder)
    assert policy == BUDGET
    assert not model.training
    expected = make_model()(tokens(), BUDGET)
    assert torch.equal(model(tokens(), policy).logits, expected.logits)
    assert 0 < float(expected.layers[0].route.mean()) < 1  # else the calibration would not matter
    provenance = read_json(folder / "provenance.json")
    assert (provenance["run"], provenance["id"], provenance["digest"]) == ("r", "t0002", BUDGET.digest())
    assert provenance["checkpoint"]["step"] == 3
    assert read_json(folder / "calibration.json")["by_head"][1][0][0] is None


@pytest.mark.usefixtures("fast")
def test_a_fresh_process_elsewhere_gives_the_same_logits(run: Run, tmp_path: Path) -> None:
    folder = export_point(run, "t0002").rename(tmp_path / "moved")
    code = "import sys, torch; from natsl.load import load_exported; m, p = load_exported(sys.argv[1]);"
    code += "t = torch.randint(384, (2, 27), generator=torch.Generator().manual_seed(5));"
    code += "torch.set_num_threads(int(sys.argv[2])); torch.save(m(t, p).logits.detach(), sys.argv[3])"
    arguments = [str(folder), str(torch.get_num_threads()), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, check=True)
    shutil.rmtree(run.path)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, make_model()(tokens(), BUDGET).logits.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ("t00", "fits several points: pick knee or one of t0002, t0013"),
        ("t9", "is not on the front: pick knee or one of t0002, t0013"),
        ("", "is not on the front"),
        ("../../x", "is not on the front"),
    ],
    ids=["several", "none", "empty", "path"],
)
def test_picks_that_name_no_point(pick: str, message: str, run: Run) -> None:
    with pytest.raises(UserError, match=message):
        export_point(run, pick)
    assert not run.exports.exists()


def test_fronts_that_cannot_be_used(run: Run) -> None:
    write_front(run, [], None)
    with pytest.raises(UserError, match="is empty: no trial was feasible"):
        export_point(run)
    for content in ("{", "[]", '{"points": 3}', '{"points": [{"id": 1}]}'):
        run.front_json.write_text(content)
        with pytest.raises(UserError, match=r"front\.json is not"):
            export_point(run)
    run.front_json.unlink()
    with pytest.raises(UserError, match=r"has no front\.json: finish the search first"):
        export_point(run)


BAD_NAMES = ["../../x", "/tmp/x", "a\0b", "", ".", "..", "a/b", ".hidden"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused(name: str, run: Run) -> None:
    before = contents(run.path.parent.parent)
    with pytest.raises(UserError, match=r"name = .* is not allowed"):
        export_point(run, name=name)
    assert contents(run.path.parent.parent) == before
    assert not run.exports.exists()


def test_a_bad_id_is_refused(run: Run) -> None:
    write_front(run, [point("../../x", BUDGET)], "../../x")
    with pytest.raises(UserError, match="is not allowed"):
        export_point(run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_that_lead_out_are_refused(overwrite: bool, run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run.exports.mkdir()
    (run.exports / "x").symlink_to(outside)
    with pytest.raises(UserError, match="leads out of"):
        export_point(run, name="x", overwrite=overwrite)
    shutil.rmtree(run.exports)
    run.exports.symlink_to(outside)
    with pytest.raises(UserError, match="leads out of"):
        export_point(run, name="y", overwrite=overwrite)
    assert list(outside.iterdir()) == []


@pytest.mark.usefixtures("fast")
def test_an_existing_folder(run: Run) -> None:
    folder = export_point(run, "knee", "best")
    before = contents(folder)
    with pytest.raises(UserError, match="exists: choose another name or give overwrite=true"):
        export_point(run, "t0013", "best")
    assert contents(folder) == before
    assert export_point(run, "t0013", "best", overwrite=True) == folder
    assert load_exported(folder)[1] == SOFTMAX
    assert [path.name for path in run.exports.iterdir()] == ["best"]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", ["file", "folder", "link", "link in place of a file"])
def test_what_is_not_of_the_export_is_never_lost_with_it(kind: str, run: Run, tmp_path: Path) -> None:
    folder = export_point(run, name="best")
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    added = folder / ("README.md" if kind == "link in place of a file" else "notes")
    if kind == "file":
        added.write_text("notes")
    elif kind == "folder":
        added.mkdir()
    else:
        added.unlink(missing_ok=True)
        added.symlink_to(mine)
    before = contents(run.exports)
    with pytest.raises(UserError, match=f"best holds {added.name}, no file of an export"):
        export_point(run, "t0013", "best", overwrite=True)
    assert contents(run.exports) == before
    assert os.path.lexists(added)
    assert mine.read_text() == "mine"


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("leads", ["best", "nowhere"])
def test_a_link_to_another_export_is_not_followed(leads: str, run: Run) -> None:
    before = contents(export_point(run, name="best"))
    (run.exports / "link").symlink_to(leads)
    with pytest.raises(UserError, match="link exists: choose another name"):
        export_point(run, "t0013", "link")
    with pytest.raises(UserError, match="link is not an exported model, so it is not overwritten"):
        export_point(run, "t0013", "link", overwrite=True)
    assert (run.exports / "link").is_symlink()
    assert contents(run.exports / "best") == before


def test_a_folder_that_is_no_export_is_never_overwritten(run: Run) -> None:
    (run.exports / "notes").mkdir(parents=True)
    (run.exports / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an exported model"):
        export_point(run, name="notes", overwrite=True)
    assert contents(run.exports) == {"notes/mine.txt": b"mine"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, run: Run) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.out_proj.weight")[0, 0] = value
    save(run, model)
    with pytest.raises(UserError, match="hold numbers that are not finite"):
        export_point(run)
    assert not run.exports.exists()


def test_a_budget_without_calibration(run: Run) -> None:
    model = make_model()
    model.calibration.by_layer.fill_(float("nan"))
    save(run, model)
    with pytest.raises(UserError, match="the model is not calibrated"):
        export_point(run, "t0002")


@pytest.mark.usefixtures("fast")
def test_a_policy_without_budgets_needs_no_calibration(run: Run) -> None:
    model = make_model()
    model.calibration.by_layer.fill_(float("nan"))
    save(run, model)
    assert load_exported(export_point(run, "t0013"))[1] == SOFTMAX


MISFITS = {
    "layers": (RoutingPolicy.all_softmax(KINDS[:2], 8), "the model has 3 layers"),
    "chunk size": (RoutingPolicy.all_softmax(KINDS, 16), "the model's chunk size is 8"),
    "kind": (RoutingPolicy.all_softmax([Op.routed] * 3, 8), "of kind delta"),
}


@pytest.mark.parametrize(("policy", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_a_policy_that_does_not_fit(policy: RoutingPolicy, message: str, run: Run) -> None:
    write_front(run, [point("t1", policy)], "t1")
    with pytest.raises(ValueError, match=message):
        export_point(run)
    assert not run.exports.exists()


def test_a_policy_that_is_none(run: Run) -> None:
    write_front(run, [{"id": "t1", "policy": {"layers": []}}], "t1")
    with pytest.raises(UserError, match="point t1"):
        export_point(run)


def test_another_supernet_than_the_searched_one(run: Run) -> None:
    write_front(run, [point("t1", BUDGET)], "t1", fingerprint={"supernet": "0" * 64})
    with pytest.raises(UserError, match="is not the one that was searched"):
        export_point(run)


def test_a_full_disk_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_point(run)
    assert list(run.exports.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    assert export_point(run).is_dir()


@pytest.mark.usefixtures("fast")
def test_a_failed_rename_brings_the_old_export_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_point(run, name="best")
    before = contents(folder)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        export_point(run, "t0013", "best", overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in run.exports.iterdir()] == ["best"]


def test_a_model_that_differs_is_not_exported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_other(folder: Path, model: RoutedLM, policy: RoutingPolicy, *_: object) -> None:
        other = make_model()
        with torch.no_grad():
            other.embed.weight.mul_(1.001)
        write(folder, other, policy, {})

    from natsl import export

    write = export._write
    monkeypatch.setattr(export, "_write", save_other)
    with pytest.raises(
        UserError, match=r"in a fresh process: natsl: logits: the supernet's differ by .*: nothing was exported"
    ):
        export_point(run)
    assert list(run.exports.iterdir()) == []


def test_a_model_that_cannot_be_loaded_is_not_exported(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot be loaded in a fresh process: .*has no manifest\.json"):
        verify(tmp_path / "empty")


def test_no_secret_is_exported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natsl.export.verify", lambda folder: [])
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    write_front(run, [point("t1", BUDGET) | {"measured": {"api_key": "hunter2"}}], "t1", fingerprint={"x": "y"})
    run.front_json.write_text(run.front_json.read_text().replace('"y"', '"0123456789abcdef"'))
    everything = b"".join(contents(export_point(run)).values())
    assert b"0123456789abcdef" not in everything
    assert b"hunter2" not in everything


@pytest.mark.usefixtures("fast")
def test_no_secret_of_data_options_is_exported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_TOKEN", "0123456789abcdef")
    config = read_config(run.config)
    config["data"]["include"] = ["*.txt", "0123456789abcdef/*"]
    run.config.write_text(yaml.safe_dump(config))
    folder = export_point(run)
    assert b"0123456789abcdef" not in b"".join(contents(folder).values())
    assert read_json(folder / "provenance.json")["data"]["include"] == ["*.txt", "<removed>/*"]


def test_the_command(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, where = ["run=r", "root=runs", "pick=t0013"], run.path.parent.parent
    command = [sys.executable, "-m", "natsl.export", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exported to runs/r/export/t0013" in done.stdout
    monkeypatch.chdir(where)
    with pytest.raises(SystemExit, match="2"):
        run_verb("export", arguments)
    assert capsys.readouterr().err == "error: runs/r/export/t0013 exists: choose another name or give overwrite=true\n"


@pytest.mark.usefixtures("fast")
def test_a_policy_that_is_not_on_the_front(run: Run, tmp_path: Path) -> None:
    policy = RoutingPolicy((LayerPolicy(threshold=0.5), LayerPolicy(Op.delta), LayerPolicy(budget=0.2)), 8)
    (tmp_path / "mine.json").write_text(policy.to_json())
    run.front_json.unlink()
    choice = Choice(run="r", root=str(run.path.parent), policy=str(tmp_path / "mine.json"))
    folder = export_choice(choice)
    assert folder == run.exports / f"policy-{policy.digest()[:8]}"
    assert load_exported(folder)[1] == policy
    provenance = read_json(folder / "provenance.json")
    assert (provenance["policy_file"], provenance["digest"]) == ("mine.json", policy.digest())
    assert provenance["checkpoint"] == {"step": 3, "sha256": read_json(run.supernet / "step-000003.json")["sha256"]}
    assert "pick" not in provenance
    with pytest.raises(UserError, match="exists: choose another name"):
        export_choice(choice)
    assert export_choice(choice, "other") == run.exports / "other"


@pytest.mark.usefixtures("fast")
def test_a_budget_says_so_in_its_provenance(run: Run) -> None:
    provenance = read_json(export_choice(Choice(run="r", root=str(run.path.parent), budget=0.25)) / "provenance.json")
    assert (provenance["budget"], "pick" in provenance, "values" in provenance) == (0.25, False, False)


def test_an_export_is_not_exported_again() -> None:
    with pytest.raises(UserError, match="is an export already: give run=<name>"):
        export_choice(Choice(export="runs/r/export/t0013"))


def test_a_policy_is_verified_in_a_fresh_process(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text(SOFTMAX.to_json())
    # what the fresh process compares with is another policy's
    monkeypatch.setattr(
        "natsl.export.write_sample", lambda folder, model, _, sets: write_sample(folder, model, BUDGET, sets)
    )
    with pytest.raises(UserError, match="nothing was exported"):
        export_choice(Choice(run="r", root=str(run.path.parent), policy=str(tmp_path / "mine.json")))
    assert list(run.exports.iterdir()) == []
