"""Ranks on several machines: the head, which serves, and the nodes, which only compute. Knows no asyncio.

The head listens on one port. Each node opens a connection to it that stays, over which it is told to start and to kill
its ranks, and says every second that it is there, what its ranks have done, and which have ended; lines of JSON both
ways. For each of its ranks it opens another one, by which that rank gets its plans from rank 0. A connection begins
with a greeting that says what it is. Whoever can reach the port can take part, and neither gloo nor NCCL ask who
speaks: the network between the machines must be a private one.
"""

import errno
import json
import logging
import select
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from octavo.server.config import EngineConfig, SupervisorConfig
from octavo.server.errors import StartupError

log = logging.getLogger("octavo")

_GREETING = struct.Struct("<8sII")  # MAGIC, epoch or CONTROL, node or rank
MAGIC = b"octavo 1"
CONTROL = 0xFFFFFFFF
BEAT_S = 1.0  # between two words of a node
SILENT_S = 10.0  # without a word, after which a machine is given up
GREETING_S = 5.0  # for a connection to say what it is
MAX_PEERS = 128  # that have not said it; of more the oldest are closed
RANKS_S = 30.0  # for a node's ranks to be connected
MAX_LINE_BYTES = 1 << 16


def ranks_of(node: int, num_nodes: int, num_ranks: int) -> range:
    """The ranks that a node has; the head is node 0."""
    return range(node * num_ranks // num_nodes, (node + 1) * num_ranks // num_nodes)


def ready(descriptors: Iterable[int], timeout_s: float, events: int = select.POLLIN) -> set[int]:
    """Those that can be read, or of which there is nothing more to read; waits for one. Any number will do."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, events)
    return {descriptor for descriptor, _ in poll.poll(1e3 * max(0.0, timeout_s))}


class Link:
    """A connection that stays, and the lines that come over it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * SILENT_S))
        self.socket, self._data = connection, b""
        self.heard_s = time.monotonic()  # when the other side last said something
        self.is_lost = False

    def send(self, message: dict[str, Any]) -> None:
        """What cannot be sent is lost, and so is then the link."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_lost = True

    def receive(self) -> list[dict[str, Any]]:
        """What has come; waits for something. Nothing more comes where the link is lost then."""
        try:
            data = self.socket.recv(MAX_LINE_BYTES)
        except OSError:
            data = b""
        if not data:
            self.is_lost = True
            return []
        self.heard_s = time.monotonic()
        *lines, self._data = (self._data + data).split(b"\n")
        try:
            if len(self._data) > MAX_LINE_BYTES:
                raise ValueError
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):
            self.is_lost = True
            return []

    def look(self) -> None:
        """Find the link lost where the other side has closed it. Takes nothing of what has come."""
        self.is_lost = self.is_lost or bool(ready([self.socket.fileno()], 0.0, select.POLLRDHUP))

    def close(self) -> None:
        """The other side finds the link lost."""
        self.socket.close()
        self.is_lost = True


@dataclass(slots=True)
class _Peer:
    """Who has connected and has not said yet what it is."""

    connection: socket.socket
    host: str
    until_s: float
    data: bytes = b""


class Nodes:
    """The other machines, as the head sees them."""

    def __init__(self, config: SupervisorConfig) -> None:
        """Listens. Raises StartupError where it cannot."""
        self.num_nodes, host, port = config.nnodes, config.master_addr, config.master_port
        self.links: dict[int, Link] = {}  # by node
        self._waiting: dict[int, _Peer] = {}  # nodes that have a link, which must be a dead one
        self._peers: dict[int, _Peer] = {}  # by descriptor, in the order in which they came
        try:
            family, *_, address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0]
            try:
                self._listener = socket.create_server(address[:2], family=family)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                self._listener = socket.create_server(("", port))  # a service's address, which is no machine's own
        except OSError as error:
            raise StartupError(
                f"cannot listen on --master-addr {host} --master-port {port}: {error.strerror or error}"
            ) from None
        self._listener.setblocking(False)

    def join(self, timeout_s: float) -> list[int]:
        """Take up nodes that ask to; waits for it. Returns those that are missing then."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for node, link in list(self.links.items()):
                link.look()
                if link.is_lost:
                    link.close()
                    del self.links[node]
            for node in [node for node in self._waiting if node not in self.links]:
                peer = self._waiting.pop(node)
                with suppress(OSError):  # it is gone again
                    link = Link(peer.connection)
                    link.look()
                    if not link.is_lost:
                        self.links[node] = link
                        log.info("node %d has joined from %s", node, peer.host)
                        continue
                peer.connection.close()
            missing = [node for node in range(1, self.num_nodes) if node not in self.links]
            left_s = deadline_s - time.monotonic()
            if not missing or left_s <= 0:
                return missing
            for *_, connection in self._greet(left_s):  # of ranks that nobody waits for any more
                connection.close()

    def start(self, config: EngineConfig, epoch: int) -> list[socket.socket]:
        """Have all nodes start their ranks of an epoch; the connections to these, in order. Raises StartupError."""
        num_ranks, wanted = config.tensor_parallel_size, set()
        for node, link in self.links.items():
            ranks = ranks_of(node, self.num_nodes, num_ranks)
            wanted |= set(ranks)
            link.send({"start": epoch, "config": config.to_json(), "ranks": [ranks.start, ranks.stop]})
        found: dict[int, socket.socket] = {}
        deadline_s = time.monotonic() + RANKS_S
        while wanted - set(found):
            for link in self.links.values():
                link.look()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or any(link.is_lost for link in self.links.values()):
                for connection in found.values():
                    connection.close()
                raise StartupError(f"ranks {sorted(wanted - set(found))} of other nodes did not connect")
            for of_epoch, rank, connection in self._greet(min(left_s, BEAT_S)):
                if of_epoch != epoch or rank not in wanted or rank in found:
                    connection.close()
                else:
                    found[rank] = connection
        return [found[rank] for rank in sorted(found)]

    def _greet(self, timeout_s: float) -> list[tuple[int, int, socket.socket]]:
        """Take what connections say; waits for something. Those of ranks, with epoch and number; nodes are put aside.

        None is waited for alone, so that one that says nothing holds up no other.
        """
        readable = ready([self._listener.fileno(), *self._peers], timeout_s)
        if self._listener.fileno() in readable:
            with suppress(OSError):  # no more have come
                for _ in range(MAX_PEERS):
                    connection, (host, *_) = self._listener.accept()
                    connection.setblocking(False)
                    self._peers[connection.fileno()] = _Peer(connection, host, time.monotonic() + GREETING_S)
                    readable.add(connection.fileno())
        ranks = []
        for descriptor in [each for each in self._peers if each in readable]:
            peer = self._peers[descriptor]
            try:
                peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                data = peer.connection.recv(_GREETING.size - len(peer.data))
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            peer.data += data
            if data and len(peer.data) < _GREETING.size:
                continue
            del self._peers[descriptor]
            magic, epoch, number = _GREETING.unpack(peer.data) if data else (b"", 0, 0)
            if magic == MAGIC and epoch != CONTROL:
                peer.connection.setblocking(True)
                ranks.append((epoch, number, peer.connection))
            elif magic == MAGIC and 1 <= number < self.num_nodes:
                if number in self._waiting:
                    self._waiting[number].connection.close()
                self._waiting[number] = peer
            else:
                peer.connection.close()
        now_s, num_more = time.monotonic(), len(self._peers) - MAX_PEERS
        for index, (descriptor, peer) in enumerate(list(self._peers.items())):
            if index < num_more or now_s > peer.until_s:
                self._peers.pop(descriptor).connection.close()
        return ranks

    @property
    def listens(self) -> str:
        """Where others can join, in words."""
        host, port = self._listener.getsockname()
        hint = " (from this machine alone: --master-addr is for an address of its own)" if host[:4] == "127." else ""
        return f"{host} port {port}{hint}"

    def address(self) -> str:
        """This machine's own, as another one reaches it."""
        host: str = next(iter(self.links.values())).socket.getsockname()[0]
        return host

    def close(self) -> None:
        """Have the nodes end."""
        for link in self.links.values():
            link.send({"end": True})
            link.close()
        for peer in (*self._waiting.values(), *self._peers.values()):
            peer.connection.close()
        self._listener.close()


def greeted(config: SupervisorConfig, epoch: int, number: int) -> socket.socket:
    """A connection to the head that has said what it is: CONTROL and a node, or an epoch and a rank. Raises OSError."""
    connection = socket.create_connection((config.master_addr, config.master_port), timeout=GREETING_S)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(_GREETING.pack(MAGIC, epoch, number))
    return connection
