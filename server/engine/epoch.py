"""One life of the engine, as the front end sees it: its processes, the socket to it, and what goes wrong first.

An epoch ends with its first fault and is never mended. It is watched in three ways: a process that ends is known at
once, by its pidfd and by the socket; an engine that fails says so; one that does not go on is known by the page of
`progress`, once it is far behind what it expected of itself. So is a rank that has nothing to do and does not show
itself.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from octavo.server.engine.channel import (
    EngineInfo,
    Failed,
    FrameBuffer,
    Ready,
    StepOutput,
    ToEngine,
    decode_to_front_end,
    encode_frame,
)
from octavo.server.engine.group import Group
from octavo.server.engine.nodes import SILENT_S, Link
from octavo.server.engine.progress import RankFigures
from octavo.server.errors import StartupError

log = logging.getLogger("octavo")

TICK_S = 0.25  # between two looks at the engine's progress
EXPECTED_FACTOR = 8.0  # how many times its expected time a step may take
LAST_WORDS_S = 0.02  # for what a process has sent before it ended
KILL_S = 30.0  # for a killed process to be gone
CLOSE_S = 5.0  # for an engine to end by itself


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an epoch has ended. `text` is for people, `silent_s` the time since the engine last showed itself."""

    reason: str  # one of REASONS
    text: str
    silent_s: float = 0.0
    detector: str = ""  # one of DETECTORS, where the engine computed wrongly
    rank: int | None = None  # whose fault it is, where that is known
    is_gone: bool = False  # since its device is not there


# startup: it says that it cannot start; died: a process ended; failed: an exception; stalled: no progress;
# unreadable: what it sends makes no sense; wrong: a known answer came out differently; corrupt: bits have changed;
# regrown: nothing is wrong, but devices are back
REASONS = ("startup", "died", "failed", "stalled", "unreadable", "wrong", "corrupt", "regrown")
DETECTORS = ("weights", "kv", "ranks", "audit", "known_answer")  # of changed bits


