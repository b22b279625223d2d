"""What a server goes through that is not about speed: being told to stop, clients that misbehave, and a long time.

    python -m octavo.benchmarks.endurance drain MODEL --times 50
    python -m octavo.benchmarks.endurance clients MODEL
    python -m octavo.benchmarks.endurance soak MODEL --minutes 10

drain: SIGTERM at a random moment of its work, in every other run just after a rank was killed. Every stream must end as
it should or with an error, and nothing of the server may be left.
clients: neighbours' time between tokens beside clients that read a byte a second, that vanish, or that connect and
send nothing; against as many that send the same requests and read the answers. In turns, as noise comes and goes.
soak: requests of all kinds, some given up midway, and each minute a fault. Between faults nothing runs for a moment,
and what the front end and the launcher hold is written down.
Each prints a line of JSON, and exits with status 1 where something is not as it should be.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations, count
from pathlib import Path
from typing import Any

import httpx

from octavo.benchmarks.chaos import Stream, bodies, launcher_pid, rank_pids, read, served

MIB = 1 << 20
LIMIT_S = 120.0
NEIGHBOURS, BAD, IDLE, PHASE_S = 4, 8, 200, 6.0
SEQUENCE = ("kill@decode:0", "stop@decode:1", "raise@sampling:0", "segv@decode:1", "kill@prefill:1")


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=LIMIT_S, limits=httpx.Limits(max_connections=None))


# Told to stop


async def _stop_one(url: str, pid: int, rng: random.Random, kills: bool) -> tuple[int, int, int]:
    """Streams that ended as they should, that ended with an error, and that just broke off."""
    async with _client(url) as http:
        requests = bodies(8, 300)
        streams = [Stream() for _ in requests]
        running = asyncio.gather(
            *(read(http, *r, s) for r, s in zip(requests, streams, strict=True)), return_exceptions=True
        )
        await asyncio.sleep(rng.uniform(0.0, 0.6))
        if kills:
            os.kill(rng.choice(rank_pids(pid)), signal.SIGKILL)
            await asyncio.sleep(rng.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGTERM)
        await running
    whole = sum(stream.is_whole for stream in streams)
    errors = sum(isinstance(s.events[-1], dict) and "error" in s.events[-1] for s in streams if s.events)
    return whole, errors, len(streams) - whole - errors


def _descendants(pid: int) -> list[int]:
    launcher = launcher_pid(pid)
    return [pid, launcher, *rank_pids(pid)]


def drain(model: str, times: int, first: int = 0) -> dict[str, Any]:
    """Streams by how they ended, and what was left behind."""
    found: dict[str, Any] = {"runs": times, "whole": 0, "errors": 0, "broken": 0, "left": 0, "statuses": {}}
    shared = set(os.listdir("/dev/shm"))
    for number in range(first, first + times):
        rng = random.Random(number)
        flags = "--kv-cache-memory-bytes", "8M", "--shutdown-timeout", str(rng.choice((0.2, 20)))
        with tempfile.TemporaryDirectory() as faults, served(model, 2, Path(faults), *flags) as (process, url):
            pids = _descendants(process.pid)
            ends = asyncio.run(_stop_one(url, process.pid, rng, number % 2 == 1))
            status = process.wait(30)
        for name, num in zip(("whole", "errors", "broken"), ends, strict=True):
            found[name] += num
        found["statuses"][status] = found["statuses"].get(status, 0) + 1
        time.sleep(0.05)
        found["left"] += sum(_is_there(pid) for pid in pids) + len(set(os.listdir("/dev/shm")) - shared)
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):
            found["left"] += 1
        print(number, *ends, "status", status, "left", found["left"], file=sys.stderr, flush=True)
    found["ok"] = found["broken"] == found["left"] == 0 and set(found["statuses"]) <= {0, 1}
    return found


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Clients that misbehave


async def _neighbour(http: httpx.AsyncClient, until_s: float, gaps: list[float]) -> None:
    body = {"prompt": "the old sea", "max_tokens": 100, "ignore_eos": True, "stream": True, "temperature": 0}
    while time.monotonic() < until_s:
        stream = Stream()
        await read(http, "/v1/completions", body, stream)
        assert stream.is_whole, stream.events[-1:]
        gaps += [b - a for a, b in zip(stream.times_s, stream.times_s[1:], strict=False)]


async def _visitor(port: int, until_s: float, how: str, opened: list[socket.socket]) -> None:
    """Sends a request a second: reads it all (good), a byte a second (slow), or three events and vanishes."""
    body = json.dumps(
        {"prompt": "rain", "max_tokens": 120, "ignore_eos": True, "stream": True, "logprobs": 5, "seed": 1}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    loop = asyncio.get_running_loop()
    while time.monotonic() < until_s:
        begin_s = time.monotonic()
        sock = socket.socket()
        sock.setblocking(False)
        if how == "slow":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            opened.append(sock)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, head % len(body) + body)
        data = b""
        while how == "good" and b"[DONE]" not in data:
            data += await loop.sock_recv(sock, 65536)
        while how == "vanishing" and data.count(b"data: ") < 3:
            data += await loop.sock_recv(sock, 256)
        if how != "slow":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no farewell
            sock.close()
        await asyncio.sleep(max(0.0, begin_s + 1 - time.monotonic()))


async def _sip(opened: list[socket.socket]) -> None:
    """Reads a byte a second of each connection."""
    while True:
        for sock in opened:
            with suppress(BlockingIOError, ConnectionError):
                sock.recv(1)
        await asyncio.sleep(1)


async def _clients(url: str, pid: int, rounds: int) -> dict[str, Any]:
    port = int(url.rpartition(":")[2])
    gaps: dict[str, list[list[float]]] = {"good": [], "bad": []}
    opened: list[socket.socket] = []
    peak = before = resident(pid)
    async with _client(url) as http:
        await _neighbour(http, time.monotonic() + 1, [])
        before = resident(pid)
        for number in range(2 * rounds):
            kind = ("good", "bad")[number % 2]
            until_s = time.monotonic() + PHASE_S
            hows = ["good"] * 2 * BAD if kind == "good" else ["slow"] * BAD + ["vanishing"] * BAD
            tasks: list[Any] = [_visitor(port, until_s, how, opened) for how in hows]
            if kind == "bad":
                for _ in range(IDLE):
                    opened.append(socket.create_connection(("127.0.0.1", port)))
                    opened[-1].setblocking(False)
            sip = asyncio.create_task(_sip(opened))
            gaps[kind].append([])
            await asyncio.gather(*tasks, *(_neighbour(http, until_s, gaps[kind][-1]) for _ in range(NEIGHBOURS)))
            peak = max(peak, resident(pid))
            sip.cancel()
            for sock in opened:
                sock.close()
            opened.clear()
            await asyncio.sleep(0.5)
        usage = await _samples(http)
    p99 = {kind: [statistics.quantiles(found, n=100)[98] for found in gaps[kind]] for kind in gaps}
    ratio = statistics.median(p99["bad"]) / statistics.median(p99["good"])
    return {
        "p99_good_ms": [round(1000 * value, 1) for value in p99["good"]],
        "p99_bad_ms": [round(1000 * value, 1) for value in p99["bad"]],
        "p99_ratio": round(ratio, 2),
        "front_end_mib": {"before": before // MIB, "peak": peak // MIB, "after": resident(pid) // MIB},
        "blocks_used_after": usage["kv_cache_usage_perc"],
        "ok": ratio < 1.5 and usage["kv_cache_usage_perc"] == 0 and peak - before < 128 * MIB,
    }


def clients(model: str, rounds: int) -> dict[str, Any]:
    """Neighbours' p99 beside bad clients and good ones, and the front end's memory."""
    with tempfile.TemporaryDirectory() as faults:
        with served(model, 1, Path(faults), "--kv-cache-memory-bytes", "32M") as (process, url):
            return asyncio.run(_clients(url, process.pid, rounds))


# A long time


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held(pid: int) -> dict[str, int]:
    """What a process holds: bytes in memory, descriptors, threads, pieces of memory that it shares."""
    status = Path(f"/proc/{pid}/status").read_text()
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(path))
    return {
        "bytes": resident(pid),
        "descriptors": len(links),
        "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
        "shared": sum("memfd" in link or "/dev/shm" in link for link in links),
    }


async def _samples(http: httpx.AsyncClient) -> dict[str, float]:
    """Some metrics, and how many series there are."""
    text = (await http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    found = {name: float(re.findall(rf"^octavo:{name}\{{.*\}} (.*)$", text, re.M)[0]) for name in names}
    return {**found, "series": len(lines)}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes of all pairs (Theil and Sen)."""
    return statistics.median((y - b) / (x - a) for (a, b), (x, y) in combinations(points, 2))


