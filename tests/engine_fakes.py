"""The ranks of an epoch for tests of the front end's side: the test has the other end of the channel, and the page."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from api_fakes import FakeEngine, eventually

from octavo.server.config import EngineConfig, SupervisorConfig
from octavo.server.engine import supervisor
from octavo.server.engine.channel import (
    Add,
    EngineInfo,
    EngineStats,
    FrameBuffer,
    Ready,
    StepOutput,
    ToEngine,
    ToFrontEnd,
    decode_to_engine,
    encode_frame,
)
from octavo.server.engine.client import EngineClient
from octavo.server.engine.nodes import Link
from octavo.server.engine.progress import Progress
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from octavo.server.errors import OctavoError

ENDLESS_S = 3600.0
INFO = FakeEngine(lambda request, index: []).info


class FakeGroup:
    """Stands for `Group`. Nothing runs: what an engine would do, the test does."""

    def __init__(self, config: EngineConfig, epoch: int, devices: list[int]) -> None:
        self.config, self.epoch, self.devices = config, epoch, devices
        self.channel, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self.progress = Progress()
        self.progress.beat(ENDLESS_S)  # it takes as long as the test takes
        self.pids: list[int] = []
        self.pidfds: list[int] = []
        self.links: dict[int, Link] = {}
        self.is_killed = False
        self._buffer = FrameBuffer()
        self.received: list[ToEngine] = []

    def wait_until_started(self) -> None:
        pass

    def wake_launcher(self) -> None:
        pass

    def ended(self) -> list[int]:
        return []

    def kill(self) -> None:
        self.is_killed = True

    def wait(self, timeout_s: float) -> bool:
        self.receive()
        self._theirs.close()
        self.progress.close()
        return True

    def send(self, *messages: ToFrontEnd) -> None:
        """All in one write."""
        self._theirs.sendall(b"".join(map(encode_frame, messages)))

    def send_bytes(self, data: bytes) -> None:
        self._theirs.sendall(data)

    def step(self, *deltas: Delta, **stats: int) -> None:
        """A step has produced so much."""
        self.send(StepOutput(self.epoch, list(deltas), EngineStats(**stats)))

    def die(self) -> None:
        """The end of rank 0, as its socket shows it."""
        self._theirs.close()

    def receive(self) -> None:
        try:
            self.received += map(decode_to_engine, self._buffer.feed(self._theirs.recv(1 << 16)))
        except OSError:  # nothing is there, or the socket is closed
            pass

    def has_received(self, *messages: ToEngine) -> bool:
        """Whether these are the messages since the last call that found them."""
        self.receive()
        if self.received != list(messages):
            return False
        self.received.clear()
        return True

    def show_itself(self) -> None:
        """As the probe of a device that is there."""
        self._theirs.sendall(b"1")

    def deny(self) -> None:
        """As the probe of one that is not."""
        self._theirs.close()

    async def prove(self, logprob: float = -1.0, info: EngineInfo = INFO) -> None:
        """Loads, and answers the question whose answer is known."""
        self.send(Ready(info))
        await self.answer(logprob)

    async def answer(self, logprob: float = -1.0) -> None:
        def questions() -> list[str]:
            self.receive()
            return [message.request.request_id for message in self.received if isinstance(message, Add)]

        await eventually(lambda: bool(questions()))
        (name,) = questions()
        self.received.clear()
        self.step(Delta(name, 0, 0, [3], [TokenLogprobs(3, logprob)], FinishReason.LENGTH))


@dataclass
class Caller:
    """Who waits for a request's deltas."""

    client: EngineClient
    request: GenerationRequest
    calls: list[list[Delta]] = field(default_factory=list)
    errors: list[OctavoError] = field(default_factory=list)
    committed: list[list[list[int]]] = field(default_factory=list)  # in the journal, when each call came

    def begin(self) -> None:
        self.client.begin(self.request, self._on_deltas, self._on_error)

    @property
    def token_ids(self) -> list[int]:
        """Of all choices, as they came."""
        return [token_id for call in self.calls for delta in call for token_id in delta.token_ids]

    def _on_deltas(self, deltas: list[Delta]) -> None:
        self.calls.append(deltas)
        entry = self.client.journal.entries[self.request.request_id]
        self.committed.append([list(token_ids) for token_ids in entry.committed])

    def _on_error(self, error: OctavoError) -> None:
        self.errors.append(error)
        self.client.end(self.request.request_id)  # as a stream does, though it does so a little later


def request(name: str, n: int = 1) -> GenerationRequest:
    return GenerationRequest(name, [1, 2], SamplingParams(max_tokens=9), n)


class Groups(list[FakeGroup]):
    """The groups that a client has started."""

    async def next(self) -> FakeGroup:
        """The next one, as soon as it is there."""
        seen = len(self)
        await eventually(lambda: len(self) > seen)
        return self[-1]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Groups:
    """No client starts processes; it starts these."""
    started = Groups()

    def start(config: EngineConfig, epoch: int, devices: Sequence[int]) -> FakeGroup:
        started.append(FakeGroup(config, epoch, list(devices)))
        return started[-1]

    monkeypatch.setattr(supervisor, "Launcher", lambda: SimpleNamespace(start=start, close=lambda: None))
    return started


@asynccontextmanager
async def connected(
    groups: Groups, info: EngineInfo = INFO, **config: float | str
) -> AsyncIterator[tuple[EngineClient, FakeGroup]]:
    """A client whose first engine runs."""
    client = EngineClient(SupervisorConfig(model="tiny", **config))  # type: ignore[arg-type]
    start = asyncio.create_task(client.start())
    group = await groups.next()
    await group.prove(info=info)
    await start
    try:
        yield client, group
    finally:
        await client.close()
        assert client.state == "dead"
        assert all(group.is_killed for group in groups[:-1])
