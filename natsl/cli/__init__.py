"""The command line: ``natsl <verb>``. Libraries never import it."""

from natsl.cli.main import command_name as command_name  # moved
from natsl.cli.main import resolve_device as resolve_device  # moved
from natsl.cli.main import run_main as run_main  # moved
