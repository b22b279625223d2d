"""What each step computes. Pure bookkeeping: knows tokens, slots and blocks, but no tensors, processes or clocks.

The unit is the choice. There are no phases: a choice has fewer computed tokens than tokens, and every step hands out a
token budget, first to running choices in the order of their admission, then to waiting ones in the order of the queue.

A choice is in one of three places, each a dictionary with choices as keys and in an order:

- waiting: may be admitted; preempted choices and former deferred ones stand at the head;
- deferred: came to the head of the queue while a running choice was computing blocks that both begin with, be it of the
  same request or of another; back in the queue once these blocks are in the prefix cache or that choice runs no more;
- running: holds a slot and blocks.

Steps may be planned ahead of the results of earlier ones. What a planned step uses stays in place until that step is
applied: a choice that ends or is preempted meanwhile *leaves*, keeping slot and blocks until its last planned step is.
"""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

from octavo.server.engine.block_pool import BlockPool
from octavo.server.engine.plan import NewChoice, StepPlan, StepResult
from octavo.server.engine.prefix_cache import PrefixCache, extend_hashes
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, TokenLogprobs

MAX_AUDITS = 256  # that wait; past it the oldest is left out


@dataclass(slots=True, eq=False)
class _Choice:
    """One output of a request. Tokens [0, num_planned) are computed, or will be by steps already planned."""

    request: GenerationRequest
    index: int
    salt: str
    token_ids: list[int]  # prompt, then committed tokens
    hashes: list[bytes]  # of all full blocks of token_ids
    num_prompt_tokens: int
    max_len: int  # the choice ends when it has this many tokens
    num_computable: int  # tokens that are ever computed: the last one before max_len is not, but all of the prompt
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    num_planned: int = 0
    num_unknown: int = 0  # tokens that planned steps will sample
    num_in_flight: int = 0  # planned steps not applied yet
    num_void: int = 0  # of these, the next ones, whose results are not to be taken
    num_inserted: int = 0  # leading blocks that the prefix cache has seen
    num_prompt_counted: int = 0  # prompt tokens that the statistics have seen, so that recomputation is not counted
    is_resumed: bool = False  # it began with tokens of an earlier engine, which may have had other bits
    is_audit: bool = False  # of a choice that has ended: its tokens are known, and computed again to be compared
    leaving: bool = False
    finished: bool = False
    announced: bool = False  # the first delta is out
    num_cached_tokens: int = 0  # at the first admission
    num_preemptions: int = 0
    scheduled_s: float | None = None  # of the first admission

    @property
    def num_plannable(self) -> int:
        """Tokens that the next step could compute: of those known, and those that planned steps will sample."""
        return min(len(self.token_ids) + self.num_unknown, self.num_computable) - self.num_planned

    @property
    def reads_cache(self) -> bool:
        """Prompt logprobs need the hidden state of every prompt token, so every one is computed; of audits, too."""
        return self.prompt_logprobs is None and not self.is_audit

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens


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
        audit: float = 0.0,
    ) -> None:
        """audit: share of the choices that are computed again after their end, when there is room for it.

        Of those that began here, that is: another number of ranks has other bits.
        """
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
        self._waiting: OrderedDict[_Choice, None] = OrderedDict()
        self._deferred: dict[_Choice, None] = {}
        self._running: dict[_Choice, None] = {}  # in the order of admission
        self._computing: dict[bytes, _Choice] = {}  # hash of a full block -> running choice to compute it
        self._awaiting: dict[bytes, list[_Choice]] = {}  # hash in _computing -> choices deferred for it, in order
        self._slots: list[_Choice | None] = [None] * max_num_seqs
        self._free_slots = list(range(max_num_seqs))[::-1]
        self._audit_share, self._audits_due = audit, 0.0
        self._to_audit: deque[_Choice] = deque(maxlen=MAX_AUDITS)
        self._audit: _Choice | None = None  # the one that runs
        self.audit_failure = ""  # what was found in the first one that went wrong
        self._tokens_audited = 0
        self._num_requests = 0
        self._num_planned_steps = 0
        self._step = 0
        self._step_tokens = 0
        self._num_preemptions = 0
        self._prefix_cache_queries = 0
        self._prefix_cache_hits = 0
        self._kv_blocks_dropped = 0
        self._prompt_tokens_computed = 0
        self._prompt_tokens_cached = 0
        self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether there is anything to compute. If so, and every planned step is applied, `plan_step` gives a plan."""
        return bool(self._choices or self._to_audit or self._audit)

    def num_decodes_and_prefills(self) -> tuple[int, int]:
        """Choices of which the next step could compute one token and no more; others that run, or could.

        Where the blocks do not suffice for the head of the queue, none that waits could.
        """
        num_decodes = sum(choice.num_plannable == 1 for choice in self._running)
        num_waiting = min(len(self._waiting), len(self._free_slots))
        if num_waiting:
            head = next(iter(self._waiting))
            if not self._fits(head, []) and not self._fits(head, self._match(head)):
                num_waiting = 0
        num_audits = bool(self._to_audit and not self._audit)
        return num_decodes, len(self._running) - num_decodes + num_waiting + num_audits

    def add(self, request: GenerationRequest, committed: dict[int, list[int]] | None = None) -> None:
        """Queues the choices of a valid request whose id is not in use.

        `committed`: choices that begin with output tokens of an earlier engine, none of which is sampled or sent again;
        its other choices have ended. None: all choices, from their first token.
        """
        assert request.request_id not in self._choices, f"request id {request.request_id} is in use"
        self._num_requests += 1
        # Without prefix caching the choices of one request still share its blocks, under a salt nobody else has.
        salt = request.cache_salt if self._enable_prefix_caching else str(self._num_requests)
        num_prompt_tokens = len(request.prompt_token_ids)
        max_len = min(num_prompt_tokens + request.params.max_tokens, self._max_model_len)
        hashes: list[bytes] = []
        extend_hashes(hashes, request.prompt_token_ids, self._block_size, salt)
        if committed is None:
            committed = {index: [] for index in range(request.n)}
        choices = self._choices[request.request_id] = {}
        for index, output in committed.items():
            scores_prompt = index == 0 and request.params.prompt_logprobs is not None and not output
            choice = choices[index] = _Choice(
                request=request,
                index=index,
                salt=salt,
                token_ids=request.prompt_token_ids + output,
                hashes=list(hashes),
                num_prompt_tokens=num_prompt_tokens,
                max_len=max_len,
                num_computable=max(max_len - 1, num_prompt_tokens),
                prompt_logprobs=[None] if scores_prompt else None,
                num_prompt_counted=num_prompt_tokens if output else 0,
                is_resumed=bool(output),
                announced=bool(output),
            )
            extend_hashes(choice.hashes, choice.token_ids, self._block_size, salt)
            self._waiting[choice] = None

    def abort(self, request_id: str, choice_index: int | None = None) -> list[Delta]:
        """Ends one choice (no delta: who asked has ended it already), or all of a request (one delta for each).

        Ids that are not known, or not any more, are ignored.
        """
        choices = self._choices.get(request_id, {})
        if choice_index is not None:
            if choice_index in choices:
                self._end(choices[choice_index])
            return []
        # From the last to the first: the first would wake its siblings for nothing.
        for choice in (aborted := list(choices.values()))[::-1]:
            self._end(choice)
        return [self._delta(choice, [], finish_reason=FinishReason.ABORT) for choice in aborted]

    def plan_step(self, now_s: float, max_prefill_tokens: int | None = None) -> StepPlan | None:
        """The next step, or None if nothing can be computed before a result is applied or a request is added.

        `now_s` is the time.monotonic() that choices admitted in this step report as `scheduled_s`.
        `max_prefill_tokens` limits, within the token budget, what is spent on running choices that compute more than
        one token and on those admitted. With 0 there may be no plan though there would be one with more.
        """
        plan = StepPlan(epoch=self._epoch, step=self._num_planned_steps + 1)
        budget = prefill_budget = self._max_num_batched_tokens
        if max_prefill_tokens is not None:
            prefill_budget = min(budget, max_prefill_tokens)
        num_preemptions = self._num_preemptions
        for choice in list(self._running):
            if choice not in self._running:
                continue  # preempted in this loop, in which an audit may stand anywhere
            num = choice.num_plannable
            prefills = num > 1
            num = min(num, budget, prefill_budget) if prefills else min(num, budget)
            if not num:
                continue
            num_new_blocks = self._num_blocks_for(choice.num_planned + num) - len(choice.blocks)
            if num_new_blocks <= self._pool.num_free or self._make_room(choice, num_new_blocks):
                self._plan_choice(plan, choice, num, num_new_blocks, [])
                budget -= num
                if prefills:
                    prefill_budget -= num
        budget = min(budget, prefill_budget)
        # What a preemption has freed is for the choices that run, so nothing is admitted beside it. Nor are more
        # choices deferred than can run: they would have held every slot, so nobody behind them waits longer than if
        # they had not been deferred, and what a step does about those who wait stays bounded.
        while (
            budget
            and self._waiting
            and self._free_slots
            and len(self._deferred) < len(self._slots)
            and num_preemptions == self._num_preemptions
        ):
            choice = next(iter(self._waiting))
            if choice.leaving:
                break
            matched = self._match(choice)
            if self._defer(choice, len(matched)):
                continue
            num = self._admit(plan, choice, matched, budget, now_s)
            if not num:
                break
            budget -= num
        if budget and self._to_audit and not (self._audit or self._waiting or self._deferred) and self._free_slots:
            self._begin_audit(plan, budget, now_s)
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
        if result.changed_blocks:
            self._drop(result.changed_blocks)
        deltas = []
        token_ids = iter(result.token_ids)
        columns = zip(plan.slots, plan.starts, plan.nums, plan.samples, strict=True)
        for index, (slot, start, num, samples) in enumerate(columns):
            choice = self._slots[slot]
            assert choice is not None, f"slot {slot} was freed under a planned step"
            new_token_ids = [next(token_ids)] if samples else []
            choice.num_in_flight -= 1
            choice.num_unknown -= samples
            if choice.num_void:
                choice.num_void -= 1
            elif choice.is_audit and not choice.finished:
                self._commit_audit(choice, start, num, index, result)
            elif not choice.finished:
                delta = self._commit(choice, start + num, new_token_ids, index, result)
                if delta is not None:
                    deltas.append(delta)
            if choice.leaving and not choice.num_in_flight:
                self._release(choice)
        return deltas

    def request_ids(self, plan: StepPlan) -> list[str]:
        """The requests in a planned step that is not applied yet; one with several choices may come as often.

        Those that are audited have ended.
        """
        choices = (self._slots[slot] for slot in plan.slots)
        return [choice.request.request_id for choice in choices if choice is not None and not choice.is_audit]

    def stats(self) -> dict[str, int]:
        """The fields of `channel.EngineStats` that the scheduler knows: those of steps and of ranks are others'."""
        return {
            "num_running": len(self._running),
            "num_waiting": len(self._waiting) + len(self._deferred),
            "num_deferred": len(self._deferred),
            "num_blocks_used": self._pool.num_blocks - self._pool.num_free,
            "prefix_cache_queries": self._prefix_cache_queries,
            "prefix_cache_hits": self._prefix_cache_hits,
            "num_preemptions": self._num_preemptions,
            "kv_blocks_dropped": self._kv_blocks_dropped,
            "tokens_audited": self._tokens_audited,
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
            assert choice.leaving != (choice in self._running), "a holder of a slot runs or leaves"
            assert len(choice.blocks) == self._num_blocks_for(choice.num_planned), "table does not fit the tokens"
            # Blocks not known to be full and computed are written to: nobody else may hold them.
            for block in choice.blocks[choice.num_inserted :]:
                assert num_refs[block] == 1, f"block {block} is written by one of {num_refs[block]} owners"
        places = (self._waiting, self._deferred, self._running)
        live = {choice for choices in self._choices.values() for choice in choices.values()}
        live |= {self._audit} if self._audit is not None and not self._audit.leaving else set()
        assert sum(map(len, places)) == len(live), "a choice is in no place or in two"
        assert live == {choice for place in places for choice in place}, "a place holds a choice that has ended"
        for block_hash, choice in self._computing.items():
            assert choice in self._running, "a block is to be computed by a choice that does not run"
            assert block_hash in choice.hashes[choice.num_inserted :], "a block to be computed is computed"
        assert self._awaiting.keys() <= self._computing.keys(), "a block is awaited that nobody computes"
        awaiting = Counter(choice for choices in self._awaiting.values() for choice in choices)
        assert all(awaiting[choice] == 1 for choice in self._deferred), "a deferred choice awaits no block, or two"

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _make_room(self, choice: _Choice, num_new_blocks: int) -> bool:
        """Sees to it that so many blocks are free for a running choice, by preemption if need be.

        False: the choice was preempted itself, or must wait for blocks that planned steps still use.
        """
        while num_new_blocks > self._pool.num_free:
            if any(holder is not None and holder.leaving for holder in self._slots):
                return False
            newest = self._audit or next(reversed(self._running))
            self._preempt(newest)
            if newest is choice:
                return False
        return True

    def _begin_audit(self, plan: StepPlan, budget: int, now_s: float) -> None:
        """Admits a copy of a choice that has ended, if there are blocks for it; what it computes nobody gets."""
        ended = self._to_audit[0]
        audit = _Choice(
            request=ended.request,
            index=ended.index,
            salt="",
            token_ids=ended.token_ids,
            hashes=[],
            num_prompt_tokens=ended.num_prompt_tokens,
            max_len=len(ended.token_ids),
            num_computable=len(ended.token_ids) - 1,
            num_prompt_counted=ended.num_prompt_tokens,
            is_audit=True,
            announced=True,
        )
        self._waiting[audit] = None
        if self._admit(plan, audit, [], budget, now_s):
            self._to_audit.popleft()
            self._audit = audit
        else:
            del self._waiting[audit]
            if not self._running:  # it will never fit: it was longer than what is free when nothing runs
                self._to_audit.popleft()

    def _commit_audit(self, audit: _Choice, start: int, num: int, index: int, result: StepResult) -> None:
        """Compares what a step, of which the audit was the entry `index`, has found to be the next tokens."""
        begin, name = max(start + 1, audit.num_prompt_tokens), f"request {audit.request.request_id}"
        found, known = result.audited.get(index, []), audit.token_ids[begin : start + num + 1]
        self._tokens_audited += len(found)
        if index in result.failed or found != known:
            differs = (i for i, pair in enumerate(zip(found, known, strict=False)) if pair[0] != pair[1])
            at = begin + next(differs, 0) - audit.num_prompt_tokens
            self.audit_failure = (
                f"output token {at} of choice {audit.index} of {name} is another one when computed again"
            )
        if self.audit_failure or start + num == audit.num_computable:
            self._audit = None
            self._end_running(audit)

    def _num_reusable(self, choice: _Choice) -> int:
        """Leading blocks that may come from the cache. The last token is computed: the choice waits for its logits."""
        return (len(choice.token_ids) - 1) // self._block_size if choice.reads_cache else 0

    def _match(self, choice: _Choice) -> list[int]:
        """Cached blocks that the choice could begin with."""
        return self._cache.match(choice.hashes[: self._num_reusable(choice)])

    def _fits(self, choice: _Choice, matched: list[int]) -> bool:
        """Whether blocks are free for all tokens of a choice that waits, beside `matched`, its cached ones.

        For all, not only for its first chunk: else it might preempt itself in the next step, for ever.
        """
        num_free = self._pool.num_free - sum(map(self._pool.is_free, matched))
        return self._num_blocks_for(len(choice.token_ids)) - len(matched) <= num_free

    def _defer(self, choice: _Choice, num_matched: int) -> bool:
        """Defers the head of the queue if a running choice is computing the block after those that are cached.

        Of the reusable blocks behind these it awaits the last one of those being computed, so that it is woken once,
        however many there are.
        """
        num, num_reusable = num_matched, self._num_reusable(choice)
        while num < num_reusable and choice.hashes[num] in self._computing:
            num += 1
        if num == num_matched:
            return False
        del self._waiting[choice]
        self._deferred[choice] = None
        self._awaiting.setdefault(choice.hashes[num - 1], []).append(choice)
        return True

    def _admit(self, plan: StepPlan, choice: _Choice, matched: list[int], budget: int, now_s: float) -> int:
        """Admits the head of the queue, of which `matched` are cached, and returns how many tokens this step computes.

        0: not now, because the blocks of its tokens are not all free.
        """
        start = len(matched) * self._block_size
        num = min(min(len(choice.token_ids), choice.num_computable) - start, budget)
        if not self._fits(choice, matched):
            return 0
        for block in matched:
            self._pool.share(block)
        del self._waiting[choice]
        self._running[choice] = None
        choice.slot = self._free_slots.pop()
        self._slots[choice.slot] = choice
        choice.blocks = matched.copy()
        choice.num_planned = start
        choice.num_inserted = len(matched)
        for block_hash in choice.hashes[len(matched) :]:
            self._computing.setdefault(block_hash, choice)
        self._count_admission(choice, now_s)
        plan.new_choices.append(
            NewChoice(
                choice.slot,
                choice.index,
                list(choice.token_ids),
                choice.num_prompt_tokens,
                choice.request.params,
                choice.scores_prompt,
                choice.is_audit,
            )
        )
        self._plan_choice(plan, choice, num, self._num_blocks_for(start + num) - len(matched), matched)
        return num

    def _count_admission(self, choice: _Choice, now_s: float) -> None:
        num_cached_tokens = min(choice.num_planned, choice.num_prompt_tokens)
        if choice.scheduled_s is None:
            choice.scheduled_s = now_s
            choice.num_cached_tokens = num_cached_tokens
            if self._enable_prefix_caching and choice.reads_cache and not choice.announced:
                self._prefix_cache_queries += choice.num_prompt_tokens
                self._prefix_cache_hits += num_cached_tokens
        if num_cached_tokens > choice.num_prompt_counted:
            self._prompt_tokens_cached += num_cached_tokens - choice.num_prompt_counted
            choice.num_prompt_counted = num_cached_tokens

    def _plan_choice(self, plan: StepPlan, choice: _Choice, num: int, num_new_blocks: int, matched: list[int]) -> None:
        """Adds tokens [num_planned, num_planned + num) of a choice to the plan, for which blocks are free."""
        if num_new_blocks or matched:
            new_blocks = self._pool.allocate(num_new_blocks)
            choice.blocks += new_blocks
            plan.new_blocks.append((choice.slot, matched + new_blocks))
        plan.slots.append(choice.slot)
        plan.starts.append(choice.num_planned)
        plan.nums.append(num)
        choice.num_planned += num
        num_tokens = len(choice.token_ids) + choice.num_unknown
        samples = choice.num_planned == num_tokens and choice.request.params.max_tokens > 0  # never in an audit
        plan.samples.append(samples)
        choice.num_unknown += samples
        choice.num_in_flight += 1

    def _preempt(self, choice: _Choice) -> None:
        """Has a running choice wait, since others need its blocks."""
        if choice.is_audit:
            self._audit = None
            self._end_running(choice)
            return
        self._num_preemptions += 1
        choice.num_preemptions += 1
        self._send_back(choice)

    def _drop(self, blocks: list[int]) -> None:
        """The content of cached blocks has changed: what was computed from them is computed again.

        That is what all choices have that begin with them, and any part of the cache.
        """
        self._kv_blocks_dropped += len(blocks)
        self._cache.clear()
        for choice in reversed([*self._running]):
            if not choice.is_audit and not set(blocks).isdisjoint(choice.blocks):
                choice.num_void = choice.num_in_flight
                self._send_back(choice)

    def _send_back(self, choice: _Choice) -> None:
        """Sends a running choice back to the head of the queue, its tokens to be computed again."""
        del self._running[choice]
        self._stop_computing(choice)
        self._put_first(choice)
        self._leave(choice)

    def _put_first(self, choice: _Choice) -> None:
        self._waiting[choice] = None
        self._waiting.move_to_end(choice, last=False)

    def _stop_computing(self, choice: _Choice) -> None:
        """Lets go on who awaits blocks that a choice would have computed, which does not run any more."""
        for block_hash in reversed(choice.hashes[choice.num_inserted :]):
            if self._computing.get(block_hash) is choice:
                self._wake(block_hash)

    def _wake(self, block_hash: bytes) -> None:
        """Lets the choices that await a block into the queue: ahead of all, in order."""
        del self._computing[block_hash]
        for choice in reversed(self._awaiting.pop(block_hash, [])):
            if choice in self._deferred:  # it may have been aborted
                del self._deferred[choice]
                self._put_first(choice)

    def _end(self, choice: _Choice) -> None:
        if self._audit_share and not choice.is_resumed and len(choice.token_ids) > choice.num_prompt_tokens:
            self._audits_due += self._audit_share
            if self._audits_due >= 1.0:
                self._audits_due -= 1.0
                self._to_audit.append(choice)
        choices = self._choices[choice.request.request_id]
        del choices[choice.index]
        if not choices:
            del self._choices[choice.request.request_id]
        self._waiting.pop(choice, None)
        self._deferred.pop(choice, None)
        self._end_running(choice)

    def _end_running(self, choice: _Choice) -> None:
        choice.finished = True
        if choice in self._running:
            del self._running[choice]
            self._stop_computing(choice)
        if choice.slot >= 0:
            self._leave(choice)

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
        if len(choice.token_ids) >= (len(choice.hashes) + 1) * self._block_size:
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
            block_hash = choice.hashes[choice.num_inserted]
            self._cache.insert(block_hash, choice.blocks[choice.num_inserted])
            choice.num_inserted += 1
            if block_hash in self._computing:
                self._wake(block_hash)

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
