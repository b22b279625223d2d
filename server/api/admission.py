"""From a parsed body to requests that the engine may run, or a refusal that names field, limit and value.

The order is: a permit (a full server refuses at once, before it has spent anything), then template and tokeniser in a
small thread pool, then lengths, ranges and the token budget. Nothing behind admission checks again.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from octavo.server.api.engine import Engine
from octavo.server.api.schemas import ChatBody, CompletionBody, Generation, Message, Template, TokenizeBody
from octavo.server.config import ServerConfig
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.errors import RequestError
from octavo.server.text.tokenizer import Tokenizer

# A text with more bytes than this per token of context is refused without tokenising it: real text has 3 to 5.
MAX_BYTES_PER_TOKEN = 64
DEFAULT_MAX_TOKENS = 16  # of completions; a chat may fill the context
GREEDY_BELOW = 1e-2  # temperatures below this are 0: logits divided by less overflow
RETRY_AFTER_S = 1

TEMPLATE_FIELDS = tuple(Template.model_fields)

Result = TypeVar("Result")


@dataclass(slots=True)
class Prompt:
    """One prompt of a body, ready to run. `text` is the client's own text where it sent one."""

    request: GenerationRequest
    text: str | None


class Permit:
    """A share of the server's room, taken in steps and given back once: use it as a context manager."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self._num_choices = 0
        self._num_tokens = 0

    def take(self, num_choices: int, num_tokens: int = 0) -> None:
        """Takes more room. Raises RequestError: 429 if there is none now, 400 if there never will be."""
        self._admission.take(num_choices, num_tokens, self._num_choices)
        self._num_choices += num_choices
        self._num_tokens += num_tokens

    def __enter__(self) -> "Permit":
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.give_back(self._num_choices, self._num_tokens)
        self._num_choices = self._num_tokens = 0


class Admission:
    """Counts what is in flight and turns bodies into requests.

    Attributes:
        num_choices: choices in flight.
        num_tokens: prompt tokens in flight.
    """

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer, engine: Engine) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._engine = engine
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._num_seeds = 0
        self.num_choices = 0
        self.num_tokens = 0

    def check_room(self) -> None:
        """Raises RequestError (429) where not even one choice more would be taken."""
        self.take(1, 0, 0)
        self.give_back(1, 0)

    def permit(self) -> Permit:
        """Room for one choice, the least that any request needs. Raises RequestError (429)."""
        permit = Permit(self)
        permit.take(1)
        return permit

    def take(self, num_choices: int, num_tokens: int, num_held: int) -> None:
        """Counts `num_choices` and `num_tokens` in, for a holder of `num_held` choices, or raises RequestError."""
        config = self._config
        if num_held + num_choices > config.max_num_choices:
            raise RequestError(
                f"The request has {num_held + num_choices} choices (prompts times n); this server runs and queues at "
                f"most {config.max_num_choices}.",
                param="n",
            )
        if num_tokens > config.max_num_queued_tokens:
            raise RequestError(
                f"The request has {num_tokens} prompt tokens; this server accepts at most "
                f"{config.max_num_queued_tokens} at once.",
                param="prompt",
            )
        if (
            self.num_choices + num_choices > config.max_num_choices
            or self.num_tokens + num_tokens > config.max_num_queued_tokens
        ):
            raise RequestError(
                "The server is full; try again later.",
                code="queue_full",
                status=429,
                retry_after_s=RETRY_AFTER_S,
            )
        self.num_choices += num_choices
        self.num_tokens += num_tokens

    def give_back(self, num_choices: int, num_tokens: int) -> None:
        """Undoes `take`."""
        self.num_choices -= num_choices
        self.num_tokens -= num_tokens

    @property
    def max_body_bytes(self) -> int:
        """Most bytes of a body: what a prompt of full length may need, at least 4 MiB for lists of prompts."""
        return max(4 << 20, MAX_BYTES_PER_TOKEN * self._engine.info.max_model_len)

    def close(self) -> None:
        """Ends the thread pool."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def completion(self, body: CompletionBody, permit: Permit, key_id: str) -> list[Prompt]:
        """The requests of a completion, one per prompt. Raises RequestError."""
        _check_stream(body)
        prompts = _split(body.prompt)
        permit.take(len(prompts) * body.n - 1)

        def tokenize() -> tuple[list[list[int]], tuple[tuple[int, ...], ...]]:
            ids = [self._encode(p, body.add_special_tokens) if isinstance(p, str) else p for p in prompts]
            return ids, self._bad_words(body)

        token_ids, bad_words = await self._in_pool(tokenize)
        prompt_logprobs = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
        max_tokens = body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise RequestError("max_tokens must be at least 1, or 0 together with echo.", param="max_tokens")
        requests = [
            self._request(body, ids, max_tokens, DEFAULT_MAX_TOKENS, body.logprobs, prompt_logprobs, bad_words)
            for ids in token_ids
        ]
        texts = [
            prompt if isinstance(prompt, str) and len(request.prompt_token_ids) == len(ids) else None
            for request, prompt, ids in zip(requests, prompts, token_ids, strict=True)
        ]
        return self._admit(body, requests, texts, permit, key_id)

    async def chat(self, body: ChatBody, permit: Permit, key_id: str) -> list[Prompt]:
        """The one request of a chat. Raises RequestError."""
        _check_stream(body)
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if max_tokens == 0:
            field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
            raise RequestError(f"{field} must be at least 1.", param=field)
        permit.take(body.n - 1)

        def tokenize() -> tuple[list[int], tuple[tuple[int, ...], ...]]:
            return self._encode_chat(body, body.messages), self._bad_words(body)

        token_ids, bad_words = await self._in_pool(tokenize)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        # A share of the budget each, so that a chat that names no limit is never refused for n.
        default = self._config.max_num_queued_tokens // body.n
        request = self._request(body, token_ids, max_tokens, default, logprobs, body.prompt_logprobs, bad_words)
        return self._admit(body, [request], [None], permit, key_id)

    async def tokenize(self, body: TokenizeBody) -> list[int]:
        """Token ids of a prompt or a chat, the same that generation would use. Raises RequestError."""
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Exactly one of prompt and messages must be given.", param="prompt")
        of_the_other = ("add_special_tokens",) if body.prompt is None else TEMPLATE_FIELDS
        for field in of_the_other:
            if field in body.model_fields_set:
                form = "messages" if body.prompt is None else "a prompt"
                raise RequestError(f"{field} has no meaning for {form}.", param=field)
        messages, prompt = body.messages, body.prompt
        if messages is not None:
            return await self._in_pool(lambda: self._encode_chat(body, messages))
        return await self._in_pool(lambda: self._encode(prompt or "", body.add_special_tokens is not False))

    async def token_texts(self, token_ids: list[int]) -> list[str]:
        """The text of each token by itself."""
        return await self._in_pool(lambda: [self._tokenizer.token_text(token_id) for token_id in token_ids])

    async def detokenize(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens included. Raises RequestError."""
        self._check_ids("tokens", token_ids)
        return await self._in_pool(lambda: self._tokenizer.decode(token_ids, skip_special_tokens=False))

    async def _in_pool(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self._check_text("prompt", [text])
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _encode_chat(self, body: Template, messages: list[Message]) -> list[int]:
        if body.continue_final_message and body.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message cannot both be true.", param="continue_final_message"
            )
        for_template = [message.for_template() for message in messages]
        self._check_text("messages", [message["content"] for message in for_template])
        kwargs = body.chat_template_kwargs
        return self._tokenizer.encode_chat(
            for_template,
            add_generation_prompt=not body.continue_final_message and body.add_generation_prompt is not False,
            continue_final_message=body.continue_final_message,
            template_kwargs=kwargs.model_dump(exclude_none=True) if kwargs else {},
        )

    def _check_text(self, field: str, texts: list[str]) -> None:
        num_bytes = sum(len(text.encode()) for text in texts)
        limit = MAX_BYTES_PER_TOKEN * self._engine.info.max_model_len
        if num_bytes > limit:
            raise RequestError(
                f"{field} has {num_bytes} bytes of text; the limit for a context of {self._engine.info.max_model_len} "
                f"tokens is {limit}.",
                param=field,
                code="context_length_exceeded",
            )

    def _bad_words(self, body: Generation) -> tuple[tuple[int, ...], ...]:
        """Token sequences of the bad words, at the start of a text and after a space."""
        sequences = (
            tuple(self._tokenizer.encode(text, add_special_tokens=False))
            for word in body.bad_words
            for text in (word, " " + word.lstrip())
        )
        # A tokenizer may know tokens that the model has no row for: they can never appear.
        vocab_size = self._engine.info.vocab_size
        possible = (sequence for sequence in sequences if sequence and max(sequence) < vocab_size)
        return tuple(dict.fromkeys(possible))

    def _check_ids(self, field: str, token_ids: list[int]) -> None:
        vocab_size = self._engine.info.vocab_size
        if token_ids and max(token_ids) >= vocab_size:
            raise RequestError(
                f"{field} has token id {max(token_ids)}; ids must be less than the vocabulary's size {vocab_size}.",
                param=field,
            )

    def _request(
        self,
        body: Generation,
        token_ids: list[int],
        max_tokens: int | None,
        default_max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        bad_words: tuple[tuple[int, ...], ...],
    ) -> GenerationRequest:
        """One prompt's request, complete but for its id and cache scope; takes a seed."""
        max_model_len, vocab_size = self._engine.info.max_model_len, self._engine.info.vocab_size
        token_ids = _truncate(body, token_ids, max_tokens or 1, max_model_len)
        self._check_ids("prompt", token_ids)
        num_tokens = len(token_ids)
        if not token_ids:
            raise RequestError("The prompt has no tokens; at least 1 is needed.", param="prompt")
        room = max_model_len - num_tokens
        if room < 0 or (room == 0 and max_tokens != 0):
            raise RequestError(
                f"The prompt has {num_tokens} tokens; with at least 1 of output the limit is max_model_len "
                f"{max_model_len}.",
                param="prompt",
                code="context_length_exceeded",
            )
        if max_tokens is None:
            max_tokens = max(1, min(default_max_tokens, room))
        elif max_tokens > room:
            field = "max_tokens" if getattr(body, "max_completion_tokens", None) is None else "max_completion_tokens"
            raise RequestError(
                f"{field} is {max_tokens}; the prompt's {num_tokens} tokens leave {room} of max_model_len "
                f"{max_model_len}.",
                param=field,
                code="context_length_exceeded",
            )
        if body.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens {max_tokens}, got {body.min_tokens}.", param="min_tokens"
            )
        if body.best_of not in (None, body.n):
            raise RequestError("best_of other than n is not supported yet.", param="best_of")
        for field, number in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            limit = min(self._config.max_logprobs, vocab_size)
            if number is not None and number > limit:
                raise RequestError(f"{field} must be at most {limit}, got {number}.", param=field)
        logit_bias = {int(token_id): bias for token_id, bias in body.logit_bias.items()}
        self._check_ids("logit_bias", list(logit_bias))
        self._check_ids("stop_token_ids", body.stop_token_ids)
        self._check_ids("allowed_token_ids", body.allowed_token_ids or [])
        eos = () if body.ignore_eos else tuple(i for i in self._tokenizer.eos_token_ids if i < vocab_size)
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            temperature=0.0 if body.temperature < GREEDY_BELOW else body.temperature,
            top_k=0 if body.top_k == -1 else min(body.top_k, vocab_size),
            top_p=body.top_p,
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            seed=self._next_seed() if body.seed is None else body.seed % 2**64,
            logit_bias=tuple(sorted(logit_bias.items())),
            allowed_token_ids=tuple(sorted(set(body.allowed_token_ids or ()))),
            bad_words=bad_words,
            eos_token_ids=eos,
            stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids)),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        return GenerationRequest(request_id="", prompt_token_ids=token_ids, params=params, n=body.n)

    def _admit(
        self,
        body: Generation,
        requests: list[GenerationRequest],
        texts: list[str | None],
        permit: Permit,
        key_id: str,
    ) -> list[Prompt]:
        """Checks what all prompts ask for together, takes the token budget, gives names and cache scope."""
        num_outputs = sum(request.n * request.params.max_tokens for request in requests)
        if num_outputs > self._config.max_num_queued_tokens:
            raise RequestError(
                f"The request may produce {num_outputs} tokens (prompts times n times max_tokens); the limit is "
                f"{self._config.max_num_queued_tokens}.",
                param="max_tokens",
            )
        permit.take(0, sum(len(request.prompt_token_ids) for request in requests))
        scope = hashlib.sha256(f"{key_id}\0{body.cache_salt or ''}".encode()).hexdigest()
        # The engine's names are ours, never a client's: it may still hold a request whose client has left.
        return [
            Prompt(replace(request, request_id=secrets.token_hex(8), cache_salt=scope), text)
            for request, text in zip(requests, texts, strict=True)
        ]

    def _next_seed(self) -> int:
        """A seed for a request without one: random, or the next of the sequence that --seed names."""
        if self._config.seed is None:
            return secrets.randbits(64)
        self._num_seeds += 1
        digest = hashlib.sha256(f"{self._config.seed}:{self._num_seeds}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


def _check_stream(body: Generation) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed.", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true.", param="stream_options")


def _split(prompt: str | list[int] | list[list[int]] | list[str]) -> list[str | list[int]]:
    """The prompts of any of the four forms."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _truncate(body: Generation, token_ids: list[int], num_outputs: int, max_model_len: int) -> list[int]:
    """The prompt cut to `truncate_prompt_tokens`, its end kept unless `truncation_side` says otherwise."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit == 0 or limit > max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens must be -1, or 1 to max_model_len {max_model_len}, got {limit}.",
            param="truncate_prompt_tokens",
        )
    if limit == -1:
        limit = max(1, max_model_len - num_outputs)
    return token_ids[:limit] if body.truncation_side == "right" else token_ids[max(0, len(token_ids) - limit) :]
