"""``natsl <verb>``: the verbs, options by Hydra, one line for a user's mistake, notes on stderr, exit codes.

Exit codes: 0 done, 2 a mistake of the user, 1 a failure, 130 Ctrl-C, 143 SIGTERM. Hydra makes no folder, changes no
directory and configures no logging here. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from natsl import __version__
from natsl.cli.verbs import VERBS, load
from natsl.errors import UserError
from natsl.secrets import redact_text
from natsl.signals import TerminatedError, sigterm_raises
from natsl.space.check import InvalidValueError
from natsl.threads import choose_threads

if TYPE_CHECKING:
    import argparse

    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from natsl.cli.options import Loader

C = TypeVar("C")
_log = logging.getLogger(__name__)
# Failures of the machine that one line explains better than a traceback.
_PLAIN_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE)


def main() -> None:
    """Entry point of ``natsl`` and ``python -m natsl``: the first argument is the verb."""
    program, arguments = command_name(), sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _guard(lambda: print(_overview(program)))
    elif arguments[0] == "--version":
        _guard(lambda: print(f"natsl {__version__}"))
    elif arguments[0] in ("-sc", "--shell-completion"):
        _complete(arguments)
    else:
        run_verb(arguments[0], arguments[1:], f"{program} {arguments[0]}")


def search_script() -> None:
    """Entry point of ``natsl-search``."""
    run_verb("search")


def train_script() -> None:
    """Entry point of ``natsl-train``."""
    run_verb("train")


def export_script() -> None:
    """Entry point of ``natsl-export``."""
    run_verb("export")


def generate_script() -> None:
    """Entry point of ``natsl-generate``."""
    run_verb("generate")


def evaluate_script() -> None:
    """Entry point of ``natsl-evaluate``."""
    run_verb("evaluate")


def run_verb(name: str, arguments: Sequence[str] | None = None, command: str | None = None) -> None:
    """Run one verb; ``arguments`` and ``command``, how it was called, are those of the process unless given.

    Returns if all went well and exits otherwise.
    """
    verb = VERBS.get(name)
    if verb is None:
        close = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        _say(f"error: unknown command {name!r}{hint} (natsl --help lists all)")
        sys.exit(2)
    if verb.config is not None:
        run_main(name, load(verb.config), lambda config: load(verb.function)(config), arguments, command)
        return
    if arguments is not None:
        sys.argv[:] = [command or command_name(), *arguments]  # which this function reads by itself
    _guard(lambda: _call(verb.function))


def _call(function: str) -> int | None:
    """Call what reads the command line by itself."""
    if not {"-h", "--help"}.intersection(sys.argv[1:]):
        choose_threads()
    result: int | None = load(function)()
    return result


def run_main(
    config_name: str,
    config_class: type[C],
    function: Callable[[C], int | None],
    arguments: Sequence[str] | None = None,
    command: str | None = None,
) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line, then call ``function`` with a ``config_class``.

    Returns if all went well and exits otherwise. ``-m`` runs one job after another, after all of them were checked.
    """
    argv = sys.argv[1:] if arguments is None else list(arguments)
    _guard(lambda: _main(config_name, config_class, function, argv, command or command_name()))


def _guard(action: Callable[[], int | None]) -> None:
    """Do what a command does; what goes wrong becomes one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    warnings.showwarning = _show_warning
    _show_log()
    try:
        with sigterm_raises():
            code = action()
    except KeyboardInterrupt:
        _say("interrupted")
        code = 128 + signal.SIGINT
    except TerminatedError:
        _say("terminated")
        code = 128 + signal.SIGTERM
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        line = user_line(error)
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            _say(redact_text(traceback.format_exc()).rstrip())
            code = 1
        if line is None:
            _say("error: this is a defect of natsl, not of what you typed: please report it with the lines above")
        else:
            _say(f"error: {line}")
            code = 2 if isinstance(error, ValueError) or _is_hydra(error) else 1
    if code:
        sys.exit(code)


def _overview(program: str) -> str:
    """What ``natsl --help`` shows: a line for every verb."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb.name:<{width}}{verb.summary}" for verb in VERBS.values()]
    return "\n".join(
        [
            "Neural attention search: models whose layers route each chunk to softmax or to linear attention.",
            f"\nUsage: {program} <command> [flags] [option=value ...]",
            "\nCommands:",
            *lines,
            f"\n{program} <command> --help shows the options of a command and their values.",
        ]
    )


