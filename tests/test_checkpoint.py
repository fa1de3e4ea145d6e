"""Checkpoints: what is written comes back bit for bit; what is damaged, foreign or dangerous does not."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from natsl import checkpoint
from natsl.model import RoutedLM
from natsl.space.policy import LayerPolicy, RoutingPolicy
from tests.oracles import fill_calibration, tiny_config, tiny_model


def make_state() -> tuple[RoutedLM, torch.optim.AdamW]:
    """A model and an optimiser that have made a step."""
    model = tiny_model("r")
    fill_calibration(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.arange(16)[None], RoutingPolicy((LayerPolicy(budget=0.5),), 8)).logits.square().mean().backward()
    optimizer.step()
    return model, optimizer


def write(folder: Path, *steps: int, keep: int = 5) -> RoutedLM:
    """Checkpoints whose first embedding tells their step."""
    model, optimizer = make_state()
    for step in steps:
        with torch.no_grad():
            model.embed.weight[0, 0] = step
        checkpoint.save(folder, step, model, optimizer, {"seed": 3}, keep)
    return model


def step_of(folder: Path) -> int:
    found = checkpoint.read_newest(folder)
    assert found is not None
    tensors, record = found
    assert tensors["model.embed.weight"][0, 0] == record["step"]
    return int(record["step"])


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    model, optimizer = make_state()
    checkpoint.save(tmp_path / "new" / "folder", 7, model, optimizer, {"seed": 3, "finished": True}, keep=1)
    loaded, record = checkpoint.load_model(tmp_path / "new" / "folder")
    assert not loaded.training
    assert loaded.config == model.config
    assert (record["step"], record["seed"], record["finished"]) == (7, 3, True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    found = checkpoint.read_newest(tmp_path / "new" / "folder")
    assert found is not None
    other = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    checkpoint.load_optimizer(other, found[0])
    before, after = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert before.keys() == after.keys()
    for index, state in before.items():
        for name, value in state.items():
            assert torch.equal(after[index][name], value)


def test_state_before_the_first_step(tmp_path: Path) -> None:
    model = RoutedLM(tiny_config("rs", tie_embeddings=False))
    checkpoint.save(tmp_path, 0, model, torch.optim.AdamW(model.parameters()), {}, keep=1)
    loaded, _ = checkpoint.load_model(tmp_path)
    assert loaded.calibration.by_layer.isnan().all()
    assert loaded.head is not None


def test_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 5, 10, 15, 1_000_000, keep=2)
    assert checkpoint.steps(tmp_path) == [15, 1_000_000]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    assert step_of(tmp_path) == 1_000_000


def test_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert checkpoint.read_newest(folder) is None
        with pytest.raises(ValueError, match="holds no checkpoint: train a supernet first"):
            checkpoint.load_model(folder)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "missing"])
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, suffix: str, how: str) -> None:
    write(tmp_path, 5, 10)
    path = tmp_path / f"step-000010.{suffix}"
    damage(path, how)
    if suffix == "json" and how == "missing":  # as if killed before the record was written: not a checkpoint yet
        assert step_of(tmp_path) == 5
        return
    if suffix == "json" and how == "flipped":
        path.write_text(path.read_text(errors="replace").replace('"sha256": "', '"sha256": "0'))
    with pytest.warns(UserWarning, match="step-000010.safetensors is passed over"):
        assert step_of(tmp_path) == 5


def test_a_flipped_bit_anywhere_is_a_checksum_error(tmp_path: Path) -> None:
    write(tmp_path, 5)
    path = tmp_path / "step-000005.safetensors"
    whole = path.read_bytes()
    for place in (0, 9, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with (
            pytest.warns(UserWarning, match="passed over: checksum error"),
            pytest.raises(ValueError, match=r"no checkpoint in .* can be read \(checksum error\)"),
        ):
            checkpoint.load_model(tmp_path)
    path.write_bytes(whole)
    assert step_of(tmp_path) == 5


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_posing_as_a_checkpoint_is_never_run(tmp_path: Path, how: str) -> None:
    folder, marker = tmp_path / "run", tmp_path / "executed"
    write(folder, 5)
    path, info = folder / "step-000005.safetensors", folder / "step-000005.json"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save({"model": Bomb(marker)}, path)
    record = json.loads(info.read_text())
    info.write_text(json.dumps({**record, "sha256": checkpoint.file_sha256(path)}))
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(ValueError, match="can be read"):
        checkpoint.load_model(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb itself works"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"format": 99}, "its format 99 needs a newer natsl"),
        ({"format": "1"}, "it is not a checkpoint record"),
        ([1], "it is not a checkpoint record"),
        ({"format": 1}, "sha256"),
    ],
    ids=["newer", "text", "list", "no-checksum"],
)
def test_foreign_records_are_refused(tmp_path: Path, record: object, message: str) -> None:
    write(tmp_path, 5)
    (tmp_path / "step-000005.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=message), pytest.raises(ValueError, match=message):
        checkpoint.read_newest(tmp_path)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 5)
    for name in ("step-7.json", "step-000009.json.bak", "notes.txt", "step-000011.safetensors"):
        (tmp_path / name).write_text("{}")
    assert checkpoint.steps(tmp_path) == [5]
    assert step_of(tmp_path) == 5


def test_a_failed_write_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path, 5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 10, model, torch.optim.AdamW(model.parameters()), {}, keep=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for name in (".step-000005.safetensors.99.tmp", ".step-000005.json.abc.tmp", "notes.tmp"):
        (tmp_path / name).write_text("half")
    write(tmp_path, 10)
    names = ["notes.tmp", "step-000010.json", "step-000010.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_later_damaged_steps_do_not_push_out_the_saved_one(tmp_path: Path) -> None:
    write(tmp_path, 5, 15)
    damage(tmp_path / "step-000015.safetensors", "truncated")
    write(tmp_path, 10, keep=1)
    assert checkpoint.steps(tmp_path) == [10, 15]
    with pytest.warns(UserWarning, match="passed over"):
        assert step_of(tmp_path) == 10


def test_an_overwritten_step_is_the_new_one(tmp_path: Path) -> None:
    write(tmp_path, 5, 10)
    damage(tmp_path / "step-000010.safetensors", "truncated")
    write(tmp_path, 10)
    assert step_of(tmp_path) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 24}, "the weights do not fit the model configuration"),
        ({"colour": 1}, "the model configuration cannot be read"),
        ({"chunk_size": 7}, "model.chunk_size = 7"),
        ({"layers": ["delta"]}, "the weights do not fit"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_weights_and_configuration_must_fit(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path, 5)
    info = tmp_path / "step-000005.json"
    record = json.loads(info.read_text())
    info.write_text(json.dumps({**record, "model": {**record["model"], **change}}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(tmp_path)


def test_a_copied_folder_is_still_valid(tmp_path: Path) -> None:
    write(tmp_path / "a", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert step_of(tmp_path / "b") == 5
