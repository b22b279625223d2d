"""Every rule of the scheduler, with exact plans, block ids and deltas. Blocks of 4 tokens throughout."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from octavo.server.engine.channel import EngineStats
from octavo.server.engine.plan import StepPlan, StepResult
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from octavo.server.engine.scheduler import Scheduler, _Choice

EOS, STOP = 2, 3


def make(**changed: Any) -> Scheduler:
    settings: dict[str, Any] = {
        "num_blocks": 16,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 32,
        "enable_prefix_caching": True,
    }
    return Scheduler(**(settings | changed))


def request(name: str, prompt: int | list[int], *, n: int = 1, salt: str = "", **params: Any) -> GenerationRequest:
    """A prompt given as a length has tokens that no request of another name has."""
    if isinstance(prompt, int):
        prompt = [1000 * ord(name[0]) + i for i in range(prompt)]
    return GenerationRequest(name, prompt, SamplingParams(**({"max_tokens": 8} | params)), n, salt)


def plan_of(scheduler: Scheduler, now_s: float = 0.0, max_prefill_tokens: int | None = None) -> StepPlan:
    plan = scheduler.plan_step(now_s, max_prefill_tokens)
    assert plan is not None
    return plan


def apply(scheduler: Scheduler, plan: StepPlan, token_ids: Sequence[int] = (), **result: Any) -> list[Delta]:
    """Without token ids, every choice that samples gets token 500."""
    sampled = list(token_ids) or [500] * sum(plan.samples)
    assert len(sampled) == sum(plan.samples)
    deltas = scheduler.apply(StepResult(plan.epoch, plan.step, sampled, **result), plan)
    scheduler.check()
    return deltas


def step(scheduler: Scheduler, *token_ids: int) -> tuple[StepPlan, list[Delta]]:
    plan = plan_of(scheduler)
    scheduler.check()
    return plan, apply(scheduler, plan, token_ids)


def columns(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return list(zip(plan.slots, plan.starts, plan.nums, plan.samples, strict=True))


def ends(deltas: list[Delta]) -> list[tuple[str, int, FinishReason | None]]:
    return [(delta.request_id, delta.choice_index, delta.finish_reason) for delta in deltas]


def waiting(scheduler: Scheduler) -> list[str]:
    return [choice.request.request_id for choice in scheduler._waiting]


def drain(scheduler: Scheduler) -> list[Delta]:
    deltas = []
    while (plan := scheduler.plan_step(0.0)) is not None:
        deltas += apply(scheduler, plan)
    return deltas


# Prefill, decode, budget


def test_a_prompt_then_its_tokens() -> None:
    scheduler = make(epoch=7)
    asked = request("a", 6, max_tokens=3)
    scheduler.add(asked)
    plan, deltas = step(scheduler, 50)
    assert (plan.epoch, plan.step) == (7, 1)
    assert columns(plan) == [(0, 0, 6, True)]
    assert plan.new_blocks == [(0, [0, 1])]
    (new,) = plan.new_choices
    assert (new.slot, new.choice_index, new.num_prompt_tokens, new.params) == (0, 0, 6, asked.params)
    assert new.token_ids == asked.prompt_token_ids
    assert deltas == [Delta("a", 0, 0, [50], scheduled_s=0.0)]
    plan, deltas = step(scheduler, 51)
    assert columns(plan) == [(0, 6, 1, True)] and plan.new_blocks == [] and plan.new_choices == []
    assert deltas == [Delta("a", 0, 1, [51])]
    plan, deltas = step(scheduler, 52)
    assert columns(plan) == [(0, 7, 1, True)] and plan.new_blocks == []
    assert deltas == [Delta("a", 0, 2, [52], finish_reason=FinishReason.LENGTH)]
    assert scheduler.plan_step(0.0) is None


def test_an_empty_scheduler_plans_nothing() -> None:
    assert make().plan_step(0.0) is None


def test_a_block_is_taken_when_its_first_position_is_computed() -> None:
    scheduler = make()
    scheduler.add(request("a", 3))
    blocks = [step(scheduler)[0].new_blocks for _ in range(6)]
    assert blocks == [[(0, [0])], [], [(0, [1])], [], [], []]


def test_a_long_prompt_is_chunked_and_samples_at_its_end_only() -> None:
    scheduler = make(max_num_batched_tokens=6)
    scheduler.add(request("a", 14))
    seen = []
    for _ in range(3):
        plan, deltas = step(scheduler)
        seen.append((columns(plan), plan.new_blocks, [delta.token_ids for delta in deltas]))
    assert seen == [
        ([(0, 0, 6, False)], [(0, [0, 1])], []),
        ([(0, 6, 6, False)], [(0, [2])], []),
        ([(0, 12, 2, True)], [(0, [3])], [[500]]),
    ]


def test_a_decode_and_a_chunk_share_a_step() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request("a", 5))
    step(scheduler)
    scheduler.add(request("b", 20))
    scheduler.add(request("c", 3))
    assert columns(step(scheduler)[0]) == [(0, 5, 1, True), (1, 0, 7, False)]
    assert columns(step(scheduler)[0]) == [(0, 6, 1, True), (1, 7, 7, False)]
    assert columns(step(scheduler)[0]) == [(0, 7, 1, True), (1, 14, 6, True), (2, 0, 1, False)]
    assert columns(step(scheduler)[0]) == [(0, 8, 1, True), (1, 20, 1, True), (2, 1, 2, True)]


def test_running_choices_come_first_in_the_order_of_their_admission_not_of_their_slots() -> None:
    scheduler = make()
    scheduler.add(request("a", 2, max_tokens=1))
    scheduler.add(request("b", 2))
    step(scheduler)  # a ends: slot 0 is free
    scheduler.add(request("c", 2))
    assert plan_slots(scheduler) == [1, 0]
    assert plan_slots(scheduler) == [1, 0]


def plan_slots(scheduler: Scheduler) -> list[int]:
    return step(scheduler)[0].slots


def test_no_more_choices_run_than_there_are_slots() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        scheduler.add(request(name, 2, max_tokens=2))
    assert plan_slots(scheduler) == [0, 1]
    assert (scheduler.stats()["num_running"], scheduler.stats()["num_waiting"]) == (2, 1)
    assert plan_slots(scheduler) == [0, 1]
    plan, _ = step(scheduler)
    assert [new.token_ids[0] for new in plan.new_choices] == [1000 * ord("c")]


def test_too_few_blocks_for_one_full_choice_is_refused() -> None:
    make(num_blocks=8, max_model_len=32)
    with pytest.raises(ValueError, match="7 blocks of 4 tokens cannot hold max_model_len 32"):
        make(num_blocks=7, max_model_len=32)
    with pytest.raises(ValueError, match="max_model_len 33"):
        make(num_blocks=8, max_model_len=33)


# Ends


def test_an_end_token_stops_and_is_sent() -> None:
    scheduler = make()
    scheduler.add(request("a", 2, eos_token_ids=(EOS,), stop_token_ids=(STOP,)))
    assert step(scheduler, 50)[1][0].finish_reason is None
    (delta,) = step(scheduler, EOS)[1]
    assert (delta.start, delta.token_ids, delta.finish_reason, delta.stop_token_id) == (1, [EOS], "stop", None)


def test_a_stop_token_is_named() -> None:
    scheduler = make()
    scheduler.add(request("a", 2, eos_token_ids=(EOS,), stop_token_ids=(STOP, 9)))
    (delta,) = step(scheduler, 9)[1]
    assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == ([9], "stop", 9)


def test_nothing_stops_before_min_tokens() -> None:
    scheduler = make()
    scheduler.add(request("a", 2, min_tokens=3, eos_token_ids=(EOS,), stop_token_ids=(STOP,)))
    reasons = [step(scheduler, token)[1][0].finish_reason for token in (EOS, STOP, EOS)]
    assert reasons == [None, None, FinishReason.STOP]


def test_a_stop_on_the_last_token_is_a_stop() -> None:
    scheduler = make()
    scheduler.add(request("a", 2, max_tokens=1, eos_token_ids=(EOS,)))
    assert ends(step(scheduler, EOS)[1]) == [("a", 0, FinishReason.STOP)]


def test_the_model_length_ends_a_choice() -> None:
    scheduler = make(max_model_len=8, num_blocks=2)
    scheduler.add(request("a", 6, max_tokens=100))
    assert ends(step(scheduler)[1] + step(scheduler)[1]) == [("a", 0, None), ("a", 0, FinishReason.LENGTH)]


def test_scoring_computes_the_prompt_and_samples_nothing() -> None:
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(request("a", 6, max_tokens=0))
    plan, deltas = step(scheduler)
    assert columns(plan) == [(0, 0, 4, False)] and deltas == []
    plan, deltas = step(scheduler)
    assert columns(plan) == [(0, 4, 2, False)]
    assert deltas == [Delta("a", 0, 0, [], finish_reason=FinishReason.LENGTH, scheduled_s=0.0)]
    assert scheduler.plan_step(0.0) is None


def test_a_failed_choice_ends_alone_and_leaves_nothing_in_the_cache() -> None:
    scheduler = make()
    prompt = list(range(10))
    scheduler.add(request("a", prompt))
    step(scheduler)
    scheduler.add(request("b", 3))
    plan = plan_of(scheduler)
    deltas = apply(scheduler, plan, [50, 51], failed=[0])
    assert deltas == [
        Delta("a", 0, 1, [], finish_reason=FinishReason.ERROR),
        Delta("b", 0, 0, [51], scheduled_s=0.0),
    ]
    scheduler.add(request("c", prompt))
    assert columns(step(scheduler)[0])[1] == (0, 0, 10, True)


def test_the_first_delta_says_when_the_choice_first_ran() -> None:
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(request("a", 6))
    assert apply(scheduler, plan_of(scheduler, now_s=1.5)) == []
    deltas = [apply(scheduler, plan_of(scheduler, now_s=now_s))[0] for now_s in (2.5, 3.5)]
    assert [delta.scheduled_s for delta in deltas] == [1.5, None]


# Limited prefill


def test_the_prefill_limit_spares_decodes() -> None:
    scheduler = make(max_num_batched_tokens=16)
    scheduler.add(request("a", 5))
    scheduler.add(request("b", 2))
    step(scheduler)
    scheduler.add(request("c", 20))
    scheduler.add(request("d", 3))
    assert scheduler.num_decodes_and_prefills() == (2, 2)
    seen = []
    for limit in (8, 0, 8, 8):
        plan = plan_of(scheduler, max_prefill_tokens=limit)
        seen.append(columns(plan))
        apply(scheduler, plan)
    assert seen == [
        [(0, 5, 1, True), (1, 2, 1, True), (2, 0, 8, False)],
        [(0, 6, 1, True), (1, 3, 1, True)],
        [(0, 7, 1, True), (1, 4, 1, True), (2, 8, 8, False)],
        [(0, 8, 1, True), (1, 5, 1, True), (2, 16, 4, True), (3, 0, 3, True)],
    ]
    assert scheduler.num_decodes_and_prefills() == (4, 0)


def test_those_who_wait_for_blocks_are_no_prefills() -> None:
    scheduler = make(num_blocks=10, block_size=4, max_model_len=32, max_num_seqs=4, max_num_batched_tokens=64)
    scheduler.add(request("a", 20))
    step(scheduler)
    scheduler.add(request("b", 12))
    assert scheduler.num_decodes_and_prefills() == (1, 1)
    scheduler.add(request("c", 12))
    step(scheduler)
    assert scheduler.num_decodes_and_prefills() == (2, 0)


def test_who_waits_for_no_more_than_cached_blocks_is_a_prefill() -> None:
    scheduler = make(num_blocks=10, max_model_len=40, max_num_batched_tokens=64)
    scheduler.add(request("a", prompt := list(range(20))))
    step(scheduler)
    scheduler.add(request("b", [*prompt, *range(100, 112)]))  # 8 blocks, of which a holds 5, which leaves 5
    assert scheduler.num_decodes_and_prefills() == (1, 1)
    scheduler.abort("a")
    scheduler.add(request("c", 1))
    assert scheduler.num_decodes_and_prefills() == (0, 2)
    step(scheduler)
    scheduler.add(request("d", [*range(4), *range(200, 212)]))  # 4 blocks, of which b holds one, which leaves 1
    assert scheduler.num_decodes_and_prefills() == (2, 0)
    assert len(step(scheduler)[0].slots) == 2


def test_a_limited_prefill_leaves_the_budget_to_decodes_behind_it() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(request("a", 20))
    step(scheduler)
    scheduler.add(request("b", 1))
    assert columns(plan := plan_of(scheduler)) == [(0, 8, 8, False)]
    apply(scheduler, plan)
    plan = plan_of(scheduler, max_prefill_tokens=5)
    assert columns(plan) == [(0, 16, 4, True), (1, 0, 1, True)]


def test_nothing_but_prefill_and_none_allowed_gives_no_plan() -> None:
    scheduler = make()
    scheduler.add(request("a", 5))
    assert scheduler.plan_step(0.0, 0) is None
    assert columns(step(scheduler)[0]) == [(0, 0, 5, True)]


# Prefix cache


def test_a_second_request_takes_the_full_blocks_of_the_first() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(10)), max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", [*range(10), 50, 51]))
    plan, (delta,) = step(scheduler)
    assert columns(plan) == [(0, 8, 4, True)]
    assert plan.new_blocks == [(0, [0, 1, 2])]  # 2 held nothing reusable, so it comes first
    assert delta.num_cached_tokens == 8
    assert step(scheduler)[1][0].num_cached_tokens == 0  # said once


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make()
    for name in "ab":
        scheduler.add(request(name, list(range(8)), max_tokens=1))
        plan, _ = step(scheduler)
    assert columns(plan) == [(0, 4, 4, True)]


def test_output_is_reused_too() -> None:
    scheduler = make()
    scheduler.add(request("a", [1, 2, 3], max_tokens=6))
    for token in range(50, 56):
        step(scheduler, token)
    # Computed: 1 2 3 50 | 51 52 53 54; the last token is not.
    scheduler.add(request("b", [1, 2, 3, *range(50, 56), 7]))
    assert columns(step(scheduler)[0]) == [(0, 8, 2, True)]


def test_a_block_is_offered_only_when_it_is_computed() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(9))))
    first = plan_of(scheduler)
    scheduler.add(request("b", list(range(9))))
    scheduler.add(request("c", list(range(9)), prompt_logprobs=0))
    second = plan_of(scheduler)  # planned before the first is applied
    assert columns(second) == [(0, 9, 1, True), (1, 0, 9, True)]  # c cannot use what it would wait for
    apply(scheduler, first)
    apply(scheduler, second)
    assert columns(step(scheduler)[0])[-1] == (2, 8, 1, True)


def test_salts_keep_requests_apart() -> None:
    scheduler = make()
    for name, salt, start in (("a", "x", 0), ("b", "y", 0), ("c", "", 0), ("d", "x", 8)):
        scheduler.add(request(name, list(range(9)), salt=salt, max_tokens=1))
        assert step(scheduler)[0].starts == [start]


def test_without_prefix_caching_nothing_is_shared_between_requests() -> None:
    scheduler = make(enable_prefix_caching=False)
    for name in "aba":  # an id that comes again is another request
        scheduler.add(request(name, list(range(9)), max_tokens=1))
        assert step(scheduler)[0].starts == [0]
    stats = scheduler.stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"], stats["prompt_tokens_cached"]) == (0, 0, 0)


def test_a_matched_block_is_not_evicted_by_the_admission_that_matched_it() -> None:
    scheduler = make(num_blocks=4, max_model_len=16)
    scheduler.add(request("a", list(range(12)), max_tokens=1))
    step(scheduler)  # free order: 3, then cached 2, 1, 0
    scheduler.add(request("b", [*range(8), *range(50, 58)], max_tokens=1))
    plan, _ = step(scheduler)
    assert columns(plan) == [(0, 8, 8, True)]
    assert plan.new_blocks == [(0, [0, 1, 3, 2])]


def test_a_choice_that_waits_for_blocks_leaves_the_eviction_order_alone() -> None:
    scheduler = make(num_blocks=6, max_model_len=24)
    scheduler.add(request("a", list(range(8)), max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", 15, max_tokens=4))
    step(scheduler)
    before = scheduler._pool.free_blocks
    scheduler.add(request("c", [*range(8), 50, 51, 52, 53, 54]))
    plan, _ = step(scheduler)
    assert plan.slots == [0] and scheduler.stats()["num_waiting"] == 1
    assert scheduler._pool.free_blocks == before == [1, 0]


def test_eviction_takes_the_tail_of_the_oldest_first() -> None:
    scheduler = make(num_blocks=8)
    scheduler.add(request("a", list(range(9)), max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", list(range(50, 59)), max_tokens=1))
    step(scheduler)
    # Block 2 held only the last token of a, so that b took it first.
    assert scheduler._pool.free_blocks == [4, 5, 6, 7, 1, 0, 3, 2]
    scheduler.add(request("c", list(range(80, 96)), max_tokens=4))
    step(scheduler)
    step(scheduler)  # c needs a fifth block: the tail of a goes
    scheduler.add(request("d", list(range(9)), max_tokens=1))
    assert step(scheduler)[0].starts[1] == 4


# Several choices of one request


def test_siblings_wait_for_the_prompt_then_share_its_full_blocks() -> None:
    scheduler = make(max_num_batched_tokens=6)
    scheduler.add(request("a", 10, n=3))
    scheduler.add(request("b", 2))
    plan, _ = step(scheduler)
    assert columns(plan) == [(0, 0, 6, False)]
    plan = plan_of(scheduler)  # the prompt's two full blocks are done after this step; b uses what is left of it
    assert columns(plan) == [(0, 6, 4, True), (1, 0, 2, True)]
    assert (scheduler.stats()["num_waiting"], scheduler.stats()["num_deferred"]) == (2, 2)
    apply(scheduler, plan)
    assert (scheduler.stats()["num_waiting"], scheduler.stats()["num_deferred"]) == (2, 0)
    plan, deltas = step(scheduler)
    assert columns(plan) == [(0, 10, 1, True), (1, 2, 1, True), (2, 8, 2, True), (3, 8, 2, True)]
    assert [(new.slot, new.choice_index) for new in plan.new_choices] == [(2, 1), (3, 2)]
    assert plan.new_blocks == [(2, [0, 1, 4]), (3, [0, 1, 5])]
    assert [delta.num_cached_tokens for delta in deltas] == [0, 0, 8, 8]


def test_siblings_stand_at_the_head_of_the_queue() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(request("a", 9, n=3, max_tokens=1))
    scheduler.add(request("b", 2, max_tokens=1))
    assert ends(drain(scheduler)) == [(name, index, "length") for name, index in zip("aaab", (0, 1, 2, 0), strict=True)]


def test_siblings_of_a_short_prompt_do_not_wait() -> None:
    scheduler = make()
    scheduler.add(request("a", 4, n=3))
    assert columns(step(scheduler)[0]) == [(0, 0, 4, True), (1, 0, 4, True), (2, 0, 4, True)]


def test_siblings_of_a_cached_prompt_do_not_wait() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(9)), max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", list(range(9)), n=2))
    assert columns(step(scheduler)[0]) == [(0, 8, 1, True), (1, 8, 1, True)]


@pytest.mark.parametrize("way", ["aborted while it waits", "aborted while it runs", "failed", "ended"])
def test_siblings_go_on_when_choice_0_is_gone(way: str) -> None:
    scheduler = make(max_num_batched_tokens=9 if way == "ended" else 4)
    scheduler.add(request("a", 9, n=2, max_tokens=1))
    if way != "aborted while it waits":
        plan = plan_of(scheduler)
        apply(scheduler, plan, failed=[0] if way == "failed" else [])
    if way.startswith("aborted"):
        assert scheduler.abort("a", 0) == []
    scheduler.check()
    assert scheduler.stats()["num_deferred"] == 0
    assert ends(drain(scheduler)) == [("a", 1, FinishReason.LENGTH)]


def test_siblings_share_without_prefix_caching_too() -> None:
    scheduler = make(enable_prefix_caching=False)
    scheduler.add(request("a", list(range(9)), n=2))
    scheduler.add(request("b", list(range(9))))
    plan, _ = step(scheduler)
    assert columns(plan) == [(0, 0, 9, True), (1, 0, 7, False)]
    plan, _ = step(scheduler)
    assert columns(plan) == [(0, 9, 1, True), (1, 7, 2, True), (2, 8, 1, True)]
    assert plan.new_blocks[-1] == (2, [0, 1, 6])  # b's third block is 5


# A prefix that several requests begin with


def deferred(scheduler: Scheduler) -> list[str]:
    return [choice.request.request_id for choice in scheduler._deferred]


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = make(num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64)
    for i in range(8):
        scheduler.add(request(f"{i}", [*range(32), 100 + i], max_tokens=1))
    scheduler.add(request("z", 5, max_tokens=1))
    plan, _ = step(scheduler)
    assert columns(plan) == [(0, 0, 33, True), (1, 0, 5, True)]  # z shares nothing and does not wait
    plan, deltas = step(scheduler)
    assert list(zip(plan.starts, plan.nums, strict=True)) == [(32, 1)] * 7
    assert [delta.request_id for delta in deltas] == [f"{i}" for i in range(1, 8)]  # in the order of arrival
    assert scheduler.stats()["prompt_tokens_computed"] == 33 + 5 + 7


def test_who_shares_waits_for_the_last_block_that_both_begin_with() -> None:
    scheduler = make(max_num_batched_tokens=64)
    scheduler.add(request("a", list(range(30)), max_tokens=1))
    first = plan_of(scheduler, max_prefill_tokens=8)
    scheduler.add(request("b", [*range(22), 50, 51]))  # five full blocks in common
    scheduler.add(request("c", 3))
    second = plan_of(scheduler, max_prefill_tokens=8)
    third = plan_of(scheduler, max_prefill_tokens=24)
    assert columns(third) == [(0, 16, 14, True), (1, 0, 3, True)]
    apply(scheduler, first)
    apply(scheduler, second)
    assert deferred(scheduler) == ["b"]  # four of the five are done
    apply(scheduler, third)
    assert columns(step(scheduler)[0]) == [(1, 3, 1, True), (0, 20, 4, True)]


def test_who_shares_is_deferred_while_the_step_has_room() -> None:
    scheduler = make(max_num_batched_tokens=16)
    scheduler.add(request("a", list(range(14)), max_tokens=1))
    scheduler.add(request("b", [*range(9), 50, 51]))
    scheduler.add(request("c", [*range(5), 60], n=2))
    scheduler.add(request("d", [*range(9), 70, 71]))
    plan = plan_of(scheduler)
    assert columns(plan) == [(0, 0, 14, True)]
    assert deferred(scheduler) == ["b", "c", "c", "d"] and waiting(scheduler) == []
    apply(scheduler, plan)
    assert sorted(waiting(scheduler)) == ["b", "c", "c", "d"] and deferred(scheduler) == []
    assert sorted(step(scheduler)[0].starts) == [4, 4, 8, 8]


def test_nobody_waits_for_a_prefix_of_another_salt_or_of_less_than_a_block() -> None:
    scheduler = make(max_num_batched_tokens=32)
    scheduler.add(request("a", list(range(9)), salt="x"))
    scheduler.add(request("b", list(range(9)), salt="y"))
    scheduler.add(request("c", [*range(3), 50, 51], salt="x"))
    assert columns(step(scheduler)[0]) == [(0, 0, 9, True), (1, 0, 9, True), (2, 0, 5, True)]


@pytest.mark.parametrize("way", ["aborted", "failed", "preempted"])
def test_those_who_share_go_on_when_the_one_that_computes_is_gone(way: str) -> None:
    scheduler = make(num_blocks=8, max_num_batched_tokens=32)
    scheduler.add(request("o", 3, max_tokens=9))
    step(scheduler)
    for name in "abc":
        scheduler.add(request(name, [*range(24), ord(name)], max_tokens=2))
    scheduler.add(request("d", 2, max_tokens=1))
    plan = plan_of(scheduler)  # all blocks are in use now
    assert columns(plan) == [(0, 3, 1, True), (1, 0, 25, True)]
    assert (deferred(scheduler), waiting(scheduler)) == (["b", "c"], ["d"])
    if way == "aborted":
        scheduler.abort("a", 0)
    if way == "preempted":
        assert scheduler.plan_step(0.0) is None  # o needs a block
        assert waiting(scheduler) == ["a", "b", "c", "d"]
    else:
        apply(scheduler, plan, failed=[1] if way == "failed" else [])
        assert waiting(scheduler) == ["b", "c", "d"]
    scheduler.check()
    if way == "preempted":
        apply(scheduler, plan)
    gone = {"a"} if way == "preempted" else set()
    assert {delta.request_id for delta in drain(scheduler) if delta.finish_reason == "length"} == {*"obcd"} | gone


def test_the_end_of_another_that_computes_the_same_wakes_nobody() -> None:
    scheduler = make(max_num_batched_tokens=32)
    scheduler.add(request("a", list(range(9))))
    scheduler.add(request("l", list(range(9)), prompt_logprobs=0))
    scheduler.add(request("b", list(range(9))))
    plan = plan_of(scheduler)
    assert columns(plan) == [(0, 0, 9, True), (1, 0, 9, True)]
    scheduler.abort("l")
    scheduler.check()
    assert deferred(scheduler) == ["b"]
    apply(scheduler, plan)
    assert columns(step(scheduler)[0])[-1][1:] == (8, 1, True)


def test_a_deferred_choice_may_be_aborted_and_its_id_come_again() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(9)), max_tokens=1))
    scheduler.add(request("b", [*range(8), 50], max_tokens=1))
    plan = plan_of(scheduler)
    assert ends(scheduler.abort("b")) == [("b", 0, "abort")]
    assert scheduler.stats()["num_deferred"] == 0
    scheduler.add(request("b", 3, max_tokens=1))
    apply(scheduler, plan)
    assert waiting(scheduler) == ["b"]
    assert ends(drain(scheduler)) == [("b", 0, "length")]


def test_no_more_choices_are_deferred_than_can_run() -> None:
    scheduler = make(max_num_seqs=3)
    for i in range(10):
        scheduler.add(request(f"{i}", [*range(8), 50 + i], max_tokens=1))
    plan = plan_of(scheduler)
    assert (scheduler.stats()["num_deferred"], scheduler.stats()["num_waiting"]) == (3, 9)
    apply(scheduler, plan)
    assert [delta.request_id for delta in drain(scheduler)] == [f"{i}" for i in range(1, 10)]


# Prompt logprobs


def logprobs_for(plan: StepPlan, index: int, num_prompt_tokens: int) -> dict[int, list[TokenLogprobs]]:
    """What a rank would give: the logprob of position p is -p."""
    end = min(plan.starts[index] + plan.nums[index] + 1, num_prompt_tokens)
    return {index: [TokenLogprobs(p, -float(p)) for p in range(plan.starts[index] + 1, end)]}


ALL_9 = [None, *(TokenLogprobs(p, -float(p)) for p in range(1, 9))]


def test_prompt_logprobs_are_collected_over_chunks_and_sent_once() -> None:
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(request("a", 9, prompt_logprobs=0))
    deltas = []
    for _ in range(4):
        plan = plan_of(scheduler)
        deltas += apply(scheduler, plan, prompt_logprobs=logprobs_for(plan, 0, 9))
    assert [delta.prompt_logprobs for delta in deltas] == [ALL_9, None]


def test_prompt_logprobs_do_not_read_the_cache_but_feed_it() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(9)), max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", list(range(9)), n=2, prompt_logprobs=1, max_tokens=0))
    plan = plan_of(scheduler)
    assert columns(plan) == [(0, 0, 9, False), (1, 8, 1, False)]
    deltas = apply(scheduler, plan, prompt_logprobs=logprobs_for(plan, 0, 9))
    assert [(delta.num_cached_tokens, delta.prompt_logprobs) for delta in deltas] == [(0, ALL_9), (8, None)]


def test_prompt_logprobs_feed_those_who_wait_for_the_prompt() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(9)), n=2, prompt_logprobs=1, max_tokens=0))
    scheduler.add(request("b", list(range(9)), max_tokens=1))
    plan = plan_of(scheduler)
    assert columns(plan) == [(0, 0, 9, False)] and scheduler.stats()["num_deferred"] == 2
    apply(scheduler, plan, prompt_logprobs=logprobs_for(plan, 0, 9))
    assert columns(step(scheduler)[0]) == [(0, 8, 1, False), (1, 8, 1, True)]


def test_prompt_logprobs_of_one_token() -> None:
    scheduler = make()
    scheduler.add(request("a", 1, prompt_logprobs=0))
    assert step(scheduler)[1][0].prompt_logprobs == [None]


def test_a_long_prompt_waits_rather_than_starting_again_and_again() -> None:
    scheduler = make(max_num_batched_tokens=8, max_model_len=64)
    scheduler.add(request("a", 30, max_tokens=20))
    for _ in range(5):
        step(scheduler)
    scheduler.add(request("b", 40, prompt_logprobs=0, max_tokens=1))  # 10 blocks; a leaves 8 and will leave fewer
    num_tokens = 0
    while scheduler.stats()["num_waiting"]:
        plan = plan_of(scheduler)
        num_tokens += sum(plan.nums)
        apply(scheduler, plan)
    assert scheduler.stats()["num_preemptions"] == 0
    assert num_tokens <= 20 + 8


def test_prompt_logprobs_known_before_a_preemption_are_not_taken_twice() -> None:
    scheduler = make(num_blocks=4, max_model_len=16, max_num_batched_tokens=8)
    scheduler.add(request("a", 3, max_tokens=10))
    step(scheduler)
    scheduler.add(request("b", 9, prompt_logprobs=0, max_tokens=2))
    plan = plan_of(scheduler)
    assert columns(plan) == [(0, 3, 1, True), (1, 0, 7, False)]
    apply(scheduler, plan, prompt_logprobs=logprobs_for(plan, 1, 9))
    assert columns(step(scheduler)[0]) == [(0, 4, 1, True)]  # b finds no third block
    assert scheduler.stats()["num_preemptions"] == 1
    deltas = []
    while (next_plan := scheduler.plan_step(0.0)) is not None:
        # The ranks do not know what was collected: they give all again, here with other values.
        again: dict[int, list[TokenLogprobs]] = {}
        for index in range(len(next_plan.slots)):
            entries = logprobs_for(next_plan, index, 9)[index]
            again[index] = [TokenLogprobs(e.token_id, e.logprob - 100 * (e.token_id < 8)) for e in entries]
        deltas += apply(scheduler, next_plan, prompt_logprobs=again)
    first = next(delta for delta in deltas if delta.request_id == "b")
    assert first.prompt_logprobs == ALL_9


def test_logprobs_go_with_their_token() -> None:
    scheduler = make()
    scheduler.add(request("a", 2))
    scheduler.add(request("b", 2, logprobs=0))
    entry = TokenLogprobs(51, -0.5)
    deltas = apply(scheduler, plan_of(scheduler), [50, 51], logprobs={1: entry})
    assert [delta.logprobs for delta in deltas] == [None, [entry]]


# Preemption


def pressed() -> Scheduler:
    """a and b own two blocks each, and no block is free; both ask for one more now."""
    scheduler = make(num_blocks=4, max_model_len=16)
    scheduler.add(request("a", 7, max_tokens=9))
    scheduler.add(request("b", 7, max_tokens=9))
    step(scheduler, 50, 60)
    step(scheduler, 51, 61)
    assert scheduler.stats()["num_blocks_used"] == 4
    return scheduler


def test_the_newest_choice_is_preempted_and_not_admitted_in_the_same_step() -> None:
    scheduler = pressed()
    scheduler.add(request("c", 1))
    plan, deltas = step(scheduler, 52)
    assert columns(plan) == [(0, 8, 1, True)]
    assert plan.new_blocks == [(0, [3])]  # the tail of b
    assert [delta.request_id for delta in deltas] == ["a"]
    stats = scheduler.stats()
    assert (stats["num_preemptions"], stats["num_running"], stats["num_waiting"]) == (1, 1, 2)


def test_a_preempted_choice_returns_first_with_its_tokens_and_says_nothing_twice() -> None:
    scheduler = pressed()
    scheduler.add(request("c", 1, max_tokens=1))
    tokens: dict[str, list[int]] = {"a": [50, 51], "b": [60, 61], "c": []}
    plans = []
    while (plan := scheduler.plan_step(0.0)) is not None:
        plans.append(plan)
        for delta in apply(scheduler, plan, [70 + sum(map(len, tokens.values()))] * sum(plan.samples)):
            assert delta.start == len(tokens[delta.request_id])  # exactly the next token
            tokens[delta.request_id] += delta.token_ids
    assert [len(tokens[name]) for name in "abc"] == [9, 9, 1]
    back = next(new for plan in plans for new in plan.new_choices)
    assert back.token_ids[7:] == [60, 61] and back.num_prompt_tokens == 7
    # b comes back before c, when a has ended, and finds its first block where it was.
    order = [new.token_ids[0] for plan in plans for new in plan.new_choices]
    assert order == [1000 * ord("b"), 1000 * ord("c")]


def test_the_choice_that_asks_may_be_the_newest_itself() -> None:
    scheduler = make(num_blocks=4, max_model_len=16)
    scheduler.add(request("a", 5, max_tokens=9))
    scheduler.add(request("b", 8, max_tokens=4))
    step(scheduler)
    plan, _ = step(scheduler)  # b needs a third block and is the newest: a goes on alone
    assert columns(plan) == [(0, 5, 1, True)]
    assert scheduler.stats()["num_preemptions"] == 1
    assert len(drain(scheduler)) == 10


def test_every_choice_that_finds_no_block_preempts_the_newest() -> None:
    scheduler = make(num_blocks=8, max_num_batched_tokens=16, max_num_seqs=4)
    for name in "abcd":
        scheduler.add(request(name, 1, max_tokens=31))
    for _ in range(4):
        step(scheduler)
    for _ in range(4):
        plan, _ = step(scheduler)
        assert plan.slots == [0, 1, 2, 3]
    plan, _ = step(scheduler)  # a and b take the two blocks of d; c finds none and is the newest left
    assert plan.slots == [0, 1]
    assert scheduler.stats()["num_preemptions"] == 2
    assert waiting(scheduler) == ["c", "d"]


def test_admission_never_preempts_and_needs_the_whole_chunk() -> None:
    scheduler = make(num_blocks=4, max_model_len=16)
    scheduler.add(request("a", 5, max_tokens=4))
    step(scheduler)
    scheduler.add(request("b", 9))  # three blocks, two are free
    scheduler.add(request("c", 1))  # would fit, but does not overtake
    for _ in range(3):
        assert step(scheduler)[0].slots == [0]
    assert scheduler.stats()["num_preemptions"] == 0
    assert len(step(scheduler)[0].slots) == 2


# Aborts


def test_abort_of_a_request_ends_all_its_choices_wherever_they_are() -> None:
    scheduler = make(max_num_seqs=1, max_num_batched_tokens=4)
    scheduler.add(request("a", 9, n=2))
    scheduler.add(request("b", 3, n=2))
    step(scheduler)
    assert ends(scheduler.abort("a")) == [("a", 0, "abort"), ("a", 1, "abort")]
    scheduler.check()
    assert ends(scheduler.abort("b")) == [("b", 0, "abort"), ("b", 1, "abort")]
    assert scheduler.abort("a") == scheduler.abort("never seen") == []
    scheduler.check()
    assert scheduler.plan_step(0.0) is None
    assert scheduler.stats()["num_blocks_used"] == 0


def test_abort_says_how_far_the_choice_was() -> None:
    scheduler = make()
    scheduler.add(request("a", 3))
    step(scheduler)
    step(scheduler)
    assert scheduler.abort("a") == [Delta("a", 0, 2, [], finish_reason=FinishReason.ABORT)]


def test_abort_of_one_choice_is_silent_and_leaves_the_others() -> None:
    scheduler = make()
    scheduler.add(request("a", 3, n=3, max_tokens=2))
    step(scheduler)
    assert scheduler.abort("a", 1) == []
    assert scheduler.abort("a", 1) == scheduler.abort("a", 9) == []
    assert ends(drain(scheduler)) == [("a", 0, "length"), ("a", 2, "length")]


def test_abort_frees_at_once_when_no_step_is_planned() -> None:
    scheduler = make()
    scheduler.add(request("a", 9))
    step(scheduler)
    scheduler.abort("a", 0)
    scheduler.check()
    assert scheduler.stats()["num_blocks_used"] == 0


def test_abort_under_a_planned_step_keeps_its_blocks_until_it_is_applied() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(request("a", 9))
    plan = plan_of(scheduler)
    scheduler.abort("a")
    scheduler.check()
    assert scheduler.stats()["num_blocks_used"] == 3
    scheduler.add(request("b", 2))
    assert scheduler.plan_step(0.0) is None  # the slot is in use, too
    assert apply(scheduler, plan) == []
    assert scheduler.stats()["num_blocks_used"] == 0
    assert columns(step(scheduler)[0]) == [(0, 0, 2, True)]


def test_an_id_may_come_again_while_its_former_owner_leaves() -> None:
    scheduler = make()
    scheduler.add(request("a", 9))
    first = plan_of(scheduler)
    scheduler.abort("a")
    scheduler.add(request("a", 3, max_tokens=1))
    second = plan_of(scheduler)
    assert columns(second) == [(1, 0, 3, True)]
    assert apply(scheduler, first) == []
    assert ends(apply(scheduler, second)) == [("a", 0, "length")]


# Steps planned ahead


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    scheduler = make()
    scheduler.add(request("a", 3, max_tokens=3))
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert columns(second) == [(0, 3, 1, True)]
    third = plan_of(scheduler)
    assert columns(third) == [(0, 4, 1, True)] and third.new_blocks == [(0, [1])]
    assert scheduler.plan_step(0.0) is None  # the third token is the last: it needs no computing
    deltas = [apply(scheduler, plan, [token])[0] for plan, token in ((first, 50), (second, 51), (third, 52))]
    assert [(delta.start, delta.token_ids) for delta in deltas] == [(0, [50]), (1, [51]), (2, [52])]
    assert deltas[-1].finish_reason == "length"


def test_a_choice_that_turns_out_finished_costs_one_token() -> None:
    scheduler = make()
    scheduler.add(request("a", 3, eos_token_ids=(EOS,)))
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert ends(apply(scheduler, first, [EOS])) == [("a", 0, "stop")]
    assert scheduler.stats()["num_blocks_used"] == 1
    assert scheduler.plan_step(0.0) is None
    assert apply(scheduler, second, [50]) == []
    assert scheduler.stats()["num_blocks_used"] == 0
    assert scheduler.stats()["generation_tokens"] == 1


def test_preemption_under_a_planned_step_waits_for_it() -> None:
    scheduler = make(num_blocks=4, max_model_len=16)
    scheduler.add(request("a", 7, max_tokens=9))
    scheduler.add(request("b", 7, max_tokens=9))
    step(scheduler, 50, 60)
    first = plan_of(scheduler)
    assert scheduler.plan_step(0.0) is None  # a must wait for b's blocks, and b leaves
    scheduler.check()
    assert scheduler.stats()["num_preemptions"] == 1
    assert scheduler.plan_step(0.0) is None  # nobody else is preempted meanwhile
    assert scheduler.stats()["num_preemptions"] == 1
    deltas = apply(scheduler, first, [51, 61])
    assert [delta.token_ids for delta in deltas] == [[51], [61]]  # b's token counts
    assert [delta.num_preemptions for delta in deltas] == [0, 1]
    plan = plan_of(scheduler)
    assert columns(plan) == [(0, 8, 1, True)]
    apply(scheduler, plan)
    last = [delta.start for delta in drain(scheduler) if delta.request_id == "b"]
    assert last == list(range(2, 9))


def test_a_choice_that_leaves_is_not_admitted_again_before_it_has_left() -> None:
    scheduler = make(num_blocks=6, max_model_len=16, max_num_batched_tokens=32)
    scheduler.add(request("a", 7, max_tokens=1))
    scheduler.add(request("b", 7))
    scheduler.add(request("c", 7))
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert scheduler.plan_step(0.0) is None  # b must wait for the blocks of c
    apply(scheduler, first)  # a ends: there are a slot and blocks, but c is still in the second step
    third = plan_of(scheduler)
    assert columns(third) == [(1, 8, 1, True)]
    apply(scheduler, second)
    fourth = plan_of(scheduler)
    assert [new.token_ids[7:] for new in fourth.new_choices] == [[500, 500]]
    apply(scheduler, third)
    apply(scheduler, fourth)


def test_a_choice_may_end_while_it_leaves() -> None:
    scheduler = make(num_blocks=4, max_model_len=16)
    scheduler.add(request("a", 7, max_tokens=9))
    scheduler.add(request("b", 7, max_tokens=9, eos_token_ids=(EOS,)))
    step(scheduler, 50, 60)
    first = plan_of(scheduler)
    assert scheduler.plan_step(0.0) is None
    assert ends(apply(scheduler, first, [51, EOS])) == [("a", 0, None), ("b", 0, "stop")]
    assert (scheduler.stats()["num_waiting"], scheduler.stats()["num_blocks_used"]) == (0, 2)


def test_results_are_applied_in_order_and_to_their_own_plan() -> None:
    scheduler = make()
    scheduler.add(request("a", 3))
    first, second = plan_of(scheduler), plan_of(scheduler)
    with pytest.raises(AssertionError, match="step 2 applied after step 0"):
        scheduler.apply(StepResult(0, 2, [50]), second)
    with pytest.raises(AssertionError, match="another step"):
        scheduler.apply(StepResult(0, 2, [50]), first)
    with pytest.raises(AssertionError, match="another step"):
        scheduler.apply(StepResult(1, 1, [50]), first)


# Statistics, cost


def test_statistics_have_the_names_of_the_channel() -> None:
    stats = make().stats()
    assert EngineStats(**stats, step_s=0.0) == EngineStats()
    of_the_ranks = {"weight_slices_checked", "weight_check_s", "kv_blocks_checked", "kv_check_s", "rank_steps_checked"}
    assert stats.keys() | {"step_s"} | of_the_ranks == set(EngineStats.__dataclass_fields__)


def test_statistics_count_tokens_once() -> None:
    scheduler = pressed()
    drain(scheduler)
    stats = scheduler.stats()
    assert stats["num_preemptions"] > 0
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (14, 0)
    assert (stats["prompt_tokens_computed"], stats["prompt_tokens_cached"]) == (14, 0)
    assert stats["generation_tokens"] == 18


def test_statistics_do_not_count_what_an_earlier_engine_has_counted() -> None:
    scheduler = make()
    scheduler.add(request("a", 9, n=3), {0: [], 2: [500, 501]})
    assert waiting(scheduler) == ["a", "a"]
    drain(scheduler)
    stats = scheduler.stats()
    assert (stats["prompt_tokens_computed"], stats["prompt_tokens_cached"]) == (9, 0)
    assert (stats["generation_tokens"], stats["prefix_cache_queries"]) == (8 + 6, 9)


def test_statistics_of_hits() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(9)), max_tokens=1))
    step(scheduler)
    scheduler.add(request("b", list(range(10)), n=2, max_tokens=1))
    plan, _ = step(scheduler)
    stats = scheduler.stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (29, 16)
    assert (stats["prompt_tokens_computed"], stats["prompt_tokens_cached"]) == (13, 16)
    assert (stats["step"], stats["step_tokens"]) == (plan.step, 4) == (2, 4)


def test_planning_does_not_look_at_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts attribute reads on choices: none may be spent on the 10 000 that are not admitted."""

    def num_reads(num_waiting: int) -> int:
        reads = 0
        scheduler = make(max_num_seqs=2)
        for i in range(num_waiting):
            scheduler.add(request(f"{i}", [1, 2, 3], max_tokens=4))

        def count(self: Any, name: str) -> Any:
            nonlocal reads
            reads += 1
            return object.__getattribute__(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(_Choice, "__getattribute__", count, raising=False)
            for _ in range(12):  # three generations of admissions
                plan = plan_of(scheduler)
                scheduler.apply(StepResult(plan.epoch, plan.step, [500] * sum(plan.samples)), plan)
                scheduler.stats()
        return reads

    assert num_reads(10_000) == num_reads(10)


def test_an_abort_does_not_search_the_queue() -> None:
    class Untouchable(dict[Any, Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("the queue was walked")

        values = items = keys = __iter__  # type: ignore[assignment]

    scheduler = make()
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 3))
    scheduler._waiting = Untouchable(scheduler._waiting)  # type: ignore[assignment]
    assert ends(scheduler.abort("b")) == [("b", 0, "abort")]
    assert scheduler.stats()["num_waiting"] == 2


# Blocks whose content has changed


def test_choices_that_begin_with_a_changed_block_are_computed_again() -> None:
    scheduler = make(max_num_seqs=3, num_blocks=24)
    prompt = list(range(10, 19))  # two full blocks and a token
    scheduler.add(request("a", prompt))
    scheduler.add(request("z", 3))
    assert step(scheduler, 50, 60)[0].new_blocks == [(0, [0, 1, 2]), (1, [3])]
    scheduler.add(request("b", [*prompt, 1]))
    plan = plan_of(scheduler)
    assert plan.new_blocks[-1] == (2, [0, 1, 4])
    deltas = apply(scheduler, plan, [51, 61, 70], changed_blocks=[1])
    assert deltas == [Delta("z", 0, 1, [61])]  # neither a's nor b's tokens
    assert waiting(scheduler) == ["a", "b"]
    assert scheduler.stats()["kv_blocks_dropped"] == 1 and scheduler.stats()["num_preemptions"] == 0
    plan, deltas = step(scheduler, 62, 51)
    assert columns(plan)[1] == (2, 0, 10, True)  # a from its first token, nothing of it is cached; b awaits its blocks
    assert [(delta.request_id, delta.start, delta.token_ids) for delta in deltas] == [("z", 2, [62]), ("a", 1, [51])]
    plan, deltas = step(scheduler, 63, 52, 70)
    assert (deltas[-1].request_id, deltas[-1].start, deltas[-1].token_ids) == ("b", 0, [70])


def test_steps_planned_on_a_changed_block_are_void() -> None:
    scheduler = make()
    scheduler.add(request("a", 9))
    step(scheduler, 50)
    first, second = plan_of(scheduler), plan_of(scheduler)
    assert apply(scheduler, first, [51], changed_blocks=[0]) == []
    assert scheduler.plan_step(0.0) is None  # its slot and blocks are in use
    assert apply(scheduler, second, [52]) == []
    plan, deltas = step(scheduler, 51)
    assert columns(plan) == [(0, 0, 10, True)] and deltas == [Delta("a", 0, 1, [51])]
    assert [delta.token_ids for delta in drain(scheduler)] == [[500]] * 6


def test_a_choice_that_ends_while_its_block_changes_ends() -> None:
    scheduler = make()
    scheduler.add(request("a", 9))
    step(scheduler, 50)
    plan = plan_of(scheduler)
    scheduler.abort("a")
    assert apply(scheduler, plan, [51], changed_blocks=[0]) == []
    assert not scheduler.has_work and not scheduler.stats()["num_blocks_used"]


# Audits


def audited(plan: StepPlan, *token_ids: int) -> dict[str, Any]:
    """What a rank finds to be next, of the only entry."""
    assert [new.is_audit for new in plan.new_choices] in ([True], [])
    return {"audited": {0: list(token_ids)}}


def test_a_share_of_the_choices_is_computed_again_when_there_is_room() -> None:
    scheduler = make(audit=0.5)
    for name in "abcd":
        scheduler.add(request(name, 6, max_tokens=2))
        step(scheduler, 50)
        plan, deltas = step(scheduler, 51)
        assert ends(deltas) == [(name, 0, FinishReason.LENGTH)]
        assert scheduler.has_work == (name in "bd")
        if name in "bd":
            plan = plan_of(scheduler)
            (new,) = plan.new_choices
            assert (new.token_ids[6:], new.num_prompt_tokens, new.is_audit) == ([50, 51], 6, True)
            assert columns(plan)[0][1:] == (0, 7, False) and scheduler.request_ids(plan) == []
            assert apply(scheduler, plan, **audited(plan, 50, 51)) == []
    assert scheduler.stats()["tokens_audited"] == 4 and not scheduler.audit_failure
    assert not scheduler.has_work and not scheduler.stats()["num_blocks_used"]


def test_an_audit_in_chunks_says_which_token_is_another() -> None:
    scheduler = make(audit=1.0, max_num_batched_tokens=4)
    scheduler.add(request("a", 3, max_tokens=5))
    for token_id in (50, 51, 52, 53, 54):
        step(scheduler, token_id)
    plan = plan_of(scheduler)
    assert columns(plan)[0][1:3] == (0, 4)
    apply(scheduler, plan, **audited(plan, 50, 51))
    plan = plan_of(scheduler)
    assert columns(plan)[0][1:3] == (4, 3)
    apply(scheduler, plan, **audited(plan, 52, 55, 54))
    assert scheduler.audit_failure == "output token 3 of choice 0 of request a is another one when computed again"


def test_what_another_engine_has_begun_is_not_audited() -> None:
    scheduler = make(audit=1.0)
    scheduler.add(request("a", 6, max_tokens=2), {0: [50]})
    _, deltas = step(scheduler, 51)
    assert ends(deltas) == [("a", 0, FinishReason.LENGTH)] and not scheduler.has_work


def test_an_audit_gives_way() -> None:
    scheduler = make(audit=1.0, num_blocks=8, max_model_len=32, max_num_batched_tokens=4)
    scheduler.add(request("a", 14, max_tokens=2))
    while scheduler._choices:
        step(scheduler)
    scheduler.add(request("b", 3, max_tokens=1))
    plan = plan_of(scheduler)
    assert not any(new.is_audit for new in plan.new_choices[:1])  # what waits comes first
    apply(scheduler, plan)
    scheduler.add(request("c", 24, max_tokens=8))
    while scheduler._choices:  # the audit holds blocks that c needs in the end
        step(scheduler)
    assert scheduler.stats()["num_preemptions"] == 0
    drain(scheduler)
    assert not scheduler.has_work and not scheduler.stats()["num_blocks_used"]


def test_who_stands_behind_an_audit_that_gives_way_goes_on() -> None:
    scheduler = make(audit=1.0, num_blocks=8)
    scheduler.add(request("z", 14, max_tokens=2))
    step(scheduler)
    step(scheduler)
    scheduler.add(request("a", 7))
    plan, _ = step(scheduler)
    assert [new.is_audit for new in plan.new_choices] == [False, True]
    scheduler.add(request("b", 5))
    first = plan_of(scheduler)
    assert scheduler.request_ids(first) == ["a", "b"] and len(first.slots) == 3
    second = plan_of(
        scheduler
    )  # there are no more blocks for a, and those of the audit are in use until the first ends
    assert scheduler.request_ids(second) == ["b"]
    apply(scheduler, first)
    apply(scheduler, second)
    drain(scheduler)
    assert not scheduler.has_work and not scheduler.stats()["num_blocks_used"]
