"""From deltas to pieces of output: text, tokens, log-probabilities and finish reasons of each choice.

Knows neither HTTP nor the wire format (`formats` has that). A piece is what a choice gained since it was last taken;
all pieces of a choice add up to its output, so a stream and a whole answer come from the same code.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from octavo.server.api.admission import Prompt
from octavo.server.api.engine import Engine
from octavo.server.api.metrics import Metrics
from octavo.server.engine.request import Delta, FinishReason, TokenLogprobs
from octavo.server.errors import RequestError
from octavo.server.text.detokenizer import Detokenizer
from octavo.server.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text."""

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    text_offsets: bool = False  # also tell where in the text each token begins


@dataclass(slots=True)
class Piece:
    """What one choice gained."""

    index: int  # of the choice in the response: prompt-major
    is_first: bool
    texts: list[str] = field(default_factory=list)  # to be joined
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token, or none at all
    offsets: list[int] = field(default_factory=list)  # one per token where asked for, from the start of the output
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """The text gained."""
        return "".join(self.texts)


class Choice:
    """One output while it grows.

    Attributes:
        piece: what was gained and not taken yet.
        num_tokens: output tokens, those past a stop string not counted.
        finish_reason: None while it runs.
        first_s, last_s: time.monotonic() of the first and last tokens, 0.0 before them.
        scheduled_s: when the engine first ran it.
        num_preemptions: how often it was put back to waiting.
    """

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.index = index
        self.prompt = prompt
        self._detokenizer = Detokenizer(
            tokenizer,
            stop=options.stop,
            include_stop_str_in_output=options.include_stop_str_in_output,
            min_tokens=prompt.request.params.min_tokens,
            skip_special_tokens=options.skip_special_tokens,
        )
        # Stop strings hold text back, which must not move offsets: they are counted beside.
        self._counter = (
            Detokenizer(
                tokenizer,
                skip_special_tokens=options.skip_special_tokens,
            )
            if options.text_offsets
            else None
        )
        self._text_len = 0
        self._show_stop_token = options.include_stop_str_in_output
        self.piece: Piece | None = None
        self._taken = False
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.first_s = self.last_s = self.scheduled_s = 0.0
        self.num_preemptions = 0

    def push(self, delta: Delta) -> bool:
        """Adds a delta. True: a stop string ended the choice, the engine must be told."""
        piece = self.piece
        if piece is None:
            piece = self.piece = Piece(self.index, not self._taken)
        token_ids, reason = delta.token_ids, delta.finish_reason
        is_hidden = reason is FinishReason.STOP and not self._show_stop_token  # the last token
        text = self._detokenizer.push(token_ids[:-1] if is_hidden else token_ids)
        if reason is not None:
            text += self._detokenizer.finish()
            self.finish_reason, piece.stop_reason = reason.value, delta.stop_token_id
        stop_hit = self._detokenizer.stop_hit
        if stop_hit is not None:
            token_ids = token_ids[: self._detokenizer.num_tokens - self.num_tokens]
            self.finish_reason, piece.stop_reason = FinishReason.STOP.value, stop_hit
        piece.finish_reason = self.finish_reason
        piece.texts.append(text)
        piece.token_ids += token_ids
        if delta.logprobs is not None:
            piece.logprobs += delta.logprobs[: len(token_ids)]
        if self._counter is not None:
            for token_id in token_ids:
                piece.offsets.append(self._text_len)
                self._text_len += len(self._counter.push([token_id]))
        self.num_tokens += len(token_ids)
        return stop_hit is not None and reason is None

    def take(self) -> Piece:
        """What was gained since the last call, which must be something."""
        piece, self.piece = self.piece, None
        assert piece is not None
        self._taken = True
        return piece


def _ignore() -> None:
    """Of a request that does not run."""


