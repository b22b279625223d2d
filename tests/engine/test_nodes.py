"""Machines of a group, as they meet: whoever connects, whatever it says or does not, the others are not held up."""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from octavo.server.config import SupervisorConfig
from octavo.server.engine import nodes
from octavo.server.engine.nodes import CONTROL, Nodes, greeted
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
