"""What each step computes. Pure bookkeeping: knows tokens, slots and blocks, but no tensors, processes or clocks.

The unit is the choice. There are no phases: a choice has fewer computed tokens than tokens, and every step hands out a
token budget, first to running choices in the order of their admission, then to waiting ones in the order of the queue.

A choice is in one of three places, each a dictionary (request id, choice index) -> choice:

- deferred: waits until choice 0 of its request has computed the blocks that they will share;
- waiting: may be admitted; preempted choices and former deferred ones stand at the head;
- running: holds a slot and blocks.

Steps may be planned ahead of the results of earlier ones. What a planned step uses stays in place until that step is
applied: a choice that ends or is preempted meanwhile *leaves*, keeping slot and blocks until its last planned step is.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from octavo.server.engine.block_pool import BlockPool
from octavo.server.engine.plan import NewChoice, StepPlan, StepResult
from octavo.server.engine.prefix_cache import PrefixCache, extend_hashes
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, TokenLogprobs

_Key = tuple[str, int]  # request id, choice index


@dataclass(slots=True, eq=False)
class _Choice:
    """One output of a request. Tokens [0, num_planned) are computed, or will be by steps already planned."""

    request: GenerationRequest
    index: int
    salt: str
    token_ids: list[int]  # prompt, then committed tokens
    hashes: list[bytes]  # of all full blocks of token_ids
    max_len: int  # the choice ends when it has this many tokens
    num_shared: int  # prompt tokens in blocks that choices of the request share
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    num_planned: int = 0
    num_unknown: int = 0  # tokens that planned steps will sample
    num_in_flight: int = 0  # planned steps not applied yet
    num_inserted: int = 0  # leading blocks that the prefix cache has seen
    num_prompt_counted: int = 0  # prompt tokens that the statistics have seen, so that recomputation is not counted
    leaving: bool = False
    finished: bool = False
    announced: bool = False  # the first delta is out
    num_cached_tokens: int = 0  # at the first admission
    num_preemptions: int = 0
    scheduled_s: float | None = None  # of the first admission

    @property
    def key(self) -> _Key:
        return self.request.request_id, self.index

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known, and those that planned steps will sample."""
        return len(self.token_ids) + self.num_unknown

    @property
    def num_plannable(self) -> int:
        """Tokens that the next step could compute. The last token before max_len needs no computing."""
        return min(self.num_tokens, max(self.max_len - 1, self.num_prompt_tokens)) - self.num_planned

    @property
    def reads_cache(self) -> bool:
        """Prompt logprobs need the hidden state of every prompt token, so they need every one computed."""
        return self.prompt_logprobs is None


