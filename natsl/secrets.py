"""Removal of secrets from what is written, shown or sent: passwords, keys and tokens.

Secrets are text under keys that look secret, the values of environment variables that do, and passwords in URLs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "<removed>"

# Keys whose text values are secrets. Only text is masked, so that counts such as max_new_tokens stay readable; kv cost
# names end in per_token.
_SECRET_KEY = re.compile(
    r"secret|passw(or)?d|passphrase|credential|(^|_)(api|access|private|auth|signing|encryption|ssh)_?key(s|_id)?$"
    r"|(^|(?<!per)_)token$|_?authorization$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(API|ACCESS|PRIVATE|AUTH)_?KEY|TOKEN(?!S|IZ)|SECRET|PASSW(OR)?D|CREDENTIAL", re.IGNORECASE
)
_NOT_SECRET_VARIABLE = re.compile(r"_(FILE|PATH|DIR|URL)$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w://[^/\s:@]*):[^/\s@]+@")
# A parameter of a URL ("&amp;" in HTML ends with ";"). Its value ends where that of a URL does, in HTML or in JSON.
_URL_PARAMETER = re.compile(
    r"([?&;][\w.-]*(?:passw(?:or)?d|passphrase|pwd|secret|token|credentials?|sig(?:nature)?"
    r"|(?:api|access|private|auth)[_-]?key)=)[^&#\s<>\"]+",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 8  # shorter values ("1", "true", "none") would blot out ordinary text


def redact(value: Any) -> Any:
    """Copy of plain data without secrets: text under secret keys, values of secret variables, passwords in URLs."""
    return _redact(value, _secrets())


def redact_text(text: str) -> str:
    """``text`` without the values of secret environment variables and passwords in URLs."""
    return str(_redact(text, _secrets()))


def _secrets() -> list[str]:
    """Values of environment variables that look like secrets, longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name) and not _NOT_SECRET_VARIABLE.search(name)
    }
    return sorted(values, key=len, reverse=True)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
        return _URL_PARAMETER.sub(rf"\1{MASK}", _URL_PASSWORD.sub(rf"\1:{MASK}@", value))
    if isinstance(value, Mapping):
        return {
            _redact(key, secrets): MASK
            if isinstance(key, str) and isinstance(item, str | bytes) and item and _is_secret_key(key)
            else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    return value


def _is_secret_key(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # apiKey → api_Key
    return _SECRET_KEY.search(re.sub(r"[\s.-]", "_", words)) is not None
