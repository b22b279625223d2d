"""What a rank's process does: rank 0 serves the front end over a socket, the others execute the plans it sends."""

import gc
import select
import socket
import traceback
from contextlib import suppress

from octavo.server.config import EngineConfig
from octavo.server.engine.channel import (
    Abort,
    Add,
    Failed,
    FrameBuffer,
    Ready,
    StepOutput,
    ToEngine,
    ToFrontEnd,
    decode_to_engine,
    encode_frame,
)
from octavo.server.engine.devices import PROBE
from octavo.server.engine.engine import Engine, Rank, choose_device, faults_of
from octavo.server.engine.faults import Faults
from octavo.server.engine.integrity import Corruption
from octavo.server.engine.peers import Follower, PeerError, Place
from octavo.server.engine.progress import IDLE_S, Finding, Progress
from octavo.server.errors import StartupError

RECEIVE_BYTES = 1 << 20


class EngineProcess:
    """Serves one engine over one socket."""

    def __init__(self, engine: Engine, channel: socket.socket, progress: Progress, epoch: int) -> None:
        self._engine, self._channel, self._progress, self._epoch = engine, channel, progress, epoch
        engine.before_step = progress.beat
        self._buffer = FrameBuffer()

    def run(self) -> None:
        """Returns when the other side closes the socket."""
        while self._receive():
            if self._engine.has_work:
                deltas = self._engine.step()
                self._progress.show(0, self._engine.runner.figures)
                self._send(StepOutput(self._epoch, deltas, self._engine.stats()))

    def _receive(self) -> bool:
        """Handle what has come in, and wait for it where there is no work. False: the other side is gone."""
        while not select.select([self._channel], [], [], 0 if self._engine.has_work else IDLE_S)[0]:
            if self._engine.has_work:
                return True
            self._engine.runner.faults.at("idle")
            self._progress.beat(IDLE_S)
            self._engine.scrub()
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

    def _send(self, message: ToFrontEnd) -> None:
        self._channel.sendall(encode_frame(message))


def run_rank(config: EngineConfig, place: Place, channel: socket.socket, progress: Progress) -> int:
    """Be one rank until the front end, or rank 0, is gone.

    channel: rank 0's to the front end, of no use to others; progress: what ranks show it, and where they report that
    they compute wrongly.

    Returns the exit status: 0, or 1 where the rank could not start or failed.
    """
    if place.epoch == PROBE:
        with suppress(StartupError):
            choose_device(config, place.device)
            channel.send(b"1")
        return 0
    if place.epoch:
        Faults(config.faults, place.rank).at("recovery")
    try:
        return _lead(config, place, channel, progress) if place.rank == 0 else follow(config, place, progress)
    except Corruption as error:
        progress.report(Finding(place.rank if error.rank == -1 else error.rank, error.detector, str(error)))
        return 1


def _lead(config: EngineConfig, place: Place, channel: socket.socket, progress: Progress) -> int:
    started = False
    try:
        engine = Engine(config, place)
        progress.show(0, engine.runner.figures)
        channel.sendall(encode_frame(Ready(engine.info)))
        started = True
        _freeze()
        EngineProcess(engine, channel, progress, place.epoch).run()
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except Corruption:
        raise
    except Exception as error:
        if not isinstance(error, StartupError):
            traceback.print_exc()
            failed = Failed(f"engine failed: {type(error).__name__}", startup=not started)
        else:
            failed = Failed.to_start(error, error.rank)
        try:
            channel.sendall(encode_frame(failed))
        except OSError:
            pass
        return 1
    return 0


def follow(config: EngineConfig, place: Place, progress: Progress) -> int:
    """Be a rank but the first. Raises PeerError for a plan that is not rank 0's, Corruption where bits have changed."""
    follower = Follower(place)
    try:
        rank = Rank(config, place)
        num_blocks = follower.agree(rank.plan.num_blocks, rank.fingerprint)
        runner = rank.load(num_blocks, follower.meeting_point)
        progress.show(place.rank, runner.figures)
        follower.loaded(rank.info)
    except StartupError as error:
        with suppress(PeerError):  # rank 0 may have met the same, and be gone
            follower.failed(Failed.to_start(error, place.rank))
        return 1
    except PeerError:  # rank 0 has given up, and said why
        return 1
    faults = faults_of(config, place.rank, runner)
    faults.at("warm-up")
    runner.warm_up(config.max_num_batched_tokens)
    runner.faults = follower.faults = faults
    _freeze()
    while True:
        while not follower.wait(IDLE_S):
            faults.at("idle")
            progress.alive(place.rank)
            runner.weights.run()
        if (plan := follower.receive()) is None:
            return 0
        runner.execute(plan)
        progress.show(place.rank, runner.figures)
        runner.weights.run()


def _freeze() -> None:
    """Nothing loaded so far is ever garbage: keep the collector from walking it."""
    gc.collect()
    gc.freeze()
