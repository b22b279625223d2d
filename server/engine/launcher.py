"""The launcher: `python -m octavo.server.engine.launcher FD PARENT_PID`; FD is a socket it inherits.

Has imported what ranks need, and forks them: those of an epoch start at once, and share the memory that the imports
take. It has no threads, nor ever touches a GPU, so that what it forks is as good as a fresh process. Ranks die with it,
it dies with the front end. It and they are started with SIGINT and SIGTERM blocked.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

from octavo.server.config import EngineConfig
from octavo.server.engine.peers import Place
from octavo.server.engine.process import run_rank
from octavo.server.engine.progress import MAX_RANKS, Progress

MAX_REQUEST_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent ended before the call
        os._exit(1)


def main() -> int:
    """Serves until the front end closes the socket."""
    die_with_parent(int(sys.argv[2]))
    front_end = socket.socket(fileno=int(sys.argv[1]))
    # Nothing loaded so far is ever garbage, and pages that the collector does not write to stay shared.
    gc.collect()
    gc.freeze()
    while True:
        request, descriptors, _, _ = socket.recv_fds(front_end, MAX_REQUEST_BYTES, 2 + MAX_RANKS)
        if not request:
            return 0
        _reap()
        channel, *others = (socket.socket(fileno=each) for each in (descriptors[0], *descriptors[2:]))
        _launch(front_end, request, channel, Progress(descriptors[1]), others)


def _reap() -> None:
    """Forget the ranks of epochs before. Until here their ids cannot become another process's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _launch(
    front_end: socket.socket, request: bytes, channel: socket.socket, progress: Progress, others: list[socket.socket]
) -> None:
    """Fork the ranks that `request` describes; tell the front end who they are.

    channel: rank 0's to the front end; progress: the page on which ranks show themselves to it; others: rank 0's
    connections to ranks of other machines, or those of the ranks here to rank 0, where that is another machine's.
    """
    told = json.loads(request)
    config, epoch, devices = EngineConfig.from_json(told["config"]), told["epoch"], told["devices"]
    num_ranks, address = told["num_ranks"], told["address"]
    ranks = range(told["first_rank"], told["first_rank"] + len(devices))
    memory = os.memfd_create("octavo") if num_ranks > 1 else -1
    channels: dict[int, list[socket.socket]] = {}  # of each rank here, to rank 0; of that, to each other rank
    if 0 in ranks:
        pairs = [socket.socketpair() for _ in ranks[1:]]
        channels[0] = [*(ours for ours, _ in pairs), *others]
        channels |= {rank: [theirs] for rank, (_, theirs) in zip(ranks[1:], pairs, strict=True)}
    else:
        channels |= {rank: [other] for rank, other in zip(ranks, others, strict=True)}
    joints = [one for of_rank in channels.values() for one in of_rank]
    parent, pids = os.getpid(), []
    for local_rank, rank in enumerate(ranks):
        if (pid := os.fork()) == 0:
            for one in (front_end, *([channel] if rank else []), *joints):
                if one not in channels[rank]:
                    one.close()
            local = local_rank, len(ranks)
            place = Place(rank, num_ranks, epoch, memory, channels[rank], devices[local_rank], local, address)
            _be_rank(parent, config, place, channel, progress)
        pids.append(pid)
    pidfds = []
    with suppress(OSError, AttributeError):  # an old kernel, or a Python built for one
        pidfds = [os.pidfd_open(pid) for pid in pids]
    socket.send_fds(front_end, [json.dumps({"epoch": epoch, "pids": pids}).encode()], pidfds)
    for descriptor in [*pidfds, *([memory] if memory >= 0 else [])]:
        os.close(descriptor)
    progress.close()
    for one in (channel, *joints):
        one.close()


def _be_rank(parent: int, config: EngineConfig, place: Place, channel: socket.socket, progress: Progress) -> NoReturn:
    status = 1
    try:
        die_with_parent(parent)
        status = run_rank(config, place, channel, progress)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
