"""The wire format of both generation routes: pieces of output as OpenAI's JSON objects, whole or as chunks.

A `Format` is made per request. Chunks and whole answers share their choices' form; `-inf` goes out as -9999.0. Most
chunks of a stream differ in their text alone: what is around it is encoded once per choice.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from octavo.server.api.generation import Generation, Piece
from octavo.server.api.schemas import ChatBody, CompletionBody
from octavo.server.api.sse import DONE, encode_json, event
from octavo.server.engine.request import TokenLogprobs
from octavo.server.text.detokenizer import Detokenizer
from octavo.server.text.tokenizer import Tokenizer

Json = dict[str, Any]
_LEAST_LOGPROB = -9999.0


class Format(ABC):
    """How one request is answered.

    Args:
        head: the fields that open every object: id, created, model, system_fingerprint.
        count_cached: report cached prompt tokens in usage.
        num_top: how many top tokens to show beside each chosen one; None: no log-probabilities.
    """

    whole_object: str
    chunk_object: str

    def __init__(
        self,
        body: CompletionBody | ChatBody,
        generation: Generation,
        tokenizer: Tokenizer,
        head: Json,
        count_cached: bool,
        num_top: int | None,
    ) -> None:
        self._num_top = num_top
        self._token_ids_as_tokens = body.return_tokens_as_token_ids
        self._return_token_ids = body.return_token_ids
        self._generation = generation
        self._tokenizer = tokenizer
        self._head = head
        self.request_id: str = head["id"]
        self._count_cached = count_cached
        options = body.stream_options
        self._usage_at_end = options is not None and options.include_usage
        self._usage_always = options is not None and options.continuous_usage_stats and self._usage_at_end
        # Whether chunks that neither begin nor end a choice differ in their text alone.
        self._only_text_differs = num_top is None and not self._return_token_ids and not self._usage_always
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # choice -> its events up to their text, and after it

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The answer to a request that did not stream; one piece per choice."""
        choices = [self._whole_choice(piece) for piece in pieces]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage()} | self._extras()

    def events(self, pieces: Sequence[Piece]) -> bytes:
        """The events that bring these pieces."""
        parts: list[bytes] = []
        for piece in pieces:
            text = piece.text
            if self._only_text_differs and text and not piece.is_first and piece.finish_reason is None:
                head, tail = self._frames.get(piece.index) or self._frame(piece.index)
                parts += head, encode_json(text), tail
            else:
                parts += map(event, self._chunks(piece))
        return b"".join(parts)

    def end(self) -> bytes:
        """The events after all pieces: usage, where the request asked for it, and [DONE]."""
        return event(self._chunk([]) | {"usage": self._usage()}) + DONE if self._usage_at_end else DONE

    def _chunks(self, piece: Piece) -> list[Json]:
        """The chunks that bring a piece."""
        return [self._chunk([choice]) for choice in self._chunk_choices(piece)]

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands around the text in the events of a choice."""
        (chunk,) = self._chunks(Piece(index, is_first=False, texts=["?"]))
        head, _, tail = event(chunk).rpartition(b'"?"')  # from the right, where no string of a client's follows
        self._frames[index] = head, tail
        return head, tail

    @abstractmethod
    def _whole_choice(self, piece: Piece) -> Json:
        """A choice of a whole answer."""

    @abstractmethod
    def _chunk_choices(self, piece: Piece) -> list[Json]:
        """The choices, one a chunk, that bring a piece."""

    def _extras(self) -> Json:
        """Fields of a whole answer beside OpenAI's."""
        return {}

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._usage_at_end:
            chunk["usage"] = self._usage() if self._usage_always else None
        return chunk

    def _usage(self) -> Json:
        num_prompt, num_output = self._generation.num_prompt_tokens, self._generation.num_output_tokens
        usage: Json = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        }
        if self._count_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(self._generation.num_cached_tokens)}
        return usage

    def _token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._token_ids_as_tokens else self._tokenizer.token_text(token_id)

    def _end(self, piece: Piece) -> Json:
        """What all choices have last."""
        end: Json = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if self._return_token_ids:
            end["token_ids"] = piece.token_ids
        return end

    def _prompt_logprobs(self, index: int) -> list[Json | None] | None:
        """vLLM's `prompt_logprobs` of a prompt: per position null or token id -> what is known of it."""
        positions = self._generation.prompt_logprobs[index]
        if positions is None:
            return None
        return [None if position is None else self._ranked(position) for position in positions]

    def _ranked(self, position: TokenLogprobs) -> Json:
        entries = {
            str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._token(token_id)}
            for rank, (token_id, logprob) in enumerate(position.top, 1)
        }
        own = {"logprob": _finite(position.logprob), "rank": None, "decoded_token": self._token(position.token_id)}
        return {str(position.token_id): own} | entries


