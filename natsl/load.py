"""Models and policies from disk: points of a front, policy files, exported folders, calibration tables.

torch is imported where it is used, so that importing this module stays fast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl.command import command, option_text, run_options
from natsl.config import Precision
from natsl.errors import UserError
from natsl.files import check_name, child_folder, read_config, read_json, user_path
from natsl.run import Run
from natsl.space.check import check, check_choice, check_number
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import NEWER, DataConfig

if TYPE_CHECKING:
    from natsl.model import RoutedLM

EXPORT_FORMAT = 4
# 1: a calibration at even levels, in one tensor; 2: a mix without bias; 3: a config.json that transformers cannot read
_READABLE = (1, 2, 3, 4)
_SCORES = ("values", "search_values", "measured", "dominated_by", "gain_over_random")  # of a point of a front
EXPORT_FILES = ("config.json", "model.safetensors", "policy.json", "calibration.json", "provenance.json")
PREFIX = "model."  # of the weights' names in a folder that transformers loads
_EXPECTED = 'it must be such as {"chunk_size": 16, "layers": [{"op": "delta"}, {"op": "routed", "budget": 0.1}]}'
# Weights of an export that are float32 whatever the dtype of the others: in half precision routes would change.
FLOAT32 = ("A_log", "dt_bias", "router", "calibration.by_head", "calibration.by_layer")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a command works on: the supernet of ``run`` below ``root``, or the folder ``export``; and a policy for it.

    Of a run, one of ``pick`` (see ``read_point``; the default is the knee), ``policy`` (a JSON file) and ``budget`` (in
    [0, 1], the same in every routed layer). Of an export and of a run that was specialised, the policy that it holds,
    unless ``policy`` or ``budget`` replaces it; ``pick="knee"``, the default, may stand beside a budget, an export or
    such a run. ``calibration``: name of a table in the run that replaces training's. ``ValueError`` for options that
    exclude each other.
    """

    run: str | None = None
    root: str = "runs"
    export: str | None = None
    pick: str | None = None
    policy: str | None = None
    budget: float | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        sources = (self.run, self.export)
        check(sources.count(None) == 1, "run, export", sources, "give either run=<name> or export=<folder>")
        check(
            self.budget is None or 0 <= check_number("budget", self.budget) <= 1,
            "budget",
            self.budget,
            "it must lie in [0, 1]",
        )
        pick = None if self.pick == "knee" and self.policy is None else self.pick
        options = {"pick": pick, "policy": self.policy, "budget": self.budget}
        options = {name: value for name, value in options.items() if value is not None}
        check(len(options) < 2, ", ".join(options), tuple(options.values()), "give only one of them")
        for name, value in (("pick", pick), ("calibration", self.calibration)):
            check(self.export is None or value is None, name, value, "an export has its own: it goes with run=<name>")


def read_front(run: Run) -> dict[str, Any]:
    """A run's ``front.json``; ``UserError`` if there is none, or it is not one of natsl's."""
    if (run.path / "ablation.json").exists():
        raise UserError(f"run {run.name!r} is an ablation, which has no front: choose a run of natsl search")
    if (run.path / "outer.json").exists():
        trial = option_text(run_options(run.best_trial(), str(run.trials)))
        raise UserError(
            f"run {run.name!r} is an outer search, which has no front: choose one of its trials, as {trial}"
        )
    if not run.front_json.is_file():
        raise UserError(f"run {run.name!r} has no front.json: finish the search first (the same command resumes it)")
    front = read_json(run.front_json)
    points = front.get("points") if isinstance(front, dict) else None
    if not isinstance(points, list) or not all(isinstance(p, dict) and "id" in p and "policy" in p for p in points):
        raise UserError(f"{run.front_json} is not a front written by natsl")
    return dict(front)


def read_point(run: Run, pick: str) -> dict[str, Any]:
    """The point of a run's ``front.json`` that ``pick`` names; errors as ``read_front`` and ``find_point``."""
    return find_point(read_front(run), pick, run.name)


