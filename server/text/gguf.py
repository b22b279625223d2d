"""The tokenizer that a GGUF file's metadata describes, as the files of a Hugging Face folder.

llama.cpp tokenises by rules of its own that a name in the metadata stands for; here they become a tokenizer.json. Knows
nothing of the file's format: what it is given is the metadata, key -> value.
"""

import json
from collections.abc import Mapping
from typing import Any

from octavo.server.errors import StartupError

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> pattern whose matches are words; "": GPT-2's; None: GPT-2's, after each digit is set apart
_WORDS = {
    **dict.fromkeys(("default", "gpt-2"), ""),
    "smollm": None,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Name -> content: tokenizer.json, tokenizer_config.json, and chat_template.jinja where there is one.

    Raises StartupError for a kind of tokenizer that is not supported, and for metadata that does not fit together.
    """
    kind = _get(metadata, "model", str, "")
    if kind not in ("gpt2", "llama"):
        raise StartupError(f"tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama")
    tokens = _get(metadata, "tokens", list)
    types = _get(metadata, "token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise StartupError(f"tokenizer.ggml.token_type: has {len(types)} values, expected {len(tokens)}, as tokens has")
    named = {}
    for name, key in _NAMED_TOKENS.items():
        token_id = _get(metadata, key, int, -1)
        if token_id >= len(tokens):
            raise StartupError(f"tokenizer.ggml.{key} is {token_id}, but there are {len(tokens)} tokens")
        if token_id >= 0:
            named[name] = tokens[token_id]
    described = _byte_level(metadata, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens)
    # A model's own default: llama.cpp's for this kind, or this family, of vocabulary.
    adds_bos = _get(metadata, "add_bos_token", bool, kind == "llama" or _WORDS.get(_pre(metadata)) == _LLAMA3)
    frame = {"bos_token": adds_bos, "eos_token": _get(metadata, "add_eos_token", bool, False)}
    ids = {name: _get(metadata, _NAMED_TOKENS[name], int) for name, is_added in frame.items() if is_added}
    described |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(token_id, token, kind == _CONTROL)
            for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "post_processor": _framed({name: (named[name], token_id) for name, token_id in ids.items()}),
    }
    files = {"tokenizer.json": json.dumps(described), "tokenizer_config.json": json.dumps(named)}
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = str(template)
    return files


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key, default)
    if type(value) is not kind:
        raise StartupError(f"{key} is {str(value)[:40]}, expected one {kind.__name__}")
    return value


def _pre(metadata: Mapping[str, Any]) -> str:
    name: str = _get(metadata, "pre", str, "default")
    return name


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """BPE over bytes, each written as a printable character."""
    pre = _pre(metadata)
    if pre not in _WORDS:
        raise StartupError(f"tokenizer.ggml.pre {pre!r} is not supported; supported: {', '.join(_WORDS)}")
    words = _WORDS[pre]
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not words}
    if words is None:
        before = {"type": "Digits", "individual_digits": True}
    else:
        before = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": {"type": "NFC"} if words == _QWEN2 else None,
        "pre_tokenizer": bytes_alone if words == "" else {"type": "Sequence", "pretokenizers": [before, bytes_alone]},
        "decoder": bytes_alone | {"use_regex": True},
        # A word that is a token needs no merges: llama.cpp's rule for this family.
        "model": _bpe(tokens, _get(metadata, "merges", list), ignore_merges=words == _LLAMA3),
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """BPE over characters, a space written as one of its own, what the vocabulary lacks as bytes."""
    if not _get(metadata, "add_space_prefix", bool, True):
        raise StartupError("tokenizer.ggml.add_space_prefix is False, which is not supported with model llama")
    scores = _get(metadata, "scores", list)
    if len(scores) != len(tokens):
        raise StartupError(f"tokenizer.ggml.scores: has {len(scores)} values, expected {len(tokens)}, as tokens has")
    model = _bpe(tokens, _merges(tokens, scores), byte_fallback=True, fuse_unk=True)
    unknown = _get(metadata, "unknown_token_id", int, 0)
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "normalizer": None,
        "pre_tokenizer": space,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"unk_token": tokens[unknown]},
    }


def _merges(tokens: list[str], scores: list[float]) -> list[str | list[str]]:
    """The vocabulary as merges: each token by each pair of tokens that it consists of, the best score first."""
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], [left, right]))
    return [pair for *_, pair in sorted(found)]


def _bpe(tokens: list[str], merges: list[Any], **options: bool) -> dict[str, Any]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise StartupError("tokenizer.ggml.merges: expected pairs of tokens with a space between")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    return {"type": "BPE", "vocab": vocab, "merges": pairs, "unk_token": None, **options}


def _added(token_id: int, token: str, special: bool) -> dict[str, Any]:
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": token, "special": special, **sides}


def _framed(tokens: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """What is put around a text."""
    around = {name: {"SpecialToken": {"id": content, "type_id": 0}} for name, (content, _) in tokens.items()}

    def template(*sequences: str) -> list[dict[str, Any]]:
        parts = []
        for sequence in sequences:
            parts += [around["bos_token"]] if "bos_token" in around else []
            parts.append({"Sequence": {"id": sequence, "type_id": 0}})
            parts += [around["eos_token"]] if "eos_token" in around else []
        return parts

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {
            content: {"id": content, "ids": [token_id], "tokens": [content]} for content, token_id in tokens.values()
        },
    }
