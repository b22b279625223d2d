"""The engine's client over its real socket, with the test as the engine: what is handed out, aborted and told."""

import asyncio

from api_fakes import eventually
from engine_fakes import Caller, Groups, connected, groups, request

from octavo.server.engine.channel import Abort, Add, EngineStats, StepOutput, encode_frame
from octavo.server.engine.request import Delta, FinishReason

__all__ = ["groups"]


def step(*deltas: Delta, number: int = 1) -> StepOutput:
    return StepOutput(0, list(deltas), EngineStats(step=number))


async def test_a_request_gets_its_committed_deltas_at_once(groups: Groups) -> None:
    async with connected(groups) as (engine, group):
        callers = [Caller(engine, request(name, n=2)) for name in "ab"]
        for caller in callers:
            caller.begin()
        await eventually(lambda: group.has_received(*(Add(caller.request) for caller in callers)))
        a = [Delta("a", 0, 0, [5]), Delta("a", 1, 0, [6]), Delta("a", 0, 1, [7])]
        steps: list[StepOutput] = []
        engine.on_step = steps.append
        again, gap, unknown = Delta("a", 0, 0, [5]), Delta("a", 1, 2, [8]), Delta("c", 0, 0, [5])
        # A front end that is behind reads several steps in one go, and hands out all of them in one call.
        group.send(step(*a[:2], again), step(a[2], gap, unknown, Delta("b", 1, 0, [9]), number=2))
        await eventually(lambda: all(caller.calls for caller in callers))
        assert callers[0].calls == [a] and callers[0].committed == [[[5, 7], [6]]]
        assert callers[1].calls == [[Delta("b", 1, 0, [9])]]
        assert [output.stats.step for output in steps] == [1, 2] and engine.stats.step == 2


async def test_a_message_may_come_in_pieces(groups: Groups) -> None:
    async with connected(groups) as (engine, group):
        caller = Caller(engine, request("a"))
        caller.begin()
        for byte in encode_frame(step(Delta("a", 0, 0, [5]))):
            assert not caller.calls
            group.send_bytes(bytes([byte]))
            await asyncio.sleep(0)
        await eventually(lambda: caller.calls == [[Delta("a", 0, 0, [5])]])


async def test_only_what_still_runs_is_aborted(groups: Groups) -> None:
    async with connected(groups) as (engine, group):
        left, done = Caller(engine, request("left")), Caller(engine, request("done"))
        for caller in (left, done):
            caller.begin()
        await eventually(lambda: group.has_received(Add(left.request), Add(done.request)))
        assert await engine.abort("left") and not await engine.abort("other")
        await eventually(lambda: group.has_received(Abort("left")))
        group.send(step(Delta("done", 0, 0, [5], finish_reason=FinishReason.LENGTH)))
        await eventually(lambda: bool(done.calls))
        for name in ("done", "left", "left", "other"):
            engine.end(name)
        await eventually(lambda: group.has_received(Abort("left")))
        assert not engine.journal.entries
        # What the engine had sent before it knew is nobody's.
        again = Caller(engine, request("again"))
        again.begin()
        group.send(step(Delta("left", 0, 0, [5]), Delta("again", 0, 0, [6])))
        await eventually(lambda: bool(again.calls))
        assert not left.calls and not left.errors


async def test_a_choice_that_is_aborted_gets_nothing_more(groups: Groups) -> None:
    async with connected(groups) as (engine, group):
        caller = Caller(engine, request("a", n=2))
        caller.begin()
        for _ in range(2):
            engine.abort_choice("a", 0)
        engine.abort_choice("other", 0)
        await eventually(lambda: group.has_received(Add(caller.request), Abort("a", 0)))
        group.send(step(Delta("a", 0, 0, [5]), Delta("a", 1, 0, [6], finish_reason=FinishReason.STOP)))
        await eventually(lambda: bool(caller.calls))
        assert [delta.choice_index for delta in caller.calls[0]] == [1]
        engine.end("a")
        caller = Caller(engine, request("b"))
        caller.begin()
        await eventually(lambda: group.has_received(Add(caller.request)))
