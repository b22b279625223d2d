"""Random histories: pool and prefix cache against a plain list, the scheduler against a model that is a pure function.

The fake ranks keep a KV cache in which every position holds a digest of the tokens up to it, read through the block
tables. A block that is reused wrongly, written by two, or freed too early changes a digest, hence the tokens after it.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.server.engine.block_pool import BlockPool
from octavo.server.engine.plan import StepPlan, StepResult
from octavo.server.engine.prefix_cache import PrefixCache, extend_hashes
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from octavo.server.engine.scheduler import Scheduler

BLOCK_SIZE = 4
SETTINGS = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)


class PoolAndCache(RuleBasedStateMachine):
    """Tables of blocks are opened, grown and closed; `free` is the eviction order as a plain list."""

    NUM_BLOCKS = 8

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.cache = PrefixCache(self.pool)
        self.free = list(range(self.NUM_BLOCKS))
        self.tables: list[list[int]] = []
        self.content: dict[int, tuple[str, list[int]]] = {}  # block -> salt and all tokens up to its end

    @rule(tokens=st.lists(st.integers(0, 1), max_size=6), salt=st.sampled_from("xy"))
    def open(self, tokens: list[int], salt: str) -> None:
        """Each drawn number stands for a full block."""
        token_ids = [token for token in tokens for _ in range(BLOCK_SIZE)]
        hashes: list[bytes] = []
        extend_hashes(hashes, token_ids, BLOCK_SIZE, salt)
        matched = self.cache.match(hashes)
        for i, block in enumerate(matched):
            assert self.content[block] == (salt, token_ids[: (i + 1) * BLOCK_SIZE])
            self.pool.share(block)
            if block in self.free:
                self.free.remove(block)
        num_new = min(len(hashes) - len(matched), self.pool.num_free)
        new = self.pool.allocate(num_new)
        assert new == self.free[:num_new]
        del self.free[:num_new]
        table = matched + new
        for i in range(len(matched), len(table)):
            self.content[table[i]] = salt, token_ids[: (i + 1) * BLOCK_SIZE]
            self.cache.insert(hashes[i], table[i])
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(reversed(table))
        for block in reversed(table):
            if not any(block in other for other in self.tables):
                self.free.insert(len(self.free) if self.pool.is_cached(block) else 0, block)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        self.cache.remove(data.draw(st.sampled_from(sorted({block for table in self.tables for block in table}))))

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        self.cache.check()
        assert self.pool.free_blocks == self.free
        owners = Counter(block for table in self.tables for block in table)
        assert [self.pool.num_refs(block) for block in range(self.NUM_BLOCKS)] == [
            owners[block] for block in range(self.NUM_BLOCKS)
        ]


# The model: the next token is a function of the tokens so far, the seed and the choice's index.

VOCAB_SIZE, EOS, STOP = 16, 0, 1
MAX_MODEL_LEN = 40
PREFILL_LIMITS = st.sampled_from([None, None, 0, 1, 4, 7])


def digest(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def next_token(kv: int, choice_index: int) -> int | None:
    """None: the logits are not finite."""
    drawn = digest(kv, choice_index)
    return None if drawn % 61 == 0 else drawn % VOCAB_SIZE


def prompt_logprob(kv: int, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(kv % 1000))


@dataclass
class Outcome:
    """What the front end has of a choice."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


def undisturbed(request: GenerationRequest, choice_index: int) -> Outcome:
    """The outcome of a choice that has the machine to itself: what the scheduler must give in any company."""
    params = request.params
    outcome = Outcome()
    kv = params.seed
    logprobs: list[TokenLogprobs | None] = [None]
    for i, prompt_token_id in enumerate(request.prompt_token_ids):
        if i:
            logprobs.append(prompt_logprob(kv, prompt_token_id))
        kv = digest(kv, prompt_token_id)
    if choice_index == 0 and params.prompt_logprobs is not None:
        outcome.prompt_logprobs = logprobs
    limit = min(params.max_tokens, MAX_MODEL_LEN - len(request.prompt_token_ids))
    while len(outcome.token_ids) < limit:
        if (token_id := next_token(kv, choice_index)) is None:
            outcome.finish_reason = FinishReason.ERROR
            return outcome
        outcome.token_ids.append(token_id)
        if len(outcome.token_ids) >= params.min_tokens and token_id in (EOS, STOP):
            outcome.finish_reason = FinishReason.STOP
            outcome.stop_token_id = STOP if token_id == STOP else None
            return outcome
        kv = digest(kv, token_id)
    outcome.finish_reason = FinishReason.LENGTH
    return outcome


