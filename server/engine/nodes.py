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
from contextlib import suppress
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
RANKS_S = 30.0  # for a node's ranks to be connected
MAX_LINE_BYTES = 1 << 16


def ranks_of(node: int, num_nodes: int, num_ranks: int) -> range:
    """The ranks that a node has; the head is node 0."""
    return range(node * num_ranks // num_nodes, (node + 1) * num_ranks // num_nodes)


class Link:
    """A connection that stays, and the lines that come over it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        except (ValueError, TypeError):
            self.is_lost = True
            return []

    def close(self) -> None:
        """The other side finds the link lost."""
        self.socket.close()
        self.is_lost = True


class Nodes:
    """The other machines, as the head sees them."""

    def __init__(self, config: SupervisorConfig) -> None:
        """Listens. Raises StartupError where it cannot."""
        self.num_nodes, host, port = config.nnodes, config.master_addr, config.master_port
        self.links: dict[int, Link] = {}  # by node
        self._waiting: dict[int, socket.socket] = {}  # connections of nodes that have a link, which must be a dead one
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

    def join(self, timeout_s: float) -> list[int]:
        """Take up nodes that ask to; waits for it. Returns those that are missing then."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for node, link in list(self.links.items()):
                if link.is_lost:
                    link.close()
                    del self.links[node]
            for node, connection in list(self._waiting.items()):
                if node not in self.links:
                    self.links[node] = Link(self._waiting.pop(node))
                    log.info("node %d has joined from %s", node, connection.getpeername()[0])
            missing = [node for node in range(1, self.num_nodes) if node not in self.links]
            left_s = deadline_s - time.monotonic()
            if not missing or left_s <= 0:
                return missing
            if select.select([self._listener], [], [], left_s)[0]:
                self._greet()

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
            lost = [node for node, link in self.links.items() if link.is_lost]
            if lost or not select.select([self._listener], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                for connection in found.values():
                    connection.close()
                raise StartupError(f"ranks {sorted(wanted - set(found))} of other nodes did not connect")
            if (greeted := self._greet()) is not None and greeted[0] == epoch and greeted[1] in wanted:
                found[greeted[1]] = greeted[2]
        return [found[rank] for rank in sorted(found)]

    def _greet(self) -> tuple[int, int, socket.socket] | None:
        """Take the next connection: one of a rank, with its epoch and number; one of a node is put aside."""
        connection, _ = self._listener.accept()
        connection.settimeout(GREETING_S)
        with suppress(OSError, struct.error):
            magic, epoch, number = _GREETING.unpack(connection.recv(_GREETING.size, socket.MSG_WAITALL))
            if magic == MAGIC and epoch != CONTROL:
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return epoch, number, connection
            if magic == MAGIC and 1 <= number < self.num_nodes:
                if number in self._waiting:
                    self._waiting.pop(number).close()
                self._waiting[number] = connection
                return None
        connection.close()
        return None

    def address(self) -> str:
        """This machine's own, as another one reaches it."""
        host: str = next(iter(self.links.values())).socket.getsockname()[0]
        return host

    def close(self) -> None:
        """Have the nodes end."""
        for link in self.links.values():
            link.send({"end": True})
            link.close()
        for connection in self._waiting.values():
            connection.close()
        self._listener.close()


def greeted(config: SupervisorConfig, epoch: int, number: int) -> socket.socket:
    """A connection to the head that has said what it is: CONTROL and a node, or an epoch and a rank. Raises OSError."""
    connection = socket.create_connection((config.master_addr, config.master_port), timeout=GREETING_S)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(_GREETING.pack(MAGIC, epoch, number))
    return connection
