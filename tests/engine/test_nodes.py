"""Machines of a group, as they meet: whoever connects, whatever it says or does not, the others are not held up."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
from engine_fakes import FakeGroup

from octavo.server.config import EngineConfig, SupervisorConfig
from octavo.server.engine import epoch, node, nodes
from octavo.server.engine.group import Group, Launcher
from octavo.server.engine.nodes import CONTROL, Link, Nodes, greeted
from octavo.server.engine.progress import Progress, RankFigures
from octavo.server.errors import StartupError


@pytest.fixture
def config() -> SupervisorConfig:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return SupervisorConfig(model="tiny", tensor_parallel_size=2, nnodes=2, master_port=port)


@pytest.fixture
def head(config: SupervisorConfig) -> Iterator[Nodes]:
    head = Nodes(config)
    yield head
    head.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_node_that_is_gone_again_has_not_joined(config: SupervisorConfig, head: Nodes) -> None:
    for _ in range(3):
        reset(greeted(config, CONTROL, 1))
    greeted(config, CONTROL, 1).close()
    assert head.join(0.3) == [1]
    with greeted(config, CONTROL, 1):
        assert head.join(5.0) == []
    with greeted(config, CONTROL, 1):  # in place of the one that has joined
        assert head.join(5.0) == [] and not head.links[1].is_lost


def test_who_says_nothing_holds_up_nobody(
    config: SupervisorConfig, head: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ("127.0.0.1", config.master_port)
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(7)]
        silent[0].sendall(b"octavo")
        begin_s = time.monotonic()
        stack.enter_context(greeted(config, CONTROL, 1))
        assert head.join(5.0) == []
        silent += [stack.enter_context(socket.create_connection(address)) for _ in range(7)]
        silent[-1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        late = stack.enter_context(greeted(config, 2, 1))  # of another epoch
        rank = stack.enter_context(greeted(config, 3, 1))
        (channel,) = head.start(config.engine(), 3)
        assert channel.getpeername() == rank.getsockname() and time.monotonic() - begin_s < 3.0
        assert channel.gettimeout() is None
        channel.close()
        for closed in (silent[-1], late):
            closed.settimeout(5.0)
            with suppress(ConnectionResetError):
                assert closed.recv(1) == b""
        monkeypatch.setattr(nodes, "RANKS_S", 0.3)
        silent[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[1].recv(1)
        monkeypatch.setattr(nodes, "GREETING_S", 0.0)
        stack.enter_context(socket.create_connection(address)).sendall(b"o")
        with pytest.raises(StartupError, match="did not connect"):
            head.start(config.engine(), 4)
        assert len(head._peers) == 13  # the last one's time is over


def test_of_many_that_say_nothing_the_oldest_are_closed(
    config: SupervisorConfig, head: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "MAX_PEERS", 4)
    with ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", config.master_port))) for _ in range(9)]
        stack.enter_context(greeted(config, CONTROL, 1))
        assert head.join(5.0) == []
        many[0].settimeout(5.0)
        assert many[0].recv(1) == b""


def test_starting_ends_in_time_whoever_connects(
    config: SupervisorConfig, head: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "RANKS_S", 0.5)
    with ExitStack() as stack:
        node = stack.enter_context(greeted(config, CONTROL, 1))
        assert head.join(5.0) == []
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", config.master_port)))
        begin_s = time.monotonic()
        with pytest.raises(StartupError, match=r"ranks \[1\] of other nodes did not connect"):
            head.start(config.engine(), 0)
        assert time.monotonic() - begin_s < 3.0
        monkeypatch.setattr(nodes, "RANKS_S", 60.0)
        node.close()  # which is known at once
        with pytest.raises(StartupError, match=r"ranks \[1\] of other nodes did not connect"):
            head.start(config.engine(), 1)
        assert time.monotonic() - begin_s < 5.0


WORD: dict[str, Any] = {"epoch": 3, "figures": [[5, 1.0, 0.5, 7]], "ended": [], "finding": None}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (json.dumps(WORD), ""),
        (json.dumps(WORD | {"ended": [1]}), "an engine process ended (rank 1)"),
        (json.dumps({"killed": 3}), ""),  # though nobody has asked for it
        ('{"epoch": 3}', "node 1 makes no sense"),
        (json.dumps(WORD | {"figures": []}), "node 1 makes no sense"),
        (json.dumps(WORD | {"figures": [[1, 2]]}), "node 1 makes no sense"),
        (json.dumps(WORD | {"figures": [["a", 1.0, 1.0, 1 << 70]]}), "node 1 makes no sense"),
        (json.dumps(WORD | {"ended": 1}), "node 1 makes no sense"),
        (json.dumps(WORD | {"finding": [1, 2, 3]}), "node 1 makes no sense"),
        (json.dumps(WORD | {"finding": [9, "kv", "a block"]}), "node 1 makes no sense"),
        ("[" * 50_000, "node 1 is gone"),
        ("\udcff", "node 1 is gone"),
    ],
)
def test_words_of_a_node(words: str, told: str, config: SupervisorConfig, head: Nodes) -> None:
    ours, theirs = socket.socketpair()
    with greeted(config, CONTROL, 1) as theirs_too, ours, theirs:
        assert head.join(5.0) == []
        link = head.links[1]
        group = Group(ours, Progress(), cast(Any, None), theirs, 3, 2, head)
        data = words.encode(errors="surrogateescape") + b"\n"
        theirs_too.sendall(data)
        assert link.socket.recv(len(data), socket.MSG_PEEK | socket.MSG_WAITALL) == data  # all of it is there
        assert group.hear(1) == told
        assert link.is_lost == told.startswith("node") and group.links == {1: link}
        if words == json.dumps(WORD):
            assert group.progress.figures(2)[1] == RankFigures(5, 1.0, 0.5, 7)
        group.progress.close()


async def test_an_epoch_whose_machines_cannot_be_reached() -> None:
    class Unreachable(FakeGroup):
        def wait_until_started(self) -> None:
            raise OSError("no descriptor is left")

    group = Unreachable(SupervisorConfig(), 0, [])
    tried = epoch.Epoch(cast(Group, group), 0.0, lambda: 1.0, lambda outputs: None)
    fault = await asyncio.wait_for(tried.fault, 5.0)
    assert (fault.reason, fault.text) == ("died", "no descriptor is left")
    await tried.kill()


async def test_a_node_that_falls_silent_while_the_engine_loads(
    config: SupervisorConfig, head: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that starting takes is none of its silence."""
    monkeypatch.setattr(epoch, "SILENT_S", 0.6)
    monkeypatch.setattr(epoch, "TICK_S", 0.1)

    class Slow(FakeGroup):
        def wait_until_started(self) -> None:
            time.sleep(0.8)

    group = Slow(config, 0, [])
    with greeted(config, CONTROL, 1):
        head.join(5.0)
        group.links = head.links
        begin_s = time.monotonic()
        loads = epoch.Epoch(cast(Group, group), 0.0, lambda: 1.0, lambda outputs: None)
        fault = await asyncio.wait_for(loads.fault, 5.0)
        assert fault.reason == "stalled" and fault.text.startswith("node 1 has been silent for")
        assert time.monotonic() - begin_s > 1.3
        await loads.kill()


def test_a_node_is_heard_while_it_starts_ranks(
    config: SupervisorConfig, head: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is of another version says so."""
    monkeypatch.setattr(node, "BEAT_S", 0.05)
    heard: list[dict[str, Any]] = []

    class Slow(FakeGroup):
        def wait_until_started(self) -> None:
            head.links[1].socket.settimeout(5.0)
            heard.extend(head.links[1].receive())  # waits for it
            self.wait(0.0)
            raise StartupError("it takes too long")

    def start_some(config: EngineConfig, epoch: int, devices: range, *_: object, **__: object) -> FakeGroup:
        return Slow(config, epoch, list(devices))

    message = {"start": 3, "config": config.engine().to_json(), "ranks": [1, 2]}
    link = Link(greeted(config, CONTROL, 1))
    assert head.join(5.0) == []
    launcher = cast(Launcher, SimpleNamespace(start_some=start_some))
    assert node._start(config, link, launcher, message) is None and heard[0] == {}
    message["config"] = json.dumps({"model": "tiny", "of_tomorrow": 1})
    with pytest.raises(StartupError, match="another version of Octavo"):
        node._start(config, link, launcher, message)
    link.close()
