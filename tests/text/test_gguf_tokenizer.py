"""Tokenizers of GGUF files: the default model's, a SentencePiece one beside transformers', and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Plain

from octavo.server.errors import StartupError
from octavo.server.text.gguf import tokenizer_files

BYTE_LEVEL: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "1", "Ġ", "ab", "Ġa", "Ċ", "<tool>", "ĠĠ"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1, 1, 4, 1],
    "tokenizer.ggml.merges": ["a b", "Ġ a", "Ġ Ġ"],
    "tokenizer.ggml.eos_token_id": 0,
}
PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA4>", "\u2581", "h", "i", "hi", "\u2581hi", "t", "\u2581t"]
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 6 + [-9.0, -7.0, -8.0, -1.0, -2.0, -6.0, -3.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def tokens(metadata: dict[str, Any], text: str) -> list[str]:
    return Plain.from_str(tokenizer_files(metadata)["tokenizer.json"]).encode(text).tokens


def test_digits_stand_alone_where_the_vocabulary_was_made_so() -> None:
    assert tokens(BYTE_LEVEL, "ab 11  1<|end|>") == ["ab", "Ġ", "1", "1", "ĠĠ", "1", "<|end|>"]
    gpt2 = {**BYTE_LEVEL, "tokenizer.ggml.pre": "gpt-2"}
    assert tokens(gpt2, "ab 11  1<|end|>") == ["ab", "Ġ", "1", "1", "Ġ", "Ġ", "1", "<|end|>"]


def test_special_and_user_defined_tokens() -> None:
    described = json.loads(tokenizer_files(BYTE_LEVEL)["tokenizer.json"])
    assert [(token["content"], token["special"]) for token in described["added_tokens"]] == [
        ("<|end|>", True),
        ("<tool>", False),
    ]
    assert json.loads(tokenizer_files(BYTE_LEVEL)["tokenizer_config.json"]) == {"eos_token": "<|end|>"}


def test_the_frame_of_a_text_is_the_files_or_its_familys() -> None:
    assert tokens(SENTENCEPIECE, "hi")[0] == "<s>"
    assert tokens({**SENTENCEPIECE, "tokenizer.ggml.add_bos_token": False}, "hi")[0] == "\u2581hi"
    assert tokens({**SENTENCEPIECE, "tokenizer.ggml.add_eos_token": True}, "hi") == ["<s>", "\u2581hi", "</s>"]
    llama3 = {**BYTE_LEVEL, "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0}
    assert tokens(llama3, "ab")[0] == "<|end|>"


def test_sentencepiece_is_as_transformers_has_it() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    names = {"tokens": "tokens", "scores": "scores", "token_type": "token_type", "tokenizer_type": "model"}
    given = {name: SENTENCEPIECE[f"tokenizer.ggml.{key}"] for name, key in names.items()}
    theirs, _ = convert_gguf_tokenizer("llama", {**given, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0})
    ours = Plain.from_str(tokenizer_files({**SENTENCEPIECE, "tokenizer.ggml.add_bos_token": False})["tokenizer.json"])
    for text in ("hi", " hi", "hi  hit t", "hi\nä hi", "hi</s>t", ""):
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text).ids) == theirs.decode(ours.encode(text).ids)


def test_the_default_models_file_reads_as_it_was_pulled(smollm2: Path) -> None:
    """Its vocabulary has no words of several digits, so only blanks before digits may differ from the pulled folder."""
    pulled = Plain.from_file(str(smollm2 / "tokenizer.json"))
    described = json.loads((smollm2 / "tokenizer.json").read_text())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(described["model"]["vocab"], key=described["model"]["vocab"].__getitem__),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
    }
    for token in described["added_tokens"]:
        assert metadata["tokenizer.ggml.tokens"][token["id"]] == token["content"]
    metadata["tokenizer.ggml.token_type"] = [3 if index < 17 else 1 for index in range(49152)]
    ours = Plain.from_str(tokenizer_files(metadata)["tokenizer.json"])
    text = (Path(__file__).parent.parent / "data" / "alice.txt").read_text()
    assert ours.encode(text).ids == pulled.encode(text).ids
    assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama"),
        ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre 'viking' is not supported; supported: default"),
        ({"tokenizer.ggml.tokens": 3}, "tokenizer.ggml.tokens is 3, expected one list"),
        ({"tokenizer.ggml.tokens": [1]}, "token_type: has 10 values, expected 1"),
        ({"tokenizer.ggml.eos_token_id": 10}, "eos_token_id is 10, but there are 10 tokens"),
        ({"tokenizer.ggml.merges": ["a"]}, "merges: expected pairs"),
    ],
)
def test_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        tokenizer_files({**BYTE_LEVEL, **change})
