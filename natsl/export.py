"""A supernet and one policy as a model of its own: weights, provenance, checksums; verified in a fresh process.

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
from natsl.errors import UserError
from natsl.files import (
    check_name,
    child_folder,
    follow_umask,
    read_config,
    read_json,
    sync,
    sync_folder,
    temporary_path,
    to_plain,
    write_json,
)
from natsl.load import EXPORT_FILES, EXPORT_FORMAT, Choice, load_choice, load_exported
from natsl.run import Run
from natsl.secrets import redact

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    from torch import Tensor

    from natsl.model import RoutedLM
    from natsl.space.policy import RoutingPolicy

TOLERANCE = 1e-5  # of logits between two processes on one machine, absolute and relative


def export_point(run: Run, pick: str = "knee", name: str | None = None, overwrite: bool = False) -> Path:
    """``export_choice`` of a point of a run's front; pick: see ``read_point``."""
    return export_choice(Choice(run=run.name, root=str(run.path.parent), pick=pick), name, overwrite)


def export_choice(choice: Choice, name: str | None = None, overwrite: bool = False) -> Path:
    """Write the model and the policy that a choice takes from a run to ``run/export/<name>`` and return that folder.

    name: of the folder (None: the point's id or ``policy-<digest>``, and the name of a calibration that is not
    training's). The folder appears whole and verified, or not at all. ``UserError`` for a bad name, a folder that
    exists (without ``overwrite``), or a model that cannot be used.
    """
    if name is not None:
        check_name(name, "name")
    if choice.run is None:
        raise UserError(f"export = {choice.export!r} is an export already: give run=<name>")
    model, policy, record = load_choice(choice)
    run = Run.open(str(choice.run), choice.root, create=False)
    if name is None:
        made_of = check_name(str(record.get("id", f"policy-{policy.digest()[:8]}")), "the point's id")
        name = made_of if choice.calibration is None else check_name(f"{made_of}-{choice.calibration}", "name")
    parent = child_folder(run.path, "export", "export")
    target = child_folder(parent, name, "name")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: choose another name or give overwrite=true")
    if target.exists() and not (target / "manifest.json").is_file():
        raise UserError(f"{target} is not an exported model, so it is not overwritten: choose another name")
    parent.mkdir(exist_ok=True)
    temporary = temporary_path(target)
    try:
        temporary.mkdir()
        pick = {"pick": choice.pick or "knee"} if "id" in record else {}
        made_from = {"run": run.name, **pick, "data": read_config(run.config).get("data"), **record}
        if run.text.exists():  # older runs do not have it
            made_from["text"] = read_json(run.text)
        _write(temporary, model, policy, made_from)
        verify(temporary, model, policy)
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
        sync(file.fileno())
    follow_umask(weights)
    made_by = {"format": EXPORT_FORMAT, "natsl": __version__}
    shape = {**made_by, "precision": model.precision.value, "model": to_plain(model.config)}
    write_json(folder / "config.json", shape)
    write_json(folder / "policy.json", policy.to_dict())
    write_json(folder / "calibration.json", model.calibration.to_plain())
    read_back = {"data": provenance.get("data")}  # all else is only shown
    write_json(folder / "provenance.json", {"natsl": __version__, **redact(to_plain(provenance)), **read_back})
    sums = {name: file_sha256(folder / name) for name in EXPORT_FILES}
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


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("export")
