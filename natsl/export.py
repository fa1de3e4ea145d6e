"""A supernet and one policy as a model of its own, verified in a fresh process, that transformers loads too.

``root/run/export/<id>/`` holds ``config.json`` (shape, policy, precision), ``model.safetensors`` (weights, calibration
table), ``generation_config.json``, the tokenizer (of models of bytes), ``policy.json``, ``calibration.json`` (the table
to read), ``provenance.json``, ``verification.*`` (what ``natsl verify`` compares with), ``README.md`` and
``manifest.json`` (sha256 of all).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from natsl import __version__
from natsl.card import card
from natsl.config import Precision
from natsl.errors import UserError
from natsl.files import (
    check_name,
    child_folder,
    read_config,
    read_json,
    sync_folder,
    temporary_path,
    to_plain,
    write_json,
    write_text,
)
from natsl.load import EXPORT_FORMAT, FLOAT32, PREFIX, Choice, load_choice
from natsl.record import DataRecord
from natsl.run import Run
from natsl.secrets import redact
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import OtherTextConfig
from natsl.text import first_names
from natsl.verify import verify, write_sample

if TYPE_CHECKING:  # torch is imported where it is used, so that --help stays fast
    from torch import Tensor

    from natsl.data import TaskData
    from natsl.model import RoutedLM
    from natsl.tasks.sequences import Batch

_LOG = logging.getLogger(__name__)


def export_point(
    run: Run, pick: str = "knee", name: str | None = None, overwrite: bool = False, data: TaskData | None = None
) -> Path:
    """``export_choice`` of a point of a run's front; pick: see ``read_point``."""
    return export_choice(Choice(run=run.name, root=str(run.path.parent), pick=pick), name, overwrite, data=data)


def export_choice(
    choice: Choice,
    name: str | None = None,
    overwrite: bool = False,
    dtype: Precision = Precision.float32,
    sequences: int = 8,
    data: TaskData | None = None,
) -> Path:
    """Write the model and the policy that a choice takes from a run to ``run/export/<name>`` and return that folder.

    name: of the folder (None: the point's id or ``policy-<digest>``, and the name of a calibration that is not
    training's). dtype: of the weights, but for those that routes depend on. sequences: so many of the test part of each
    task go along to be scored again; data: the run's, if it is in memory. The folder appears whole and verified, or not
    at all. ``UserError`` for a bad name, a folder that exists (without ``overwrite``), or a model that cannot be used.
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
    if (target.is_symlink() or target.exists()) and not overwrite:
        raise UserError(f"{target} exists: choose another name or give overwrite=true")
    if target.is_symlink() or target.exists():
        _check_overwritten(target)
    parent.mkdir(exist_ok=True)
    temporary = temporary_path(target)
    try:
        temporary.mkdir()
        made_from = _provenance(run, choice, record)
        exported = trimmed(model, policy)
        if dtype is Precision.bfloat16:
            exported = model = _rounded(exported)
        sets = _held_out_sets(run, model, sequences, data)
        _write(temporary, exported, policy, made_from, dtype)
        write_sample(temporary, model, policy, sets)
        _seal(temporary)
        results = verify(temporary)
        write_text(temporary / "README.md", card(temporary, results))
        _seal(temporary)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _check_overwritten(target: Path) -> None:
    """``UserError`` unless all that is in a folder is an export's: nothing else is lost with it."""
    if target.is_symlink() or not target.is_dir() or not (target / "manifest.json").is_file():
        raise UserError(f"{target} is not an exported model, so it is not overwritten: choose another name")
    manifest = read_json(target / "manifest.json")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    own = {"manifest.json", *(files if isinstance(files, dict) else {})}
    others = sorted(path.name for path in target.iterdir() if path.name not in own or not _is_plain_file(path))
    if others:
        raise UserError(
            f"{target} holds {first_names(others)}, no file of an export, so it is not overwritten: move that away or "
            "choose another name"
        )


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _provenance(run: Run, choice: Choice, record: Mapping[str, Any]) -> dict[str, Any]:
    """Where an export is from, for anybody to read: of paths only the last name, of the files of the text digests."""
    pick = {"pick": choice.pick or "knee"} if "id" in record else {}
    data = read_config(run.config).get("data")
    made_from = {"run": run.name, **pick, "data": _public(data), **record}
    if "calibration" in record:
        own = record["calibration"]["data"]
        settings = {"fingerprint": own.get("fingerprint"), "settings": _public(own.get("settings"))}
        made_from["calibration"] = {**record["calibration"], "data": settings}
    text = DataRecord.read(run.text)  # older runs do not have it
    return made_from if text is None else {**made_from, "text": text.without_names()}


def _public(data: Any) -> Any:
    """Data settings with the last name of their path, and without secrets in what chooses text; all else is as it is.

    They are read back: the names of tasks and options are no secrets, whatever the environment holds.
    """
    if not isinstance(data, Mapping):
        return None
    path = data.get("path")
    chosen = {"path": Path(path).name if isinstance(path, str) else None}
    chosen |= {name: data[name] for name in ("include", "exclude", "field") if name in data}
    return {**data, **redact(chosen)}


