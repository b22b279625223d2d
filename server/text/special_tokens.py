"""Keeps text that merely looks like a special token from becoming one.

A chat template writes special tokens, and so can a user; the rendered text alone does not say who wrote what. So each
special token inside a message is disguised before rendering. Afterwards the special tokens that are still to be seen
are the template's own: they get secret names, the disguises come off, and a twin of the tokenizer that knows special
tokens by their secret names only encodes the whole in one go. Knows nothing about templates.
"""

import json
import secrets
from functools import cached_property
from typing import Any

import tokenizers


class SpecialTokenGuard:
    """Disguises special tokens in user text, and encodes rendered text in which they are disguised. Thread-safe."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        # Longest first, so that a token is found before another one that begins it.
        special = sorted((token.content for token in added if token.special and token.content), key=len, reverse=True)
        self._prefixes = {content[:n] for content in special for n in range(1, len(content))}
        self._max_prefix_len = max(map(len, self._prefixes), default=0)
        self._disguises = {content[0]: _private_text() for content in special}  # first character -> what stands for it
        # content -> name in the twin; never shown, so that nobody can write it
        self._secret_names = {content: _private_text() for content in special}

    def disguise(self, value: Any) -> Any:
        """A copy of a JSON value in which no string contains a special token, or ends like the beginning of one.

        The latter because a template may join strings. Equal to `value` where there was nothing to disguise.
        """
        if isinstance(value, str):
            return self._disguise_text(value)
        if isinstance(value, list):
            return [self.disguise(item) for item in value]
        if isinstance(value, dict):
            return {key: self.disguise(item) for key, item in value.items()}
        return value

    def encode(self, rendered: str) -> list[int]:
        """Token ids of text rendered from disguised messages: what is disguised becomes ordinary text."""
        for content, name in self._secret_names.items():
            rendered = rendered.replace(content, name)
        for char, disguise in self._disguises.items():
            rendered = rendered.replace(disguise, char)
        return self._twin.encode(rendered, add_special_tokens=False).ids

    def _disguise_text(self, text: str) -> str:
        for content in self._secret_names:
            while content in text:  # again, because occurrences may overlap
                text = text.replace(content, self._disguises[content[0]] + content[1:])
        tail = text.rstrip()  # templates like to trim
        for at in reversed(range(max(0, len(tail) - self._max_prefix_len), len(tail))):
            if tail[at:] in self._prefixes:
                text = text[:at] + self._disguises[text[at]] + text[at + 1 :]
        return text

    @cached_property
    def _twin(self) -> tokenizers.Tokenizer:
        # Made on first need (Python 3.11 locks this): it costs as much memory as the tokenizer, and is seldom used.
        data = json.loads(self._tokenizer.to_str())
        secret = self._secret_names
        for token in data["added_tokens"]:
            if token["special"]:
                token["content"] = secret.get(token["content"], token["content"])
        model, vocab = data["model"], data["model"]["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {secret.get(name, name): token_id for name, token_id in vocab.items()}
        else:  # Unigram: a list of (name, score)
            model["vocab"] = [[secret.get(name, name), score] for name, score in vocab]
        data["post_processor"] = None  # names special tokens; only adds what chat templates write themselves
        return tokenizers.Tokenizer.from_str(json.dumps(data))


def _private_text() -> str:
    """Eight random characters of a private-use plane: 128 bits that no text holds by chance."""
    return "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(8))
