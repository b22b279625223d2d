"""What becomes of requests when an engine is lost: they go on in order, with nothing lost, repeated or taken of it."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from api_fakes import eventually
from engine_fakes import ENDLESS_S, INFO, Caller, FakeGroup, Groups, connected, groups, request

from octavo.server.config import SupervisorConfig
from octavo.server.engine import devices, supervisor
from octavo.server.engine.channel import Abort, Add, EngineInfo, EngineStats, Failed, Ready, StepOutput, ToEngine
from octavo.server.engine.client import EngineClient
from octavo.server.engine.devices import PROBE, Rung
from octavo.server.engine.epoch import TICK_S
from octavo.server.engine.progress import Finding
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, SamplingParams
from octavo.server.engine.supervisor import Recovery
from octavo.server.errors import EngineError, RequestError, StartupError

__all__ = ["groups"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSES_S", (0.0,))


def begun(client: EngineClient, *requests: GenerationRequest) -> list[Caller]:
    callers = [Caller(client, request) for request in requests]
    for caller in callers:
        caller.begin()
    return callers


def runs(group: FakeGroup, *names: str) -> None:
    """The engine says that it is about to execute a step with these requests."""
    group.progress.beat(0.0, names)


async def gets(group: FakeGroup, *messages: ToEngine) -> None:
    """The engine is sent these messages."""
    await eventually(lambda: group.has_received(*messages))


async def has(caller: Caller, num_tokens: int) -> None:
    """It has so many tokens."""
    await eventually(lambda: len(caller.token_ids) == num_tokens)


async def refused(caller: Caller) -> None:
    """It gets an error, and the engine goes on."""
    await eventually(lambda: caller.client.state == "ok" and len(caller.errors) == 1)


async def replaced(group: FakeGroup, groups: Groups, how: str = "died") -> FakeGroup:
    """The group has a fault; returns the one after it, which has proved itself."""
    if how == "died":
        group.die()
    else:
        group.send(Failed("engine failed: KeyError", startup=False))
    next_group = await groups.next()
    assert group.is_killed
    await next_group.prove()
    return next_group


@pytest.mark.parametrize("how", ["died", "failed"])
async def test_requests_go_on_where_they_were(groups: Groups, how: str) -> None:
    async with connected(groups) as (client, first):
        a, b, c = begun(client, request("a", n=2), request("b"), request("c", n=3))
        first.step(Delta("a", 0, 0, [5]), Delta("a", 1, 0, [6]), Delta("c", 1, 0, [7]))
        first.step(Delta("a", 0, 1, [8]), Delta("c", 0, 0, [9], finish_reason=FinishReason.STOP))
        client.abort_choice("c", 2)
        waits: list[str] = []
        client.on_wait = lambda: waits.append(client.state)
        second = await replaced(first, groups, how)
        assert waits == ["recovering"]
        await eventually(lambda: client.state == "ok")
        resumed = (Add(a.request, {0: [5, 8], 1: [6]}), Add(b.request, {0: []}), Add(c.request, {1: [7]}))
        await eventually(lambda: second.has_received(*resumed))
        second.step(Delta("a", 0, 2, [10]), Delta("b", 0, 0, [11]), Delta("c", 1, 1, [12]))
        await eventually(lambda: b.token_ids == [11])
        assert (a.token_ids, c.token_ids) == ([5, 6, 8, 10], [7, 9, 12])
        assert not (a.errors or b.errors or c.errors)


async def replaced_twice(first: FakeGroup, groups: Groups, *request_ids: str) -> FakeGroup:
    """Requests are in the step of two faults: from then on they are under suspicion."""
    runs(first, *request_ids)
    second = await replaced(first, groups)
    runs(second, *request_ids)
    return await replaced(second, groups)


async def test_nothing_is_taken_of_an_epoch_that_has_ended(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        (a,) = begun(client, request("a"))
        second = await replaced(first, groups)
        stale = StepOutput(0, [Delta("a", 0, 0, [66])], EngineStats())
        second.send(stale, StepOutput(1, [Delta("a", 0, 0, [5])], EngineStats()), stale)
        await eventually(lambda: bool(a.calls))
        second.step(Delta("a", 0, 1, [6]))
        await eventually(lambda: a.token_ids == [5, 6])


async def test_what_comes_meanwhile_waits_behind_the_others(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        (a,) = begun(client, request("a"))
        first.die()
        second = await groups.next()
        assert client.state == "recovering" and client.stats.num_waiting == 1
        left, cancelled, late = begun(client, request("left"), request("cancelled", n=2), request("late"))
        client.end("left")
        assert await client.abort("cancelled")
        ends = [delta.finish_reason for delta in cancelled.calls[0]]
        assert ends == [FinishReason.ABORT, FinishReason.ABORT] and not await client.abort("cancelled")
        client.end("cancelled")
        await second.prove()
        await eventually(lambda: second.has_received(Add(a.request, {0: []}), Add(late.request, {0: []})))
        assert not left.calls


async def test_an_engine_that_answers_wrongly_gets_no_request(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        (a,) = begun(client, request("a"))
        first.die()
        second = await groups.next()
        await second.prove(logprob=-1.0000000000000002)
        third = await groups.next()
        assert second.is_killed and second.has_received()
        await third.prove()
        await eventually(lambda: third.has_received(Add(a.request, {0: []})))


async def test_an_engine_is_asked_again_while_it_runs(groups: Groups) -> None:
    async with connected(groups, canary_interval=0.05) as (client, first):
        await first.answer()
        await first.answer()
        await first.answer(logprob=float("nan"))
        second = await groups.next()
        await second.prove()
        await eventually(lambda: client.state == "ok")


@pytest.mark.parametrize("how", ["died", "failed"])
async def test_what_a_rank_has_found_is_the_fault(how: str, groups: Groups, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(groups, max_faults=9) as (client, first):
        recovered: list[Recovery] = []
        client.on_recovered = recovered.append
        for number in range(1, 4):  # more often than a request is taken for the cause
            (a,) = begun(client, request(f"a{number}"))
            runs(groups[-1], a.request.request_id)
            groups[-1].progress.report(Finding(number, "weights", "layers[0].norm.weight has changed"))
            await replaced(groups[-1], groups, how)
            await eventually(lambda: client.state == "ok")
            assert f"rank {number}, detector weights: layers[0].norm.weight has changed" in caplog.text
            client.end(a.request.request_id)
        groups[-1].step()
        (b,) = begun(client, request("b"))
        groups[-1].step(Delta("b", 0, 0, [5]))
        await eventually(lambda: b.token_ids == [5])
        assert {(r.fault.reason, r.fault.detector) for r in recovered} == {("corrupt", "weights")}


async def test_a_start_that_fails_is_tried_again(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        begun(client, request("a"))
        first.die()
        (second := await groups.next()).die()
        (third := await groups.next()).send(Failed("too little memory", startup=True))
        fourth = await groups.next()
        assert second.is_killed and third.is_killed
        await fourth.prove()
        await eventually(lambda: client.state == "ok")
        assert [group.epoch for group in groups] == [0, 1, 2, 3]


async def test_an_engine_that_stands_still_is_replaced(groups: Groups) -> None:
    async with connected(groups, step_deadline=0.1) as (client, first):
        begun(client, request("a"))
        first.progress.beat(ENDLESS_S)  # a step that may take long
        await asyncio.sleep(5 * TICK_S)
        assert len(groups) == 1 and client.state == "ok"
        first.progress.beat(0.01)
        second = await groups.next()
        await second.prove()
        await eventually(lambda: client.state == "ok")


@pytest.mark.parametrize("names", [["a"], []])
async def test_a_rank_that_does_not_show_itself_is_found_though_there_is_no_work(
    names: list[str], groups: Groups
) -> None:
    async with connected(groups, step_deadline=2 * TICK_S, tensor_parallel_size=2) as (client, first):
        first.pids = [os.getpid()] * 2
        first.progress.beat(ENDLESS_S, names)  # in a step rank 0 speaks for all, also where it only audits
        await asyncio.sleep(4 * TICK_S)
        first.progress.beat(ENDLESS_S)
        for _ in range(4):
            first.progress.alive(1)
            await asyncio.sleep(TICK_S)
        assert len(groups) == 1 and client.state == "ok"
        second = await groups.next()
        await second.prove()
        await eventually(lambda: client.state == "ok")


async def test_a_deadline_of_zero_is_none(groups: Groups) -> None:
    async with connected(groups, step_deadline=0.0) as (client, first):
        first.progress.beat(0.0)
        await asyncio.sleep(5 * TICK_S)
        assert len(groups) == 1


async def test_counters_go_on(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        begun(client, request("a"))
        first.step(Delta("a", 0, 0, [5]), generation_tokens=5, step=3, num_running=1, num_blocks_used=4)
        await eventually(lambda: client.stats.generation_tokens == 5)
        first.die()
        second = await groups.next()
        assert client.stats == EngineStats(generation_tokens=5, step=3, num_waiting=1)
        second.step(generation_tokens=8, step=8)  # its proof, which is nobody's
        await second.prove()
        await eventually(lambda: client.state == "ok")
        second.step(Delta("a", 0, 1, [5]), generation_tokens=1, step=1, num_running=1)
        await eventually(lambda: client.stats.num_running == 1)
        assert client.stats == EngineStats(generation_tokens=6, step=4, num_running=1)


# Requests that may be the cause


async def test_a_request_that_ends_the_engine_alone_is_refused(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        a, bad, c = begun(client, request("a"), request("bad"), request("c"))
        runs(first, "a", "bad")
        second = await replaced(first, groups)
        await eventually(lambda: second.has_received(*(Add(caller.request, {0: []}) for caller in (a, bad, c))))
        second.step(Delta("a", 0, 0, [5]))
        await eventually(lambda: bool(a.calls))
        runs(second, "a", "bad", "c")
        third = await replaced(second, groups)
        # It was there twice without a token between; the others were not.
        await eventually(lambda: third.has_received(Add(bad.request, {0: []})))
        runs(third, "bad")
        fourth = await replaced(third, groups)
        await eventually(lambda: fourth.has_received(Add(a.request, {0: [5]}), Add(c.request, {0: []})))
        (error,) = bad.errors
        assert isinstance(error, RequestError) and error.status == 500
        assert not (a.errors or c.errors) and client.state == "ok"


async def test_a_suspect_that_gets_on_is_cleared(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        a, b, c = begun(client, request("a", n=2), request("b"), request("c"))
        third = await replaced_twice(first, groups, "a", "b")
        await eventually(lambda: third.has_received(Add(a.request, {0: [], 1: []})))
        third.step(Delta("a", 0, 0, [5]))
        await eventually(lambda: a.token_ids == [5])
        await asyncio.sleep(0.05)
        await gets(third)  # its other choice may be the cause
        third.step(Delta("a", 1, 0, [4]))
        await eventually(lambda: third.has_received(Abort("a", 0), Abort("a", 1), Add(b.request, {0: []})))
        third.step(Delta("b", 0, 0, [6], finish_reason=FinishReason.STOP))
        await eventually(lambda: third.has_received(Add(a.request, {0: [5], 1: [4]}), Add(c.request, {0: []})))
        assert client.state == "ok"
        # What it had said before it was stopped, and says again, is taken once.
        third.step(Delta("a", 0, 1, [7]))
        third.step(Delta("a", 0, 1, [7]))
        third.step(Delta("a", 0, 2, [8]))
        await eventually(lambda: a.token_ids == [5, 4, 7, 8])


async def test_a_request_of_which_one_choice_ends_the_engine_is_refused(groups: Groups) -> None:
    async with connected(groups) as (client, group):
        (bad,) = begun(client, request("bad", n=2))
        for num_faults in (1, 2, 3):
            group.step(Delta("bad", 0, num_faults - 1, [5]))
            await has(bad, num_faults)
            runs(group, "bad", "bad")
            group = await replaced(group, groups)
            if num_faults < 3:
                await gets(group, Add(bad.request, {0: [5] * num_faults, 1: []}))
        await refused(bad)


async def test_changed_bits_are_not_the_fault_of_who_runs_alone(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        (a,) = begun(client, request("a"))
        third = await replaced_twice(first, groups, "a")
        await gets(third, Add(a.request, {0: []}))
        runs(third, "a")
        third.progress.report(Finding(0, "weights", "layers[0].norm.weight has changed"))
        fourth = await replaced(third, groups)
        await gets(fourth, Add(a.request, {0: []}))
        assert not a.errors


async def test_a_request_with_several_choices_is_under_no_more_suspicion(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        a, b = begun(client, request("a", n=2), request("b"))
        runs(first, "a", "a", "b")
        second = await replaced(first, groups)
        await gets(second, Add(a.request, {0: [], 1: []}), Add(b.request, {0: []}))


async def test_a_suspect_may_leave(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        (a,) = begun(client, request("a"))
        third = await replaced_twice(first, groups, "a")
        await eventually(lambda: third.has_received(Add(a.request, {0: []})))
        client.end("a")
        await eventually(lambda: client.state == "ok")


async def test_a_request_in_no_step_is_under_no_suspicion(groups: Groups) -> None:
    async with connected(groups) as (client, group):
        (a,) = begun(client, request("a"))
        for _ in range(4):
            runs(group, "a")
            runs(group)
            group = await replaced(group, groups)
            await eventually(lambda: client.state == "ok")
        assert not a.errors


# Devices that are lost


def info_of(num_ranks: int, max_model_len: int = INFO.max_model_len) -> EngineInfo:
    rungs = [Rung(count, INFO.max_model_len if count > 1 else 64) for count in (4, 3, 2, 1)]
    return replace(INFO, ranks=INFO.ranks * num_ranks, max_model_len=max_model_len, ladder=rungs)


@asynccontextmanager
async def on_devices(groups: Groups, **config: float | str) -> AsyncIterator[tuple[EngineClient, FakeGroup]]:
    """A client whose four ranks run."""
    context = connected(groups, info_of(4), tensor_parallel_size=4, **config)
    async with context as (client, first):
        assert first.devices == [0, 1, 2, 3] and not client.degraded
        yield client, first


def gone(rank: int) -> Failed:
    return Failed(f"rank {rank}: lost", startup=True, rank=rank, is_gone=True)


async def test_the_engine_goes_on_without_a_device(groups: Groups) -> None:
    async with on_devices(groups) as (client, first):
        (a,) = begun(client, request("a"))
        first.step(Delta("a", 0, 0, [5]))
        first.die()
        (second := await groups.next()).send(gone(1))
        third = await groups.next()
        assert (second.devices, third.devices) == ([0, 1, 2, 3], [0, 2, 3])
        assert third.config.tensor_parallel_size == 3 and third.config.device == "cpu"
        third.send(gone(2))
        fourth = await groups.next()
        assert fourth.devices == [0, 2]
        await fourth.prove(-2.0, info_of(2))  # with another number of ranks the answer may be another
        await eventually(lambda: fourth.has_received(Add(a.request, {0: [5]})))
        assert client.degraded == "2 of 4 ranks: device 1 is gone, device 3 is gone"
        assert client.left_out == ["gone", "gone"]
        fourth.die()
        fifth = await groups.next()
        await fifth.prove(-2.25, info_of(2))  # but not with the same
        sixth = await groups.next()
        await sixth.prove(-2.0, info_of(2))
        await eventually(lambda: client.state == "ok")


async def test_bits_that_do_not_depend_on_ranks_are_checked(groups: Groups) -> None:
    async with on_devices(groups, exactness="ranks") as (client, first):
        first.die()
        (await groups.next()).send(gone(3))
        await (await groups.next()).prove(-2.0, info_of(3))
        fourth = await groups.next()
        await fourth.prove(-1.0, info_of(3))
        await eventually(lambda: client.state == "ok")


async def test_a_rank_that_fails_again_and_again(groups: Groups) -> None:
    async with on_devices(groups, max_device_faults=1) as (client, first):
        first.die()  # rank 0, as its socket shows
        (await groups.next()).send(Failed("rank 2: too little memory", startup=True, rank=2))
        third = await groups.next()
        assert third.devices == [0, 1, 2, 3]
        third.die()
        fourth = await groups.next()
        assert fourth.devices == [1, 2, 3]
        await fourth.prove(info=info_of(3))
        await eventually(lambda: client.degraded == "3 of 4 ranks: device 0 is failing")


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 1)])
async def test_a_request_is_blamed_and_not_the_device_nor_the_engine(ranks: tuple[int, ...], groups: Groups) -> None:
    async with on_devices(groups, max_device_faults=2, max_faults=3) as (client, group):
        for name in ("a", "b", "c", "d"):
            (bad,) = begun(client, request(name))
            for num_faults, rank in enumerate(ranks, 1):
                runs(group, name)
                group.send(Failed("engine failed: KeyError", startup=False, rank=rank))
                group = await groups.next()
                assert len(group.devices) == 4
                await group.prove(info=info_of(4))
                if num_faults < 3:
                    await gets(group, Add(bad.request, {0: []}))
            await refused(bad)
        for _ in range(3):  # those of others still end it
            assert client.state != "dead"
            group.die()
            group = await groups.next()
        group.die()
        await eventually(lambda: client.state == "dead")


async def test_requests_that_fewer_ranks_cannot_hold(groups: Groups) -> None:
    async with on_devices(groups) as (client, first):
        a, long = begun(client, request("a"), GenerationRequest("long", [1] * 60, SamplingParams(max_tokens=5)))
        group = first
        for _ in range(3):
            group.die()
            (group := await groups.next()).send(gone(0))
            group = await groups.next()
            if len(group.devices) > 1:
                await group.prove(info=info_of(len(group.devices)))
                await eventually(lambda: client.state == "ok")
        assert group.config.max_model_len == 64
        await group.prove(info=info_of(1, 64))
        await eventually(lambda: group.has_received(Add(a.request, {0: []})))
        (error,) = long.errors
        assert isinstance(error, RequestError) and error.status == 503 and not a.errors
        assert "goes on with 1 ranks, which hold 64 tokens of context; this request may need 65" in error.message
        with pytest.raises(RequestError, match="may need 65"):
            begun(client, GenerationRequest("longer", [1] * 60, SamplingParams(max_tokens=5)))


async def test_a_request_that_is_too_long_comes_while_another_is_tried_alone(groups: Groups) -> None:
    async with on_devices(groups) as (client, first):
        (a,) = begun(client, request("a"))
        runs(first, "a")
        first.die()
        second = await groups.next()
        await second.prove(info=info_of(4))
        await gets(second, Add(a.request, {0: []}))
        runs(second, "a")
        second.die()
        (await groups.next()).send(gone(0))
        group = await groups.next()
        await group.prove(info=info_of(3, 64))
        await gets(group, Add(a.request, {0: []}))
        (long,) = begun(client, GenerationRequest("long", [1] * 60, SamplingParams(max_tokens=5)))
        group.step(Delta("a", 0, 0, [5]))
        await gets(group, Abort("a", 0), Add(a.request, {0: [5]}))
        (error,) = long.errors
        assert isinstance(error, RequestError) and error.status == 503 and client.state == "ok"


@pytest.mark.parametrize("busy", [False, True])
async def test_a_device_that_is_back_is_used_again(busy: bool, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "LOOK_S", 0.0)
    async with on_devices(groups, max_faults=2) as (client, first):
        (a,) = begun(client, request("a"))
        first.die()
        (await groups.next()).send(gone(3))
        third = await groups.next()
        await third.prove(info=info_of(3))
        await eventually(lambda: third.has_received(Add(a.request, {0: []})))
        (await groups.next()).deny()
        probe = await groups.next()
        assert (probe.devices, probe.epoch) == ([3], PROBE)
        probe.show_itself()
        await eventually(lambda: client.degraded == "3 of 4 ranks: device 3 is back")
        num_groups = len(groups)
        third.step(Delta("a", 0, 0, [5]))
        await asyncio.sleep(2 * TICK_S)
        assert len(groups) == num_groups and client.state == "ok"  # not while a request runs
        if busy:
            monkeypatch.setattr(supervisor, "GROW_S", 0.0)
        else:
            client.end("a")
        fifth = await groups.next()
        assert third.is_killed and fifth.devices == [0, 1, 2, 3] and fifth.config.tensor_parallel_size == 4
        await fifth.prove(info=info_of(4))
        await eventually(lambda: client.state == "ok" and not client.degraded)
        if busy:
            await eventually(lambda: fifth.has_received(Add(a.request, {0: [5]})))


# Its bounds


async def test_too_many_faults_end_it(groups: Groups) -> None:
    async with connected(groups, max_faults=2) as (client, first):
        a, b = begun(client, request("a"), request("b"))
        first.die()
        (await groups.next()).die()
        (await groups.next()).die()
        await eventually(lambda: client.state == "dead" and bool(b.errors))
        assert [len(caller.errors) for caller in (a, b)] == [1, 1]
        assert isinstance(a.errors[0], EngineError) and "3 faults within 10 minutes" in str(a.errors[0])
        assert len(groups) == 3
        with pytest.raises(EngineError, match="dead"):
            a.begin()


@pytest.mark.parametrize("limit_s", [0.0, 0.3])
async def test_a_recovery_that_takes_too_long_ends_it(groups: Groups, limit_s: float) -> None:
    async with connected(groups, max_recovery_time=limit_s) as (client, first):
        (a,) = begun(client, request("a"))
        first.die()
        await eventually(lambda: client.state == "dead" and bool(a.errors))
        assert f"did not recover within {limit_s:g} s" in str(a.errors[0])
        assert len(groups) == (1 if limit_s == 0 else 2)
        await eventually(lambda: groups[-1].is_killed)


async def test_an_engine_that_cannot_start_says_why(groups: Groups) -> None:
    for how, words in (("says", "too little memory"), ("dies", "ended while it started")):
        client = EngineClient(SupervisorConfig(model="tiny"))
        start = asyncio.create_task(client.start())
        group = await groups.next()
        group.send(Failed("too little memory", startup=True)) if how == "says" else group.die()
        with pytest.raises(StartupError, match=words):
            await start
        await client.close()
        assert not groups[-1].received


async def test_garbage_is_a_fault(groups: Groups) -> None:
    async with connected(groups) as (client, first):
        (a,) = begun(client, request("a"))
        first.step(Delta("a", 0, 0, [5]))
        first.send_bytes(b"\1\0\0\0?")
        second = await groups.next()
        assert a.token_ids == [5]  # what came before still counts
        second.send(Ready(INFO))
        await second.answer()
        await eventually(lambda: second.has_received(Add(a.request, {0: [5]})))