class Generation:
    """All prompts and choices of one HTTP request while they run.

    Attributes:
        choices: in the order of the response, prompt-major.
        prompt_logprobs: per prompt, once known; None where not asked for.
        num_cached_tokens: per prompt.
        is_running: some choices have not ended, and nothing has cut them.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        prompts: list[Prompt],
        options: TextOptions,
        arrival_s: float,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._queued_s = time.monotonic()
        self.prompts = prompts
        n = prompts[0].request.n
        self._waits_for_prompt = prompts[0].request.params.prompt_logprobs is not None
        self.choices = [
            Choice(p * n + k, prompt, tokenizer, options) for p, prompt in enumerate(prompts) for k in range(n)
        ]
        self._n = n
        self.prompt_logprobs: list[list[TokenLogprobs | None] | None] = [None] * len(prompts)
        self.num_cached_tokens = [0] * len(prompts)
        self._num_running = len(self.choices)
        self.is_running = True
        self._error: Exception | None = None
        self._has_hole = False  # a delta could not be used, so what comes behind it does not count
        self._on_gain: Callable[[], None] = _ignore
        self._on_wait: Callable[[], None] = _ignore

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens, once per prompt."""
        return sum(len(prompt.request.prompt_token_ids) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, of all choices."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def is_done(self) -> bool:
        """Whether all choices have ended."""
        return not self._num_running

    def check(self) -> None:
        """Raises what `cut` was given, or what failed, if that ended the request."""
        if self._error is not None and (self._num_running or self._has_hole):
            raise self._error

    def cut(self, error: Exception) -> None:
        """Ends the request from outside: `check` raises `error`."""
        self._error = error
        self.is_running = False
        self._on_gain()

    def wait(self) -> None:
        """Says that the request waits for the engine to recover."""
        self._on_wait()

    async def abort(self) -> bool:
        """Asks the engine to end all choices. True: at least one was running."""
        known = [await self._engine.abort(prompt.request.request_id) for prompt in self.prompts]
        return any(known)

    def take(self) -> list[Piece]:
        """What the choices gained since the last call."""
        pieces = []
        for choice in self.choices:
            if choice.piece is not None and (not self._waits_for_prompt or self._is_showable(choice)):
                pieces.append(choice.take())
        return pieces

    def _is_showable(self, choice: Choice) -> bool:
        # Choices may run ahead of the prompt's log-probabilities, which a first piece shows.
        return self.prompt_logprobs[choice.index // self._n] is not None or choice.finish_reason is not None

    @contextmanager
    def running(self, on_gain: Callable[[], None], on_wait: Callable[[], None] = _ignore) -> Iterator[None]:
        """Runs the request; leaving aborts what still runs.

        `on_gain` is called whenever choices have gained something, once for all that came at once, and when the request
        is cut; what it raises cuts the request. What nobody takes is kept, bounded by what the request may produce
        (admission's n * max_tokens): a slow reader costs its own tokens' memory and holds up nobody. `on_wait` is
        called from time to time while the request waits for the engine to recover.
        """
        self._on_gain, self._on_wait = on_gain, on_wait
        try:
            for index, prompt in enumerate(self.prompts):
                self._engine.begin(prompt.request, partial(self._receive, index), self.cut)
            yield
        finally:
            self._on_gain = self._on_wait = _ignore
            for prompt in self.prompts:
                self._engine.end(prompt.request.request_id)
            self._report()

    async def complete(self) -> None:
        """Runs the request to its end. Raises as `check`; cancelling it aborts."""
        end = asyncio.Event()

        def on_gain() -> None:
            if not self.is_running:
                end.set()

        with self.running(on_gain):
            on_gain()  # it may have been cut before
            await end.wait()
            self.check()

    def _receive(self, prompt_index: int, deltas: list[Delta]) -> None:
        """Called by the engine, whose other callers must not suffer from what fails here."""
        if self._has_hole:
            return
        try:
            now = time.monotonic()
            for delta in deltas:
                self._apply(prompt_index, delta, now)
            self._on_gain()
        except Exception as error:
            self._has_hole = True
            self.cut(error)

    def _apply(self, prompt_index: int, delta: Delta, now: float) -> None:
        """Gives a delta to its choice."""
        choice = self.choices[prompt_index * self._n + delta.choice_index]
        if choice.finish_reason is not None:
            return
        choice.num_preemptions = delta.num_preemptions
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[prompt_index] = delta.prompt_logprobs
        if delta.scheduled_s is not None:
            choice.scheduled_s = delta.scheduled_s
            if delta.choice_index == 0:  # the others share its blocks
                self.num_cached_tokens[prompt_index] = delta.num_cached_tokens
        if delta.finish_reason is FinishReason.ERROR:
            # Never an ordinary-looking token from numbers that are not finite.
            self._metrics.corrupted()
            choice.finish_reason = delta.finish_reason.value
            raise RequestError("The model produced values that are not finite.", code="not_finite", status=500)
        if delta.token_ids:
            if choice.first_s:
                self._metrics.itl.observe(now - choice.last_s)
            else:
                choice.first_s = now
                self._metrics.ttft.observe(now - self._arrival_s)
            choice.last_s = now
        if choice.push(delta):
            self._engine.abort_choice(choice.prompt.request.request_id, delta.choice_index)
        if choice.finish_reason is not None:
            self._num_running -= 1
            self.is_running = self.is_running and self._num_running > 0

    def _report(self) -> None:
        """Tells the metrics how the request went."""
        now = time.monotonic()
        default = FinishReason.ABORT if self._error is None else FinishReason.ERROR
        for choice in self.choices:
            self._metrics.choice_done(
                finish_reason=choice.finish_reason or default.value,
                num_tokens=choice.num_tokens,
                max_tokens=choice.prompt.request.params.max_tokens,
                e2e_s=(choice.last_s or now) - self._arrival_s,
                queued_s=self._queued_s,
                scheduled_s=choice.scheduled_s,
                first_s=choice.first_s,
                last_s=choice.last_s,
                num_preemptions=choice.num_preemptions,
            )
        for index, prompt in enumerate(self.prompts):
            num_tokens = len(prompt.request.prompt_token_ids)
            self._metrics.prompt_done(
                num_prompt_tokens=num_tokens,
                num_computed_tokens=num_tokens - self.num_cached_tokens[index],
                n=self._n,
                max_num_tokens=max(c.num_tokens for c in self.choices[index * self._n : (index + 1) * self._n]),
            )
