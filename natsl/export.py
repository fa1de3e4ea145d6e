"""One point of a front as a model of its own: weights, policy, provenance, checksums; verified in a fresh process.

``root/run/export/<id>/`` holds ``config.json`` (shape, precision), ``model.safetensors`` (weights, calibration table),
``policy.json``, ``calibration.json`` (the table to read), ``provenance.json`` and ``manifest.json`` (sha256 of all).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl import __version__
from natsl.cli import run_main
from natsl.config import DataConfig, ExportConfig, Precision, check_precision, to_plain
from natsl.run import Run, UserError, check_name, child_folder, read_config, read_json, sync_folder, write_json
from natsl.space.policy import Op, RoutingPolicy

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    from torch import Tensor

    from natsl.model import RoutedLM

FORMAT = 1
FILES = ("config.json", "model.safetensors", "policy.json", "calibration.json", "provenance.json")
TOLERANCE = 1e-5  # of logits between two processes on one machine, absolute and relative


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
    if found != FORMAT:
        needed = manifest.get("natsl", "unknown") if isinstance(manifest, dict) else "unknown"
        raise UserError(f"{folder} has the export format {found!r}, this natsl reads {FORMAT}: use natsl {needed}")
    sums = manifest.get("files")
    for name in FILES:
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


def export_point(run: Run, pick: str = "knee", name: str | None = None, overwrite: bool = False) -> Path:
    """Write a point of a run's front to ``run/export/<name>`` and return that folder.

    pick: see ``read_point``. name: of the folder (None: the point's id). The folder appears whole and verified, or not
    at all. ``UserError`` for a bad name, a folder that exists (without ``overwrite``), or a model that cannot be used.
    """
    if name is not None:
        check_name(name, "name")
    model, policy, point = load_point(run, pick)
    name = name or check_name(str(point["id"]), "the point's id")
    parent = child_folder(run.path, "export", "export")
    target = child_folder(parent, name, "name")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: choose another name or give overwrite=true")
    if target.exists() and not (target / "manifest.json").is_file():
        raise UserError(f"{target} is not an exported model, so it is not overwritten: choose another name")
    parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
    try:
        made_from = {"run": run.name, "pick": pick, "data": read_config(run.config).get("data"), **point}
        _write(temporary, model, policy, made_from)
        verify(temporary, model, policy)
        temporary.chmod(0o755)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write(folder: Path, model: RoutedLM, policy: RoutingPolicy, provenance: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from natsl.checkpoint import file_sha256

    weights = folder / "model.safetensors"
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    try:
        save_file(tensors, weights)
    except SafetensorError as error:  # it hides the system's error, such as a full disk, in its text
        raise UserError(f"{weights} cannot be written: {error}") from None
    with weights.open("rb+") as file:
        os.fsync(file.fileno())
    table = model.calibration.tolist()
    made_by = {"format": FORMAT, "natsl": __version__}
    shape = {**made_by, "precision": model.precision.value, "model": to_plain(model.config)}
    write_json(folder / "config.json", shape)
    write_json(folder / "policy.json", policy.to_dict())
    write_json(folder / "calibration.json", {"quantiles_of_margins": table, "axes": ["layer", "head", "quantile"]})
    write_json(folder / "provenance.json", {"natsl": __version__, **provenance})
    sums = {name: file_sha256(folder / name) for name in FILES}
    write_json(folder / "manifest.json", {**made_by, "files": sums})


def _put_in_place(temporary: Path, target: Path) -> None:
    old = temporary.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify(folder: Path, model: RoutedLM, policy: RoutingPolicy) -> float:
    """Load ``folder`` in a fresh process, elsewhere, and compare its logits with those of ``model`` under ``policy``.

    Returns the largest absolute difference; ``UserError`` if it is beyond ``TOLERANCE`` or the process fails.
    """
    import torch
    from safetensors.torch import save_file

    tokens = _probe(model)
    with torch.no_grad():
        logits = model(tokens, policy).logits
    with tempfile.TemporaryDirectory() as elsewhere:
        probe = Path(elsewhere) / "probe.safetensors"
        save_file({"tokens": tokens, "logits": logits.contiguous()}, probe)
        code = "import sys; from natsl.export import answer; answer(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
        paths = [str(Path(__file__).absolute().parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder.absolute()), str(probe), str(torch.get_num_threads())],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            check=False,
        )
    difference = None
    with contextlib.suppress(ValueError, IndexError, TypeError, KeyError):
        difference = float(json.loads(done.stdout.splitlines()[-1])["difference"])
    if done.returncode or difference is None:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the exported model cannot be loaded in a fresh process: {last}")
    if difference > TOLERANCE * max(1.0, float(logits.abs().max())):
        raise UserError(
            f"the exported model's logits differ by {difference:.3g} in a fresh process: nothing was exported"
        )
    return difference


def _probe(model: RoutedLM) -> Tensor:
    """Tokens [2,T] over complete chunks and a partial one."""
    import torch

    shape = (2, 3 * model.config.chunk_size + model.config.chunk_size // 2)
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def answer(folder: str, probe: str, threads: int) -> None:
    """The fresh process of ``verify``: print the largest difference of logits as JSON."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)  # another number of threads may add in another order
    model, policy = load_exported(folder)
    expected = load_file(probe)
    with torch.no_grad():
        logits = model(expected["tokens"], policy).logits
    print(json.dumps({"difference": float((logits - expected["logits"]).abs().max())}))


def main() -> None:
    """``python -m natsl.export run=<name> pick=knee``."""
    run_main("export", ExportConfig, _export)


def _export(config: ExportConfig) -> None:
    run = Run.open(config.run, config.root, create=False)
    folder = export_point(run, config.pick, config.name, config.overwrite)
    print(f"exported to {folder}; a fresh process gave the supernet's logits")
    print(f"try it: python -m natsl.generate export={folder} prompt='def '")


if __name__ == "__main__":
    main()
