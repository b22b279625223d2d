"""The rank processes of an epoch: started, ended all at once, stopped ones too, and nothing of them left."""

import fcntl
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from octavo.server.config import EngineConfig
from octavo.server.engine.group import Group, Launcher
from octavo.server.errors import StartupError

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def config(tiny_checkpoint: Callable[[str], Path]) -> EngineConfig:
    folder = tiny_checkpoint("smollm2")
    return EngineConfig(str(folder), device="cpu", kv_cache_memory_bytes=1 << 20, tensor_parallel_size=3)


@pytest.fixture
def group(launcher: Launcher, config: EngineConfig) -> Iterator[Group]:
    group = launcher.start(config, 3, range(3))
    group.wait_until_started()
    yield group
    group.kill()
    assert group.wait(TIMEOUT_S)
    group.channel.close()


def ready(group: Group) -> None:
    assert group.channel.recv(1)  # of the first message


@pytest.mark.parametrize("stopped", [False, True])
def test_a_group_is_killed_at_once(group: Group, stopped: bool) -> None:
    ready(group)
    assert group.ended() == [] and not group.wait(0.0) and len(group.pids) == 3
    if stopped:
        for pid in group.pids:
            os.kill(pid, signal.SIGSTOP)
    assert select.select(group.pidfds, [], [], 0)[0] == []
    begin_s = time.monotonic()
    group.kill()
    pidfds = group.pidfds
    while pidfds:  # each becomes readable by itself
        readable, _, _ = select.select(pidfds, [], [], TIMEOUT_S)
        assert readable
        pidfds = [pidfd for pidfd in pidfds if pidfd not in readable]
    assert group.ended() == [0, 1, 2]
    assert group.wait(TIMEOUT_S) and time.monotonic() - begin_s < 1.0
    assert group.ended() == [0, 1, 2]  # also where nobody says so


def test_descriptors_may_have_high_numbers(group: Group) -> None:
    ready(group)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("no more than 1024 files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:  # as with so many clients
        low, group.pidfds = group.pidfds, [fcntl.fcntl(pidfd, fcntl.F_DUPFD_CLOEXEC, 1024) for pidfd in group.pidfds]
        for pidfd in low:
            os.close(pidfd)
        assert group.ended() == [] and not group.wait(0.02)
        group.kill()
        assert group.wait(TIMEOUT_S)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ranks_end_with_the_channel(group: Group) -> None:
    ready(group)
    group.channel.close()
    assert group.wait(TIMEOUT_S)


def test_ranks_end_with_the_launcher(config: EngineConfig) -> None:
    launcher = Launcher()
    group = launcher.start(config, 0, range(3))
    group.wait_until_started()
    ready(group)
    launcher.close()
    assert group.wait(1.0)
    again = launcher.start(config, 1, range(3))  # by another launcher
    again.wait_until_started()
    assert again.ended() == []
    launcher.close()
    assert again.wait(1.0)
    for one in (group, again):
        one.channel.close()


def test_a_group_may_be_killed_before_it_is_there(config: EngineConfig) -> None:
    launcher = Launcher()
    group = launcher.start(replace(config, model="/nowhere"), 0, range(3))
    group.kill()
    with pytest.raises(StartupError, match="launcher"):
        group.wait_until_started()
    assert group.wait(0.0)
    group.channel.close()
    launcher.close()