def _complete(arguments: list[str]) -> None:
    """Shell completion of ``natsl`` itself: of the verb, and then, as if the verb were the program, of its options."""
    verb = "search"  # what is installed is the same for all
    line = re.fullmatch(r"\s*(\S+)\s*(\S*)(.*)", os.environ.get("COMP_LINE", ""), re.DOTALL)
    if any(argument.startswith("query=") for argument in arguments) and line is not None:
        program, verb, rest = line.groups()
        if not rest:
            print(" ".join(name for name in VERBS if name.startswith(verb)))
            return
        if verb not in VERBS or VERBS[verb].config is None:
            return
        os.environ["COMP_LINE"] = program + rest
    run_verb(verb, arguments, "natsl")


def user_line(error: Exception) -> str | None:
    """The one line that tells a user what to fix, or None if ``error`` is a defect whose traceback is needed."""
    text = _text(error)
    return None if text is None else redact_text(" ".join(text.split()))


def _text(error: Exception) -> str | None:
    if isinstance(error, UserError | InvalidValueError) or type(error).__name__ == "InvalidTableError":
        return str(error)  # kernels/ knows nothing of natsl, and its tables are too slow to import for their error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: use smaller batches or another device ({str(error) or 'no more is known'})"
    if isinstance(error, OSError) and error.errno in _PLAIN_ERRNO:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error)
    if "omegaconf" in sys.modules and "hydra" in sys.modules:
        return _hydra_text(error)
    return None


def _is_hydra(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("hydra", "omegaconf")


def _hydra_text(error: Exception) -> str | None:
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return f"{error.override} cannot be read: put a value with spaces or symbols in quotes, as in '{key}=\"a (b)\"'"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return f"unknown option {cause.full_key!r} (--help lists all)"
    if isinstance(cause, OmegaConfBaseException):
        first = str(cause.msg or cause).splitlines()[0]
        if "is not Optional" in first:
            name = cause.full_key
            return f"{name} = null is not allowed: it needs a value (the text null is written {name}='\"null\"')"
        return f"{cause.full_key}: {first}" if cause.full_key else first
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:1] if "search path" in str(error).lower() else lines)
    found = re.fullmatch(r"(In '.*?': )\w+ raised while composing config: (.*?) full_key: (\S+).*", text)
    return f"{found[1]}{found[3]}: {found[2]}" if found else text


def _main(
    config_name: str, config_class: type[C], function: Callable[[C], int | None], argv: list[str], command: str
) -> int:
    if "--version" in argv:
        print(f"natsl {__version__}")
        return 0
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = command
    args = parser.parse_args(argv)
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun is not allowed: it would execute a pickle")
    if args.config_path is not None:
        raise UserError("--config-path is not allowed: add your own folder of config files with --config-dir")
    if args.resolve and not (args.cfg or args.help):
        raise UserError("--resolve goes with --cfg or --help")
    config_name = args.config_name or config_name
    loader = _loader(config_class, args.config_dir)
    if args.help:
        from natsl.cli.options import help_text

        print(help_text(loader, _compose(loader, config_name, args.overrides), command), end="")
        return 0
    if args.hydra_help or args.cfg or args.shell_completion or args.info:
        return _show(loader, config_name, args, parser)
    _note_ignored(args.overrides)
    if not (args.multirun or "hydra.mode=MULTIRUN" in args.overrides):
        config = _to_object(_compose(loader, config_name, args.overrides), config_class)
        choose_threads()  # after all checks, before anything loads torch
        return function(config) or 0
    lines = _jobs(loader, args.overrides)
    jobs = [_to_object(_compose(loader, config_name, line), config_class) for line in lines]
    targets = [
        tuple(getattr(job, part, None) for part in ("root", "run", "name"))
        for job in jobs
        if getattr(job, "name", None) is not None
    ]
    if len(set(targets)) < len(targets):
        raise UserError(f"the {len(jobs)} jobs need different names, for example name=a,b or name='s${{seed}}'")
    choose_threads()
    for number, (line, job) in enumerate(zip(lines, jobs, strict=True), 1):
        _say(redact_text(f"job {number} of {len(jobs)}: {' '.join(line)}"))
        code = function(job)
        if code:
            return code
    return 0


