"""What the ranks of a group say to each other: agreement while they start, then step plans, each with a digest.

Rank 0 decides, the others obey: it is joined to each of them by a socket pair that both inherit. A plan is msgpack, as
everything that crosses between processes here; nothing is unpickled. A rank that finds itself with another plan than
rank 0's, with one of another epoch, or with one missing, raises before it takes part in anything.
"""

import hashlib
import select
import socket
import struct
from dataclasses import dataclass, field

import msgspec

from octavo.server.engine.channel import Failed, FrameBuffer, RankInfo
from octavo.server.engine.faults import Faults
from octavo.server.engine.plan import StepPlan
from octavo.server.errors import StartupError

VERSION = 1  # of the message that carries a plan
DIGEST_BYTES = 16
RECEIVE_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")
_HEADER = struct.Struct(f"<H{DIGEST_BYTES}s")  # version, digest of the plan
HEADER_BYTES = _HEADER.size


class PeerError(RuntimeError):
    """A rank is gone, or has another plan than rank 0."""


class Planned(msgspec.Struct, tag="planned"):
    """A rank -> rank 0: the KV blocks that its memory holds."""

    num_blocks: int
    fingerprint: str = ""  # of the model that it has read of


class Agreed(msgspec.Struct, tag="agreed"):
    """Rank 0 -> a rank: the KV blocks that every rank has."""

    num_blocks: int
    meeting_point: tuple[str, int] | None = None  # for collectives of several machines: host and port


class Loaded(msgspec.Struct, tag="loaded"):
    """A rank -> rank 0: ready for the first step."""

    info: RankInfo


@dataclass(frozen=True, slots=True)
class Place:
    """A process's place in its group, as whoever started it says. By default it is alone."""

    rank: int = 0
    num_ranks: int = 1
    epoch: int = 0
    memory: int = -1  # descriptor of memory that all ranks share
    channels: list[socket.socket] = field(default_factory=list)  # of rank 0, to each other rank; of others, to rank 0
    device: int = 0  # the number of the rank's device
    local: tuple[int, int] | None = None  # number, and how many there are, among the ranks of this machine; None: all
    address: str = ""  # of this machine, towards others that have ranks; empty where none has

    @property
    def local_rank(self) -> int:
        """Number among the ranks of this machine."""
        return self.rank if self.local is None else self.local[0]

    @property
    def num_local_ranks(self) -> int:
        """Ranks of this machine."""
        return self.num_ranks if self.local is None else self.local[1]


_encoder = msgspec.msgpack.Encoder()
_decode_plan = msgspec.msgpack.Decoder(StepPlan).decode
_decode_message = msgspec.msgpack.Decoder(Planned | Agreed | Loaded | Failed).decode


def encode_plan(plan: StepPlan) -> bytes:
    """Version, digest and plan."""
    body = _encoder.encode(plan)
    return _HEADER.pack(VERSION, _digest(body)) + body


def decode_plan(data: bytes) -> StepPlan:
    """Inverse of `encode_plan`. Raises PeerError where what is decoded has another digest than what was encoded."""
    try:
        version, digest = _HEADER.unpack_from(data)
        if version != VERSION:
            raise PeerError(f"a plan has version {version}, expected {VERSION}")
        plan: StepPlan = _decode_plan(data[HEADER_BYTES:])
    except (struct.error, msgspec.DecodeError) as error:
        raise PeerError(f"a plan cannot be read: {error}") from None
    if _digest(_encoder.encode(plan)) != digest:
        raise PeerError(f"the plan of step {plan.step} is not rank 0's")
    return plan


def _other_plan(data: bytes) -> bytes:
    """A message whose plan is not the one that its digest was made of."""
    plan = decode_plan(data)
    plan.starts[0] += 1
    return data[:HEADER_BYTES] + _encoder.encode(plan)


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