def find_point(front: Mapping[str, Any], pick: str, run: str) -> dict[str, Any]:
    """The point of a front, as ``front.json`` of the run of this name holds it, that ``pick`` names.

    pick: ``knee``, the id of a point, or the beginning of an id or of a policy's digest. ``UserError`` for an empty
    front, an unknown pick and one that fits several points.
    """
    points = front["points"]
    if not points:
        raise UserError(f"the front of run {run!r} is empty: no trial was feasible, so there is nothing to export")
    wanted = front.get("knee") if pick == "knee" else pick
    exact = [point for point in points if point["id"] == wanted]
    if pick == "knee" and not exact:
        raise UserError(f"the front of run {run!r} has no knee: pick one of {_ids(points)}")
    matches = exact or [
        point
        for point in points
        if pick and (str(point["id"]).startswith(pick) or str(point.get("digest", "")).startswith(pick))
    ]
    if len(matches) != 1:
        what = "fits several points" if matches else "is not on the front"
        raise UserError(f"pick = {pick!r} {what}: pick knee or one of {_ids(matches or points)}")
    return {**matches[0], "fingerprint": front.get("fingerprint")}


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


def load_specialised(run: Run, pick: str = "knee") -> tuple[RoutedLM, RoutingPolicy, dict[str, Any]]:
    """The weights of a run that was specialised (eval mode, CPU), the one policy they are for, and the run's record.

    ``UserError`` for a training that is not finished, and for another pick than the default.
    """
    from natsl import checkpoint

    policy, special = read_specialised(run)
    if pick != "knee":
        raise UserError(f"pick = {pick!r}: run {run.name!r} is specialised for one policy: leave pick out")
    model, record = checkpoint.load_model(run.supernet)
    if not record.get("finished"):
        raise UserError(f"the specialisation {run.name!r} is not finished: resume it first")
    facts = {"digest": policy.digest(), "policy": policy.to_dict(), "specialised": special}
    return model, policy, {**facts, "checkpoint": {"step": record.get("step"), "sha256": record.get("sha256")}}


def read_specialised(run: Run) -> tuple[RoutingPolicy, dict[str, Any]]:
    """The policy that a run is specialised for, and what else its ``specialise.json`` holds."""
    try:
        record = dict(read_json(run.specialised))
        return RoutingPolicy.from_dict(record.pop("policy")), record
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{run.specialised} is not the record of a specialisation") from None


