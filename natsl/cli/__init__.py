"""The command line: ``natsl <verb>``. Libraries never import it."""

from natsl.device import resolve_device as resolve_device  # moved
