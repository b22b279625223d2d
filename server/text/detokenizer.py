"""Turns a growing list of token ids into text that may be sent, piece by piece.

Held back is what the next token may still change: an unfinished character, and an end that may become a stop string.
One `Detokenizer` per choice; knows nothing about requests or streams.
"""

import codecs
from collections.abc import Sequence

from octavo.server.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoding and stop strings of one choice; constant time per token, amortised.

    All pieces together equal `tokenizer.decode` of all ids, or its part before the stop string that was completed
    first (of those completed by the same character the longest counts).

    Args:
        stop: strings that end the text; none of them empty.
        include_stop_str_in_output: the stop string is part of the text.
        min_tokens: stop strings completed before this many tokens are out do not count.

    Attributes:
        stop_hit: the stop string that ended the text, None so far.
        num_tokens: tokens taken, up to and including the one that completed the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = _ByteDecoder(tokenizer, skipped) if tokenizer.byte_level else _WindowDecoder(tokenizer, skipped)
        self._matchers = [_Matcher(s) for s in sorted(stop, key=len, reverse=True)]
        self._first_chars = frozenset(s[0] for s in stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._held = ""  # decoded, but may be the beginning of a stop string
        self.stop_hit: str | None = None
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that may be sent now; after a stop hit always nothing."""
        if not self._matchers:
            self.num_tokens += len(token_ids)
            return "".join(map(self._decoder.push, token_ids))
        pieces = []
        for token_id in token_ids:
            if self.stop_hit is not None:
                break
            self.num_tokens += 1
            pieces.append(self._release(self._decoder.push(token_id)))
        return "".join(pieces)

    def finish(self) -> str:
        """The text still held back. Call once, when the choice has ended; after a stop hit there is none."""
        if self.stop_hit is not None:
            return ""
        text = self._release(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _release(self, piece: str) -> str:
        """What of the text held so far and `piece` may be sent."""
        if not self._held and self._first_chars.isdisjoint(piece):
            return piece  # no stop string has begun or begins
        text = self._held + piece
        for end, char in enumerate(piece, len(self._held) + 1):
            # A list, not any(): every matcher must see every character.
            hits = [matcher for matcher in self._matchers if matcher.push(char)]
            if hits and self.num_tokens >= self._min_tokens:
                self.stop_hit = hits[0].pattern
                self._held = ""
                return text[: end if self._include_stop else end - len(self.stop_hit)]
        num_sendable = len(text) - max(matcher.num_matched for matcher in self._matchers)
        self._held = text[num_sendable:]
        return text[:num_sendable]


class _Matcher:
    """Finds a pattern in a text given character by character (Knuth-Morris-Pratt)."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.num_matched = 0  # longest beginning of the pattern that the text ends with, shorter than the pattern
        # _shorter[n]: longest beginning of the pattern, shorter than n, that its first n characters end with
        self._shorter = [0, 0]
        for char in pattern[1:]:
            self._shorter.append(self._longer(self._shorter[-1], char))

    def push(self, char: str) -> bool:
        """Whether the text ends with the pattern now."""
        self.num_matched = self._longer(self.num_matched, char)
        if self.num_matched < len(self.pattern):
            return False
        self.num_matched = self._shorter[self.num_matched]
        return True

    def _longer(self, num_matched: int, char: str) -> int:
        while num_matched and self.pattern[num_matched] != char:
            num_matched = self._shorter[num_matched]
        return num_matched + (self.pattern[num_matched] == char)


class _ByteDecoder:
    """For byte-level vocabularies: the text is the tokens' bytes, read as UTF-8."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._whole_texts = tokenizer.whole_texts
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_within = False  # a character that has begun and not ended

    def push(self, token_id: int) -> str:
        if not self._is_within and (text := self._whole_texts.get(token_id)) is not None:
            return text
        if token_id in self._skipped:
            return ""
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._is_within = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For all others: what a token adds depends on its left neighbours, so a short window is decoded again.

    A run of byte tokens is decoded as a whole when it has ended: one bad byte changes how all of them are shown.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids: list[int] = []  # [0, _num_done) gave text last time and is context, the rest is new
        self._num_done = 0
        self._done_len = 0  # characters of the context, decoded alone

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or not self._tokenizer.token_bytes(token_id):
            return ""
        self._ids.append(token_id)
        return "" if self._tokenizer.is_byte_token(token_id) else self.finish()

    def finish(self) -> str:
        text = self._decode()[self._done_len :]
        if text:  # a context without text would not keep decoders from trimming what follows
            del self._ids[: self._num_done]
            self._num_done, self._done_len = len(self._ids), len(self._decode())
        return text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)
