"""The tokenizer of an export: its ids are natsl's, and every text and every byte comes back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from natsl.generate import decode, encode
from natsl.tokenizer import PAD, tokenizer_files

pytest.importorskip("transformers", minversion="5.23")


def load(folder: Path, vocab_size: int) -> Any:
    """As a user does; without natsl's classes, which it does not need."""
    from transformers import AutoTokenizer

    for name, content in tokenizer_files(vocab_size).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(tmp_path_factory.mktemp("tokenizer"), 390)


def any_text() -> str:
    rng = random.Random(0)
    codes = [rng.choice([rng.randrange(0x800), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])]
    codes += [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(500)]
    return "".join(map(chr, codes))


TEXTS = {
    "code": "def main(x):\n\treturn  x .y , 'n' don't",
    "letters of bytes": "Ā ġ Ċ \0 \x7f",
    "keys and values": "é⟨k0⟩ü ⟨v63⟩⟨384⟩⟨389⟩",
    "no tokens": "⟨k64⟩⟨v⟩⟨k ⟨390⟩",
    "any characters": any_text(),
    "one": "a",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_texts_come_back(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    if "⟨k64⟩" not in text:  # which natsl refuses
        assert ids == encode(text, 390)


def test_every_byte_is_its_own_id(tokenizer: Any) -> None:
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(256) for _ in range(40)]
        assert tokenizer.decode(ids) == bytes(ids).decode(errors="replace")
        ids = [rng.randrange(390) for _ in range(40)]
        assert tokenizer.decode(ids) == decode(ids)
    assert sorted(tokenizer.get_vocab().values()) == list(range(391))


def test_padding_is_on_the_left_and_beyond_the_vocabulary(tokenizer: Any) -> None:
    batch = tokenizer(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[390, 390, 97], [98, 99, 100]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (PAD, 390)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "a"


def test_a_vocabulary_of_bytes_only(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, 256)
    assert tokenizer("⟨k3⟩")["input_ids"] == [*"⟨k3⟩".encode()]
    assert tokenizer.pad_token_id == 256
