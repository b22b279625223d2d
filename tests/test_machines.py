"""Ranks on several machines, which are network namespaces here, or none: the bits of one machine, whatever is lost."""

import asyncio
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import eventually
from servers import command, launched, processes

from octavo.server.cli import main

FLAGS = ("--kv-cache-memory-bytes", "8M", "--max-model-len", "512", "--tensor-parallel-size", "3")
PROMPTS = ("Hello", "An octavo is a sheet", "a" * 70)
ADDRESSES = ("10.213.7.1", "10.213.7.2")


@pytest.fixture(scope="module")
def tiny(served_checkpoint: Callable[[str], Path]) -> Path:
    return served_checkpoint("smollm2")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def answers(client: httpx.Client) -> list[Any]:
    """Greedy and seeded, with log-probabilities."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        body = {"prompt": prompt, "max_tokens": 30, "ignore_eos": True, "logprobs": 2, "seed": 5}
        response = client.post("/v1/completions", json={**body, "temperature": number % 2})
        assert response.status_code == 200, response.text
        found.append(response.json()["choices"])
    return found


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The answers of three ranks on one machine."""
    with launched(tmp_path_factory.mktemp("one") / "log", *command(tiny, *FLAGS)) as server:
        server.wait_until_ready()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            return answers(client)


def machine(folder: Path, number: int, address: str, port: int) -> list[str]:
    """Its command."""
    place = ("--nnodes", "2", "--node-rank", str(number), "--master-addr", address, "--master-port", str(port))
    return command(folder, *FLAGS, *place)


def test_two_machines_on_loopback(tiny: Path, expected: list[Any], tmp_path: Path) -> None:
    """The second is told by the environment, comes first, is lost, and comes again."""
    port = free_port()
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        node = stack.enter_context(launched(tmp_path / "node", *command(tiny, *FLAGS), **place))
        head = stack.enter_context(launched(tmp_path / "head", *machine(tiny, 0, "127.0.0.1", port)))
        head.wait_until_ready()
        assert "it is waited for: ranks over several machines are not made fewer" in head.log
        client = stack.enter_context(httpx.Client(base_url=head.url, timeout=60))
        assert len(head.rank_pids) == 1 and len(node.rank_pids) == 2
        assert answers(client) == expected
        told = re.findall(r'^octavo:rank_steps_total\{.*rank="(\d)"\} (.*)$', client.get("/metrics").text, re.MULTILINE)
        assert [rank for rank, _ in told] == ["0", "1", "2"] and min(float(count) for _, count in told) > 0
        os.kill(node.rank_pids[1], signal.SIGKILL)  # a rank of another machine
        assert answers(client) == expected
        os.kill(node.pid, signal.SIGKILL)  # the machine
        asyncio.run(eventually(lambda: client.get("/health").json()["status"] == "recovering", 20))
        assert "node 1 is gone" in head.log
        again = stack.enter_context(launched(tmp_path / "again", *command(tiny, *FLAGS), **place))
        assert answers(client) == expected
        os.kill(head.pid, signal.SIGTERM)
        assert head.process.wait(20) == 0 and again.process.wait(20) == 0
        for server in (head, node, again):
            asyncio.run(eventually(lambda server=server: not processes(server.pid), 5))  # type: ignore[misc]


@contextmanager
def namespaces() -> Iterator[list[str]]:
    """Names of two, joined by a cable, each with one of ADDRESSES; skips the test where that is not allowed."""
    names = [f"octavo{os.getpid()}{end}" for end in "ab"]

    def ip(*arguments: str, check: bool = True) -> bool:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode and check:
            pytest.skip(f"no right to make network namespaces: {done.stderr.strip()}")
        return not done.returncode

    if shutil.which("ip") is None:
        pytest.skip("no ip(8) to make network namespaces with")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def enter(name: str) -> None:
    """What this thread opens from now on is in a namespace."""
    with open(f"/run/netns/{name}") as file:
        assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0


@pytest.mark.slow
def test_two_machines_with_a_network_between(tiny: Path, expected: list[Any], tmp_path: Path) -> None:
    with namespaces() as names, ExitStack() as stack:
        head, node = (
            stack.enter_context(
                launched(tmp_path / name, "ip", "netns", "exec", name, *machine(tiny, number, ADDRESSES[0], 29500))
            )
            for number, name in enumerate(names)
        )

        def ask() -> list[Any]:
            head.wait_until_ready()
            with httpx.Client(base_url=head.url, timeout=60) as client:
                return answers(client)

        with ThreadPoolExecutor(1, initializer=enter, initargs=(names[0],)) as inside:
            assert inside.submit(ask).result() == expected
        assert len(head.rank_pids) == 1 and len(node.rank_pids) == 2
        reachable = set()  # from the other machine: all of it is on the address that was given
        for server in (head, node):
            for row in Path(f"/proc/{server.pid}/net/tcp").read_text().splitlines()[1:]:
                local, _, state = row.split()[1:4]
                if state == "0A" and not local.startswith("0100007F"):
                    reachable.add(socket.inet_ntoa(bytes.fromhex(local[:8])[::-1]))
        assert reachable == set(ADDRESSES)


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ("--nnodes 4", {}, "--tensor-parallel-size is 3, but --nnodes 4: each needs a rank"),
        ("--nnodes 2 --node-rank 2", {}, "--node-rank is 2, but --nnodes 2: they are numbered from 0"),
        ("", {"WORLD_SIZE": "2", "RANK": "x"}, "RANK: not a whole number: 'x'"),
        ("", {"WORLD_SIZE": "9"}, "WORLD_SIZE: must be between 1 and 8, not 9"),
        ("", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, but one octavo serve starts"),
        ("--nnodes 1 --tensor-parallel-size 8", {"WORLD_SIZE": "2", "RANK": "5"}, "no model"),  # flags come first
        ("", {"RANK": "5", "MASTER_PORT": "x"}, "no model"),  # of no group
    ],
)
def test_machines_that_cannot_be(
    flags: str,
    environment: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", "/nowhere", "--tensor-parallel-size", "3", *flags.split()]) == 1
    assert capsys.readouterr().err.startswith(f"octavo: error: {words}")


@pytest.mark.parametrize("flag", ["--node-rank 1", "--master-addr 10.0.0.1", "--nnodes 1 --master-port 29501"])
@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_place_among_machines_needs_some(
    flag: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the environment tells of some it is one of them; others' variables alone break nothing."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "/nowhere", *flag.split()])
    name = flag.split()[-2]
    words = f"octavo serve: error: {name} is for several machines, but --nnodes is 1\n"
    assert ended.value.code == 2 and capsys.readouterr().err == words
    assert main(["serve", "/nowhere"]) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["serve", "/nowhere", "--tensor-parallel-size", "2", *flag.removeprefix("--nnodes 1 ").split()]) == 1
    assert all(line.startswith("octavo: error: no model") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("number", "waits", "words"),
    [
        (0, "waiting for node 1 on 127.0.0.1 port {} (from this machine alone", "node 1 did not join within 1 s"),
        (1, "waiting for the head at 127.0.0.1 port {}", "there is no head at --master-addr 127.0.0.1"),
    ],
)
def test_a_machine_alone_gives_up(number: int, waits: str, words: str, tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    alone = [*machine(tiny, number, "127.0.0.1", port), "--max-recovery-time", "1"]
    with launched(tmp_path / "log", *alone) as server:
        assert server.process.wait(60) == 1
        assert server.log.count(waits.format(port)) == 1
        assert server.log.splitlines()[-1].startswith(f"octavo: error: {words}")