def check_model(model: RoutedLM, policy: RoutingPolicy) -> None:
    """Raise ``ValueError`` unless the policy fits the model and all numbers that it uses are finite."""
    policy.check(model.kinds, model.config.chunk_size, model.config.heads)
    for name, value in model.named_parameters():
        if not bool(value.isfinite().all()):
            raise UserError(f"the weights {name} hold numbers that are not finite: the supernet cannot be used")
    try:
        model.calibration.check([policy], range(len(policy.layers)))
    except ValueError as error:
        raise UserError(str(error)) from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder; ``UserError`` for a folder without one and for formats of another natsl."""
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is not an exported model: {_missing(folder)}")
    manifest = read_json(folder / "manifest.json")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found not in _READABLE:
        needed = manifest.get("natsl", "unknown") if isinstance(manifest, dict) else "unknown"
        formats = f"{_READABLE[0]} to {EXPORT_FORMAT}"
        raise UserError(f"{folder} has the export format {found!r}, this natsl reads {formats}: use natsl {needed}")
    return manifest  # type: ignore[no-any-return]


def _missing(folder: Path) -> str:
    """Why a folder without a manifest is not an export; of a run, where its exports are."""
    run = Run(folder)
    if not run.version.is_file():
        return "it has no manifest.json"
    names = sorted(path.parent.name for path in run.exports.glob("*/manifest.json"))
    if names:
        return f"it is a run, whose exports are in {run.exports}: {', '.join(names)}"
    return f"it is a run without exports: {command('export', run_options(run.name, str(folder.parent)))} makes one"


def file_faults(folder: Path) -> list[str]:
    """What is wrong with the files of an exported folder, a line for each; errors as ``read_manifest``."""
    from natsl.checkpoint import file_sha256

    manifest = read_manifest(folder)
    sums = manifest.get("files")
    sums = sums if isinstance(sums, dict) else {}
    faults = []
    for name in dict.fromkeys((*EXPORT_FILES, *sums)):
        path = folder / name
        if name not in sums or Path(name).name != name or not path.is_file():
            faults.append(f"{folder} is incomplete: {name} is missing")
        elif file_sha256(path) != sums[name]:
            faults.append(f"checksum error: {path} has changed since it was exported")
    if not faults and manifest["format"] == EXPORT_FORMAT:
        config = read_json(folder / "config.json")  # says who wrote it as well: the manifest has no sum of its own
        own = config.get("natsl") if isinstance(config, dict) else None
        if isinstance(own, dict) and manifest != {
            "format": own.get("format"),
            "natsl": own.get("version"),
            "files": sums,
        }:
            faults.append(f"checksum error: {folder / 'manifest.json'} has changed since it was exported")
    return faults


def load_exported(path: str | Path) -> tuple[RoutedLM, RoutingPolicy]:
    """The model (eval mode, CPU) and the policy of an exported folder, after checking every file's sha256.

    The weights are float32, whatever they are stored in. ``UserError`` for a folder that is no export, one of another
    format, and any file that has changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from natsl.checkpoint import build_model

    folder = user_path(path, "export")
    faults = file_faults(folder)
    if faults:
        raise UserError(faults[0])
    try:
        config = read_json(folder / "config.json")
        own = config.get("natsl")
        shape = own if isinstance(own, dict) else config  # until format 3 there was nothing else in the file
        precision = check_choice("precision", shape.get("precision", Precision.float32), Precision)
        weights = load_file(folder / "model.safetensors")
        state = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
        model = build_model(shape["model"], state, precision)
        model.supernet_kinds = [Op(kind) for kind in shape.get("supernet_layers", model.kinds)]
        policy = RoutingPolicy.from_dict(read_json(folder / "policy.json"))
        if RoutingPolicy.from_dict(shape.get("policy", policy.to_dict())) != policy:
            raise ValueError("config.json and policy.json hold different policies")
        check_model(model, policy)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be used: {error}") from None
    return model.eval(), policy


def load_choice(choice: Choice) -> tuple[RoutedLM, RoutingPolicy, dict[str, Any]]:
    """The model (eval mode, CPU) and the policy that a command names, and a record of where they are from (JSON-ready).

    A run needs a front for a pick only. ``UserError`` for files that cannot be read, a policy that does not fit the
    model, and a budget without calibration.
    """
    from natsl import checkpoint

    policy = None if choice.policy is None else read_policy(user_path(choice.policy, "policy"))
    record: dict[str, Any] = {}
    if choice.export is not None:
        model, stored = load_exported(choice.export)
        policy = policy or stored
    else:
        run = Run.open(str(choice.run), choice.root, create=False)
        pick = "knee" if choice.pick is None else choice.pick
        if policy is None and choice.budget is None:
            model, policy, record = (load_specialised if run.specialised.exists() else load_point)(run, pick)
        else:
            model, made_from = checkpoint.load_model(run.supernet)
            record = {"checkpoint": {"step": made_from.get("step"), "sha256": made_from.get("sha256")}}
            if run.specialised.exists():
                record["specialised"] = read_specialised(run)[1]
        if choice.calibration is not None:
            record["calibration"] = use_calibration(model, run, choice.calibration, record["checkpoint"]["sha256"])
            # what was measured under training's table does not hold under this one
            scores = {key: record.pop(key) for key in _SCORES if key in record}
            if scores:
                record["searched"] = scores
    if choice.budget is not None:
        policy = RoutingPolicy.uniform(model.kinds, model.config.chunk_size, choice.budget)
        record |= {"budget": choice.budget, "digest": policy.digest(), "policy": policy.to_dict()}
    assert policy is not None, "one of the four sources has given it"
    if choice.calibration is not None and not any(layer.needs_calibration() for layer in policy.layers):
        raise UserError(f"calibration = {choice.calibration!r} has no effect: no budget of the policy is in (0, 1)")
    if choice.policy is not None:
        record |= {"policy_file": Path(choice.policy).name, "digest": policy.digest(), "policy": policy.to_dict()}
        try:
            policy.check(model.kinds, model.config.chunk_size, model.config.heads)
        except ValueError as error:
            raise UserError(f"policy: {choice.policy} does not fit the model: {error}") from None
    check_model(model, policy)
    return model, policy, record


