"""A group of ranks in one process, a thread each: what rank processes run, over the same memory and sockets."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.peers import Place
from octavo.server.engine.process import follow
from octavo.server.engine.progress import Progress


@contextmanager
def engine_of(config: EngineConfig) -> Iterator[Engine]:
    """Rank 0 of `config.tensor_parallel_size` ranks. The others end with it; that they end well is checked."""
    num_ranks = config.tensor_parallel_size
    memory, progress = os.memfd_create("ranks"), Progress()
    leader = Place(0, num_ranks, memory=memory)
    statuses: list[int] = []
    threads = []
    ends: list[socket.socket] = []
    try:
        for rank in range(1, num_ranks):
            ours, theirs = socket.socketpair()
            leader.channels.append(ours)
            ends += [ours, theirs]
            place = replace(leader, rank=rank, channels=[theirs])
            threads.append(
                threading.Thread(target=lambda place: statuses.append(follow(config, place, progress)), args=(place,))
            )
            threads[-1].start()
        yield Engine(config, leader)
    finally:
        for channel in leader.channels:
            channel.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(60)
        for end in ends:
            end.close()
        os.close(memory)
        progress.close()
    assert statuses == [0] * (num_ranks - 1)
