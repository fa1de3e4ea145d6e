"""Checkpoints of a supernet: safetensors and JSON, never a pickle; checksummed, written atomically, newest k kept.

A checkpoint is ``step-000100.safetensors`` (weights, optimiser state) and ``step-000100.json`` (its sha256, the step,
the configuration). The JSON is written last: without it the tensors do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from natsl.calibration import upgraded
from natsl.config import ModelConfig, Precision
from natsl.errors import UserError
from natsl.files import follow_umask, sync, to_plain, write_text
from natsl.model import RoutedLM
from natsl.space.check import check_choice

FORMAT = 1
_NEXT = "replaced_by"  # in a record: the one of the tensors that were about to replace those of the same step
_NAME = re.compile(r"step-(\d{6,})\.json")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new safetensors file, durably; ``UserError`` if that is impossible."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # it hides the system's error, such as a full disk, in its text
        raise UserError(f"{path} cannot be written: {error}") from None
    with path.open("rb+") as file:
        sync(file.fileno())
    follow_umask(path)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def save(
    folder: Path,
    step: int,
    model: RoutedLM,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint of a step and remove all but the newest ``keep``; ``meta`` is JSON-ready.

    Checkpoints of later steps do not count: a resumed training skipped them as damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
        stale.unlink(missing_ok=True)
    tensors = {f"model.{name}": t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    data, info = folder / f"step-{step:06d}.safetensors", folder / f"step-{step:06d}.json"
    temporary = data.with_name(f".{data.name}.{os.getpid()}.tmp")
    try:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # it hides the system's error, such as a full disk, in its text
            raise UserError(f"{data} cannot be written: {error}") from None
        with temporary.open("rb") as file:
            sync(file.fileno())
        record = {"format": FORMAT, "step": step, "sha256": file_sha256(temporary), **meta}
        record["model"] = to_plain(model.config)
        follow_umask(temporary)
        _announce(info, record)
        temporary.replace(data)
    finally:
        temporary.unlink(missing_ok=True)
    write_text(info, json.dumps(record, indent=1))
    for old in [stored for stored in steps(folder) if stored <= step][:-keep]:
        (folder / f"step-{old:06d}.json").unlink(missing_ok=True)
        (folder / f"step-{old:06d}.safetensors").unlink(missing_ok=True)


def _announce(info: Path, record: dict[str, Any]) -> None:
    """Let the record of a checkpoint that is about to be replaced fit the new tensors too: two files, one moment."""
    try:
        old = json.loads(info.read_bytes())
    except (OSError, ValueError):  # there is none, or it is damaged
        return
    if isinstance(old, dict):
        write_text(info, json.dumps({**old, _NEXT: record}, indent=1))


def read_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and record of the newest intact checkpoint; None if the folder has none at all.

    A damaged one is skipped with a warning. Raises ``UserError`` if all are damaged or of a newer format, and for one
    that cannot be read, which says nothing about what it holds.
    """
    stored = steps(folder)
    reason = ""
    for step in reversed(stored):
        data, info = folder / f"step-{step:06d}.safetensors", folder / f"step-{step:06d}.json"
        try:
            record = json.loads(info.read_bytes())
            if not isinstance(record, dict) or not isinstance(record.get("format"), int):
                raise ValueError("it is not a checkpoint record")
            if record["format"] > FORMAT:
                raise ValueError(f"its format {record['format']} needs a newer natsl (this one reads {FORMAT})")
            actual = file_sha256(data)
            following = record.pop(_NEXT, None)
            if isinstance(following, dict) and following.get("sha256") == actual:
                record = following  # cut off between the two files
            if actual != record["sha256"]:
                raise ValueError("checksum error")
            return load_file(data), record
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise UserError(f"{error.filename or data} cannot be read: {error.strerror or error}") from None
            reason = str(error)
            warnings.warn(f"checkpoint {data} is passed over: {error}", stacklevel=2)
    if stored:
        raise UserError(f"no checkpoint in {folder} can be read ({reason}); move the folder away to train again")
    return None


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the optimiser's state from a checkpoint's tensors."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def build_model(config: dict[str, Any], state: dict[str, Tensor], precision: Precision = Precision.float32) -> RoutedLM:
    """A model from a plain configuration and its state; ``UserError`` if they do not fit each other."""
    try:
        shape = ModelConfig.stored(config)
    except TypeError as error:
        raise UserError(f"the model configuration cannot be read: {error}") from None
    state = upgraded(state)
    if "calibration.levels" not in state:
        raise UserError("the weights hold no calibration table")
    model = RoutedLM(shape, state["calibration.levels"].shape[0], precision)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the model configuration: {error}") from None
    return model


def load_model(folder: Path) -> tuple[RoutedLM, dict[str, Any]]:
    """The model of the newest intact checkpoint, in eval mode on the CPU, and the checkpoint's record.

    It computes in the precision that it was trained in.
    """
    newest = read_newest(folder)
    if newest is None:
        raise UserError(f"{folder} holds no checkpoint: train a supernet first")
    tensors, record = newest
    state = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    trained = record.get("train")
    precision = Precision.float32
    if isinstance(trained, dict) and "precision" in trained:  # older checkpoints do not have it
        precision = check_choice("train.precision", trained["precision"], Precision)
    return build_model(record["model"], state, precision).eval(), record
