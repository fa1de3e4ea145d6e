"""The held-out data of a run, compared with what the run stored about it: nothing is scored on other text unnoticed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from natsl import checkpoint
from natsl.data import Corpus, TaskData, load_text
from natsl.errors import UserError
from natsl.files import read_config, read_json, user_path
from natsl.load import Choice, stored_data
from natsl.record import DataRecord, TrainedText
from natsl.run import Run
from natsl.tasks import DataConfig, OtherTextConfig
from natsl.text import absolute, printable

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Data to judge a model on. ``other``: how it differs from what its run was judged on (None: it is the same)."""

    data: TaskData
    other: str | None


def held_out(
    choice: Choice,
    named: OtherTextConfig,
    vocab_size: int,
    allow_other: bool,
    tasks: Mapping[str, float] | None = None,
    scored: bool = True,
) -> HeldOut:
    """The held-out data of a run or an export, or the text that ``named`` names on purpose.

    tasks: weights that replace the run's. scored: whether files that the supernet was trained on are left out of text
    that is named. Raises ``UserError`` for a run's own text that has changed (without ``allow_other``), for named text
    of which nothing is left, and for token ids where the supernet was trained on text or the other way round.
    """
    settings, record = _stored(choice)
    rules = (choice.root, record.runs) if record and record.runs else (choice.root,)
    other = None
    if named.path is not None:
        path = absolute(named.path)
        settings = replace(settings, path=path, include=named.include, exclude=named.exclude, field=named.field)
        trained = record.trained if record and scored and not allow_other else None
        corpus = load_text(settings.path, settings.text_rules(*rules), trained)
        if record is None or corpus.fingerprint != record.text:
            other = f"data.path = {path!r} was named instead of the text of the run"
        _check_kind(record, corpus)
    else:
        # A run with the supernet of another one has left out of its held-out text what that one was trained on.
        trained = record.trained if record and record.trained.text != record.text else None
        try:
            corpus = load_text(settings.path, settings.text_rules(*rules), trained)
        except UserError as error:
            why = "" if choice.export is None else "an export does not say in which folder its text is: "
            raise UserError(f"{error}; {why}data.path=<path> names where the text is now, or another one") from None
        _check_kind(record, corpus)
        other = _difference(choice, record, TaskData(settings, corpus, vocab_size))
        if other is not None and not allow_other:
            raise UserError(
                f"the text is not what {_name(choice)} was judged on: {other}; data.path=<path> names other text on "
                "purpose, allow_other_data=true takes this one and marks the result"
            )
    return HeldOut(TaskData(replace(settings, tasks=dict(tasks or settings.tasks)), corpus, vocab_size), other)


def keep_record(run: Run, data: TaskData, root: str, trained: TrainedText | None, allow_other: bool) -> tuple[str, ...]:
    """Store what a run reads before its first checkpoint, compare it later; returns how other text differed, if any.

    trained: what its supernet was trained on, None: this data. With ``allow_other`` a run whose supernet is finished
    goes on with other text; ``data`` then takes the fingerprint that the run began with. ``UserError`` otherwise.
    """
    record = DataRecord.read(run.text)
    if not checkpoint.steps(run.supernet) or (record is None and data.fingerprint == _older_fingerprint(run)):
        made_from = trained or TrainedText.of(data.corpus)
        corpus = data.corpus
        DataRecord(
            data.fingerprint, corpus.fingerprint, corpus.source, printable(absolute(root)), corpus.contents, made_from
        ).write(run.text)
        return ()
    if record is None:  # of an older natsl, with other data: its checkpoints and its study refuse it
        return ()
    other = record.difference(data.corpus)
    if other is None:
        return record.others
    begun = f"the text is not what run {run.name!r} began with: {other}"
    if not _checkpoint_record(run).get("finished"):
        raise UserError(f"{begun}; its training goes on with the same text only: choose another name")
    record.trained.check_kind(data.corpus)
    if not allow_other:
        raise UserError(f"{begun}; choose another name, or allow_other_data=true, which goes on and marks the report")
    data.fingerprint = data.fingerprint_with(record.text)
    if other not in record.others:
        record = replace(record, others=(*record.others, other))
        record.write(run.text)
    return record.others


