"""The engine process: `python -m octavo.server.engine.process FD PARENT_PID EPOCH CONFIG`; FD is a socket it inherits.

Receives requests, runs steps while there is work, replies with deltas; ends when the other side of the socket does.
Started with SIGINT and SIGTERM blocked.
"""

import ctypes
import gc
import os
import select
import signal
import socket
import sys
import traceback

from octavo.server.config import EngineConfig
from octavo.server.engine.channel import (
    Abort,
    Add,
    Failed,
    FrameBuffer,
    Ping,
    Pong,
    Ready,
    StepOutput,
    ToEngine,
    ToFrontEnd,
    decode_to_engine,
    encode_frame,
)
from octavo.server.engine.engine import Engine
from octavo.server.errors import StartupError

RECEIVE_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent ended before the call
        os._exit(1)


class EngineProcess:
    """Serves one engine over one socket."""

    def __init__(self, engine: Engine, channel: socket.socket, epoch: int) -> None:
        self._engine, self._channel, self._epoch = engine, channel, epoch
        self._buffer = FrameBuffer()

    def run(self) -> None:
        """Returns when the other side closes the socket."""
        while self._receive(block=not self._engine.has_work):
            if self._engine.has_work:
                deltas = self._engine.step()
                self._send(StepOutput(self._epoch, deltas, self._engine.stats()))

    def _receive(self, block: bool) -> bool:
        """Handle what has come in; with `block`, wait for something. False: the other side is gone."""
        ready, _, _ = select.select([self._channel], [], [], None if block else 0)
        if not ready:
            return True
        data = self._channel.recv(RECEIVE_BYTES)
        for body in self._buffer.feed(data):
            self._handle(decode_to_engine(body))
        return bool(data)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Add(request, committed):
                self._engine.add(request, committed)
            case Abort(request_id, choice_index):
                deltas = self._engine.abort(request_id, choice_index)
                self._send(StepOutput(self._epoch, deltas, self._engine.stats()))
            case Ping(sent_s):
                self._send(Pong(sent_s, self._engine.stats()))

    def _send(self, message: ToFrontEnd) -> None:
        self._channel.sendall(encode_frame(message))


def main() -> int:
    """Exit status: 0 when the front end closed the socket, 1 where the engine could not start or failed."""
    die_with_parent(int(sys.argv[2]))
    channel = socket.socket(fileno=int(sys.argv[1]))
    started = False
    try:
        engine = Engine(EngineConfig.from_json(sys.argv[4]))
        channel.sendall(encode_frame(Ready(engine.info)))
        started = True
        # Nothing loaded so far is ever garbage: keep the collector from walking it.
        gc.collect()
        gc.freeze()
        EngineProcess(engine, channel, epoch=int(sys.argv[3])).run()
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        if not isinstance(error, StartupError):
            traceback.print_exc()
        message = str(error) if isinstance(error, StartupError) else f"engine failed: {type(error).__name__}"
        try:
            channel.sendall(encode_frame(Failed(message, startup=not started)))
        except OSError:
            pass
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
