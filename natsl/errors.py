"""The error that a user's mistake raises."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user or a state of the machine that one line explains, without a traceback."""
