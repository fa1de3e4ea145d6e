"""The commands: their options and what they do. Anything heavy is imported when a command runs."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from natsl.command import changed_options, command, run_options
from natsl.config import ModelConfig, Precision, SupernetConfig, TrainConfig, check_batch, check_chunks
from natsl.device import resolve_device
from natsl.errors import UserError
from natsl.files import check_name, output_folder, to_plain, user_path
from natsl.generate import Sampling, Transcript, encode, generate_batch, read_prompt, read_prompts, unescape
from natsl.load import Choice, load_choice
from natsl.resume import check_resume, differences
from natsl.run import Run
from natsl.space.check import check, check_counts
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import CalibrationDataConfig, DataConfig
from natsl.tracking import TrackingConfig, start_tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from natsl.search.config import SearchRunConfig
    from natsl.serving import ServingSpeed
    from natsl.throughput import Speed, ThroughputConfig

CHECKED_BUDGETS = (0.05, 0.1, 0.25, 0.5)  # what a new calibration table is measured at
DEFAULT_PROMPT = "def "


@dataclass
class TrainRunConfig:
    """Train one supernet into ``root/name``; a run that exists is resumed. ``device``: auto, cpu, cuda or cuda:<n>.

    ``specialise``: a run below ``root`` whose finished weights are trained on under one policy: ``pick`` (``knee``, an
    id of its front or its beginning; null: the knee) or ``policy`` (a JSON file). Model, data and supernet settings are
    then those of that run, and so is ``train`` except for what is given here and the schedule, which by default is .3
    of the learning rate and half of the steps, with warm-up and decay to zero.
    """

    name: str = "train"
    root: str = "runs"
    specialise: str | None = None
    pick: str | None = None
    policy: str | None = None
    seed: int = 0
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        check_counts(0, {"seed": self.seed})
        if self.specialise is not None:
            check_name(self.specialise, "specialise")
            check(self.specialise != self.name, "name", self.name, "that is the run to specialise: it stays as it is")
            self.choice()
        for option in ("pick", "policy"):
            value = getattr(self, option)
            check(value is None or self.specialise is not None, option, value, "it goes with specialise=<run>")

    def choice(self) -> Choice:
        """Weights and policy to specialise; ``ValueError`` for options that exclude each other."""
        return Choice(run=self.specialise, root=self.root, pick=self.pick, policy=self.policy)


class Choosing:
    """Options that name a model and a policy, by the names of the fields of ``Choice``."""

    def choice(self) -> Choice:
        """Model and policy; ``ValueError`` for options that exclude each other."""
        return Choice(**{item.name: getattr(self, item.name) for item in fields(Choice) if hasattr(self, item.name)})


@dataclass
class ExportConfig(Choosing):
    """Write one point of a run's front, or any other policy, as a model of its own; verify it in a fresh process.

    ``import natsl`` makes transformers know such a folder (``AutoModelForCausalLM.from_pretrained``). Layers that only
    use the delta rule lose the weights of softmax and router. ``run``: a run below ``root``. ``pick``: ``knee``, an id
    of the front, or the beginning of an id or of a policy's digest (null: the knee). ``policy``: a JSON file instead,
    which needs no front. ``calibration``: a table made by natsl calibrate instead of the run's own. ``name``: of the
    folder below ``root/run/export`` (null: the point's id or ``policy-<digest>``, and the calibration's name).
    ``overwrite`` replaces a folder that exists. ``dtype``: of the weights; those that routes depend on stay float32,
    and with bfloat16 the model computes in it. ``sequences``: so many of the test part of each task are copied into the
    folder, to be scored again by natsl verify (0: no text goes along).
    """

    run: str = "???"  # must be given
    root: str = "runs"
    pick: str | None = None
    policy: str | None = None
    calibration: str | None = None
    name: str | None = None
    overwrite: bool = False
    dtype: Precision = Precision.float32
    sequences: int = 8

    def __post_init__(self) -> None:
        self.choice()
        check_counts(0, {"sequences": self.sequences})


@dataclass
class VerifyConfig:
    """Repeat the checks of an exported folder, anywhere: one line for each, exit code 1 if one fails.

    ``export``: a folder made by natsl export. Files against their checksums; then, by natsl's own loader and by
    transformers where it is installed: the supernet's logits, reading in pieces, batches and padding against one pass,
    generation, and the scores of the sequences that the folder holds.
    """

    export: str = "???"  # must be given


@dataclass
class GenerateConfig(Choosing):
    """Continue prompts with a point of a run's front, any other policy, or an exported model.

    Either ``run`` (below ``root``) with ``pick`` (null: the knee), or with ``policy`` (a JSON file) or ``budget`` (the
    same in every routed layer; 0 and 1 are the ops delta and softmax), which need no front; or ``export`` (a folder
    made by natsl export), whose policy these two replace. ``calibration``: a table made by natsl calibrate instead of
    the run's own. ``prompt`` (null: ``def``) is text, or ``prompt_file`` names a file with it, or ``prompts_file`` one
    with a prompt in each line (-: standard input); ``⟨k3⟩`` and ``⟨v3⟩`` in it stand for the fourth key and value of
    the recall tasks. ``temperature`` 0 takes the most likely token; ``top_k`` draws from so many (0: all), ``top_p``
    from the fewest that come to this probability. ``stop``: texts that end it before ``max_new_tokens`` and are not
    printed; ``\\n`` in them, and in the lines of ``prompts_file``, is a line break and two backslashes are one. Of
    several prompts the i-th (from 0) draws with ``seed`` + i. ``state``: a file to go on from if there is one, and that
    is written once all is drawn; it holds all that was read and drawn, so that the same options go on as if nothing had
    ended. A prompt then follows what is there (null: none), and policy or budget may be others. The rate of the tokens
    after the first ones and the bytes of the cache go to standard error.
    """

    run: str | None = None
    root: str = "runs"
    pick: str | None = None
    export: str | None = None
    policy: str | None = None
    budget: float | None = None
    calibration: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    prompts_file: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int = 0
    state: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        self.choice()
        check("" not in self.stop, "stop", self.stop, "each must have at least one character")
        check(self.prompt != "", "prompt", self.prompt, "it must not be empty")
        sources = {name: getattr(self, name) for name in ("prompt", "prompt_file", "prompts_file")}
        sources = {name: value for name, value in sources.items() if value is not None}
        check(len(sources) < 2, ", ".join(sources), tuple(sources.values()), "give only one of them")
        check_counts(1, {"max_new_tokens": self.max_new_tokens})
        self.sampling()

    def stops(self) -> list[str]:
        """``stop`` with line breaks, which a command line cannot have."""
        return [unescape(text) for text in self.stop]

    def prompts(self) -> list[str] | None:
        """The prompts as text, None if there are none; ``UserError`` for a file that cannot be used."""
        if self.prompts_file is not None:
            return read_prompts(self.prompts_file)
        if self.prompt_file is not None:
            return [read_prompt(self.prompt_file)]
        return None if self.prompt is None else [self.prompt]

    def sampling(self) -> Sampling:
        """How tokens are drawn; ``ValueError`` naming the option."""
        return Sampling(self.temperature, self.top_k, self.seed, self.top_p)


@dataclass
class CalibrateConfig:
    """Make a calibration table of a run's supernet on other text: what turns a budget into a threshold of the router.

    The table that training made turns a budget into the fraction of chunks kept on training's kind of text; other text
    needs another table to be kept at the same fraction. ``run``: a run below ``root`` whose supernet is trained to its
    end. ``name``: the table goes to ``root/run/calibrations/<name>.json``, beside training's own, which stays as it is;
    ``calibration=<name>`` makes evaluate, generate and export use it. ``sequences``: how many to calibrate on, over all
    tasks; ``seed`` that they are drawn with (null for either: as in training).
    ``allow_other_data`` takes the run's own text also where it has changed, and the table says so. ``overwrite``
    replaces a table of that name.
    """

    run: str = "???"  # must be given
    name: str = "???"  # must be given
    root: str = "runs"
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig)
    allow_other_data: bool = False
    sequences: int | None = None
    seed: int | None = None
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.name != "???":
            check_name(self.name, "name")
        if self.sequences is not None:
            check_counts(1, {"sequences": self.sequences})
        if self.seed is not None:
            check_counts(0, {"seed": self.seed})


def run_search(config: SearchRunConfig) -> None:
    """Train a supernet, search its policies and report the front; see ``natsl.search.pipeline``."""
    from natsl.search import pipeline

    arguments = sys.argv[1:]
    pipeline.run_search(config, arguments[1:] if arguments[:1] == ["search"] else arguments)


def run_training(config: TrainRunConfig) -> None:
    """Train a supernet, or specialise one, or resume that, in ``root/name/supernet``."""
    device = resolve_device(config.device)
    if config.specialise is not None:
        _run_specialisation(config, device)
        return
    from natsl.data import TaskData, load_text
    from natsl.heldout import keep_record
    from natsl.model import count_parameters
    from natsl.train import TrainRecipe, fit

    check_batch(config.model.layers, config.train, config.supernet)
    check_chunks(config.model.chunk_size, config.data.seq_len)
    text = load_text(config.data.path, config.data.text_rules(str(user_path(config.root, "root"))))
    data = TaskData(config.data, text, config.model.vocab_size)
    run = Run.open(config.name, config.root)
    with run.lock():
        if run.study_db.exists():
            raise UserError(f"name = {config.name!r} is a search, which trains its own supernet: choose another name")
        check_resume(run, config)
        keep_record(run, data, config.root, None, allow_other=False)
        recipe = TrainRecipe(config.train, config.supernet, config.seed)
        with start_tracker(config.tracking, run, to_plain(config)) as tracker:
            net = fit(run, config.model, data, recipe, device, tracker)
        run.write_config(config)  # only now is it known that the checkpoints belong to this configuration
    print(f"supernet of {count_parameters(net):,} parameters in {run.supernet}")
    root = None if config.root == "runs" else config.root
    if Op.routed not in config.model.layers:  # there is one policy, which any budget comes to
        print(f"score it: {command('evaluate', {'run': config.name, 'budget': 1, 'root': root})}")
        return
    names = {"name": f"{config.name[:57]}-search", "supernet_from": config.name, "root": root}
    options = names | changed_options(config.data, DataConfig(), "data")
    print(f"search its policies: {command('search', options)}")


def _run_specialisation(config: TrainRunConfig, device: torch.device) -> None:
    """Specialise the weights of a run in ``root/name`` and print what that gained."""
    from natsl.heldout import keep_record
    from natsl.search.gain import lines
    from natsl.search.specialise import Settings, Source, claim, recipe_of, specialise

    source = Source.load(config.choice())
    given = Settings(config.model, config.data, config.supernet, config.train)
    settings = source.settings(given, _chosen(config))
    config = replace(config, model=settings.model, data=settings.data, supernet=settings.supernet, train=settings.train)
    data = source.data(config.data)
    recipe = recipe_of(source, settings, config.seed)
    run = Run.open(config.name, config.root)
    with run.lock():
        if run.study_db.exists():
            raise UserError(f"name = {config.name!r} is a search: choose another name")
        check_resume(run, config)
        claim(run, source)
        keep_record(run, data, config.root, None, allow_other=False)
        with start_tracker(config.tracking, run, to_plain(config)) as tracker:
            report = specialise(run, source, data, recipe, device, tracker)
        run.write_config(config)
    what = f"{report['pick'] or 'policy'} ({source.policy.describe()}) of run {config.specialise!r}"
    print(
        f"{what}, specialised in {recipe.train.steps} steps at a learning rate of {recipe.train.lr:.3g}: {run.supernet}"
    )
    print("\n".join(lines(report)))
    print(f"export it: {command('export', run_options(config.name, config.root))}")


def _chosen(config: TrainRunConfig) -> set[str]:
    """Options of the sections of a training that the user has set: they differ from the defaults, or were typed."""
    from natsl.cli.main import composed
    from natsl.cli.options import option_types

    typed = [argument.lstrip("+").partition("=")[0] for argument in sys.argv[1:] if "=" in argument]
    chosen = {
        name
        for name, _ in option_types(TrainRunConfig)
        if any(f"{name}.".startswith(f"{one}.") or one.startswith(f"{name}.") for one in typed)
    }
    defaults = (composed("train", TrainRunConfig), TrainRunConfig())
    for section in ("model", "data", "supernet", "train"):
        value = getattr(config, section)
        changed = [
            {name for name, *_ in differences(f"{section}.", to_plain(getattr(default, section)), value, type(value)())}
            for default in defaults
        ]
        chosen |= changed[0] & changed[1]
    return chosen


def run_export(config: ExportConfig) -> None:
    """Export a point or a policy, and say where it went."""
    from natsl.export import export_choice
    from natsl.heldout import trained_on_tokens

    folder = export_choice(config.choice(), config.name, config.overwrite, config.dtype, config.sequences)
    print(f"exported to {folder}; a fresh process gave the supernet's logits")
    if config.sequences:
        what = f"up to {config.sequences} held-out sequences of each task, to score again; sequences=0 leaves them out"
        print(f"note: the folder holds {what}", file=sys.stderr)
    tokens = trained_on_tokens(Choice(export=str(folder)))
    options = {"export": str(folder)} if tokens else {"export": str(folder), "prompt": "def "}
    print(f"try it: {command('evaluate' if tokens else 'generate', options)}")


def run_verification(config: VerifyConfig) -> int:
    """Print what each check of a folder finds; 1 if one fails."""
    from natsl.hf import transformers_version
    from natsl.verify import checks

    failed = False
    for result in checks(user_path(config.export, "export")):
        failed |= result.fault is not None
        print(result.line(), flush=True)
    if transformers_version() is None:
        print("note: transformers is not installed, or too old: natsl's own loader only", file=sys.stderr)
    return int(failed)


class _Printer:
    """Prints texts that grow side by side one after another, the first that is not finished as it grows."""

    def __init__(self, texts: list[str]) -> None:
        self._pieces = [[text.encode(errors="surrogateescape").decode(errors="replace")] for text in texts]
        if len(texts) > 1:
            for i, pieces in enumerate(self._pieces):
                pieces.insert(0, f"==> prompt {i + 1} of {len(texts)} <==\n")
        self._finished = [False] * len(texts)
        self._row = 0
        self._print()

    def add(self, row: int, piece: str, finished: bool = False) -> None:
        """Let the text of a row grow; after the last piece it is ``finished``."""
        self._pieces[row] += [piece, "\n"] if finished else [piece]
        self._finished[row] = finished
        self._print()

    def _print(self) -> None:
        while self._row < len(self._pieces):
            print(*self._pieces[self._row], sep="", end="", flush=True)
            self._pieces[self._row].clear()
            if not self._finished[self._row]:
                return
            self._row += 1


def run_generation(config: GenerateConfig) -> None:
    """Print prompts and their continuations, those of a single prompt as they are drawn."""
    device = resolve_device(config.device)
    from natsl.cache import Cache
    from natsl.heldout import trained_on_tokens

    texts, state = config.prompts(), None if config.state is None else _writable(config.state, "state")
    model, policy, _ = load_choice(config.choice())
    if config.budget is not None and Op.routed not in model.kinds:
        raise UserError(f"budget = {config.budget} has no effect: no layer of the model is routed")
    if trained_on_tokens(config.choice()):
        raise UserError("the model was trained on token ids, and natsl has no tokenizer: generate continues text only")
    model.to(device)
    cache = Cache.load(state, model) if state is not None and state.exists() else None
    if texts is None:
        texts = [DEFAULT_PROMPT] if cache is None else [""] * len(cache.unread)
    if cache is None:
        cache = model.new_cache(len(texts))
    if len(cache.unread) != len(texts):
        raise UserError(f"state: {state} holds {len(cache.unread)} sequences, but {len(texts)} are to be continued")
    prompts = []
    for line, text in enumerate(texts, 1):
        try:
            prompts.append(encode(text, model.config.vocab_size) if text else [])
        except ValueError as error:
            if config.prompts_file is None:
                raise
            raise UserError(f"prompts_file = {config.prompts_file!r}: line {line}: {error}") from None
    transcripts = [Transcript(config.stops()) for _ in texts]
    steps = generate_batch(
        model,
        policy,
        prompts,
        config.max_new_tokens,
        config.sampling(),
        cache,
        ends=lambda row, _: transcripts[row].ended,
    )
    printer, times, drawn = _Printer(texts), [], 0
    for step in steps:
        times.append(time.perf_counter())
        for row, token in enumerate(step):
            if token is not None:
                drawn += 1
                printer.add(row, transcripts[row].add(token), transcripts[row].ended)
    for row, transcript in enumerate(transcripts):
        if not transcript.ended:
            printer.add(row, transcript.close(), finished=True)
    if state is not None:
        cache.save(state, model)
    seconds = times[-1] - times[0]
    rate = f", {(drawn - len(texts)) / seconds:,.1f} a second" if seconds > 0 else ""
    new, read = (f"{n} token{'s' * (n != 1)}" for n in (drawn, int(cache.lengths.sum())))
    several = f" of {len(texts)} prompts" if len(texts) > 1 else ""
    print(f"note: {new}{several}{rate}; a cache of {cache.nbytes:,} bytes for {read}", file=sys.stderr)


def _writable(text: str, option: str) -> Path:
    """A user's path of a file to write, links followed; ``UserError`` for what is no file or cannot be one."""
    path = user_path(text, option).resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"{option}: {path} is no file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror or error}") from None


