"""Groups of ranks, each in processes of its own, for benchmarks that drive the engine themselves."""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.peers import Place
from octavo.server.engine.process import follow
from octavo.server.engine.progress import Progress, RankFigures

Measure = Callable[[Engine, Callable[[], list[RankFigures]]], Any]


def in_group(config: EngineConfig, measure: Measure) -> Any:
    """What `measure` returns on rank 0 of `config.tensor_parallel_size` processes, which end with it; as JSON has it.

    It gets the engine, and what tells what each rank has done. This process must not have computed anything yet: native
    threads are not forked. Raises RuntimeError where a rank fails.
    """
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        _run(lambda: _lead(config, measure, write))
    os.close(write)
    with os.fdopen(read) as file:
        answer = file.read()
    if os.waitpid(pid, 0)[1] or not answer:
        raise RuntimeError(f"a group of {config.tensor_parallel_size} ranks failed")
    return json.loads(answer)


def _lead(config: EngineConfig, measure: Measure, answer: int) -> int:
    num_ranks, progress = config.tensor_parallel_size, Progress()
    pairs = [socket.socketpair() for _ in range(num_ranks - 1)]
    leader = Place(0, num_ranks, memory=os.memfd_create("ranks"), channels=[ours for ours, _ in pairs])
    pids = []
    for rank in range(1, num_ranks):
        place = Place(rank, num_ranks, memory=leader.memory, channels=[pairs[rank - 1][1]])
        if (pid := os.fork()) == 0:
            os.close(answer)
            for index, (ours, theirs) in enumerate(pairs):
                ours.close()
                if index != rank - 1:
                    theirs.close()
            _run(lambda place=place: follow(config, place, progress))  # type: ignore[misc]
        pids.append(pid)
    for _, theirs in pairs:
        theirs.close()
    engine = Engine(config, leader)

    def figures() -> list[RankFigures]:
        progress.show(0, engine.runner.figures)
        return progress.figures(num_ranks)

    with os.fdopen(answer, "w") as file:
        json.dump(measure(engine, figures), file)
    for ours, _ in pairs:
        ours.close()
    return max([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], default=0)


def _run(function: Callable[[], int]) -> NoReturn:
    """As all that a forked process does."""
    status = 1
    try:
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
