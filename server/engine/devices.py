"""Which devices an engine's ranks have, and how many ranks there are when devices are lost. Standard library only.

A device is left out when a rank finds it gone, or when more faults than are allowed were its rank's within some
minutes. The engine then goes down its ladder: numbers of ranks that the memory allows, found out when it first starts.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

WINDOW_S = 600.0  # in which faults are counted
LOOK_S, MAX_LOOK_S = 2.0, 60.0  # between looks for a device that is gone: doubled each time, up to the latter

PROBE = -1  # in place of an epoch: the rank only looks whether its device is there
LEFT_OUT = ("gone", "failing")  # why a device is left out: it is not there; its rank had too many faults


@dataclass(frozen=True, slots=True)
class Rung:
    """A number of ranks that the memory allows, with the context that it allows then."""

    num_ranks: int
    max_model_len: int


@dataclass(slots=True)
class LeftOut:
    """A device that is not used."""

    reason: str  # one of LEFT_OUT
    look_s: float  # when to look whether it is there again
    pause_s: float  # until the look after that
    back_s: float | None = None  # since when it is there again


class Devices:
    """Those of one engine, by number.

    Attributes:
        ladder: from the number of ranks that was asked for downwards.
        left_out: devices that are not used, whatever the reason.
        used: devices of the ranks of the current start, by rank.
    """

    def __init__(self, num_devices: int, max_faults: int) -> None:
        """max_faults: of one device within WINDOW_S; with more it is left out."""
        self.ladder = [Rung(num_devices, 0)]  # until it is known
        self.left_out: dict[int, LeftOut] = {}
        self.used: list[int] = []
        self._max_faults = max_faults
        self._faults_s: list[deque[float]] = [deque(maxlen=max_faults + 1) for _ in range(num_devices)]

    @property
    def is_degraded(self) -> bool:
        """Whether fewer are used than were asked for."""
        return len(self.used) < self.ladder[0].num_ranks

    @property
    def can_grow(self) -> bool:
        """Whether devices that are back make more ranks possible."""
        return self._rung().num_ranks > len(self.used)

    def choose(self) -> Rung:
        """The highest rung that there are devices for. They are `used` from now on; those that are back are as new."""
        rung = self._rung()
        for device in self._usable():
            self.left_out.pop(device, None)
        self.used = self._usable()[: rung.num_ranks]
        return rung

    def fault(self, rank: int, is_gone: bool, now_s: float) -> str | None:
        """Counts a fault of a rank's device. Returns in words why it is left out from now on, if it is.

        It is not where the ladder has no rung without it: then all that can be done is to try again.
        """
        if rank >= len(self.used):  # as an engine may say that is no longer right in its mind
            return None
        device = self.used[rank]
        faults_s = self._faults_s[device]
        faults_s.append(now_s)
        is_failing = len(faults_s) > self._max_faults and now_s - faults_s[0] < WINDOW_S
        if not (is_gone or is_failing) or self.ladder[-1].num_ranks >= len(self._usable()):
            return None
        if is_gone:
            self.left_out[device] = LeftOut("gone", now_s + LOOK_S, LOOK_S)
            return f"device {device} is gone"
        self.left_out[device] = LeftOut("failing", faults_s[0] + WINDOW_S, LOOK_S)
        return f"device {device} had {len(faults_s)} faults within {WINDOW_S / 60:.0f} minutes"

    def forgive(self, faults_s: Collection[float]) -> None:
        """Faults at these times were no device's own. One that is left out for them may be chosen again."""
        for device, counted_s in enumerate(self._faults_s):
            own_s = [at_s for at_s in counted_s if at_s not in faults_s]
            if len(own_s) < len(counted_s):
                counted_s.clear()
                counted_s.extend(own_s)
                if device in self.left_out and self.left_out[device].reason == "failing":
                    del self.left_out[device]

    def to_look_for(self, now_s: float) -> list[int]:
        """Devices for which it is time to look; the next time is later."""
        due = [device for device, out in self.left_out.items() if out.back_s is None and out.look_s <= now_s]
        for device in due:
            out = self.left_out[device]
            out.pause_s = min(2 * out.pause_s, MAX_LOOK_S)
            out.look_s = now_s + out.pause_s
        return due

    def is_back(self, device: int, now_s: float) -> None:
        """A device is there again: it may be chosen."""
        self.left_out[device].back_s = now_s

    def back_for_s(self, now_s: float) -> float:
        """How long the devices that are back have waited to be used."""
        return now_s - min((out.back_s for out in self.left_out.values() if out.back_s is not None), default=now_s)

    def _usable(self) -> list[int]:
        return [
            device
            for device in range(self.ladder[0].num_ranks)
            if device not in self.left_out or self.left_out[device].back_s is not None
        ]

    def _rung(self) -> Rung:
        num_devices = len(self._usable())
        return next(rung for rung in self.ladder if rung.num_ranks <= num_devices)