async def _load(http: httpx.AsyncClient, until_s: float, rng: random.Random, counts: dict[str, int]) -> None:
    for number in count():
        if time.monotonic() >= until_s:
            return
        path, body = rng.choice(bodies(16, rng.randrange(20, 200)))
        stream = Stream()
        try:
            async with asyncio.timeout(0.3 if number % 5 == 4 else None):  # some clients leave
                await read(http, path, body, stream)
            counts["whole" if stream.is_whole else "lost"] += 1
        except TimeoutError:
            counts["left"] += 1


async def _soak(url: str, pid: int, faults: Path, minutes: int, num_clients: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    counts = {"whole": 0, "lost": 0, "left": 0}
    begin_s = time.monotonic()
    async with _client(url) as http:
        for minute in range(minutes):
            until_s = begin_s + 60 * (minute + 1) - 4
            load = asyncio.gather(
                *(_load(http, until_s, random.Random(100 * minute + i), counts) for i in range(num_clients))
            )
            await asyncio.sleep((until_s - time.monotonic()) / 2)
            (faults / SEQUENCE[minute % len(SEQUENCE)]).touch()
            await load
            while (await http.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            struck = not any(faults.iterdir())
            row = {"s": time.monotonic() - begin_s, "struck": struck, **await _samples(http)}
            row |= {f"front_end_{name}": value for name, value in held(pid).items()}
            row |= {f"launcher_{name}": value for name, value in held(launcher_pid(pid)).items()}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    warm = rows[min(2, len(rows) - 2) :]
    found: dict[str, Any] = {"minutes": minutes, **counts, "faults": sum(row["struck"] for row in rows)}
    for who in ("front_end", "launcher"):
        points = [(row["s"] / 3600, row[f"{who}_bytes"] / 1024) for row in warm]
        found[f"{who}_kib_per_hour"] = round(slope(points))
        for name in ("descriptors", "threads", "shared"):
            found[f"{who}_{name}"] = [warm[0][f"{who}_{name}"], warm[-1][f"{who}_{name}"]]
    found["series"] = [warm[0]["series"], warm[-1]["series"]]
    found["blocks_leaked"] = max(row["kv_cache_usage_perc"] for row in rows)
    pairs = [value for value in found.values() if isinstance(value, list)]
    found["ok"] = not counts["lost"] and not found["blocks_leaked"] and all(a == b for a, b in pairs)
    return found


def soak(model: str, minutes: int, num_clients: int) -> dict[str, Any]:
    """Requests by how they ended, and what grew."""
    flags = "--kv-cache-memory-bytes", "8M"
    with tempfile.TemporaryDirectory() as faults, served(model, 2, Path(faults), *flags) as (process, url):
        return asyncio.run(_soak(url, process.pid, Path(faults), minutes, num_clients))


def main(argv: list[str] | None = None) -> int:
    """Status 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m octavo.benchmarks.endurance", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("drain", "clients", "soak"))
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("--times", type=int, default=50, help="of drain")
    parser.add_argument("--first", type=int, default=0, help="of drain: the seed of the first time")
    parser.add_argument("--rounds", type=int, default=3, help="of clients: good and bad ones in turns")
    parser.add_argument("--minutes", type=int, default=10, help="of soak")
    parser.add_argument("--clients", type=int, default=4, help="of soak")
    arguments = parser.parse_args(argv)
    if arguments.what == "drain":
        found = drain(arguments.model, arguments.times, arguments.first)
    elif arguments.what == "clients":
        found = clients(arguments.model, arguments.rounds)
    else:
        found = soak(arguments.model, arguments.minutes, arguments.clients)
    print(json.dumps(found))
    return int(not found["ok"])


if __name__ == "__main__":
    sys.exit(main())