def read_policy(path: Path, option: str = "policy") -> RoutingPolicy:
    """A policy from a JSON file; ``UserError`` naming ``option`` and the file if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        plain = json.loads(text)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{option}: {path} is not JSON{where}: {_EXPECTED}") from None
    if not isinstance(plain, dict) or not {"chunk_size", "layers"} & plain.keys():  # any other file: say nothing of it
        raise UserError(f"{option}: {path} is not a policy: {_EXPECTED}")
    try:
        return RoutingPolicy.from_json(text)
    except ValueError as error:
        raise UserError(f"{option}: {path}: {error}") from None


def calibration_path(run: Run, name: str, option: str = "calibration") -> Path:
    """The file of a run's calibration table ``name``; ``UserError`` for a name or a link that leads elsewhere."""
    folder = child_folder(run.path, "calibrations", option)
    return child_folder(folder, check_name(name, option) + ".json", option)


def use_calibration(model: RoutedLM, run: Run, name: str, sha256: str) -> dict[str, Any]:
    """Replace the model's calibration table by one that ``natsl calibrate`` has stored in its run.

    sha256: of the model's checkpoint. Returns name, date, data and seed of the table. ``UserError`` if there is none of
    that name, it belongs to another checkpoint, or it does not fit the model.
    """
    path = calibration_path(run, name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("[!.]*.json"))) or "none"
        raise UserError(f"run {run.name!r} has no calibration {name!r}; known: {known}")
    record = read_json(path)
    try:
        made_for = record["checkpoint"]["sha256"]
        facts = {"name": name, **{key: record[key] for key in ("date", "data", "sequences", "seed")}}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a calibration table written by natsl") from None
    if made_for != sha256:
        raise UserError(
            f"calibration = {name!r} was made for another supernet than the one in run {run.name!r}: calibrate again"
        )
    try:
        model.calibration.load_plain(record)
        model.calibration.check(
            [RoutingPolicy.uniform(model.kinds, model.config.chunk_size, 0.5)], range(len(model.kinds))
        )
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path} is not a calibration table of this model") from None
    return facts


def stored_data(run: str | None, root: str, export: str | None) -> DataConfig:
    """The data settings with which a run, or the run behind an exported folder, was judged."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if export is not None:
        path = user_path(export, "export") / "provenance.json"
        settings = read_json(path).get("data")
    else:
        folder = Run.open(str(run), root, create=False)
        path = folder.config
        if not path.exists() and folder.supernet.is_dir():
            raise UserError(
                f"{path} is missing: the training of run {run!r} has not ended; the same command resumes it"
            )
        settings = read_config(path).get("data")
    if "${" in json.dumps(settings, default=str):  # stored settings are resolved; these could expand without end
        raise UserError(f"{path} holds no data settings: interpolations are not allowed")
    try:
        schema = OmegaConf.structured(DataConfig)
        if isinstance(settings, Mapping) and "tasks" in settings:
            schema.tasks = {}  # else the default task would be added to those of the run
        if isinstance(settings, Mapping) and "field" not in settings:
            schema.field = ""  # older runs read .jsonl files as they are
        for (task, name), value in NEWER.items():
            schema[task][name] = value  # unless it is stored
        result = OmegaConf.to_object(OmegaConf.merge(schema, settings))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{path} holds no data settings: {error}") from None
    assert isinstance(result, DataConfig)
    return result
