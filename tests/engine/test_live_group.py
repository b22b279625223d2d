"""Rank processes behind the engine's client, as a server has them."""

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from octavo.server.config import SupervisorConfig
from octavo.server.engine.channel import StepOutput
from octavo.server.engine.client import EngineClient
from octavo.server.engine.progress import RankFigures
from octavo.server.engine.request import Delta, GenerationRequest, SamplingParams
from octavo.server.engine.supervisor import Recovery
from octavo.server.errors import OctavoError

NUM_TOKENS = 60
INJECTED = ("change", "change", "drop", "change") * 3
TIMEOUT_S = 60.0


class Streams:
    """Requests, and the tokens that came of them."""

    def __init__(self, client: EngineClient, name: str) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.has_ended, self.has_begun = asyncio.Event(), asyncio.Event()
        self._client, self._open = client, 0
        for i in range(4):
            params = SamplingParams(max_tokens=NUM_TOKENS, temperature=i % 2, seed=i)
            request = GenerationRequest(f"{name}/{i}", [7 * i + 3 * j for j in range(1 + 9 * i)], params)
            self.tokens[request.request_id] = []
            client.begin(request, self._take, self._fail)
            self._open += 1

    def _take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self.tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                assert delta.finish_reason == "length"
                self._client.end(delta.request_id)
                self._open -= 1
        if min(map(len, self.tokens.values())) > 3:
            self.has_begun.set()
        if not self._open:
            self.has_ended.set()

    def _fail(self, error: OctavoError) -> None:
        raise error


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that faults are asked for in."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that ranks log to."""
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="module")
def client(
    tiny_checkpoint: Callable[[str], Path], faults: Path, log: Path, runner: asyncio.Runner
) -> Iterator[EngineClient]:
    """Of three ranks."""
    config = SupervisorConfig(
        str(tiny_checkpoint("smollm2")),
        device="cpu",
        tensor_parallel_size=3,
        max_model_len=256,
        kv_cache_memory_bytes=4 << 20,
        step_deadline=0.5,
        max_faults=100,
        max_device_faults=100,
        faults=str(faults),
    )
    client = EngineClient(config)
    stderr = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        runner.run(client.start())
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    yield client
    runner.run(client.close())
    assert client.figures == []


async def outputs(client: EngineClient, name: str) -> list[list[int]]:
    streams = Streams(client, name)
    async with asyncio.timeout(TIMEOUT_S):
        await streams.has_ended.wait()
    return list(streams.tokens.values())


async def settled(client: EngineClient) -> list[RankFigures]:
    """What ranks have done once all have put it down: the last step's tokens may come before that."""
    async with asyncio.timeout(TIMEOUT_S):
        while len({rank.num_steps for rank in client.figures}) > 1:
            await asyncio.sleep(0.01)
    return client.figures


def test_ranks_show_what_they_do(client: EngineClient, runner: asyncio.Runner) -> None:
    async def check() -> None:
        assert all(rank.resident_bytes > 20 << 20 for rank in client.figures)
        before = await settled(client)
        await outputs(client, "a")
        after = await settled(client)
        assert len(after) == 3
        for old, new in zip(before, after, strict=True):
            assert new.num_steps - old.num_steps == client.stats.step >= NUM_TOKENS
            assert 0 < new.collective_s - old.collective_s < new.step_s - old.step_s

    runner.run(check())


def test_a_wrong_plan_is_never_executed(client: EngineClient, faults: Path, log: Path, runner: asyncio.Runner) -> None:
    """Each that is injected is found out before a token of its step is emitted, and no stream notices."""
    emitted: set[tuple[int, float]] = set()  # (epoch, step)
    recoveries: list[Recovery] = []

    def on_step(output: StepOutput) -> None:
        emitted.add((output.epoch, output.stats.step - client._offset["step"]))

    client.on_step, client.on_recovered = on_step, recoveries.append

    async def inject(number: int, kind: str) -> None:
        fault = faults / f"{kind}@plan:{1 + number % 2}"
        streams = Streams(client, f"{number}")
        await streams.has_begun.wait()
        fault.touch()
        await streams.has_ended.wait()
        assert list(streams.tokens.values()) == expected
        if fault.exists():  # the engine was done before
            assert await outputs(client, f"{number} again") == expected
        assert not fault.exists()

    expected = runner.run(outputs(client, "undisturbed"))
    for number, kind in enumerate(INJECTED):
        epoch = client.journal.epoch
        runner.run(asyncio.wait_for(inject(number, kind), TIMEOUT_S))
        assert len(recoveries) == number + 1
        assert recoveries[-1].fault.reason == ("stalled" if kind == "drop" else "died")
        told = re.findall(r"^(\w+) of the plan of step (\d+)$", log.read_text(), re.MULTILINE)
        assert [name for name, _ in told] == list(INJECTED[: number + 1])
        step = told[-1][1]
        assert (epoch, int(step) - 1) in emitted and (epoch, int(step)) not in emitted
