"""Removal of secrets from data and text."""

from __future__ import annotations

import pytest

from natsl.secrets import MASK, redact, redact_text

SECRET_KEYS = ["api_key", "apikey", "API-KEY", "apiKey", "wandb.api_key", "token", "hf_token", "accessToken", "secret"]
SECRET_KEYS += ["client_secret_value", "password", "db_passwd", "aws_access_key_id", "private_key", "credentials"]
PLAIN_KEYS = ["key_dim", "key", "keys", "kv_bytes_per_token", "bytes_per_token", "tokens", "max_new_tokens"]
PLAIN_KEYS += ["tokens_per_second", "monkey", "tokenizer", "vocab_size"]


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_secret_keys_are_masked(key: str) -> None:
    assert redact({"a": [{key: "hunter2"}]}) == {"a": [{key: MASK}]}


@pytest.mark.parametrize("key", PLAIN_KEYS)
def test_ordinary_keys_are_not(key: str) -> None:
    assert redact({key: "minimize"}) == {key: "minimize"}
    assert redact({key: 16}) == {key: 16}


def test_empty_and_numeric_values_stay() -> None:
    assert redact({"token": None, "secret": "", "password": 3}) == {"token": None, "secret": "", "password": 3}


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_values_of_secret_variables_are_removed_everywhere(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "0123456789abcdef")
    value = {"name": "x0123456789abcdefy", "0123456789abcdef": ["0123456789abcdef"]}
    assert redact(value) == {"name": f"x{MASK}y", MASK: [MASK]}
    assert "0123456789abcdef" not in redact_text("error: 0123456789abcdef")


def test_other_variables_are_not_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    monkeypatch.setenv("MAX_TOKENS", "associative")
    monkeypatch.setenv("WEB_TOKEN_FILE", "/home/somebody/token")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    text = "sometimes associative /home/somebody/token true"
    assert redact_text(text) == text


def test_passwords_in_urls_are_removed() -> None:
    url = "postgresql+psycopg://me:hunter2@host:5432/db"
    assert redact({"storage": url}) == {"storage": f"postgresql+psycopg://me:{MASK}@host:5432/db"}
    assert redact("sqlite:////tmp/a:b@c") == "sqlite:////tmp/a:b@c"


PARAMETERS = ["password", "sslpassword", "passwd", "pwd", "token", "access_token", "client_secret", "api_key", "apikey"]


@pytest.mark.parametrize("key", [*PARAMETERS, "PASSWORD", "X-Amz-Signature", "sig"])
def test_secret_parameters_of_urls_are_removed(key: str) -> None:
    for before in ("?", "?a=1&", "?a=1&amp;"):
        url = f"postgresql://host/db{before}{key}=hunter2:%20'x&b=2"
        masked = f"postgresql://host/db{before}{key}={MASK}&b=2"
        assert redact({"storage": url}) == {"storage": masked}
        assert redact_text(f'<b>{url}</b> <i title="{url}">') == f'<b>{masked}</b> <i title="{masked}">'
        assert redact_text(masked) == masked
    assert redact_text(f"<b>?{key}=hunter2</b>") == f"<b>?{key}={MASK}</b>"
    url = f"sqlite:///a.db?mode=ro&max_tokens=8&cache=shared&x{key}x=1"
    assert redact_text(url) == url
