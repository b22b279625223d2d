"""Faults on demand, for tests alone: files named KIND@PHASE:RANK or dead=DEVICE, in a folder. Standard library.

OCTAVO_FAULTS names the folder, and is refused unless the server is started with --test-faults. A rank that comes to a
phase takes the file away and does what it says, once. Kinds: kill, stop, segv, raise, hang, slow (10 times as long,
for NUM_SLOW steps), and flips of a bit in what the rank holds (`bit_flips.py`): flip-weights, flip-kv, and of the step
that begins flip-activations and flip-logits. Phases: idle, recovery (of an epoch but the first, before it loads),
warm-up, prefill, decode, collective (while the model runs, where ranks wait for each other), sampling, plan (a rank but
the first is sent one), which has kinds of its own: drop (it never comes) and change (what comes is another plan). A
device is dead while there is a file that says so: no rank starts on it.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

FLIPS = ("flip-weights", "flip-kv", "flip-activations", "flip-logits")
KINDS = ("kill", "stop", "segv", "raise", "hang", "slow", "drop", "change", *FLIPS)
PHASES = ("idle", "recovery", "warm-up", "prefill", "decode", "collective", "sampling", "plan")
NUM_SLOW = 20
SLOWER = 10
HANG_S = 3600.0
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}


def is_dead(folder: str, device: int) -> bool:
    """Whether a device is declared dead; none is where `folder` is empty."""
    return bool(folder) and os.path.exists(os.path.join(folder, f"dead={device}"))


class Faults:
    """Those of one rank; none where `folder` is empty."""

    def __init__(self, folder: str = "", rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self.flip: Callable[[str], object] = _nothing_to_flip  # told where a bit is to change
        self._num_slow = 0
        self._begin_s = self._step_s = 0.0

    def at(self, phase: str) -> None:
        """The rank is at a phase."""
        if self._folder and (kind := self._take(phase)):
            self._strike(kind)

    def begin_step(self, phase: str) -> None:
        """A step begins, of the phase prefill or decode; the model runs next."""
        if not self._folder:
            return
        self._begin_s = time.monotonic()
        self.at(phase)
        kind = self._take("collective")
        if kind in _SIGNALS:
            threading.Timer(self._step_s / 2, self._strike, (kind,)).start()
        elif kind:
            self._strike(kind)

    def end_step(self) -> None:
        """The step has ended."""
        if self._folder:
            self._step_s = time.monotonic() - self._begin_s
            if self._num_slow:
                self._num_slow -= 1
                time.sleep((SLOWER - 1) * self._step_s)

    def plan(self, step: int) -> str:
        """What becomes of the plan of a step, on its way to the rank: drop, change, or nothing."""
        if kind := self._folder and self._take("plan"):
            print(f"{kind} of the plan of step {step}", file=sys.stderr, flush=True)
        return kind

    def _take(self, phase: str) -> str:
        """The kind of a fault that is asked for here, which nobody gets again."""
        for name in os.listdir(self._folder):
            kind, _, place = name.partition("@")
            if kind in KINDS and place == f"{phase}:{self._rank}":
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._folder, name))
                    return kind
        return ""

    def _strike(self, kind: str) -> None:
        if kind == "raise":
            raise RuntimeError("a fault that was asked for")
        if kind == "hang":
            time.sleep(HANG_S)
        elif kind == "slow":
            self._num_slow = NUM_SLOW
        elif kind in FLIPS:
            self.flip(kind.removeprefix("flip-"))
        else:
            os.kill(os.getpid(), _SIGNALS[kind])


def _nothing_to_flip(where: str) -> None:
    raise RuntimeError(f"there are no {where} yet")