@dataclass
class Slot:
    choice_index: int
    num_prompt_tokens: int
    seed: int
    wants_prompt_logprobs: bool
    token_ids: list[int]
    table: list[int] = field(default_factory=list)


class FakeRanks:
    """Executes plans as ranks would: knows slots and blocks, and nothing of requests."""

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.kv: dict[tuple[int, int], int] = {}  # (block, offset) -> digest of the tokens up to there

    def execute(self, plan: StepPlan) -> StepResult:
        result = StepResult(plan.epoch, plan.step)
        for new in plan.new_choices:
            self.slots[new.slot] = Slot(
                new.choice_index, new.num_prompt_tokens, new.params.seed, new.scores_prompt, list(new.token_ids)
            )
        for slot_id, blocks in plan.new_blocks:
            self.slots[slot_id].table += blocks
        for index, (slot_id, start, num) in enumerate(zip(plan.slots, plan.starts, plan.nums, strict=True)):
            slot = self.slots[slot_id]
            kv = slot.seed if start == 0 else self.kv[self._place(slot, start - 1)]
            logprobs = []
            for position in range(start, start + num):
                kv = self.kv[self._place(slot, position)] = digest(kv, slot.token_ids[position])
                if position + 1 < slot.num_prompt_tokens:
                    logprobs.append(prompt_logprob(kv, slot.token_ids[position + 1]))
            if slot.wants_prompt_logprobs:
                result.prompt_logprobs[index] = logprobs
            assert plan.samples[index] <= (start + num == len(slot.token_ids))
            if plan.samples[index]:
                token_id = next_token(kv, slot.choice_index)
                if token_id is None:
                    result.failed.append(index)
                result.token_ids.append(token_id or 0)
                slot.token_ids.append(token_id or 0)
        return result

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        return slot.table[position // BLOCK_SIZE], position % BLOCK_SIZE


COUNTERS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "generation_tokens",
    "step",
)


