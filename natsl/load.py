"""What a command names, read from disk: a point of a run's front, an exported folder, the data it was judged on.

torch is imported where it is used, so that importing this module stays fast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.config import DataConfig, Precision, check_precision
from natsl.run import Run, UserError, read_config, read_json
from natsl.space.policy import Op, RoutingPolicy

if TYPE_CHECKING:
    from natsl.model import RoutedLM

EXPORT_FORMAT = 1
EXPORT_FILES = ("config.json", "model.safetensors", "policy.json", "calibration.json", "provenance.json")


def read_point(run: Run, pick: str) -> dict[str, Any]:
    """The point of a run's ``front.json`` that ``pick`` names.

    pick: ``knee``, the id of a point, or the beginning of an id or of a policy's digest. ``UserError`` for an empty
    front, an unknown pick and one that fits several points.
    """
    if not run.front_json.is_file():
        raise UserError(f"run {run.name!r} has no front.json: finish the search first (the same command resumes it)")
    front = read_json(run.front_json)
    points = front.get("points") if isinstance(front, dict) else None
    if not isinstance(points, list) or not all(isinstance(p, dict) and "id" in p and "policy" in p for p in points):
        raise UserError(f"{run.front_json} is not a front written by natsl")
    if not points:
        raise UserError(f"the front of run {run.name!r} is empty: no trial was feasible, so there is nothing to export")
    wanted = front.get("knee") if pick == "knee" else pick
    exact = [point for point in points if point["id"] == wanted]
    if pick == "knee" and not exact:
        raise UserError(f"the front of run {run.name!r} has no knee: pick one of {_ids(points)}")
    found = exact or [
        point
        for point in points
        if pick and (str(point["id"]).startswith(pick) or str(point.get("digest", "")).startswith(pick))
    ]
    if len(found) != 1:
        what = "fits several points" if found else "is not on the front"
        raise UserError(f"pick = {pick!r} {what}: pick knee or one of {_ids(found or points)}")
    return {**found[0], "fingerprint": front.get("fingerprint")}


def _ids(points: list[dict[str, Any]]) -> str:
    return ", ".join(str(point["id"]) for point in points)


def load_point(run: Run, pick: str) -> tuple[RoutedLM, RoutingPolicy, dict[str, Any]]:
    """The supernet of a run (eval mode, CPU), the policy of a point of its front, and the point's record.

    ``UserError`` if the supernet is not the one that was searched or holds numbers that are not finite, ``ValueError``
    if the policy does not fit it.
    """
    from natsl import checkpoint

    point = read_point(run, pick)
    try:
        policy = RoutingPolicy.from_dict(point["policy"])
    except ValueError as error:
        raise UserError(f"{run.front_json}: point {point['id']}: {error}") from None
    model, record = checkpoint.load_model(run.supernet)
    searched = point["fingerprint"].get("supernet") if isinstance(point["fingerprint"], Mapping) else None
    if searched is not None and searched != record.get("sha256"):
        raise UserError(f"the supernet of run {run.name!r} is not the one that was searched: search again")
    check_model(model, policy)
    return model, policy, {**point, "checkpoint": {"step": record.get("step"), "sha256": record.get("sha256")}}


def check_model(model: RoutedLM, policy: RoutingPolicy) -> None:
    """Raise ``ValueError`` unless the policy fits the model and all numbers that it uses are finite."""
    policy.check(model.kinds, model.config.chunk_size)
    for name, value in model.named_parameters():
        if not bool(value.isfinite().all()):
            raise UserError(f"the weights {name} hold numbers that are not finite: the supernet cannot be used")
    for i, layer in enumerate(policy.layers):
        needs = layer.op is Op.routed and layer.budget is not None and 0 < layer.budget < 1
        if needs and not bool(model.calibration[i].isfinite().all()):
            raise UserError(f"layer {i} has a budget, but the model is not calibrated: finish its training first")


def load_exported(path: str | Path) -> tuple[RoutedLM, RoutingPolicy]:
    """The model (eval mode, CPU) and the policy of an exported folder, after checking every file's sha256.

    ``UserError`` for a folder that is no export, one of another format, and any file that has changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from natsl.checkpoint import build_model, file_sha256

    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is not an exported model: it has no manifest.json")
    manifest = read_json(folder / "manifest.json")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != EXPORT_FORMAT:
        needed = manifest.get("natsl", "unknown") if isinstance(manifest, dict) else "unknown"
        raise UserError(
            f"{folder} has the export format {found!r}, this natsl reads {EXPORT_FORMAT}: use natsl {needed}"
        )
    sums = manifest.get("files")
    for name in EXPORT_FILES:
        if not isinstance(sums, dict) or name not in sums or not (folder / name).is_file():
            raise UserError(f"{folder} is incomplete: {name} is missing")
        if file_sha256(folder / name) != sums[name]:
            raise UserError(f"checksum error: {folder / name} has changed since it was exported")
    try:
        shape = read_json(folder / "config.json")
        model = build_model(shape["model"], load_file(folder / "model.safetensors"))
        model.precision = check_precision("precision", shape.get("precision", Precision.float32))
        policy = RoutingPolicy.from_dict(read_json(folder / "policy.json"))
        check_model(model, policy)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be used: {error}") from None
    return model.eval(), policy


def load_choice(
    run: str | None, root: str, pick: str, export: str | None, budget: float | None = None
) -> tuple[RoutedLM, RoutingPolicy]:
    """The model and policy that a command names: a point of a run, or else an exported folder.

    With ``budget`` the policy is that budget in every routed layer, and the run needs no front.
    """
    from natsl import checkpoint

    if export is not None:
        model, policy = load_exported(export)
    elif run is None:
        raise UserError("give either run=<name> or export=<folder>")
    elif budget is None:
        model, policy, _ = load_point(Run.open(run, root, create=False), pick)
    else:
        model, _ = checkpoint.load_model(Run.open(run, root, create=False).supernet)
    if budget is not None:
        policy = RoutingPolicy.uniform(model.kinds, model.config.chunk_size, budget)
        check_model(model, policy)
    return model, policy


def stored_data(run: str | None, root: str, export: str | None) -> DataConfig:
    """The data settings with which a run, or the run behind an exported folder, was judged."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if export is not None:
        path = Path(export) / "provenance.json"
        found = read_json(path).get("data")
    else:
        path = Run.open(str(run), root, create=False).config
        found = read_config(path).get("data")
    if "${" in json.dumps(found, default=str):  # stored settings are resolved; these could expand without end
        raise UserError(f"{path} holds no data settings: interpolations are not allowed")
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), found))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{path} holds no data settings: {error}") from None
    assert isinstance(result, DataConfig)
    return result