def trained_text(run: Run) -> TrainedText | None:
    """What the supernet of a run was trained on (None: an older run, whose text is not what it was)."""
    record = DataRecord.read(run.text)
    if record is not None:
        return record.trained
    source = read_config(run.config).get("supernet_from")
    root = str(run.path.parent)
    if source is not None:
        return trained_text(Run.open(str(source), root, create=False))
    settings = stored_data(run.name, root, None)
    try:
        data = TaskData(settings, load_text(settings.path, settings.text_rules(root)), vocab_size=1 << 62)
    except ValueError:
        return None
    return TrainedText.of(data.corpus) if data.fingerprint == _checkpoint_record(run).get("data") else None


def _name(choice: Choice) -> str:
    return f"run {choice.run!r}" if choice.export is None else f"the export {choice.export}"


def trained_on_tokens(choice: Choice) -> bool:
    """Whether a run, or the run behind an export, was trained on ids of a tokenizer instead of text."""
    record = _stored_record(choice)
    return record is not None and record.trained.tokens


def _stored(choice: Choice) -> tuple[DataConfig, DataRecord | None]:
    """Data settings and record of a run or an export.

    An export that is still in its run's folder has those of the run: by itself it does not say where the text is.
    """
    settings, record = stored_data(choice.run, choice.root, choice.export), _stored_record(choice)
    if choice.export is None or (record is not None and not record.trained.hidden):
        return settings, record
    folder = user_path(choice.export, "export").resolve()
    run = folder.parent.parent
    if folder.parent.name == "export" and (run / "run.json").is_file() and (run / "config.yaml").is_file():
        theirs, own = _stored(Choice(run=run.name, root=str(run.parent)))
        if record is None or (own is not None and (own.data, own.text) == (record.data, record.text)):
            return theirs, own
    return settings, record


def _stored_record(choice: Choice) -> DataRecord | None:
    if choice.export is None:
        return DataRecord.read(Run.open(str(choice.run), choice.root, create=False).text)
    path = user_path(choice.export, "export") / "provenance.json"
    plain = read_json(path).get("text")
    return None if plain is None else DataRecord.from_dict(plain, path)


def _check_kind(record: DataRecord | None, corpus: Corpus) -> None:
    """As ``TrainedText.check_kind``; what stored no record was trained on text."""
    trained = TrainedText("", "", ()) if record is None else record.trained
    trained.check_kind(corpus)


def _difference(choice: Choice, record: DataRecord | None, data: TaskData) -> str | None:
    if record is not None:
        return record.difference(data.corpus)
    if choice.export is None:
        stored = _older_fingerprint(Run.open(str(choice.run), choice.root, create=False))
    else:
        stored = _data_of(read_json(user_path(choice.export, "export") / "provenance.json"))
    if stored is None:
        _LOG.info("%s is of an older natsl and does not say which text it was judged on", _name(choice))
        return None
    return None if stored == data.fingerprint else f"the fingerprint of {data.corpus.description} is another one"


def _older_fingerprint(run: Run) -> str | None:
    """Fingerprint of the data of a run from before it stored its files."""
    if run.front_json.is_file():
        return _data_of(read_json(run.front_json))
    if run.config.exists() and read_config(run.config).get("supernet_from") is not None:
        return None  # the checkpoint's is that of the other run
    stored = _checkpoint_record(run).get("data")
    return None if stored is None else str(stored)


def _data_of(plain: Any) -> str | None:
    fingerprint = plain.get("fingerprint") if isinstance(plain, Mapping) else None
    stored = fingerprint.get("data") if isinstance(fingerprint, Mapping) else None
    return None if stored is None else str(stored)


def _checkpoint_record(run: Run) -> Mapping[str, Any]:
    """Record of the newest checkpoint, without its tensors ({}: there is none that can be read)."""
    stored = checkpoint.steps(run.supernet)
    try:
        record = read_json(run.supernet / f"step-{stored[-1]:06d}.json") if stored else {}
    except UserError:
        return {}
    return record if isinstance(record, dict) else {}