def run_calibration(config: CalibrateConfig) -> None:
    """Store a calibration table beside that of training, and print what budgets keep under it."""
    run = Run.open(config.run, config.root, create=False)
    device = resolve_device(config.device)
    from natsl.calibrate import make_table
    from natsl.data import Split
    from natsl.evaluate import evaluate

    made = make_table(
        run,
        config.name,
        config.data,
        device,
        sequences=config.sequences,
        seed=config.seed,
        allow_other_data=config.allow_other_data,
        overwrite=config.overwrite,
    )
    data, model = made.held.data, made.model
    print(f"{made.path}: calibrated on {data.corpus.description}")
    tasks = data.tasks if len(data.tasks) > 1 else []
    total = sum(data.config.tasks[task] for task in data.tasks)
    print("kept of the test part" + (", tasks by weight:" if tasks else ":"))
    print("budget   kept" + "".join(f"  {task:>8}" for task in tasks))
    sets = data.eval_sets(Split.test)  # calibrated on the part for the search
    for budget in CHECKED_BUDGETS:
        policy = RoutingPolicy.uniform(model.kinds, model.config.chunk_size, budget)
        kept = evaluate(model, policy, sets)
        by_task = kept.kept_fraction_by_task
        mean = sum(data.config.tasks[task] * by_task[task] for task in data.tasks) / total  # as the table was made
        print(f"{budget:6.2f} {mean:6.3f}" + "".join(f"  {by_task[task]:8.3f}" for task in tasks))
    if config.data.tasks:  # evaluate would score the tasks of the run
        return
    named = {} if config.data.path is None else {"data.path": data.config.path}  # where the table holds
    options = {**run_options(run.name, config.root), "calibration": config.name, "budget": 0.1, **named}
    print(f"try it: {command('evaluate', options)}")


def run_throughput(config: ThroughputConfig) -> None:
    """Print the table of what was timed and write ``throughput.json`` into the folder ``out``."""
    import torch

    from natsl.serving import measure_decode, measure_prefill
    from natsl.throughput import Phase, measure

    device = resolve_device(config.device)
    path = output_folder(config.out) / "throughput.json"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    size = f"{config.batch_size} × {config.tokens} tokens, {config.precision.value}"
    print(f"{name}, torch {torch.__version__}; {config.phase.value}, {size}")
    measures: dict[Phase, Callable[[ThroughputConfig, torch.device], Iterator[Speed | ServingSpeed]]]
    measures = {Phase.train: measure, Phase.prefill: measure_prefill, Phase.decode: measure_decode}
    rows: list[Speed | ServingSpeed] = []
    for row in measures[config.phase](config, device):
        if not rows:
            print(row.heading())
        rows.append(row)
        print(row.line(), flush=True)
    result = {
        "device": name,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": to_plain(config),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")