def trimmed(model: RoutedLM, policy: RoutingPolicy) -> RoutedLM:
    """The model without the weights that a policy never uses: what does only the delta rule has no softmax, no router.

    Such layers become of kind ``delta``. The same model if there are none.
    """
    from natsl.model import RoutedLM

    kinds = [Op.delta if layer.op is Op.delta else kind for layer, kind in zip(policy.layers, model.kinds, strict=True)]
    if kinds == model.kinds:
        return model
    smaller = RoutedLM(replace(model.config, layers=kinds), model.calibration.points, model.precision)
    state = model.state_dict()
    smaller.load_state_dict({name: state[name] for name in smaller.state_dict()})
    smaller.supernet_kinds = model.supernet_kinds
    return smaller.eval()


def _rounded(model: RoutedLM) -> RoutedLM:
    """A model with the weights of a bfloat16 file in float32, which computes in bfloat16."""
    from natsl.model import RoutedLM

    rounded = RoutedLM(model.config, model.calibration.points, Precision.bfloat16)
    rounded.load_state_dict(_stored(model, Precision.bfloat16))
    rounded.supernet_kinds = model.supernet_kinds
    return rounded.eval()


def _stored(model: RoutedLM, dtype: Precision) -> dict[str, Tensor]:
    """The weights of a model as its file has them."""
    import torch

    half = dtype is Precision.bfloat16
    return {
        name: weight.detach().cpu().to(torch.bfloat16 if half and _may_be_rounded(name, weight) else weight.dtype)
        for name, weight in model.state_dict().items()
    }


def _may_be_rounded(name: str, weight: Tensor) -> bool:
    return weight.is_floating_point() and not name.startswith("calibration.") and not any(x in name for x in FLOAT32)


def _held_out_sets(run: Run, model: RoutedLM, sequences: int, data: TaskData | None) -> dict[str, Batch]:
    """Sequences of each task from the test part of a run's text; none where that has changed or is gone."""
    from natsl.data import Split
    from natsl.heldout import held_out

    if sequences == 0:
        return {}
    if data is None:
        choice = Choice(run=run.name, root=str(run.path.parent))
        try:
            data = held_out(choice, OtherTextConfig(), model.config.vocab_size, allow_other=False).data
        except UserError as error:
            _LOG.info("no sequences go along with the export: %s", error)
            return {}
    return {task: batch.rows(slice(0, sequences)) for task, batch in data.eval_sets(Split.test).items()}


def _write(
    folder: Path,
    model: RoutedLM,
    policy: RoutingPolicy,
    provenance: Mapping[str, Any],
    dtype: Precision = Precision.float32,
) -> None:
    """Write all that is needed to run the model, and the manifest."""
    from natsl.checkpoint import write_tensors
    from natsl.tasks.sequences import BYTES
    from natsl.tokenizer import tokenizer_files

    write_tensors(folder / "model.safetensors", {PREFIX + k: weight for k, weight in _stored(model, dtype).items()})
    own = {
        "format": EXPORT_FORMAT,
        "version": __version__,
        "precision": model.precision.value,
        "model": to_plain(model.config),
        "supernet_layers": to_plain(model.supernet_kinds),
        "calibration_points": model.calibration.points,
        "policy": policy.to_dict(),
    }
    config = {"architectures": ["NatslForCausalLM"], "model_type": "natsl", "dtype": dtype.value, "natsl": own}
    write_json(folder / "config.json", config)
    write_json(folder / "policy.json", policy.to_dict())
    write_json(folder / "calibration.json", model.calibration.to_plain())
    read_back = {"data": provenance.get("data")}
    write_json(folder / "provenance.json", {"natsl": __version__, **redact(to_plain(provenance)), **read_back})
    # the first id past the vocabulary: the forward pass takes it for padding
    write_json(folder / "generation_config.json", {"do_sample": False, "pad_token_id": model.config.vocab_size})
    if model.config.vocab_size >= len(BYTES) and not _on_tokens(provenance):
        for name, content in tokenizer_files(model.config.vocab_size).items():
            write_json(folder / name, content)
    _seal(folder)


def _on_tokens(provenance: Mapping[str, Any]) -> bool:
    """Whether the model was trained on ids of a tokenizer, which natsl does not have."""
    text: DataRecord | None = provenance.get("text")
    return text is not None and text.trained.tokens


def _seal(folder: Path) -> None:
    """Write the manifest of all files that are there."""
    from natsl.checkpoint import file_sha256

    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    sums = {name: file_sha256(folder / name) for name in names}
    write_json(folder / "manifest.json", {"format": EXPORT_FORMAT, "natsl": __version__, "files": sums})


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


if __name__ == "__main__":
    from natsl.cli.main import run_verb

    run_verb("export")
