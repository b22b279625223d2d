"""The front end's side of the rank processes: starts those of one epoch, watches them, ends them. Knows no asyncio."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from octavo.server.config import EngineConfig, SupervisorConfig
from octavo.server.engine.nodes import BEAT_S, SILENT_S, Link, Nodes, ranks_of, ready
from octavo.server.engine.progress import MAX_RANKS, Finding, Progress, RankFigures
from octavo.server.errors import StartupError

log = logging.getLogger("octavo")

MAX_ANSWER_BYTES = 1 << 12
POLL_S = 0.01  # where the kernel does not say when a process ends


class Launcher:
    """The process that ranks are forked from, started when it is first needed. It dies with this one.

    To be used in a thread that lives as long as it does, since the kernel takes a thread's end for the parent's.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._nodes: Nodes | None = None

    def listen(self, config: SupervisorConfig) -> str:
        """Be the head of several machines. Returns where, in words. Raises StartupError where it cannot be."""
        self._nodes = Nodes(config)
        return self._nodes.listens

    def join(self, timeout_s: float) -> list[int]:
        """Wait for other machines; those that are missing when the time is over."""
        return self._nodes.join(timeout_s) if self._nodes is not None else []

    def start(self, config: EngineConfig, epoch: int, devices: Sequence[int]) -> "Group":
        """Have the ranks of an epoch started, one on each device, those of epochs before having ended.

        Does not wait for it.
        """
        nodes, num_ranks = self._nodes, len(devices)
        if nodes is None:
            return self.start_some(config, epoch, devices, range(num_ranks), num_ranks, lambda: [])
        ranks = ranks_of(0, nodes.num_nodes, num_ranks)
        return self.start_some(config, epoch, ranks, ranks, num_ranks, lambda: nodes.start(config, epoch), nodes)

    def start_some(
        self,
        config: EngineConfig,
        epoch: int,
        devices: Sequence[int],
        ranks: range,
        num_ranks: int,
        connect: Callable[[], list[socket.socket]],
        nodes: Nodes | None = None,
        address: str = "",
    ) -> "Group":
        """Have this machine's ranks, of `num_ranks`, of an epoch started, one on each device.

        connect: gives the connections to ranks of other machines, in their order; or those of these ranks to rank 0,
        which is another machine's. It is called at once, or with `nodes` when the group is waited for. address: this
        machine's, towards others.
        """
        if self._process is None or self._process.poll() is not None:
            self._start_launcher()
        process, answers = self._process, self._socket
        assert process is not None and answers is not None
        ours, theirs = socket.socketpair()
        progress = Progress()

        def ask() -> None:
            channels = connect()
            told = {"epoch": epoch, "config": config.to_json(), "devices": list(devices), "num_ranks": num_ranks}
            told |= {"first_rank": ranks.start, "address": nodes.address() if nodes is not None else address}
            descriptors = [theirs.fileno(), progress.fd, *(channel.fileno() for channel in channels)]
            with suppress(OSError):  # it has just ended: so will be found out
                socket.send_fds(answers, [json.dumps(told).encode()], descriptors)
            for channel in (theirs, *channels):
                channel.close()

        group = Group(ours, progress, process, answers, epoch, num_ranks, nodes)
        if nodes is None:
            ask()
        else:
            group.ask = ask
        return group

    def close(self) -> None:
        """End the launcher, and all ranks with it, those of other machines too."""
        self._end_launcher()
        if self._nodes is not None:
            self._nodes.close()

    def _end_launcher(self) -> None:
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            self._process = self._socket = None

    def _start_launcher(self) -> None:
        self._end_launcher()
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
    links: dict[int, Link]  # to other machines, by node, until its ranks have ended
    ask: Callable[[], None] | None = None  # what is to be done first when the group is waited for

    def __init__(
        self,
        channel: socket.socket,
        progress: Progress,
        launcher: "subprocess.Popen[bytes]",
        answers: socket.socket,
        epoch: int,
        num_ranks: int,
        nodes: Nodes | None = None,
    ) -> None:
        self.channel, self.progress, self.pids, self.pidfds = channel, progress, [], []
        self._launcher, self._answers, self._epoch = launcher, answers, epoch
        self.links, self._num_ranks = dict(nodes.links) if nodes is not None else {}, num_ranks
        self._num_nodes = nodes.num_nodes if nodes is not None else 1
        self._told = False  # other machines, to kill their ranks

    def wait_until_started(self) -> None:
        """Returns when the processes are there, which takes as long as importing torch the first time.

        Raises StartupError where the launcher ends instead, or another machine's ranks do not come.
        """
        if self.ask is not None:
            self.ask()
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

    def wake_launcher(self) -> None:
        """Has a launcher that somebody has stopped go on: else there would never be any process."""
        self._launcher.send_signal(signal.SIGCONT)

    def ended(self) -> list[int]:
        """The ranks whose processes have ended."""
        if self.pidfds:
            readable = ready(self.pidfds, 0.0)
            return [rank for rank, pidfd in enumerate(self.pidfds) if pidfd in readable]
        return [rank for rank, pid in enumerate(self.pids) if not _runs(pid)]

    def kill(self) -> None:
        """Have all processes end at once, stopped and stuck ones too. Does not wait for it."""
        self._tell()
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
        self._tell()
        while len(ended := self.ended()) < len(self.pids) or self.links:
            left_s = max(0.0, deadline_s - time.monotonic())
            if left_s == 0.0:
                return False
            running = [pidfd for rank, pidfd in enumerate(self.pidfds) if rank not in ended]
            nodes = {link.socket.fileno(): node for node, link in self.links.items()}
            polls = len(ended) < len(self.pids) and not running
            readable = ready([*running, *nodes], min(left_s, POLL_S if polls else BEAT_S))
            for node in [nodes[each] for each in readable if each in nodes]:
                self.hear(node)
            for node, link in list(self.links.items()):
                if link.is_lost or time.monotonic() - link.heard_s > SILENT_S:  # its ranks end without the head
                    link.is_lost = True
                    del self.links[node]
        for pidfd in self.pidfds:
            os.close(pidfd)
        self.pidfds = []
        self.progress.close()
        return True

    def hear(self, node: int) -> str:
        """Take what a machine has to say. Returns what is wrong with it, in words, or nothing."""
        link, wrong = self.links[node], ""
        try:
            for message in link.receive():
                if self._told and message.get("killed") == self._epoch:
                    del self.links[node]
                    return ""
                if message.get("epoch") != self._epoch:
                    continue
                ranks = ranks_of(node, self._num_nodes, self._num_ranks)
                for rank, figures in zip(ranks, message["figures"], strict=True):
                    num_steps, step_s, collective_s, resident_bytes = figures
                    self.progress.put(rank, RankFigures(num_steps, step_s, collective_s, resident_bytes))
                if message["finding"] is not None:
                    finding = Finding(*message["finding"])
                    if finding.rank is not None and finding.rank not in range(self._num_ranks):
                        raise ValueError(f"a finding about rank {finding.rank}")
                    self.progress.report(finding)
                if message["ended"]:
                    wrong = f"an engine process ended (rank {', '.join(map(str, message['ended']))})"
        except Exception as error:  # whatever is wrong with it, all that another machine can do is to be lost
            log.error("a word of node %d cannot be read: %s: %s", node, type(error).__name__, error)
            link.is_lost = True
            return f"node {node} makes no sense"
        return f"node {node} is gone" if link.is_lost else wrong

    def _tell(self) -> None:
        """Have other machines kill their ranks."""
        if not self._told:
            self._told = True
            for link in self.links.values():
                link.send({"kill": self._epoch})


def _runs(pid: int) -> bool:
    """Whether a process exists that has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
