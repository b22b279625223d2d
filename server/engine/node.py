"""A node: the machine of a group that only computes. Does what the head says, which is in `nodes`."""

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from typing import Any

from octavo.server.config import EngineConfig, SupervisorConfig
from octavo.server.engine.group import Group, Launcher
from octavo.server.engine.nodes import BEAT_S, CONTROL, Link, greeted, ready
from octavo.server.errors import StartupError

log = logging.getLogger("octavo")


@dataclass
class _Ranks:
    """A node's ranks of one epoch."""

    epoch: int
    ranks: range
    num_ranks: int
    group: Group


def run_node(config: SupervisorConfig) -> int:
    """Be a node until the head ends. Returns the exit status: 1 where there is no head any more."""
    launcher = Launcher()
    try:
        while (link := _connect(config)) is not None:
            log.info("node %d has joined %s port %d", config.node_rank, config.master_addr, config.master_port)
            if _serve(config, link, launcher):
                return 0
            log.error("the head is gone: joining again")
        raise StartupError(
            f"there is no head at --master-addr {config.master_addr} --master-port {config.master_port}: none answered "
            f"within {config.max_recovery_time:g} s"
        )
    finally:
        launcher.close()


def _connect(config: SupervisorConfig) -> Link | None:
    """The link to the head. None: there was none for too long."""
    deadline_s, is_told = time.monotonic() + config.max_recovery_time, False
    while True:
        with suppress(OSError):
            return Link(greeted(config, CONTROL, config.node_rank))
        if time.monotonic() > deadline_s:
            return None
        if not is_told:
            log.warning("waiting for the head at %s port %d", config.master_addr, config.master_port)
            is_told = True
        time.sleep(0.2)


def _serve(config: SupervisorConfig, link: Link, launcher: Launcher) -> bool:
    """Do what the head says. True: it said that this is the end. False: it is gone."""
    running: _Ranks | None = None
    try:
        while not link.is_lost:
            pidfds = running.group.pidfds if running is not None else []
            if link.socket.fileno() in ready([link.socket.fileno(), *pidfds], BEAT_S):
                for message in link.receive():
                    if "end" in message:
                        return True
                    if running is not None:  # an epoch ends before another begins
                        _kill(running)
                    if "start" in message:
                        running = _start(config, link, launcher, message)
                    else:
                        running = None
                        link.send({"killed": message["kill"]})
            elif pidfds and running is not None and running.group.ended():
                time.sleep(BEAT_S / 10)  # it is said until the head has an answer
            link.send(_beat(running))
    finally:
        if running is not None:
            _kill(running)
        link.close()
    return False


def _beat(running: _Ranks | None) -> dict[str, Any]:
    if running is None:
        return {}
    figures = running.group.progress.figures(running.num_ranks)[running.ranks.start : running.ranks.stop]
    ended = [running.ranks[index] for index in running.group.ended()]
    finding = running.group.progress.finding()
    return {
        "epoch": running.epoch,
        "figures": [astuple(each) for each in figures],
        "ended": ended,
        "finding": None if finding is None else astuple(finding),
    }


def _start(config: SupervisorConfig, link: Link, launcher: Launcher, message: dict[str, Any]) -> _Ranks | None:
    """Start the ranks of an epoch. None where they cannot be, which the head finds out.

    Raises StartupError where the head is of another version.
    """
    try:
        epoch, ranks = int(message["start"]), range(*message["ranks"])
        wanted = replace(EngineConfig.from_json(message["config"]), model=config.model)  # each has its own folder
    except (KeyError, TypeError, ValueError) as error:
        raise StartupError(
            f"the head at --master-addr {config.master_addr} --master-port {config.master_port} must be another "
            f"version of Octavo: {error}"
        ) from None
    channels: list[socket.socket] = []
    try:
        channels += [greeted(config, epoch, rank) for rank in ranks]
        group = launcher.start_some(
            wanted,
            epoch,
            range(len(ranks)),
            ranks,
            wanted.tensor_parallel_size,
            lambda: channels,
            address=link.socket.getsockname()[0],
        )
        group.channel.close()  # rank 0's, which is not here
        with ThreadPoolExecutor(1) as other:  # importing torch may take longer than a node may be silent
            started = other.submit(group.wait_until_started)
            while not wait((started,), BEAT_S).done:
                link.send(_beat(None))
        started.result()
    except (OSError, StartupError) as error:
        log.error("ranks of epoch %d do not start: %s", epoch, error)
        for channel in channels:
            channel.close()
        return None
    return _Ranks(epoch, ranks, wanted.tensor_parallel_size, group)


def _kill(running: _Ranks) -> None:
    running.group.kill()
    while not running.group.wait(BEAT_S):
        log.error("processes %s do not end", running.group.pids)
