"""The front end's side of the rank processes: starts those of one epoch, watches them, ends them. Knows no asyncio."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from octavo.server.config import EngineConfig
from octavo.server.engine.progress import MAX_RANKS, Progress
from octavo.server.errors import StartupError

MAX_ANSWER_BYTES = 1 << 12
POLL_S = 0.01  # where the kernel does not say when a process ends


class Launcher:
    """The process that ranks are forked from, started when it is first needed. It dies with this one.

    To be used in a thread that lives as long as it does, since the kernel takes a thread's end for the parent's.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, config: EngineConfig, epoch: int, devices: Sequence[int]) -> "Group":
        """Have the ranks of an epoch started, one on each device, those of epochs before having ended.

        Does not wait for it.
        """
        if self._process is None or self._process.poll() is not None:
            self._start_launcher()
        assert self._process is not None and self._socket is not None
        ours, theirs = socket.socketpair()
        progress = Progress()
        request = json.dumps({"epoch": epoch, "config": config.to_json(), "devices": list(devices)}).encode()
        with suppress(OSError):  # it has just ended: so will be found out
            socket.send_fds(self._socket, [request], [theirs.fileno(), progress.fd])
        theirs.close()
        return Group(ours, progress, self._process, self._socket, epoch)

    def close(self) -> None:
        """End the launcher, and all ranks with it."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            self._process = self._socket = None

    def _start_launcher(self) -> None:
        self.close()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "octavo.server.engine.launcher", str(theirs.fileno()), str(os.getpid())]
        # numpy's BLAS, of which nothing is used, starts threads when it is loaded; what has threads must not fork.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        # Ctrl-C and service managers signal the whole group; when to stop is decided here. The mask is inherited, so
        # that no signal finds the process before it could have said so itself.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()


class Group:
    """The rank processes of one epoch.

    `channel` is the socket to rank 0, which belongs to whoever takes it; `progress` is what rank 0 shows of itself,
    until `wait` has seen the end.
    """

    pids: list[int]  # by rank; empty before they are started
    pidfds: list[int]  # by rank: readable once it has ended; empty where the kernel has none; closed by `wait`

    def __init__(
        self,
        channel: socket.socket,
        progress: Progress,
        launcher: "subprocess.Popen[bytes]",
        answers: socket.socket,
        epoch: int,
    ) -> None:
        self.channel, self.progress, self.pids, self.pidfds = channel, progress, [], []
        self._launcher, self._answers, self._epoch = launcher, answers, epoch

    def wait_until_started(self) -> None:
        """Returns when the processes are there, which takes as long as importing torch the first time.

        Raises StartupError where the launcher ends instead.
        """
        while not self.pids:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._answers, MAX_ANSWER_BYTES, MAX_RANKS)
            except OSError:
                data = b""
            if not data:
                raise StartupError("the launcher of ranks ended (its log says why)")
            answer = json.loads(data)
            if answer["epoch"] == self._epoch:
                self.pidfds, self.pids = descriptors, answer["pids"]
            else:  # of a group that nobody waited for
                for descriptor in descriptors:
                    os.close(descriptor)

    def ended(self) -> list[int]:
        """The ranks whose processes have ended."""
        if self.pidfds:
            readable = select.select(self.pidfds, [], [], 0)[0]
            return [rank for rank, pidfd in enumerate(self.pidfds) if pidfd in readable]
        return [rank for rank, pid in enumerate(self.pids) if not _runs(pid)]

    def kill(self) -> None:
        """Have all processes end at once, stopped and stuck ones too. Does not wait for it."""
        if not self.pids:
            self._launcher.kill()  # which they die with
        for rank, pid in enumerate(self.pids):
            with suppress(ProcessLookupError):
                if self.pidfds:
                    signal.pidfd_send_signal(self.pidfds[rank], signal.SIGKILL)
                else:  # until the next epoch the id is not given away
                    os.kill(pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all processes have ended. False: one has not within `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while len(ended := self.ended()) < len(self.pids):
            left_s = max(0.0, deadline_s - time.monotonic())
            if left_s == 0.0:
                return False
            running = [pidfd for rank, pidfd in enumerate(self.pidfds) if rank not in ended]
            select.select(running, [], [], left_s if running else min(left_s, POLL_S))
        for pidfd in self.pidfds:
            os.close(pidfd)
        self.pidfds = []
        self.progress.close()
        return True


def _runs(pid: int) -> bool:
    """Whether a process exists that has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
