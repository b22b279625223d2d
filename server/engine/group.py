"""The front end's side of the rank processes: starts those of one epoch, watches them, ends them. Knows no asyncio."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

from octavo.server.config import EngineConfig


class Group:
    """The rank processes of one epoch: children of this process, which die with it.

    `channel` is the socket to rank 0, which belongs to whoever takes it. To be started in a thread that lives as long
    as the group does, since the kernel takes a thread's end for the parent's.
    """

    channel: socket.socket
    pids: list[int]  # by rank
    pidfds: list[int]  # by rank: readable once it has ended; empty where the kernel has none; closed by `wait`

    def __init__(self, config: EngineConfig, epoch: int) -> None:
        """Starts the processes. Raises OSError where one cannot be started."""
        self.channel, theirs = socket.socketpair()
        command = [sys.executable, "-m", "octavo.server.engine.process"]
        command += [str(theirs.fileno()), str(os.getpid()), str(epoch), config.to_json()]
        # Ctrl-C and service managers signal the whole group; when to stop is decided here. The mask is inherited, so
        # that no signal finds the process before it could have said so itself.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._processes = [subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self.pids = [process.pid for process in self._processes]
        self.pidfds = []
        with suppress(OSError, AttributeError):  # an old kernel, or a Python built for one
            self.pidfds = [os.pidfd_open(pid) for pid in self.pids]

    def ended(self) -> list[int]:
        """The ranks whose processes have ended."""
        return [rank for rank, process in enumerate(self._processes) if process.poll() is not None]

    def kill(self) -> None:
        """Have all processes end at once, stopped and stuck ones too. Does not wait for it."""
        for process in self._processes:
            process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all processes have ended. False: one has not within `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        for pidfd in self.pidfds:
            os.close(pidfd)
        self.pidfds = []
        return True