def _loader(config_class: type, config_dir: str | None) -> Loader:
    import hydra.version
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    from natsl.cli.options import Loader

    hydra.version.setbase("1.3")
    search_path = create_config_search_path("pkg://natsl.conf")  # Hydra imports it, which registers the classes
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise UserError(f"--config-dir {config_dir}: there is no such folder")
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    return Loader(search_path, config_class)


def _compose(loader: Loader, config_name: str, overrides: list[str]) -> DictConfig:
    from hydra.types import RunMode

    with _told_of(overrides):
        return loader.load_configuration(config_name, list(overrides), RunMode.RUN)


def composed(config_name: str, config_class: type[C], overrides: Sequence[str] = ()) -> C:
    """What a command gets that is given these options; nothing of Hydra's own state in this process changes."""
    from hydra.version import VersionBase

    state = VersionBase.instance()
    before = state.version_base
    try:
        return _to_object(_compose(_loader(config_class, None), config_name, list(overrides)), config_class)
    finally:
        state.version_base = before


@contextlib.contextmanager
def _told_of(overrides: list[str]) -> Iterator[None]:
    """Hydra's complaints about what was written, as ``UserError``."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError | OmegaConfBaseException):
            raise
        empty = [text for text in overrides if text.lower().endswith("=null")]
        if empty and "Config group override must be" in str(error):  # Hydra tells neither option nor value
            raise UserError(f"{' '.join(empty)} is not allowed: give the name of a preset, or leave it out") from None
        raise UserError(str(error)) from None


def _to_object(config: DictConfig, config_class: type[C]) -> C:
    """The composed config as an object of ``config_class``, which checks itself on the way."""
    from omegaconf import OmegaConf, open_dict

    with open_dict(config):
        del config["hydra"]
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{', '.join(missing)} must be given: {' '.join(f'{key}=...' for key in missing)}")
    from natsl.cli.options import check_texts

    check_texts(config_class, config)
    result = OmegaConf.to_object(config)
    assert isinstance(result, config_class)
    return result


def _jobs(loader: Loader, overrides: list[str]) -> list[list[str]]:
    """Command lines of the jobs of a sweep: every combination of the values."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create(config_loader=loader).parse_overrides(loader.as_typed(overrides, sweep=True))
    kept = [override for override in parsed if not override.is_hydra_override()]
    return [list(job) for job in BasicSweeper.split_arguments(kept, None)[0]]


def _show(loader: Loader, config_name: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """What Hydra itself shows: ``--cfg``, ``--info``, ``--hydra-help``, shell completion."""
    from hydra._internal.hydra import Hydra
    from hydra.core.global_hydra import GlobalHydra

    hydra = Hydra(task_name=config_name, config_loader=loader)
    GlobalHydra.instance().initialize(hydra)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), _told_of(args.overrides):
            _show_one(hydra, config_name, args, parser)
    except UserError:
        if not args.shell_completion:  # a shell that completes a wrong line has nothing to offer, and stays silent
            raise
    finally:
        GlobalHydra.instance().clear()
    print(redact_text(shown.getvalue()), end="")
    return 0


def _show_one(hydra: Hydra, config_name: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.hydra_help:
        hydra.hydra_help(config_name, parser, args)
    elif args.cfg:
        hydra.show_cfg(config_name, args.overrides, args.cfg, args.package, args.resolve)
    elif args.shell_completion:
        hydra.shell_completion(config_name, args.overrides)
    else:
        hydra.show_info(args.info, config_name, args.overrides)


def _note_ignored(overrides: list[str]) -> None:
    from natsl.cli.options import IGNORED_HYDRA

    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in IGNORED_HYDRA:
            _log.info("%s has no effect: everything is written to the run's folder, root/name", key)


def command_name() -> str:
    """How the running program was called: ``natsl``, ``natsl-search`` or ``python -m natsl.train``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name or "natsl"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if category is UserWarning:  # made for the user, who does not care where in the code it arose
        text = f"warning: {message}"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(redact_text(text), file=file or sys.stderr, flush=True)


class _Notes(logging.Handler):
    """Prints what libraries log, a line for each record, to whatever stderr is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "note" if record.levelno < logging.WARNING else record.levelname.lower()
        _say(redact_text(f"{level}: {record.getMessage()}"))


def _show_log() -> None:
    logger = logging.getLogger("natsl")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(logging.INFO))
    logger.setLevel(logging.INFO)
    logger.propagate = False  # else a handler of the root logger would print each note once more


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
