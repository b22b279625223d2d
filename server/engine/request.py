"""What the front end asks of the engine and what it gets back. Standard library only.

A `GenerationRequest` is already valid: admission has checked every field, nothing behind it checks again.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a choice ended. The values are those of the OpenAI wire format where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of a request are chosen. All ids are within the vocabulary, all floats finite."""

    max_tokens: int  # 0 only for scoring (echo)
    min_tokens: int = 0  # stop and end tokens are masked until this many tokens are out
    temperature: float = 1.0  # 0.0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # 0 <= seed < 2**64, the Philox key
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not appear
    eos_token_ids: tuple[int, ...] = ()  # empty with ignore_eos
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # how many top tokens beside the chosen one; None: no logprobs
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and its n choices."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    n: int = 1
    cache_salt: str = ""  # scope of the prefix cache: requests of other salts share no block


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the raw logits (before temperature and penalties)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)  # (token id, logprob), best first


@dataclass(slots=True)
class Delta:
    """New tokens of one choice. Sent in order; the last one of a choice carries its finish reason."""

    request_id: str
    choice_index: int
    start: int  # output index of token_ids[0]
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per token where the request asked for them
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id in stop_token_ids that was hit (None for an end-of-sequence token)
    num_preemptions: int = 0  # of the choice so far
    # Below: only on the first delta of a choice.
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # choice 0 only; the first entry is None
    scheduled_s: float | None = None  # time.monotonic() when the choice first ran
