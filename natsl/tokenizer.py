"""The files of a tokenizer for models of bytes, as ``tokenizers`` and transformers read them.

Ids are those of ``natsl.generate.encode``: a byte is its own id, and what is beyond the bytes is written ``⟨k3⟩``,
``⟨v3⟩`` or ``⟨384⟩``. Here those from 0 to 255 and the names of keys and values in numbers are ordinary text.
"""

from __future__ import annotations

from typing import Any

from natsl.tasks.sequences import BYTES, KEYS, VALUES

PAD = "⟨pad⟩"  # its id is the first one past the vocabulary, so that nothing which is read can be taken for padding


def special_name(token: int) -> str:
    """How an id beyond the bytes is written."""
    if token in KEYS:
        return f"⟨k{token - KEYS.start}⟩"
    return f"⟨v{token - VALUES.start}⟩" if token in VALUES else f"⟨{token}⟩"


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary: its own if that is visible, else a later one.

    Source: the GPT-2 tokenizer, whose letters ``tokenizers`` expects.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in BYTES if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return {letters[byte]: byte for byte in BYTES}


def tokenizer_files(vocab_size: int) -> dict[str, dict[str, Any]]:
    """``tokenizer.json`` and ``tokenizer_config.json`` of a vocabulary with at least the 256 bytes."""
    names = [special_name(token) for token in range(BYTES.stop, vocab_size)] + [PAD]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": BYTES.stop + i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": name == PAD,  # keys and values are content: decoding for people must not leave them out
            }
            for i, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": None,
        "decoder": step,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": byte_letters(),
            "merges": [],
        },
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
