"""Kills, stops and breaks the ranks of a server while it answers, and compares every answer with the undisturbed one.

    python -m octavo.benchmarks.chaos MODEL --ranks 4 --faults 140 --log chaos.jsonl

The matrix: {kill, stop, segv, raise, slow} x {idle, prefill, decode, collective, sampling, warm-up, recovery} x rank,
further {hang} x {idle, decode}, and {drop, change} of the plan that a rank is sent.
Each fault appends a line of JSON to the log, and a log that is there already is gone on with. In the end, the table.
Idle faults are signals from outside (raise and slow have no idle; a hang is waited for until it is found); those of
warm-up and recovery strike the start that follows a kill, so they are two faults. All else is asked of the ranks
themselves (`server/engine/faults.py`).

With --lose-devices, instead: while all requests run, the ranks' devices are declared dead and their ranks killed, from
the last to the second, so that one is left; then they are all there again.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import httpx

KINDS = ("kill", "stop", "segv", "raise", "slow", "hang", "drop", "change")
PHASES = ("idle", "prefill", "decode", "collective", "sampling", "plan", "warm-up", "recovery")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}
READY_S, FAULT_S = 120.0, 90.0
WORDS = "the of sea and ship old night rain stone under light over river house never again".split()


@dataclass(frozen=True)
class Planned:
    """A fault to be."""

    kind: str
    phase: str
    rank: int


@dataclass
class Outcome:
    """What came of one."""

    number: int
    kind: str
    phase: str
    rank: int
    effective: bool = False  # it has struck
    recoveries: int = 0
    lost: int = 0  # requests that did not end as the undisturbed ones
    wrong: int = 0  # requests with another output
    leaked: float = 0.0  # share of the KV blocks that nobody gave back
    tokens: int = 0
    first_s: float | None = None  # from the fault to the first token after it
    all_s: float | None = None  # to the first token of the last stream to go on
    seconds: dict[str, float] = field(default_factory=dict)  # of the server's own account, by phase
    ranks: list[int] = field(default_factory=list)  # after each device that was lost, and when all were back


def matrix(num_ranks: int) -> list[Planned]:
    """Every kind in every phase on every rank, as far as there is such a thing.

    In an order that is random and always the same, so that a part of a campaign has something of everything.
    """
    planned = [
        Planned(kind, phase, rank)
        for phase, kind, rank in product(PHASES, KINDS, range(num_ranks))
        if (kind in ("drop", "change")) == (phase == "plan")
        and not (phase == "idle" and kind in ("raise", "slow"))
        and not (phase in ("warm-up", "recovery") and kind == "slow")
        and not (kind == "hang" and phase not in ("idle", "decode"))
        and not (phase == "plan" and rank == 0)
    ]
    random.Random(0).shuffle(planned)
    return planned


def bodies(num_streams: int, num_tokens: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests of all kinds: path and body."""
    text = [" ".join(islice(cycle(WORDS[i % 7 :]), 3 + 11 * i % 50)) for i in range(num_streams)]
    base = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.9, "seed": 6, "n": 3, "top_p": 0.95},
        {"temperature": 0.8, "seed": 7, "presence_penalty": 0.8, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 8, "stop": ["e", "qx"], "ignore_eos": False},
        {"temperature": 0.7, "seed": 9, "logprobs": 4, "top_k": 30},
        {"temperature": 1.2, "seed": 10, "min_tokens": num_tokens // 2, "ignore_eos": False, "min_p": 0.01},
        {"chat": True, "temperature": 0.6, "seed": 11, "logprobs": True, "top_logprobs": 3},
    ]
    requests = []
    for i in range(num_streams):
        body = {**base, **kinds[i % len(kinds)]}
        if body.pop("chat", False):
            requests.append(("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text[i]}]}))
        else:
            requests.append(("/v1/completions", {**body, "prompt": text[i]}))
    return requests


@dataclass
class Stream:
    """A request's events, without what differs from run to run."""

    events: list[Any] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    comments: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether it ended as it should."""
        return self.events[-1:] == ["[DONE]"]

    @property
    def num_tokens(self) -> int:
        """Output tokens, by the server's count."""
        usage = next((event["usage"] for event in self.events if isinstance(event, dict) and event.get("usage")), None)
        return usage["completion_tokens"] if usage else 0

    def output(self) -> Any:
        """All that a client has of it, in an order that does not depend on when tokens came."""
        choices: dict[int, list[Any]] = {}
        for event in self.events:
            for choice in event.get("choices", ()) if isinstance(event, dict) else ():
                gained = {key: value for key, value in choice.items() if key != "index"}
                choices.setdefault(choice["index"], []).append(gained)
        return {index: _joined(pieces) for index, pieces in choices.items()}, self.num_tokens


def _joined(pieces: list[Any]) -> Any:
    """Text, log-probabilities and finish reason of a choice: how they were cut into events does not matter."""
    text = ""
    logprobs: list[str] = []
    end: list[Any] = []
    for piece in pieces:
        text += piece.get("text") or piece.get("delta", {}).get("content") or ""
        if found := piece.get("logprobs"):
            logprobs += map(repr, found["content"] if "content" in found else zip(*_columns(found), strict=True))
        if piece.get("finish_reason"):
            end.append((piece["finish_reason"], piece.get("stop_reason")))
    return text, logprobs, end


def _columns(logprobs: dict[str, Any]) -> list[list[Any]]:
    return [logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")]


async def read(http: httpx.AsyncClient, path: str, body: dict[str, Any], stream: Stream) -> None:
    """Reads a stream to its end, whichever that is."""
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            stream.events.append(json.loads(await response.aread()))
            return
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                stream.events.append(data if data == "[DONE]" else json.loads(data))
                stream.times_s.append(time.monotonic())
            elif line.startswith(":"):
                stream.comments += 1


class Chaos:
    """One server, its undisturbed answers, and faults for it."""

    def __init__(self, http: httpx.AsyncClient, pid: int, faults: Path, requests: list[tuple[str, Any]]) -> None:
        self._http, self._pid, self._faults, self._requests = http, pid, faults, requests
        self._expected: list[Any] = []

    @property
    def launcher_pid(self) -> int:
        """Process id of the server's launcher."""
        return launcher_pid(self._pid)

    async def learn(self) -> None:
        """Answers without a fault, twice the same."""
        first, second = [[stream.output() for stream in await self._run()] for _ in range(2)]
        assert first == second, "the server does not repeat itself"
        self._expected = first

    async def _run(self) -> list[Stream]:
        streams = [Stream() for _ in self._requests]
        await asyncio.gather(*(read(self._http, *r, s) for r, s in zip(self._requests, streams, strict=True)))
        return streams

    async def suffer(self, number: int, planned: Planned) -> Outcome:
        """One fault, while all requests run (none, where it is to strike the idle server)."""
        outcome = Outcome(number, **asdict(planned))
        before = await self._recoveries()
        streams = [Stream() for _ in self._requests]
        struck_s = 0.0
        if planned.phase == "idle":
            outcome.effective = True
            if planned.kind == "hang":
                (self._faults / f"hang@idle:{planned.rank}").touch()
                await self._until_recovered(before["count"])
            struck_s = time.monotonic()
            if planned.kind in SIGNALS:
                os.kill(rank_pids(self._pid)[planned.rank], SIGNALS[planned.kind])
        running = asyncio.gather(
            *(read(self._http, *r, s) for r, s in zip(self._requests, streams, strict=True)), return_exceptions=True
        )
        if planned.phase != "idle":
            if planned.phase != "prefill":
                await self._until(lambda: all(s.times_s for s in streams) or running.done())
            names = [f"{planned.kind}@{planned.phase}:{planned.rank}"]
            if planned.phase in ("warm-up", "recovery"):
                names.append("kill@decode:0")
            for name in names:
                (self._faults / name).touch()
            await self._until(lambda: not any(self._faults.iterdir()) or running.done())
            struck_s = time.monotonic()
            outcome.effective = not any(self._faults.iterdir())
            for path in self._faults.iterdir():
                path.unlink()
        try:
            async with asyncio.timeout(FAULT_S):
                await running
                await self._until_ready()
        except TimeoutError:
            running.cancel()
        after = await self._recoveries()
        outcome.recoveries = int(after["count"] - before["count"])
        outcome.leaked = after["kv_cache_usage_perc"]
        outcome.effective &= bool(outcome.recoveries) or planned.kind == "slow"  # else it came too late to matter
        if outcome.recoveries:
            outcome.seconds = {
                phase: after[phase] - before[phase] for phase in after if phase not in ("count", "kv_cache_usage_perc")
            }
        later = [min((t for t in s.times_s if t > struck_s), default=None) for s in streams]
        first = [t - struck_s for t in later if t is not None]
        if outcome.recoveries and first:
            outcome.first_s, outcome.all_s = min(first), max(first)
        outcome.lost = sum(not stream.is_whole for stream in streams)
        outputs = [stream.output() for stream in streams]
        outcome.wrong = sum(o != e for o, e in zip(outputs, self._expected, strict=True))
        outcome.tokens = sum(stream.num_tokens for stream in streams)
        return outcome

    async def lose_devices(self, has_same_bits: bool) -> Outcome:
        """All devices but the first are lost, from the last on, while all requests run; then they are taken back.

        has_same_bits: fewer ranks should give the same answers; else they are to be whole, and where nothing but their
        length ends them as long as they were.
        """
        num_ranks = left = len(rank_pids(self._pid))
        outcome, before = Outcome(0, "kill", "decode", num_ranks - 1), await self._recoveries()
        streams = [Stream() for _ in self._requests]
        running = asyncio.gather(
            *(read(self._http, *r, s) for r, s in zip(self._requests, streams, strict=True)), return_exceptions=True
        )
        for device in range(num_ranks - 1, 0, -1):
            since_s = time.monotonic()
            await self._until(lambda since_s=since_s: any(s.times_s and s.times_s[-1] > since_s for s in streams))
            (self._faults / f"dead={device}").touch()
            if device < left:  # else it is not used
                os.kill(rank_pids(self._pid)[device], signal.SIGKILL)
                left = await self._fewer_ranks(left)
            outcome.ranks.append(left)
        outcome.effective = not running.done()
        await running
        after = await self._recoveries()
        outcome.recoveries = int(after["count"] - before["count"])
        outcome.lost = sum(not stream.is_whole for stream in streams)
        for (_, body), stream, expected in zip(self._requests, streams, self._expected, strict=True):
            if has_same_bits:
                outcome.wrong += stream.output() != expected
            elif body["ignore_eos"]:
                outcome.wrong += stream.num_tokens != expected[1]
        for path in self._faults.iterdir():
            path.unlink()
        begin_s = time.monotonic()
        while "ranks" in (await self._http.get("/health")).json():
            assert time.monotonic() < begin_s + FAULT_S, "the devices are not taken back"
            await asyncio.sleep(0.05)
        await self._until_ready()
        outcome.ranks.append(len(rank_pids(self._pid)))
        return outcome

    async def _fewer_ranks(self, num_ranks: int) -> int:
        """How many ranks the server goes on with, once these are fewer."""
        begin_s = time.monotonic()
        while (left := (await self._http.get("/health")).json().get("ranks", num_ranks)) >= num_ranks:
            assert time.monotonic() < begin_s + FAULT_S, "no device is left out"
            await asyncio.sleep(0.01)
        await self._until_ready()
        return int(left)

    async def _until(self, condition: Any) -> None:
        deadline = time.monotonic() + FAULT_S
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)

    async def _until_recovered(self, count: float) -> None:
        """Until there have been more recoveries than so many."""
        deadline = time.monotonic() + FAULT_S
        while (await self._recoveries())["count"] == count and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def _until_ready(self) -> None:
        while (await self._http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.02)

    async def _recoveries(self) -> dict[str, float]:
        """How many there were, how long their phases took in all, and the share of KV blocks in use."""
        text = (await self._http.get("/metrics")).text
        found = {"count": sum(float(v) for v in re.findall(r"^octavo:recoveries_total\{.*\} (.*)$", text, re.M))}
        found["kv_cache_usage_perc"] = float(re.findall(r"^octavo:kv_cache_usage_perc\{.*\} (.*)$", text, re.M)[0])
        for phase, value in re.findall(r'^octavo:recovery_seconds_sum\{.*phase="([a-z]+)".*\} (.*)$', text, re.M):
            found[phase] = float(value)
        return found


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(path.name))
    return sorted(found)


def launcher_pid(pid: int) -> int:
    """The launcher of the server with this process id: its one child."""
    (launcher,) = _children(pid)
    return launcher


def rank_pids(pid: int) -> list[int]:
    """The ranks of the server with this process id, in order: the launcher's children."""
    return _children(launcher_pid(pid))


@contextmanager
def served(model: str, num_ranks: int, faults: Path, *flags: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A server in test mode, and its URL."""
    command = [sys.executable, "-m", "octavo.server", "serve", model, "--port", "0", "--device", "cpu", "--test-faults"]
    command += ["--tensor-parallel-size", str(num_ranks), "--max-faults", "1000000"]
    command += ["--max-device-faults", "1000000", *flags]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        environment = {**os.environ, "OCTAVO_FAULTS": str(faults), "OCTAVO_API_KEY": ""}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + READY_S
            while not (found := re.search(r"listening on (http://\S+)", Path(log.name).read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start:\n{Path(log.name).read_text()}")
                time.sleep(0.05)
            yield process, found[1]
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@asynccontextmanager
async def suffering(
    model: str, num_ranks: int, *flags: str, num_streams: int = 8, num_tokens: int = 40
) -> AsyncIterator[Chaos]:
    """A server that has given its undisturbed answers."""
    with tempfile.TemporaryDirectory() as faults, served(model, num_ranks, Path(faults), *flags) as (process, url):
        async with httpx.AsyncClient(base_url=url, timeout=FAULT_S, limits=httpx.Limits(max_connections=None)) as http:
            chaos = Chaos(http, process.pid, Path(faults), bodies(num_streams, num_tokens))
            await chaos.learn()
            yield chaos


def _quantile(values: list[float], share: float) -> str:
    return f"{sorted(values)[min(int(share * len(values)), len(values) - 1)]:.2f}" if values else "-"


def table(outcomes: list[Outcome]) -> str:
    """By phase: faults, what they cost, how long it took."""
    names = ["phase", "faults", "recoveries", "requests lost", "requests wrong"]
    names.append("blocks leaked")
    names += ["first token p50", "p99", "max", "all streams p50", "max"]
    lines = [names, ["---"] * len(names)]
    for phase in (*PHASES, "all"):
        if not (rows := [o for o in outcomes if o.effective and phase in (o.phase, "all")]):
            continue
        first = [o.first_s for o in rows if o.first_s is not None]
        last = [o.all_s for o in rows if o.all_s is not None]
        counts = len(rows), sum(o.recoveries for o in rows), sum(o.lost for o in rows), sum(o.wrong for o in rows)
        leaks = sum(o.leaked > 0 for o in rows)
        times = [_quantile(first, share) for share in (0.5, 0.99, 1.0)] + [
            _quantile(last, share) for share in (0.5, 1.0)
        ]
        lines.append([phase, *map(str, (*counts, leaks)), *times])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


async def _shrink(arguments: argparse.Namespace) -> Outcome:
    flags = arguments.flags.split()
    async with suffering(
        arguments.model, arguments.ranks, *flags, num_streams=arguments.streams, num_tokens=arguments.tokens
    ) as chaos:
        return await chaos.lose_devices("ranks" in flags)


async def _campaign(arguments: argparse.Namespace, log: Path, done: int) -> None:
    planned = list(islice(cycle(matrix(arguments.ranks)), arguments.faults))[done:]
    flags = arguments.flags.split()
    async with suffering(
        arguments.model, arguments.ranks, *flags, num_streams=arguments.streams, num_tokens=arguments.tokens
    ) as chaos:
        for number, fault in enumerate(planned, done):
            outcome = await chaos.suffer(number, fault)
            with log.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(f"{number:4} {fault.kind:6} {fault.phase:10} rank {fault.rank}: lost {outcome.lost}, wrong ", end="")
            print(f"{outcome.wrong}, recoveries {outcome.recoveries}, first {outcome.first_s}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the campaign as far as it is not in the log yet. Status 1 where anything was lost or wrong."""
    parser = argparse.ArgumentParser(prog="python -m octavo.benchmarks.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--faults", type=int, default=len(matrix(4)))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40, help="of each stream")
    parser.add_argument("--flags", default="", help="more flags of octavo serve, in one string")
    parser.add_argument("--log", type=Path, default=Path("chaos.jsonl"))
    parser.add_argument("--lose-devices", action="store_true", help="see above; nothing is logged")
    arguments = parser.parse_args(argv)
    if arguments.lose_devices:
        outcome = asyncio.run(_shrink(arguments))
        print(json.dumps(asdict(outcome)))
        return int(bool(outcome.lost or outcome.wrong))
    log: Path = arguments.log
    done = len(log.read_text().splitlines()) if log.exists() else 0
    if done < arguments.faults:
        asyncio.run(_campaign(arguments, log, done))
    outcomes = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()]
    print(table(outcomes))
    detected = [o.seconds["detect"] for o in outcomes if o.seconds]
    if detected:
        print(f"detection, by the server's account: median {statistics.median(detected):.2f} s")
    return int(any(o.lost or o.wrong or o.leaked for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
