"""Where the supernet of a search comes from: it is trained, resumed, or copied from another run."""

from __future__ import annotations

import logging
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from natsl import __version__, checkpoint
from natsl.config import ModelConfig, SupernetConfig, TrainConfig
from natsl.data import TaskData, load_text
from natsl.errors import UserError
from natsl.files import child_folder, to_plain, user_path
from natsl.heldout import trained_text
from natsl.model import RoutedLM
from natsl.record import TrainedText
from natsl.run import Run
from natsl.search.config import SearchRunConfig
from natsl.tracking import Tracker
from natsl.train import TrainRecipe, fit, write_calibration

_LOG = logging.getLogger(__name__)


def take_settings(config: SearchRunConfig) -> SearchRunConfig:
    """The configuration of a search with the model and the training of the run that ``supernet_from`` names.

    Raises ``UserError`` if that supernet is not trained to its end, or was specialised for one policy.
    """
    if config.supernet_from is None:
        return config
    source = _source(config)
    if source is None:
        raise UserError(f"the run {config.supernet_from!r} holds no checkpoint: train its supernet first")
    if not source.get("finished"):
        raise UserError(
            f"the supernet of run {config.supernet_from!r} is not trained to its end: resume that run first"
        )
    if source.get("specialised"):
        raise UserError(
            f"supernet_from = {config.supernet_from!r} is a specialisation: its weights are for one policy, and others "
            "cannot be judged on them. Search the supernet that it began with"
        )
    trained, supernet = source.get("train", {}), source.get("supernet", {})  # older checkpoints do not have them
    return replace(
        config,
        model=ModelConfig.stored(source["model"]),
        train=replace(config.train, **known(trained, TrainConfig)),
        supernet=replace(config.supernet, **known(supernet, SupernetConfig)),
    )


def held_out_data(config: SearchRunConfig) -> tuple[TaskData, TrainedText | None]:
    """The data of a search, and what a supernet of another run was trained on, which is not held out.

    ``UserError`` if nothing else is left, if it is not known what the supernet was trained on, or if that was text
    where this is token ids, or the other way round.
    """
    settings = config.data
    source = None if config.supernet_from is None else source_run(config)
    trained = None if source is None else trained_text(source)
    text = load_text(settings.path, settings.text_rules(str(user_path(config.root, "root"))), trained)
    if trained is not None:
        trained.check_kind(text)
    data = TaskData(settings, text, config.model.vocab_size)
    if source is not None and trained is None:
        newest = checkpoint.read_newest(source.supernet)
        if newest is None or newest[1].get("data") != data.fingerprint:
            raise UserError(
                f"supernet_from = {source.name!r}: the text that it was trained on is no longer there, so that it "
                "cannot be kept out of the held-out text: search with the data settings of that run"
            )
    return data, trained


def source_run(config: SearchRunConfig) -> Run:
    """The run whose supernet is copied, or the search's own run if that was removed and its copy is there."""
    root = user_path(config.root, "root")
    own = Run(child_folder(root, config.name, "name"))
    source = child_folder(root, str(config.supernet_from), "supernet_from")
    if not source.exists() and checkpoint.steps(own.supernet):
        return own
    return Run.open(source.name, config.root, create=False)


def _source(config: SearchRunConfig) -> dict[str, Any] | None:
    """The record of the supernet to copy, or of the copy if its source was removed."""
    newest = checkpoint.read_newest(source_run(config).supernet)
    return None if newest is None else newest[1]


def known(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """Those of stored values that are fields of a dataclass."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def obtain_supernet(
    config: SearchRunConfig, run: Run, data: TaskData, device: torch.device, tracker: Tracker
) -> RoutedLM:
    """The supernet of a run: trained from wherever it stopped, or the finished one of ``config.supernet_from``.

    Raises ``UserError`` if the supernet of ``config.supernet_from`` is no longer the one that was copied.
    """
    if config.supernet_from is not None:
        return _copy(config, run, data)
    recipe = TrainRecipe(config.train, config.supernet, config.seed)
    return fit(run, config.model, data, recipe, device, tracker)


def made_from(config: SearchRunConfig, run: Run, data: TaskData) -> dict[str, Any]:
    """What results depend on besides the policy; reads the checkpoint to its end, for its checksum."""
    record = checkpoint.read_newest(run.supernet)
    assert record is not None, "the supernet was stored or copied before"
    return {
        "natsl": __version__,
        "model": to_plain(config.model),
        "data": data.fingerprint,
        "supernet": record[1]["sha256"],
    }


def _copy(config: SearchRunConfig, run: Run, data: TaskData) -> RoutedLM:
    """The supernet of another run, whose files are copied into this one unless they are there."""
    record = _source(config)
    assert record is not None, "take_settings has seen it"
    if not checkpoint.steps(run.supernet):
        source = Run.open(str(config.supernet_from), config.root, create=False)
        copy_checkpoint(source.supernet, run.supernet, record["step"])
    model, copied = checkpoint.load_model(run.supernet)
    if copied["sha256"] != record["sha256"]:
        raise UserError(
            f"the supernet of run {config.supernet_from!r} is not the one that was copied into run {run.name!r}: "
            "choose another name"
        )
    if record.get("data") != data.fingerprint:
        _LOG.info("the supernet of %r was trained on other data", config.supernet_from)
    write_calibration(run, model)
    return model


def copy_checkpoint(source: Path, target: Path, step: int) -> None:
    """Copy one checkpoint; the folder ``target``, which holds no checkpoint yet, appears whole or not at all."""
    temporary = target.with_name(f".{target.name}.new")
    for folder in (temporary, target):
        if folder.exists():  # what an interrupted copy or training has left
            shutil.rmtree(folder)
    temporary.mkdir()
    for ending in ("safetensors", "json"):
        name = f"step-{step:06d}.{ending}"
        shutil.copyfile(source / name, temporary / name)
    temporary.rename(target)
