"""The front end's side of the engine: starts its process, sends requests, fans deltas out to the streams that wait.

Owns the journal: a delta reaches a stream only after it is committed there.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
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
from octavo.server.engine.journal import Journal
from octavo.server.engine.request import Delta, GenerationRequest
from octavo.server.errors import EngineError, StartupError

log = logging.getLogger("octavo")

PING_S = 2.0  # an engine not heard of for this long is asked for a sign of life
STALL_S = 30.0  # not heard of for this long: stalled
RECEIVE_BYTES = 1 << 20
STOP_S = 5.0  # how long a stopping engine may take before it is killed

State = Literal["starting", "ok", "stalled", "dead"]


class EngineClient:
    """One engine process and the requests in it. All methods belong to one event loop.

    `info` is valid once `start` has returned; `stats` is the latest state; `on_step` is called with each step.
    """

    info: EngineInfo

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.stats = EngineStats()
        self.on_step: Callable[[StepOutput], None] | None = None
        self.journal = Journal()
        self._streams: dict[str, asyncio.Queue[Delta | EngineError | None]] = {}  # None: look at the entry again
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
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
        """Process id of the engine, once it is started."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises StartupError with the engine's own words."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "octavo.server.engine.process"]
        command += [str(theirs.fileno()), str(os.getpid()), self._config.to_json()]
        # Ctrl-C and service managers signal the whole group; when to stop is decided here. The mask is inherited, so
        # that no signal finds the process before it could have said so itself.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._ready = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._read(reader)), asyncio.create_task(self._ping())]
        self.info = await self._ready
        self._state = "ok"

    async def close(self) -> None:
        """Stop the process; it ends by itself once the socket closes, and is killed if it does not."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        self._state = "dead"

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Deltas of a valid request until each of its choices has ended. Closing the generator early aborts them.

        The request id must never have been used before: the engine may still answer for a request given up on. Raises
        EngineError if the engine is not running or ends meanwhile, ValueError where the id is in use.
        """
        if self._state != "ok":
            raise EngineError(f"the engine is {self._state}")
        entry = self.journal.open(request)
        queue = self._streams[request.request_id] = asyncio.Queue()
        try:
            self._send(Add(request))
            while entry.open_choices or not queue.empty():  # committed deltas may wait to be read
                delta = await queue.get()
                if isinstance(delta, EngineError):
                    raise delta
                if delta is not None:
                    yield delta
        finally:
            if entry.open_choices:
                self._send(Abort(request.request_id))
            self.journal.close(request.request_id)
            del self._streams[request.request_id]

    async def abort(self, request_id: str) -> bool:
        """End all choices of a request with `FinishReason.ABORT`, through its stream. False where it is not known."""
        if request_id not in self._streams:
            return False
        self._send(Abort(request_id))
        return True

    def abort_choice(self, request_id: str, choice_index: int) -> None:
        """End one choice at once: the engine stops it, and no more deltas come for it. Unknown ids are ignored."""
        entry = self.journal.entries.get(request_id)
        if entry is not None and choice_index in entry.open_choices:
            entry.open_choices.discard(choice_index)
            self._streams[request_id].put_nowait(None)
            self._send(Abort(request_id, choice_index))

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and self._state in ("ok", "starting") and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        buffer = FrameBuffer()
        try:
            while data := await reader.read(RECEIVE_BYTES):
                self._heard_s = time.monotonic()
                for body in buffer.feed(data):
                    self._handle(decode_to_front_end(body))
            self._died("the engine process ended")
        except ConnectionError:
            self._died("the engine process ended")
        except Exception as error:
            log.exception("reading from the engine failed")
            self._died(f"reading from the engine failed: {type(error).__name__}")

    def _handle(self, message: Ready | Failed | StepOutput | Pong) -> None:
        match message:
            case StepOutput(epoch, deltas, stats):
                self.stats = stats
                if self.on_step is not None:
                    self.on_step(message)
                for delta in deltas:
                    if self.journal.commit(epoch, delta):
                        self._streams[delta.request_id].put_nowait(delta)
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
        for queue in self._streams.values():
            queue.put_nowait(EngineError(text))

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if time.monotonic() - self._heard_s >= PING_S:
                self._send(Ping(time.monotonic()))
