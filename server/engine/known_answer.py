"""A prompt whose answer is known: an engine that gives another one, in any bit, computes wrongly.

The answer is learned from the first engine of a server. It is an ordinary greedy request, so that it goes the way of
all others; that the bits of a request depend on nothing beside it makes every difference a fault. The log-probabilities
are what shows the logits: each has all of them in its normaliser.
"""

import secrets

from octavo.server.engine.channel import Add, EngineInfo
from octavo.server.engine.request import Delta, GenerationRequest, SamplingParams

PROMPT_LEN, NUM_TOKENS, NUM_TOP = 48, 8, 20

Answer = list[tuple[object, ...]]  # per token: its id, and the token ids and log-probabilities that the engine gave


class KnownAnswer:
    """One asking of the question. `add` is to be sent; `answer` is complete once `feed` has returned True."""

    def __init__(self, info: EngineInfo) -> None:
        num_tokens = min(NUM_TOKENS, info.max_model_len - 1)
        length = min(PROMPT_LEN, info.max_model_len - num_tokens)
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=min(NUM_TOP, info.vocab_size))
        name = secrets.token_hex(8)
        # A salt that nobody has: the answer is to be computed, not found in the prefix cache.
        prompt = [7919 * i % info.vocab_size for i in range(1, length + 1)]
        self.add = Add(GenerationRequest(name, prompt, params, cache_salt=name))
        self.answer: Answer = []

    def feed(self, deltas: list[Delta]) -> bool:
        """Takes what of a step's deltas is for it. True: the answer is whole."""
        for delta in deltas:
            if delta.request_id == self.add.request.request_id:
                for logprobs in delta.logprobs or []:
                    self.answer.append((logprobs.token_id, logprobs.logprob, tuple(logprobs.top)))
                if delta.finish_reason is not None:
                    return True
        return False
