"""The front end's side of the engine: starts its process, sends requests, hands deltas to those who asked for them.

Owns the journal: a delta is handed out only after it is committed there. Nothing waits between the socket and a
stream's own code: a step's deltas are handed out in the call that read them, which is what keeps a token cheap.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from octavo.server.config import EngineConfig
from octavo.server.engine.channel import (
    Abort,
    Add,
    EngineInfo,
    EngineStats,
    Failed,
    FrameBuffer,
    Ping,
    Pong,
    Ready,
    StepOutput,
    ToEngine,
    decode_to_front_end,
    encode_frame,
)
from octavo.server.engine.group import Group, Launcher
from octavo.server.engine.journal import Journal
from octavo.server.engine.request import Delta, GenerationRequest
from octavo.server.errors import EngineError, StartupError

log = logging.getLogger("octavo")

EPOCH = 0
PING_S = 2.0  # an engine not heard of for this long is asked for a sign of life
STALL_S = 30.0  # not heard of for this long: stalled
STOP_S = 5.0  # how long a stopping engine may take before it is killed

State = Literal["starting", "ok", "stalled", "dead"]
OnDeltas = Callable[[list[Delta]], None]
OnError = Callable[[EngineError], None]


class EngineClient(asyncio.Protocol):
    """One engine process and the requests in it. All methods belong to one event loop.

    `info` is valid once `start` has returned; `stats` is the latest state; `on_step` is called with each step.
    """

    info: EngineInfo

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.stats = EngineStats()
        self.on_step: Callable[[StepOutput], None] | None = None
        self.journal = Journal()
        self._buffer = FrameBuffer()
        self._callers: dict[str, tuple[OnDeltas, OnError]] = {}  # by request id
        self._launcher = Launcher()
        self._group: Group | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._state: State = "starting"
        self._closing = False
        self._heard_s = time.monotonic()

    @property
    def state(self) -> State:
        """Whether the engine loads, runs, makes no progress, or has ended."""
        if self._state == "ok" and time.monotonic() - self._heard_s > STALL_S:
            return "stalled"
        return self._state

    @property
    def pid(self) -> int | None:
        """Process id of rank 0, once it is started."""
        return self._group.pids[0] if self._group and self._group.pids else None

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises StartupError with the engine's own words."""
        self._group = self._launcher.start(self._config, EPOCH)
        await asyncio.to_thread(self._group.wait_until_started)
        loop = asyncio.get_running_loop()
        for pidfd in self._group.pidfds:
            loop.add_reader(pidfd, self._end_group)  # without one rank the others wait for ever
        self._ready = loop.create_future()
        self._transport, _ = await loop.create_connection(lambda: self, sock=self._group.channel)
        self._pinging = asyncio.create_task(self._ping())
        self.info = await self._ready
        self._state = "ok"

    async def close(self) -> None:
        """Stop the process; it ends by itself once the socket closes, and is killed if it does not."""
        self._closing = True
        if self._pinging is not None:
            self._pinging.cancel()
        if self._transport is not None:
            self._transport.close()
        if self._group is not None:
            for pidfd in self._group.pidfds:
                asyncio.get_running_loop().remove_reader(pidfd)
        if self._group is not None and not await asyncio.to_thread(self._group.wait, STOP_S):
            self._end_group()
            await asyncio.to_thread(self._group.wait, STOP_S)
        self._launcher.close()
        self._state = "dead"

    def begin(self, request: GenerationRequest, on_deltas: OnDeltas, on_error: OnError) -> None:
        """Run a valid request: its deltas go to `on_deltas`, all of one step at once, until each choice has ended.

        `on_error` is called if the engine ends first. Neither is called before this returns, nor after `end`, and
        neither may raise. The request id must never have been used before: the engine may still answer for a request
        given up on. Raises EngineError if the engine is not running, ValueError where the id is in use.
        """
        if self._state != "ok":
            raise EngineError(f"the engine is {self._state}")
        self.journal.open(request)
        self._callers[request.request_id] = on_deltas, on_error
        self._send(Add(request))

    def end(self, request_id: str) -> None:
        """Forget a request, and abort what of it still runs. Unknown ids are ignored."""
        entry = self.journal.entries.get(request_id)
        if entry is None:
            return
        if entry.open_choices:
            self._send(Abort(request_id))
        self.journal.close(request_id)
        del self._callers[request_id]

    async def abort(self, request_id: str) -> bool:
        """End all choices of a request with `FinishReason.ABORT`, as a delta says. False where it is not known."""
        entry = self.journal.entries.get(request_id)
        if entry is None or not entry.open_choices:
            return False
        self._send(Abort(request_id))
        return True

    def abort_choice(self, request_id: str, choice_index: int) -> None:
        """End one choice at once: the engine stops it, and no more deltas come for it. Unknown ids are ignored."""
        entry = self.journal.entries.get(request_id)
        if entry is not None and choice_index in entry.open_choices:
            entry.open_choices.discard(choice_index)
            self._send(Abort(request_id, choice_index))

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None and self._state in ("ok", "starting") and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def data_received(self, data: bytes) -> None:
        """Takes what the engine has sent: a part of a message, one, or several."""
        self._heard_s = time.monotonic()
        deltas: dict[str, list[Delta]] = {}  # by request id; a stream that is behind gets several steps at once
        try:
            for body in self._buffer.feed(data):
                message = decode_to_front_end(body)
                if isinstance(message, StepOutput):
                    self._commit(message, deltas)
                else:
                    self._hand_out(deltas)
                    self._handle(message)
            self._hand_out(deltas)
        except Exception as error:
            self._hand_out(deltas)
            log.exception("reading from the engine failed")
            self._died(f"reading from the engine failed: {type(error).__name__}")
            if self._transport is not None:
                self._transport.abort()  # what comes behind it cannot be told apart

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed: the process has ended, or is to end."""
        self._died("the engine process ended")

    def _commit(self, output: StepOutput, deltas: dict[str, list[Delta]]) -> None:
        """Adds the deltas that the journal accepts."""
        self.stats = output.stats
        if self.on_step is not None:
            self.on_step(output)
        for delta in output.deltas:
            if self.journal.commit(output.epoch, delta):
                deltas.setdefault(delta.request_id, []).append(delta)

    def _hand_out(self, deltas: dict[str, list[Delta]]) -> None:
        for request_id in list(deltas):
            self._callers[request_id][0](deltas.pop(request_id))

    def _handle(self, message: Ready | Failed | Pong) -> None:
        match message:
            case Pong(_, stats):
                self.stats = stats
            case Ready(info):
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(info)
            case Failed(text, startup):
                self._died(text, StartupError(text) if startup else None)

    def _died(self, text: str, startup_error: StartupError | None = None) -> None:
        """The engine is no more. While it starts, `startup_error` is its own account of why."""
        if self._closing or self._state == "dead":
            return
        self._state = "dead"
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(startup_error or StartupError(f"{text} while it started (its log says why)"))
        else:
            log.error("%s", text)
        for _, on_error in self._callers.values():
            on_error(EngineError(text))

    def _end_group(self) -> None:
        """Kill every rank, and watch none any more."""
        assert self._group is not None
        for pidfd in self._group.pidfds:
            asyncio.get_running_loop().remove_reader(pidfd)
        self._group.kill()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if time.monotonic() - self._heard_s >= PING_S:
                self._send(Ping(time.monotonic()))