class Channel:
    """Messages over one socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._buffer = channel, FrameBuffer()
        self._bodies: list[bytes] = []  # received, not yet asked for; the last one came first

    def send(self, body: bytes) -> None:
        """Raises PeerError where nobody is at the other end."""
        try:
            self._channel.sendall(_LENGTH.pack(len(body)) + body)
        except OSError:
            raise PeerError("a rank is gone") from None

    def receive(self) -> bytes:
        """The next message. Raises PeerError where none can come."""
        while not self._bodies:
            try:
                data = self._channel.recv(RECEIVE_BYTES)
            except OSError:
                data = b""
            if not data:
                raise PeerError("a rank is gone")
            self._bodies = self._buffer.feed(data)[::-1]
        return self._bodies.pop()

    def wait(self, timeout_s: float) -> bool:
        """Whether `receive` will find something, which may be the end, within so many seconds."""
        return bool(self._bodies or select.select([self._channel], [], [], timeout_s)[0])


class Leader:
    """Rank 0's side. With no other rank it agrees with itself."""

    def __init__(self, place: Place) -> None:
        self._channels = [Channel(channel) for channel in place.channels]

    def agree(self, num_blocks: int, fingerprint: str = "", meeting_point: tuple[str, int] | None = None) -> int:
        """The least number of KV blocks that any rank has memory for.

        Raises StartupError where a rank cannot start, or has read of another model.
        """
        for rank in range(1, len(self._channels) + 1):
            message = self._hear(rank)
            assert isinstance(message, Planned)
            if message.fingerprint != fingerprint:
                raise StartupError(f"rank {rank} has another model, or another version of Octavo, than rank 0")
            num_blocks = min(num_blocks, message.num_blocks)
        for channel in self._channels:
            channel.send(_encoder.encode(Agreed(num_blocks, meeting_point)))
        return num_blocks

    def wait_until_loaded(self) -> list[RankInfo]:
        """What each of the other ranks has loaded. Raises StartupError where one could not."""
        infos = []
        for rank in range(1, len(self._channels) + 1):
            message = self._hear(rank)
            assert isinstance(message, Loaded)
            infos.append(message.info)
        return infos

    def broadcast(self, plan: StepPlan) -> None:
        """Tell the other ranks what to execute. Raises PeerError where one is gone."""
        if self._channels:
            frame = encode_plan(plan)
            for channel in self._channels:
                channel.send(frame)

    def _hear(self, rank: int) -> Planned | Agreed | Loaded:
        try:
            message: Planned | Agreed | Loaded | Failed = _decode_message(self._channels[rank - 1].receive())
        except PeerError:
            raise Failed(f"rank {rank} ended while it started (its log says why)", True, rank).error() from None
        if isinstance(message, Failed):
            raise msgspec.structs.replace(message, message=f"rank {rank}: {message.message}", rank=rank).error()
        return message


class Follower:
    """The side of every other rank."""

    def __init__(self, place: Place) -> None:
        (channel,) = place.channels
        self._channel, self._epoch = Channel(channel), place.epoch
        self.faults = Faults()  # none, unless a test asks for some
        self.num_steps = 0  # plans received
        self.meeting_point: tuple[str, int] | None = None  # once agreed

    def agree(self, num_blocks: int, fingerprint: str = "") -> int:
        """See `Leader`. Raises PeerError where rank 0 gives up."""
        self._channel.send(_encoder.encode(Planned(num_blocks, fingerprint)))
        message = _decode_message(self._channel.receive())
        assert isinstance(message, Agreed)
        self.meeting_point = message.meeting_point
        return message.num_blocks

    def loaded(self, info: RankInfo) -> None:
        """Tell rank 0 that this rank is ready."""
        self._channel.send(_encoder.encode(Loaded(info)))

    def failed(self, failed: Failed) -> None:
        """Tell rank 0 why this rank cannot start."""
        self._channel.send(_encoder.encode(failed))

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to be received within so many seconds."""
        return self._channel.wait(timeout_s)

    def receive(self) -> StepPlan | None:
        """The next step's plan; None where rank 0 has ended. Raises PeerError for any other plan."""
        try:
            data = self._channel.receive()
            while (fault := self.faults.plan(self.num_steps + 1)) == "drop":
                data = self._channel.receive()
        except PeerError:
            return None
        plan = decode_plan(_other_plan(data) if fault == "change" else data)
        wanted = self._epoch, self.num_steps + 1
        if (plan.epoch, plan.step) != wanted:
            raise PeerError(f"a plan is of (epoch, step) {(plan.epoch, plan.step)}, expected {wanted}")
        self.num_steps += 1
        return plan