class CompletionFormat(Format):
    """POST /v1/completions."""

    whole_object = chunk_object = "text_completion"

    def __init__(
        self, body: CompletionBody, generation: Generation, tokenizer: Tokenizer, head: Json, count_cached: bool
    ) -> None:
        super().__init__(body, generation, tokenizer, head, count_cached, body.logprobs)
        self._n = body.n
        self._echo = body.echo
        self._prompt_logprobs_asked = body.prompt_logprobs is not None

    def _whole_choice(self, piece: Piece) -> Json:
        choice = self._choice(piece)
        if self._prompt_logprobs_asked:
            choice["prompt_logprobs"] = self._prompt_logprobs(piece.index // self._n)
        return choice

    def _chunk_choices(self, piece: Piece) -> list[Json]:
        return [self._choice(piece)]

    def _choice(self, piece: Piece) -> Json:
        prompt = self._generation.prompts[piece.index // self._n]
        prompt_ids = prompt.request.prompt_token_ids
        text, before = piece.text, 0
        logprobs = None if self._num_top is None else self._logprobs(piece.logprobs, piece.offsets)
        if self._echo:
            prompt_text = prompt.text
            if prompt_text is None:
                prompt_text = self._tokenizer.decode(prompt_ids, skip_special_tokens=False)
            before = len(prompt_text)
            if piece.is_first:
                text = prompt_text + text
        if logprobs is not None:
            logprobs["text_offset"] = [before + offset for offset in logprobs["text_offset"]]
            positions = self._generation.prompt_logprobs[piece.index // self._n]
            if self._echo and piece.is_first and positions is not None:
                shown = self._logprobs(positions, self._prompt_offsets(prompt_ids, before))
                shown["tokens"] = [self._token(token_id) for token_id in prompt_ids]
                logprobs = {key: shown[key] + logprobs[key] for key in logprobs}
        choice = {"index": piece.index, "text": text, "logprobs": logprobs} | self._end(piece)
        if self._return_token_ids and piece.is_first:
            choice["prompt_token_ids"] = prompt_ids
        return choice

    def _logprobs(self, positions: Sequence[TokenLogprobs | None], offsets: list[int]) -> Json:
        """OpenAI's four columns; a position without logprobs is null."""
        return {
            "tokens": ["" if p is None else self._token(p.token_id) for p in positions],
            "token_logprobs": [None if p is None else _finite(p.logprob) for p in positions],
            "top_logprobs": [p and self._top(p) for p in positions],
            "text_offset": offsets,
        }

    def _top(self, position: TokenLogprobs) -> dict[str, float]:
        """The best tokens and the chosen one. Of several tokens with one text the best counts."""
        top: dict[str, float] = {}
        for token_id, logprob in [*position.top[: self._num_top], (position.token_id, position.logprob)]:
            top.setdefault(self._token(token_id), _finite(logprob))
        return top

    def _prompt_offsets(self, token_ids: list[int], text_len: int) -> list[int]:
        """Where each prompt token begins in the prompt's text, which special tokens put before it are not part of."""
        counter = Detokenizer(self._tokenizer, skip_special_tokens=False)
        offsets, end = [], 0
        for token_id in token_ids:
            offsets.append(end)
            end += len(counter.push([token_id]))
        extra = max(0, end - text_len)
        return [max(0, offset - extra) for offset in offsets]


class ChatFormat(Format):
    """POST /v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, body: ChatBody, generation: Generation, tokenizer: Tokenizer, head: Json, count_cached: bool
    ) -> None:
        num_top = (body.top_logprobs or 0) if body.logprobs else None
        super().__init__(body, generation, tokenizer, head, count_cached, num_top)
        self._prompt_logprobs_asked = body.prompt_logprobs is not None

    def _extras(self) -> Json:
        extras: Json = {}
        if self._prompt_logprobs_asked:
            extras["prompt_logprobs"] = self._prompt_logprobs(0)
        if self._return_token_ids:
            extras["prompt_token_ids"] = self._generation.prompts[0].request.prompt_token_ids
        return extras

    def _chunks(self, piece: Piece) -> list[Json]:
        chunks = super()._chunks(piece)
        if self._return_token_ids and piece.is_first and piece.index == 0:
            chunks[0]["prompt_token_ids"] = self._generation.prompts[0].request.prompt_token_ids
        return chunks

    def _whole_choice(self, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.index, "message": message, "logprobs": self._logprobs(piece)} | self._end(piece)

    def _chunk_choices(self, piece: Piece) -> list[Json]:
        delta = {"content": piece.text} if piece.text else {}
        choice = {"index": piece.index, "delta": delta, "logprobs": self._logprobs(piece)} | self._end(piece)
        if not piece.is_first:
            return [choice]
        role: Json = {"role": "assistant", "content": ""}
        return [{"index": piece.index, "delta": role, "logprobs": None, "finish_reason": None}, choice]

    def _logprobs(self, piece: Piece) -> Json | None:
        if self._num_top is None:
            return None
        return {
            "content": [
                self._entry(p.token_id, p.logprob)
                | {"top_logprobs": [self._entry(*entry) for entry in p.top[: self._num_top]]}
                for p in piece.logprobs
            ],
            "refusal": None,
        }

    def _entry(self, token_id: int, logprob: float) -> Json:
        data = list(self._tokenizer.token_bytes(token_id))
        return {"token": self._token(token_id), "logprob": _finite(logprob), "bytes": data}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
