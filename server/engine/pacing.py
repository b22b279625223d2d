"""How much prefill a step may take beside decodes, learned from how long recent steps took. No clock, no choices.

The model: a step takes as long as its decodes alone, and a time per prefill token on top. Both are medians of a few
recent samples, so that one step the operating system has disturbed changes nothing, and growing contexts are followed.
Steps that always mix cannot tell the two apart: where no recent step shows how long the decodes take alone, prefill is
left out until three have.
"""

from collections import deque
from statistics import median

# A few prefills slow many streams down to half their pace: of the three times that a gap may grow, the rest is for what
# the estimate does not foresee. A prefill that waits weighs as much as 8 streams: a few of them do not hold up many
# prompts, whose small chunks would cost more time than they leave to the streams.
MIN_SLOWDOWN = 2.0
PREFILL_WEIGHT = 8.0
ROW_TILE = 16  # a CPU's kernels take a step's tokens in tiles: prefill fills them up, and gets one at the least
NUM_ALONE = 3  # steps without prefill that tell how long the decodes take
MOST_MIXED = 64  # steps with prefill after which they are to tell it again
NUM_PREFILL = 5  # steps with prefill that tell how long one of its tokens takes


class _Decodes:
    """What is known of steps with about the same number of decodes."""

    def __init__(self) -> None:
        self.alone_s: deque[float] = deque(maxlen=NUM_ALONE)  # durations without prefill
        self.num_mixed = 0  # steps with prefill since alone_s was full


class Pacer:
    """Paces the prefill of an engine by its step times. `max_num_batched_tokens` is a step's token budget.

    Of `row_tile` tokens the last costs as good as nothing.
    """

    def __init__(self, max_num_batched_tokens: int, row_tile: int = ROW_TILE) -> None:
        self._max_num_batched_tokens = max_num_batched_tokens
        self._row_tile = row_tile
        self._decodes: dict[int, _Decodes] = {}  # bit length of the number of decodes -> what is known
        self._token_s: deque[float] = deque(maxlen=NUM_PREFILL)  # per prefill token

    def observe(self, num_decodes: int, num_prefill_tokens: int, step_s: float) -> None:
        """Takes notice of a step that took `step_s` > 0 seconds."""
        decodes = self._of(num_decodes)
        if not num_prefill_tokens:
            decodes.alone_s.append(step_s)
            decodes.num_mixed = 0
            return
        alone_s = median(decodes.alone_s) if decodes.alone_s else 0.0
        if step_s <= alone_s:
            decodes.alone_s.append(step_s)  # too long even for the decodes alone: what is known is out of date
        # A few tokens hide in the fixed cost of a step, and decodes of unknown cost hide that of any tokens.
        elif num_prefill_tokens >= self._row_tile and (alone_s or not num_decodes):
            self._token_s.append((step_s - alone_s) / num_prefill_tokens)
        decodes.num_mixed += 1
        if num_decodes and decodes.num_mixed == MOST_MIXED:
            decodes.alone_s.clear()
            decodes.num_mixed = 0

    def max_prefill_tokens(self, num_decodes: int, num_prefills: int) -> int:
        """Most prefill tokens for a step in which so many choices decode, and so many others wait for their prefill.

        The whole budget where nothing decodes.

        0: the step is to show how long the decodes take alone. Never more than NUM_ALONE times in a row for about the
        same number of decodes, if the steps are observed.
        """
        if not num_decodes:
            return self._max_num_batched_tokens
        decodes = self._of(num_decodes)
        if len(decodes.alone_s) < NUM_ALONE:
            return 0
        num_tiles = 0
        if self._token_s:
            slowdown = max(MIN_SLOWDOWN, 1.0 + PREFILL_WEIGHT * num_prefills / num_decodes)
            num_tokens = (slowdown - 1.0) * median(decodes.alone_s) / median(self._token_s)
            num_tiles = round(min(num_decodes + num_tokens, self._max_num_batched_tokens) / self._row_tile)
        return max(num_tiles * self._row_tile - num_decodes, self._row_tile)

    def expected_s(self, num_decodes: int, num_prefill_tokens: int) -> float:
        """About how long a step will take, rather too long where little is known of such steps."""
        alone_s = 0.0
        if num_decodes:
            known = self._of(num_decodes).alone_s or [s for other in self._decodes.values() for s in other.alone_s]
            alone_s = median(known) if known else self._max_num_batched_tokens * median(self._token_s or (0.0,))
        return alone_s + num_prefill_tokens * median(self._token_s or (0.0,))

    def _of(self, num_decodes: int) -> _Decodes:
        return self._decodes.setdefault(num_decodes.bit_length(), _Decodes())
