"""Where the supernet of a search comes from: it is trained, resumed, or copied from another run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from natsl import checkpoint
from natsl.data import TaskData
from natsl.errors import UserError
from natsl.files import write_bytes
from natsl.model import RoutedLM
from natsl.run import Run
from natsl.search.config import SearchRunConfig
from natsl.tracking import Tracker
from natsl.train import TrainRecipe, fit

_LOG = logging.getLogger(__name__)


def obtain_supernet(
    config: SearchRunConfig, run: Run, source: Run | None, data: TaskData, device: torch.device, tracker: Tracker
) -> RoutedLM:
    """The supernet of a run: trained from wherever it stopped, or the finished one of ``source``.

    Raises ``UserError`` if the supernet of ``source`` is not trained to its end.
    """
    if source is not None:
        return _copy(source, run, data)
    recipe = TrainRecipe(config.train, config.supernet, config.seed)
    return fit(run, config.model, data, recipe, device, tracker)


def _copy(source: Run, run: Run, data: TaskData) -> RoutedLM:
    """The supernet of another run, whose files are copied into this one unless they are there."""
    copied = bool(checkpoint.steps(run.supernet))
    model, record = checkpoint.load_model((run if copied else source).supernet)
    if not record.get("finished"):
        raise UserError(f"the supernet of run {source.name!r} is not trained to its end: resume that run first")
    if record.get("data") != data.fingerprint:
        _LOG.info("the supernet of %r was trained on other data", source.name)
    if source.calibration.exists():
        write_bytes(run.calibration, source.calibration.read_bytes())
    if not copied:
        copy_checkpoint(source.supernet, run.supernet, record["step"])
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