class Serving(RuleBasedStateMachine):
    """Requests come and go at random, with up to three steps planned and not applied, on far too few blocks."""

    BUDGET = 12
    MOST_AHEAD = 3
    MAX_NUM_SEQS = 4

    def __init__(self) -> None:
        super().__init__()
        self.start()
        self.requests: dict[str, GenerationRequest] = {}
        self.outcomes: dict[tuple[str, int], Outcome] = {}
        self.aborted: set[tuple[str, int]] = set()

    def start(self) -> None:
        """An engine that knows of nothing yet."""
        self.scheduler = Scheduler(
            num_blocks=MAX_MODEL_LEN // BLOCK_SIZE + 2,
            block_size=BLOCK_SIZE,
            max_num_seqs=self.MAX_NUM_SEQS,
            max_num_batched_tokens=self.BUDGET,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=self.caching(),
        )
        self.ranks = FakeRanks()
        self.planned: list[StepPlan] = []
        self.counters = self.scheduler.stats()

    def caching(self) -> bool:
        return True

    @rule(
        shared=st.integers(0, 24),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        n=st.integers(1, 4),
        salt=st.sampled_from(["", "x"]),
        max_tokens=st.integers(0, 30),
        min_tokens=st.integers(0, 30),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(self, shared: int, own: list[int], n: int, salt: str, **params: Any) -> None:
        # Another salt is another model, so that sharing across salts would show.
        sampling = SamplingParams(**params, seed=len(salt), eos_token_ids=(EOS,), stop_token_ids=(STOP,))
        name = f"r{len(self.requests)}"
        request = GenerationRequest(name, [7] * shared + own, sampling, n, salt)
        self.requests[name] = request
        for index in range(n):
            self.outcomes[name, index] = Outcome()
        self.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), index=st.sampled_from([None, 0, 0, 1, 3]))
    def abort(self, data: st.DataObject, index: int | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        live = {
            key
            for key, outcome in self.outcomes.items()
            if key[0] == name and outcome.finish_reason is None and key not in self.aborted
        }
        deltas = self.scheduler.abort(name, index)
        if index is None:
            assert {(delta.request_id, delta.choice_index) for delta in deltas} == live
            self.aborted |= live
        else:
            assert deltas == []
            self.aborted |= live & {(name, index)}
        for delta in deltas:
            assert delta.start == len(self.outcomes[name, delta.choice_index].token_ids)
            assert delta.finish_reason == FinishReason.ABORT

    @rule()
    def die(self) -> None:
        """The engine is lost, and another goes on from what the front end has."""
        self.start()
        for name, request in self.requests.items():
            committed = {
                index: list(outcome.token_ids)
                for index in range(request.n)
                if (outcome := self.outcomes[name, index]).finish_reason is None and (name, index) not in self.aborted
            }
            if committed:
                self.scheduler.add(request, committed)

    @precondition(lambda self: len(self.planned) < self.MOST_AHEAD)
    @rule(max_prefill_tokens=PREFILL_LIMITS)
    def plan(self, max_prefill_tokens: int | None) -> None:
        plan = self.scheduler.plan_step(0.0, max_prefill_tokens)
        if plan is None and max_prefill_tokens == 0:
            plan = self.scheduler.plan_step(0.0)
        if plan is None:
            assert self.planned or not self.scheduler.has_work, "nothing goes on"
            return
        assert 0 < sum(plan.nums) <= self.BUDGET and min(plan.nums) > 0
        if max_prefill_tokens:
            assert sum(num for num in plan.nums if num > 1) <= max_prefill_tokens
        assert len(set(plan.slots)) == len(plan.slots)
        self.planned.append(plan)

    @precondition(lambda self: self.planned)
    @rule()
    def apply(self) -> None:
        plan = self.planned.pop(0)
        for delta in self.scheduler.apply(self.ranks.execute(plan), plan):
            self.receive(delta)

    @rule(num=st.integers(1, 10), max_prefill_tokens=PREFILL_LIMITS)
    def run(self, num: int, max_prefill_tokens: int | None) -> None:
        """Several steps at once, so that histories become long enough to matter."""
        for _ in range(num):
            self.step(max_prefill_tokens)

    def step(self, max_prefill_tokens: int | None = None) -> None:
        """One more step, planned as far ahead as the history has it."""
        if len(self.planned) < self.MOST_AHEAD:
            self.plan(max_prefill_tokens)
        self.invariants_hold()
        if self.planned:
            self.apply()

    def receive(self, delta: Delta) -> None:
        key = delta.request_id, delta.choice_index
        outcome = self.outcomes[key]
        assert key not in self.aborted and outcome.finish_reason is None, "a delta after the end"
        assert delta.start == len(outcome.token_ids), "not exactly the next token"
        assert delta.token_ids or delta.finish_reason, "a delta that says nothing"
        outcome.token_ids += delta.token_ids
        outcome.finish_reason = delta.finish_reason
        outcome.stop_token_id = delta.stop_token_id
        if delta.prompt_logprobs is not None:
            assert outcome.prompt_logprobs is None
            outcome.prompt_logprobs = delta.prompt_logprobs

    @invariant()
    def invariants_hold(self) -> None:
        self.scheduler.check()
        stats = self.scheduler.stats()
        num_live = sum(o.finish_reason is None and k not in self.aborted for k, o in self.outcomes.items())
        assert self.scheduler.has_work == (num_live > 0)
        assert all(stats[name] >= self.counters[name] for name in COUNTERS), "a counter went backwards"
        self.counters = stats
        assert stats["num_running"] + stats["num_waiting"] == num_live
        assert stats["num_deferred"] <= self.MAX_NUM_SEQS

    def teardown(self) -> None:
        """Everything ends, with the very tokens of an undisturbed run, within a bound on steps."""
        for _ in range(self.most_steps()):
            self.step()
        for (name, index), outcome in self.outcomes.items():
            expected = undisturbed(self.requests[name], index)
            if (name, index) in self.aborted:
                assert outcome.token_ids == expected.token_ids[: len(outcome.token_ids)]
            else:
                if expected.finish_reason == FinishReason.ERROR:  # how far the prompt's got is not promised
                    outcome.prompt_logprobs = expected.prompt_logprobs
                assert outcome == expected
        assert not self.scheduler.has_work and self.scheduler.plan_step(0.0) is None
        assert self.scheduler.stats()["num_blocks_used"] == 0

    def most_steps(self) -> int:
        """The oldest running choice goes on in every step that is not spent on waiting for blocks of a planned one."""
        sizes = [len(request.prompt_token_ids) for request in self.requests.values() for _ in range(request.n)]
        return 10 + self.MOST_AHEAD * sum(-(-MAX_MODEL_LEN // self.BUDGET) + MAX_MODEL_LEN - size + 1 for size in sizes)


class ServingWithoutPrefixCaching(Serving):
    def caching(self) -> bool:
        return False


TestPoolAndCache = PoolAndCache.TestCase
TestServing = Serving.TestCase
TestServingWithoutPrefixCaching = ServingWithoutPrefixCaching.TestCase
TestPoolAndCache.settings = SETTINGS
TestServing.settings = SETTINGS
TestServingWithoutPrefixCaching.settings = settings(SETTINGS, max_examples=20)