class Scheduler:
    """Hands out slots, blocks and the token budget; commits what steps produce. Not for use by two threads at once.

    Raises ValueError where the blocks cannot hold one choice of full length: with that many, the oldest running choice
    can always go on, so that every choice ends.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool,
        epoch: int = 0,
    ) -> None:
        if num_blocks * block_size < max_model_len:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens cannot hold max_model_len {max_model_len}")
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._enable_prefix_caching = enable_prefix_caching
        self._epoch = epoch
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(self._pool)
        self._choices: dict[str, dict[int, _Choice]] = {}  # request id -> choice index -> choice that has not ended
        self._deferred: dict[_Key, _Choice] = {}
        self._waiting: OrderedDict[_Key, _Choice] = OrderedDict()
        self._running: dict[_Key, _Choice] = {}  # in the order of admission
        self._slots: list[_Choice | None] = [None] * max_num_seqs
        self._free_slots = list(range(max_num_seqs))[::-1]
        self._num_requests = 0
        self._num_planned_steps = 0
        self._step = 0
        self._step_tokens = 0
        self._num_preemptions = 0
        self._prefix_cache_queries = 0
        self._prefix_cache_hits = 0
        self._prompt_tokens_computed = 0
        self._prompt_tokens_cached = 0
        self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a choice has not ended. If so, and every planned step is applied, `plan_step` gives a plan."""
        return bool(self._choices)

    def add(self, request: GenerationRequest) -> None:
        """Queues the choices of a valid request whose id is not in use."""
        assert request.request_id not in self._choices, f"request id {request.request_id} is in use"
        self._num_requests += 1
        # Without prefix caching the choices of one request still share its blocks, under a salt nobody else has.
        salt = request.cache_salt if self._enable_prefix_caching else str(self._num_requests)
        num_prompt_tokens = len(request.prompt_token_ids)
        num_shared = (num_prompt_tokens - 1) // self._block_size * self._block_size
        hashes: list[bytes] = []
        extend_hashes(hashes, request.prompt_token_ids, self._block_size, salt)
        choices = self._choices[request.request_id] = {}
        for index in range(request.n):
            choice = choices[index] = _Choice(
                request=request,
                index=index,
                salt=salt,
                token_ids=list(request.prompt_token_ids),
                hashes=list(hashes),
                max_len=min(num_prompt_tokens + request.params.max_tokens, self._max_model_len),
                num_shared=num_shared,
                prompt_logprobs=[None] if index == 0 and request.params.prompt_logprobs is not None else None,
            )
            queue = self._deferred if index and num_shared else self._waiting
            queue[choice.key] = choice

    def abort(self, request_id: str, choice_index: int | None = None) -> list[Delta]:
        """Ends one choice (no delta: who asked has ended it already), or all of a request (one delta for each).

        Ids that are not known, or not any more, are ignored.
        """
        choices = self._choices.get(request_id, {})
        if choice_index is not None:
            if choice_index in choices:
                self._end(choices[choice_index])
            return []
        # From the last to the first: choice 0 would wake its siblings for nothing.
        for choice in (aborted := list(choices.values()))[::-1]:
            self._end(choice)
        return [self._delta(choice, [], finish_reason=FinishReason.ABORT) for choice in aborted]

    def plan_step(self, now_s: float) -> StepPlan | None:
        """The next step, or None if nothing can be computed before a result is applied or a request is added.

        `now_s` is the time.monotonic() that choices admitted in this step report as `scheduled_s`.
        """
        plan = StepPlan(epoch=self._epoch, step=self._num_planned_steps + 1)
        budget = self._max_num_batched_tokens
        num_preemptions = self._num_preemptions
        for choice in list(self._running.values()):
            if choice.key not in self._running:
                break  # preempted in this loop, as is everything behind it
            num = min(choice.num_plannable, budget)
            if num and self._make_room(choice, num):
                budget -= self._plan_choice(plan, choice, num, [])
        # What a preemption has freed is for the choices that run, so nothing is admitted beside it.
        while budget and self._waiting and self._free_slots and num_preemptions == self._num_preemptions:
            num = self._admit(plan, next(iter(self._waiting.values())), budget, now_s)
            if not num:
                break
            budget -= num
        if not plan.slots:
            return None
        self._num_planned_steps += 1
        return plan

    def apply(self, result: StepResult, plan: StepPlan) -> list[Delta]:
        """Commits the result of the oldest planned step; gives the new tokens and ends, in the plan's order."""
        assert plan.step == self._step + 1, f"step {plan.step} applied after step {self._step}"
        assert (result.epoch, result.step) == (plan.epoch, plan.step), "result of another step"
        self._step = plan.step
        self._step_tokens = sum(plan.nums)
        deltas = []
        token_ids = iter(result.token_ids)
        for index, slot in enumerate(plan.slots):
            choice = self._slots[slot]
            assert choice is not None, f"slot {slot} was freed under a planned step"
            new_token_ids = [next(token_ids)] if plan.samples[index] else []
            choice.num_in_flight -= 1
            choice.num_unknown -= len(new_token_ids)
            if not choice.finished:
                delta = self._commit(choice, plan.starts[index] + plan.nums[index], new_token_ids, index, result)
                if delta is not None:
                    deltas.append(delta)
            if choice.leaving and not choice.num_in_flight:
                self._release(choice)
        return deltas

    def stats(self) -> dict[str, int]:
        """The fields of `channel.EngineStats` that the scheduler knows: all but `step_s`."""
        return {
            "num_running": len(self._running),
            "num_waiting": len(self._waiting) + len(self._deferred),
            "num_deferred": len(self._deferred),
            "num_blocks_used": self._pool.num_blocks - self._pool.num_free,
            "prefix_cache_queries": self._prefix_cache_queries,
            "prefix_cache_hits": self._prefix_cache_hits,
            "num_preemptions": self._num_preemptions,
            "prompt_tokens_computed": self._prompt_tokens_computed,
            "prompt_tokens_cached": self._prompt_tokens_cached,
            "generation_tokens": self._generation_tokens,
            "step": self._step,
            "step_tokens": self._step_tokens,
        }

    def check(self) -> None:
        """Raises AssertionError on a broken invariant. O(num_blocks): for tests, and for when the engine idles."""
        self._pool.check()
        self._cache.check()
        holders = [choice for choice in self._slots if choice is not None]
        num_refs = Counter(block for choice in holders for block in choice.blocks)
        for block in range(self._pool.num_blocks):
            assert num_refs[block] == self._pool.num_refs(block), f"block {block}: references and owners differ"
        assert sorted(self._free_slots) == [s for s, choice in enumerate(self._slots) if choice is None], "slots leak"
        for choice in holders:
            assert choice.leaving != (self._running.get(choice.key) is choice), "a holder of a slot runs or leaves"
            assert len(choice.blocks) == self._num_blocks_for(choice.num_planned), "table does not fit the tokens"
            # Blocks not known to be full and computed are written to: nobody else may hold them.
            for block in choice.blocks[choice.num_inserted :]:
                assert num_refs[block] == 1, f"block {block} is written by one of {num_refs[block]} owners"
        places = (self._deferred, self._waiting, self._running)
        live = {choice.key for choices in self._choices.values() for choice in choices.values()}
        assert sum(map(len, places)) == len(live), "a choice is in no place or in two"
        assert live == {key for place in places for key in place}, "a place holds a choice that has ended"

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _make_room(self, choice: _Choice, num: int) -> bool:
        """Sees to it that the blocks for `num` more tokens of a running choice are free, by preemption if need be.

        False: the choice was preempted itself, or must wait for blocks that planned steps still use.
        """
        num_needed = self._num_blocks_for(choice.num_planned + num) - len(choice.blocks)
        while num_needed > self._pool.num_free:
            if any(holder is not None and holder.leaving for holder in self._slots):
                return False
            newest = next(reversed(self._running.values()))
            self._preempt(newest)
            if newest is choice:
                return False
        return True

    def _admit(self, plan: StepPlan, choice: _Choice, budget: int, now_s: float) -> int:
        """Admits the head of the queue and returns how many tokens it computes in this step.

        0: not now, because the blocks of its tokens are not all free, or because it still leaves.
        """
        if choice.leaving:
            return 0
        # At least the last token is computed: its logits are what the choice waits for.
        reusable = choice.hashes[: (len(choice.token_ids) - 1) // self._block_size] if choice.reads_cache else []
        matched = self._cache.match(reusable)
        start = len(matched) * self._block_size
        num = min(len(choice.token_ids) - start, budget)
        num_free = self._pool.num_free - sum(map(self._pool.is_free, matched))
        # Room for all its tokens, not only the first chunk: else it might preempt itself in the next step, for ever.
        if self._num_blocks_for(len(choice.token_ids)) - len(matched) > num_free:
            return 0
        for block in matched:
            self._pool.share(block)
        del self._waiting[choice.key]
        self._running[choice.key] = choice
        choice.slot = self._free_slots.pop()
        self._slots[choice.slot] = choice
        choice.blocks = matched.copy()
        choice.num_planned = start
        choice.num_inserted = len(matched)
        self._count_admission(choice, now_s)
        plan.new_choices.append(
            NewChoice(
                choice.slot,
                choice.index,
                list(choice.token_ids),
                choice.num_prompt_tokens,
                choice.request.params,
            )
        )
        if start >= choice.num_shared:
            self._wake_siblings(choice)
        return self._plan_choice(plan, choice, num, matched)

    def _count_admission(self, choice: _Choice, now_s: float) -> None:
        num_cached_tokens = min(choice.num_planned, choice.num_prompt_tokens)
        if choice.scheduled_s is None:
            choice.scheduled_s = now_s
            choice.num_cached_tokens = num_cached_tokens
            if self._enable_prefix_caching and choice.reads_cache:
                self._prefix_cache_queries += choice.num_prompt_tokens
                self._prefix_cache_hits += num_cached_tokens
        if num_cached_tokens > choice.num_prompt_counted:
            self._prompt_tokens_cached += num_cached_tokens - choice.num_prompt_counted
            choice.num_prompt_counted = num_cached_tokens

    def _plan_choice(self, plan: StepPlan, choice: _Choice, num: int, matched: list[int]) -> int:
        """Adds tokens [num_planned, num_planned + num) of a choice to the plan, for which blocks are free."""
        new_blocks = self._pool.allocate(self._num_blocks_for(choice.num_planned + num) - len(choice.blocks))
        choice.blocks += new_blocks
        if matched or new_blocks:
            plan.new_blocks.append((choice.slot, matched + new_blocks))
        plan.slots.append(choice.slot)
        plan.starts.append(choice.num_planned)
        plan.nums.append(num)
        choice.num_planned += num
        samples = choice.num_planned == choice.num_tokens and choice.request.params.max_tokens > 0
        plan.samples.append(samples)
        choice.num_unknown += samples
        choice.num_in_flight += 1
        return num

    def _preempt(self, choice: _Choice) -> None:
        """Sends a running choice back to the head of the queue, its tokens to be computed again."""
        self._num_preemptions += 1
        choice.num_preemptions += 1
        del self._running[choice.key]
        self._put_first(choice)
        self._leave(choice)

    def _put_first(self, choice: _Choice) -> None:
        self._waiting[choice.key] = choice
        self._waiting.move_to_end(choice.key, last=False)

    def _wake_siblings(self, choice: _Choice) -> None:
        """Lets the deferred choices of a request into the queue: ahead of all, in order."""
        request = choice.request
        if choice.index == 0:
            for index in range(request.n - 1, 0, -1):
                if (sibling := self._deferred.pop((request.request_id, index), None)) is not None:
                    self._put_first(sibling)

    def _end(self, choice: _Choice) -> None:
        choice.finished = True
        choices = self._choices[choice.request.request_id]
        del choices[choice.index]
        if not choices:
            del self._choices[choice.request.request_id]
        for place in (self._deferred, self._waiting, self._running):
            place.pop(choice.key, None)
        if choice.slot >= 0:
            self._leave(choice)
        self._wake_siblings(choice)

    def _leave(self, choice: _Choice) -> None:
        choice.leaving = True
        if not choice.num_in_flight:
            self._release(choice)

    def _release(self, choice: _Choice) -> None:
        """Gives back slot and blocks, which no planned step uses any more."""
        self._pool.release(reversed(choice.blocks))
        self._slots[choice.slot] = None
        self._free_slots.append(choice.slot)
        choice.slot = -1
        choice.blocks = []
        choice.num_planned = choice.num_inserted = 0
        choice.leaving = False

    def _commit(
        self, choice: _Choice, num_computed: int, new_token_ids: list[int], index: int, result: StepResult
    ) -> Delta | None:
        """Takes over what a step, of which the choice was the entry `index`, has computed for it: at most one token."""
        if index in result.failed:
            # Whatever made the logits bad may sit in these blocks: nobody else may inherit it.
            for block in choice.blocks:
                self._cache.remove(block)
            self._end(choice)
            return self._delta(choice, [], finish_reason=FinishReason.ERROR)
        self._commit_computed(choice, num_computed, result.prompt_logprobs.get(index, []))
        choice.token_ids += new_token_ids
        extend_hashes(choice.hashes, choice.token_ids, self._block_size, choice.salt)
        self._generation_tokens += len(new_token_ids)
        finish_reason, stop_token_id = self._finish_reason(choice, new_token_ids)
        if num_computed < choice.num_prompt_tokens or not (new_token_ids or finish_reason):
            return None
        if finish_reason is not None:
            self._end(choice)
        return self._delta(
            choice,
            new_token_ids,
            logprobs=[result.logprobs[index]] if index in result.logprobs else None,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
        )

    def _commit_computed(self, choice: _Choice, num_computed: int, prompt_logprobs: list[TokenLogprobs]) -> None:
        """Takes over that tokens [0, num_computed) are computed; `prompt_logprobs` are the last step's, in order."""
        num_prompt = min(num_computed, choice.num_prompt_tokens)
        if num_prompt > choice.num_prompt_counted:
            self._prompt_tokens_computed += num_prompt - choice.num_prompt_counted
            choice.num_prompt_counted = num_prompt
        if choice.prompt_logprobs is not None:
            # They end at position num_computed or at the prompt's end. After a preemption some are known already.
            end = min(num_computed + 1, choice.num_prompt_tokens)
            if (num_new := end - len(choice.prompt_logprobs)) > 0:
                choice.prompt_logprobs += prompt_logprobs[-num_new:]
        while choice.num_inserted < num_computed // self._block_size:
            self._cache.insert(choice.hashes[choice.num_inserted], choice.blocks[choice.num_inserted])
            choice.num_inserted += 1
        if num_computed >= choice.num_shared:
            self._wake_siblings(choice)

    def _finish_reason(self, choice: _Choice, new_token_ids: list[int]) -> tuple[FinishReason | None, int | None]:
        """Why the choice ends with its newest token, if it does, and the id in stop_token_ids that ended it."""
        params = choice.request.params
        if len(choice.token_ids) - choice.num_prompt_tokens >= params.min_tokens:
            for token_id in new_token_ids:
                if token_id in params.eos_token_ids:
                    return FinishReason.STOP, None
                if token_id in params.stop_token_ids:
                    return FinishReason.STOP, token_id
        return (FinishReason.LENGTH if len(choice.token_ids) >= choice.max_len else None), None

    def _delta(
        self,
        choice: _Choice,
        token_ids: list[int],
        *,
        logprobs: list[TokenLogprobs] | None = None,
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
    ) -> Delta:
        """The newest tokens of a choice, which are committed already."""
        delta = Delta(
            request_id=choice.request.request_id,
            choice_index=choice.index,
            start=len(choice.token_ids) - choice.num_prompt_tokens - len(token_ids),
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            num_preemptions=choice.num_preemptions,
        )
        if not choice.announced:
            choice.announced = True
            delta.num_cached_tokens = choice.num_cached_tokens
            delta.prompt_logprobs = choice.prompt_logprobs
            delta.scheduled_s = choice.scheduled_s
        return delta
