"""The engine's client over its real socket, with the test as the engine: what is handed out, aborted and told."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from api_fakes import FakeEngine, eventually

from octavo.server.config import EngineConfig
from octavo.server.engine import client
from octavo.server.engine.channel import (
    Abort,
    Add,
    EngineStats,
    Failed,
    FrameBuffer,
    Ready,
    StepOutput,
    ToEngine,
    ToFrontEnd,
    decode_to_engine,
    encode_frame,
)
from octavo.server.engine.client import EngineClient
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, SamplingParams
from octavo.server.errors import EngineError, StartupError


class Process:
    """Stands for the engine's processes: the test has its end of the socket."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        self.group = SimpleNamespace(
            channel=theirs, pids=[0], pidfds=[], wait_until_started=lambda: None, wait=lambda timeout_s: True
        )
        self._buffer = FrameBuffer()
        self.received: list[ToEngine] = []

    def send(self, *messages: ToFrontEnd) -> None:
        """All in one write."""
        self.channel.sendall(b"".join(map(encode_frame, messages)))

    def has_received(self, *messages: ToEngine) -> bool:
        """Whether these are the messages since the last call that found them."""
        self.channel.setblocking(False)
        try:
            self.received += map(decode_to_engine, self._buffer.feed(self.channel.recv(1 << 16)))
        except BlockingIOError:
            pass
        self.channel.setblocking(True)
        if self.received != list(messages):
            return False
        self.received.clear()
        return True


@dataclass
class Caller:
    """Who waits for a request's deltas."""

    client: EngineClient
    request: GenerationRequest
    calls: list[list[Delta]] = field(default_factory=list)
    errors: list[EngineError] = field(default_factory=list)
    committed: list[list[list[int]]] = field(default_factory=list)  # in the journal, when each call came

    def begin(self) -> None:
        self.client.begin(self.request, self._on_deltas, self.errors.append)

    def _on_deltas(self, deltas: list[Delta]) -> None:
        self.calls.append(deltas)
        entry = self.client.journal.entries[self.request.request_id]
        self.committed.append([list(token_ids) for token_ids in entry.committed])


async def launched(monkeypatch: pytest.MonkeyPatch) -> tuple[EngineClient, Process, asyncio.Task[None]]:
    """A client, the process that it launched, and its start, which waits for the process to say something."""
    process = Process()
    launcher = SimpleNamespace(start=lambda config, epoch: process.group, close=lambda: None)
    monkeypatch.setattr(client, "Launcher", lambda: launcher)
    engine = EngineClient(EngineConfig(model="tiny"))
    return engine, process, asyncio.create_task(engine.start())


@asynccontextmanager
async def connected(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[EngineClient, Process]]:
    engine, process, start = await launched(monkeypatch)
    process.send(Ready(FakeEngine(lambda request, index: []).info))
    await start
    try:
        yield engine, process
    finally:
        process.channel.close()
        await engine.close()
        assert engine.state == "dead"


def request(request_id: str, n: int = 1) -> GenerationRequest:
    return GenerationRequest(request_id, [1, 2], SamplingParams(max_tokens=9), n)


def step(*deltas: Delta, number: int = 1) -> StepOutput:
    return StepOutput(0, list(deltas), EngineStats(step=number))


async def test_a_request_gets_its_committed_deltas_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (engine, process):
        callers = [Caller(engine, request(name, n=2)) for name in "ab"]
        for caller in callers:
            caller.begin()
        await eventually(lambda: process.has_received(*(Add(caller.request) for caller in callers)))
        a = [Delta("a", 0, 0, [5]), Delta("a", 1, 0, [6]), Delta("a", 0, 1, [7])]
        steps: list[StepOutput] = []
        engine.on_step = steps.append
        again, gap, unknown = Delta("a", 0, 0, [5]), Delta("a", 1, 2, [8]), Delta("c", 0, 0, [5])
        # A front end that is behind reads several steps in one go, and hands out all of them in one call.
        process.send(step(*a[:2], again), step(a[2], gap, unknown, Delta("b", 1, 0, [9]), number=2))
        await eventually(lambda: all(caller.calls for caller in callers))
        assert callers[0].calls == [a] and callers[0].committed == [[[5, 7], [6]]]
        assert callers[1].calls == [[Delta("b", 1, 0, [9])]]
        assert [output.stats.step for output in steps] == [1, 2] and engine.stats.step == 2


async def test_a_message_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (engine, process):
        caller = Caller(engine, request("a"))
        caller.begin()
        for byte in encode_frame(step(Delta("a", 0, 0, [5]))):
            assert not caller.calls
            process.channel.sendall(bytes([byte]))
            await asyncio.sleep(0)
        await eventually(lambda: caller.calls == [[Delta("a", 0, 0, [5])]])


async def test_only_what_still_runs_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (engine, process):
        left, done = Caller(engine, request("left")), Caller(engine, request("done"))
        for caller in (left, done):
            caller.begin()
        await eventually(lambda: process.has_received(Add(left.request), Add(done.request)))
        assert await engine.abort("left") and not await engine.abort("other")
        await eventually(lambda: process.has_received(Abort("left")))
        process.send(step(Delta("done", 0, 0, [5], finish_reason=FinishReason.LENGTH)))
        await eventually(lambda: bool(done.calls))
        for name in ("done", "left", "left", "other"):
            engine.end(name)
        await eventually(lambda: process.has_received(Abort("left")))
        assert not engine.journal.entries
        # What the engine had sent before it knew is nobody's.
        again = Caller(engine, request("again"))
        again.begin()
        process.send(step(Delta("left", 0, 0, [5]), Delta("again", 0, 0, [6])))
        await eventually(lambda: bool(again.calls))
        assert not left.calls and not left.errors


async def test_a_choice_that_is_aborted_gets_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (engine, process):
        caller = Caller(engine, request("a", n=2))
        caller.begin()
        for _ in range(2):
            engine.abort_choice("a", 0)
        engine.abort_choice("other", 0)
        await eventually(lambda: process.has_received(Add(caller.request), Abort("a", 0)))
        process.send(step(Delta("a", 0, 0, [5]), Delta("a", 1, 0, [6], finish_reason=FinishReason.STOP)))
        await eventually(lambda: bool(caller.calls))
        assert [delta.choice_index for delta in caller.calls[0]] == [1]
        engine.end("a")
        caller = Caller(engine, request("b"))
        caller.begin()
        await eventually(lambda: process.has_received(Add(caller.request)))


@pytest.mark.parametrize("how", ["closed", "failed", "garbage"])
async def test_everybody_is_told_once_when_the_engine_ends(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async with connected(monkeypatch) as (engine, process):
        callers = [Caller(engine, request(name)) for name in "ab"]
        for caller in callers:
            caller.begin()
        last = step(Delta("a", 0, 0, [5]))
        match how:
            case "closed":
                process.send(last)
            case "failed":
                process.send(last, Failed("engine failed: KeyError", startup=False))
            case _:
                process.send(last)
                process.channel.sendall(b"\1\0\0\0?")
        process.channel.close()
        await eventually(lambda: engine.state == "dead" and callers[1].errors != [])
        assert [len(caller.errors) for caller in callers] == [1, 1]
        assert callers[0].calls == [[Delta("a", 0, 0, [5])]]  # what came before still counts
        with pytest.raises(EngineError, match="dead"):
            callers[0].begin()


async def test_an_engine_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, process, start = await launched(monkeypatch)
    process.send(Failed("too little memory", startup=True))
    with pytest.raises(StartupError, match="too little memory"):
        await start
    process.channel.close()
    await engine.close()