class Epoch(asyncio.Protocol):
    """An engine's processes, once they are being started.

    Attributes:
        ready: the engine's description of itself, once it has loaded.
        fault: set once.
    """

    def __init__(
        self,
        group: Group,
        deadline_s: float,
        patience: Callable[[], float],
        on_outputs: Callable[[list[StepOutput]], None],
    ) -> None:
        """deadline_s: time without progress that is a fault, unless the engine expects a step to take long; 0: none.

        `patience` gives what both are to be multiplied by. `on_outputs` gets what the engine has sent, all that came at
        once in one call, and nothing after the fault; it must not raise.
        """
        self._group = group
        self._deadline_s, self._patience = deadline_s, patience
        self._on_outputs = on_outputs
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self.fault: asyncio.Future[Fault] = self._loop.create_future()
        self._buffer = FrameBuffer()
        self._transport: asyncio.Transport | None = None
        self._killed: asyncio.Task[None] | None = None
        self._first_ended: int | None = None  # rank
        self._begin_s = self._looked_s = time.monotonic()
        self._since_s = self._begin_s  # from when on the engine's silence counts
        self._awake_s = self._begin_s  # when this process did not run itself, and could hear nothing
        self._ran_s = self._begin_s  # when no process was stopped
        self._worked_s = self._begin_s  # when a step was being executed
        self._timer = self._loop.call_later(TICK_S, self._look)
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        """Takes the socket as soon as the processes are there."""
        try:
            await asyncio.to_thread(self._group.wait_until_started)
        except (StartupError, OSError) as error:
            self.fail("died", str(error))
        if self.fault.done():
            return
        for pidfd in self._group.pidfds:
            self._loop.add_reader(pidfd, self._on_end, pidfd)
        for node, link in self._group.links.items():
            link.heard_s = time.monotonic()  # nobody has listened until now
            self._loop.add_reader(link.socket.fileno(), self._on_word, node, link)
        self._transport, _ = await self._loop.create_connection(lambda: self, sock=self._group.channel)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return self._group.pids

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the requests in the step that the engine was executing when it last showed itself."""
        return self._group.progress.read().request_ids

    @property
    def figures(self) -> list[RankFigures]:
        """What each rank has done; none until all have loaded."""
        return self._group.progress.figures(len(self.ready.result().ranks)) if self.ready.done() else []

    def send(self, message: ToEngine) -> None:
        """Sends a message; to an engine that is gone, nothing."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def fail(self, reason: str, text: str, rank: int | None = None, is_gone: bool = False) -> None:
        """Ends the epoch, unless it has ended: whatever still comes of it is dropped."""
        if self.fault.done():
            return
        last_s = max(self._group.progress.read().at_s, self._begin_s)
        detector = "known_answer" if reason == "wrong" else ""
        if (finding := self._group.progress.finding()) is not None:  # whatever else came of it
            reason, detector, rank = "corrupt", finding.detector, finding.rank
            whose = "some rank" if rank is None else f"rank {rank}"
            text = f"{whose}, detector {detector}: {finding.text}"
        self.fault.set_result(Fault(reason, text, time.monotonic() - last_s, detector, rank, is_gone))

    async def close(self) -> None:
        """Has the engine end by itself, or else ends it. One that loads is not waited for."""
        is_ready = self.ready.done() and self._killed is None
        if is_ready:
            self._release()
        if not is_ready or not await asyncio.to_thread(self._group.wait, CLOSE_S):
            await self.kill()

    async def kill(self) -> None:
        """Ends all processes, stopped and stuck ones too, and returns once nothing of them is left."""
        if self._killed is None:
            self._release()
            self._killed = asyncio.create_task(self._wait())
            self._group.kill()
        await asyncio.shield(self._killed)

    async def _wait(self) -> None:
        await self._connecting
        self._release()
        self._group.kill()  # those that were not there yet
        if not await asyncio.to_thread(self._group.wait, KILL_S):
            log.error("processes %s do not end", self._group.pids)

    def _release(self) -> None:
        self.fail("died", "closed")
        self._timer.cancel()
        for pidfd in self._group.pidfds:
            self._loop.remove_reader(pidfd)
        for link in self._group.links.values():
            self._loop.remove_reader(link.socket.fileno())
        if self._transport is not None:
            self._transport.abort()
        elif self._connecting.done():
            self._group.channel.close()

    def data_received(self, data: bytes) -> None:
        """Takes what the engine has sent: a part of a message, one, or several."""
        if self.fault.done():
            return
        outputs = []
        try:
            for body in self._buffer.feed(data):
                match decode_to_front_end(body):
                    case StepOutput() as output:
                        outputs.append(output)
                    case Ready(info):
                        if not self.ready.done():
                            self.ready.set_result(info)
                    case Failed(text, startup, rank, is_gone):
                        self._hand_out(outputs)
                        if startup:
                            self.fail("startup", text, rank, is_gone)
                        else:
                            self.fail("failed", text, self._culprit(rank))
        except Exception as error:
            self._hand_out(outputs)
            log.exception("reading from the engine failed")
            self.fail("unreadable", f"reading from the engine failed: {type(error).__name__}")
        self._hand_out(outputs)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed: rank 0 has ended, or is to end."""
        self.fail("died", f"the engine process ended{self._how()}", self._culprit(0))

    def _hand_out(self, outputs: list[StepOutput]) -> None:
        if outputs and not self.fault.done():
            self._on_outputs(list(outputs))
            outputs.clear()

    def _on_end(self, pidfd: int) -> None:
        """A process has ended; if it is rank 0, the end of its socket comes with it, behind what it had to say."""
        self._loop.remove_reader(pidfd)
        if self._first_ended is None:
            self._first_ended = self._group.pidfds.index(pidfd)
        self._loop.call_later(
            LAST_WORDS_S, lambda: self.fail("died", f"an engine process ended{self._how()}", self._first_ended)
        )

    def _culprit(self, rank: int) -> int:
        """Whose fault it is that a rank has failed: others fail when one has ended."""
        return rank if self._first_ended is None else self._first_ended

    def _on_word(self, node: int, link: Link) -> None:
        """Another machine has something to say."""
        wrong = self._group.hear(node)
        if link.is_lost:
            self._loop.remove_reader(link.socket.fileno())
        if wrong:
            self._loop.call_later(LAST_WORDS_S, lambda: self.fail("died", wrong))

    def _how(self) -> str:
        """Which ranks have ended, in words."""
        ended = self._group.ended()
        return f" (rank {', '.join(map(str, ended))})" if ended and len(self._group.pids) > 1 else ""

    def _look(self) -> None:
        """Looks whether the engine goes on."""
        self._timer = self._loop.call_later(TICK_S, self._look)
        now, before_s = time.monotonic(), self._looked_s
        self._looked_s = now
        if now - before_s > 2 * TICK_S:
            self._awake_s = self._since_s = now
        if not self.ready.done():  # the engine loads
            self._since_s = now
        if not self._group.pids:
            self._group.wake_launcher()
        stopped = [rank for rank, pid in enumerate(self._group.pids) if _is_stopped(pid)]
        if not stopped:
            self._ran_s = now
        for node, link in self._group.links.items() if self._connecting.done() else ():
            if (silent_s := now - max(link.heard_s, self._awake_s)) > SILENT_S:
                self.fail("stalled", f"node {node} has been silent for {silent_s:.1f} s")
        if not self._deadline_s:
            return
        beat = self._group.progress.read()
        if beat.is_step or not self.ready.done():
            self._worked_s = now  # those that wait for each other in a step say nothing; rank 0 speaks for them
        silent_s = now - max(beat.at_s, self._since_s)
        patience = self._patience()
        if silent_s > patience * max(self._deadline_s, EXPECTED_FACTOR * beat.expected_s):
            self.fail("stalled", f"the engine made no progress for {silent_s:.1f} s", next(iter(stopped), None))
        for rank in range(1, len(self._group.pids)):
            since_s = max(self._group.progress.alive_s(rank), self._worked_s, self._since_s)
            if now - since_s > patience * self._deadline_s:
                self.fail("stalled", f"rank {rank} has not shown itself for {now - since_s:.1f} s", rank)
        if now - self._ran_s > patience * self._deadline_s:
            self.fail("stalled", f"rank {', '.join(map(str, stopped))} is stopped", stopped[0])


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False
