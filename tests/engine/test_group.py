"""The rank processes of an epoch: ended all at once, stopped ones too, and nothing of them left."""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from octavo.server.config import EngineConfig
from octavo.server.engine.group import Group

TIMEOUT_S = 60.0


@pytest.fixture
def group(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Group]:
    group = Group(
        EngineConfig(model=str(tiny_checkpoint("smollm2")), device="cpu", kv_cache_memory_bytes=1 << 20), epoch=3
    )
    yield group
    group.kill()
    assert group.wait(TIMEOUT_S)
    group.channel.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_group_is_killed_at_once(group: Group, stopped: bool) -> None:
    assert group.ended() == [] and not group.wait(0.0)
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
    assert group.wait(TIMEOUT_S) and time.monotonic() - begin_s < 1.0
    assert group.ended() == list(range(len(group.pids)))
    assert group.channel.recv(1) == b""
    assert not any(Path(f"/proc/{pid}").exists() for pid in group.pids)


def test_a_rank_ends_with_its_channel(group: Group) -> None:
    group.channel.close()
    assert group.wait(TIMEOUT_S) and group.ended() == list(range(len(group.pids)))
