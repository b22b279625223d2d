"""Which devices are used when some are lost, and when a device is taken back."""

import pytest

from octavo.server.engine.devices import LOOK_S, MAX_LOOK_S, WINDOW_S, Devices, Rung


def devices(*ladder: int, max_faults: int = 2) -> Devices:
    found = Devices(ladder[0], max_faults)
    assert found.choose().num_ranks == ladder[0]  # before anything is known
    found.ladder = [Rung(num_ranks, 100 * num_ranks) for num_ranks in ladder]
    return found


def test_a_device_that_is_gone_is_left_out_at_once() -> None:
    found = devices(4, 3, 2, 1)
    assert found.fault(3, False, 0.0) is None and found.choose() == Rung(4, 400)
    assert found.fault(4, True, 0.0) is None  # there is no such rank
    assert found.fault(1, True, 1.0) == "device 1 is gone"
    assert found.choose() == Rung(3, 300) and found.used == [0, 2, 3] and found.is_degraded
    assert found.fault(1, True, 2.0) == "device 2 is gone"  # the rank's device, not the rank's number
    assert found.choose() == Rung(2, 200) and found.used == [0, 3]


def test_a_ladder_that_has_not_every_number_leaves_spares() -> None:
    found = devices(4, 2, 1)
    assert found.fault(0, True, 0.0)
    assert found.choose().num_ranks == 2 and found.used == [1, 2]
    assert found.fault(0, True, 0.0)
    assert found.choose().num_ranks == 2 and found.used == [2, 3]


@pytest.mark.parametrize("ladder", [(1,), (4,), (4, 3)])
def test_the_last_rung_is_not_left(ladder: tuple[int, ...]) -> None:
    found = devices(*ladder)
    for _ in ladder[1:]:
        assert found.fault(0, True, 0.0)
        found.choose()
    for _ in range(9):
        assert found.fault(0, True, 0.0) is None
    assert found.choose().num_ranks == ladder[-1]


def test_a_device_that_fails_too_often_is_left_out_until_that_is_long_ago() -> None:
    found = devices(2, 1)
    for now_s in (0.0, WINDOW_S / 2, WINDOW_S + 1, WINDOW_S * 1.5 + 1):  # never three within the window
        assert found.fault(1, False, now_s) is None
    assert found.fault(0, False, WINDOW_S * 1.5 + 1) is None  # another's
    end_s = WINDOW_S * 1.6
    assert found.fault(1, False, end_s) == "device 1 had 3 faults within 10 minutes"
    assert found.choose().num_ranks == 1
    assert not found.to_look_for(2 * WINDOW_S) and found.to_look_for(2 * WINDOW_S + 1) == [1]
    found.is_back(1, 2 * WINDOW_S + 1)
    assert found.choose().num_ranks == 2
    assert found.fault(1, False, 2 * WINDOW_S + 2)  # what it did before counts as long as it is in the window


def test_faults_that_were_no_devices_own() -> None:
    found = devices(3, 2, 1)
    assert found.fault(1, False, 0.0) is None
    for at_s in range(1, 9):
        assert found.fault(1, False, at_s) is None and found.fault(2, False, at_s) is None
        found.forgive([at_s])
    assert found.fault(2, False, 10.0) is None and found.fault(2, False, 11.0) is None
    assert found.fault(1, False, 12.0) is None
    assert found.fault(1, False, 13.0) and found.fault(2, False, 14.0)
    assert found.choose().num_ranks == 1
    found.forgive([12.0])
    assert found.choose().num_ranks == 2 and found.used == [0, 1]
    assert found.fault(1, True, 15.0) == "device 1 is gone"
    found.forgive([13.0])
    assert found.choose().num_ranks == 1  # it is still not there


def test_a_device_is_looked_for_ever_more_rarely() -> None:
    found = devices(3, 2, 1)
    assert found.fault(2, True, 0.0)
    assert found.fault(1, True, 1.0)
    found.choose()
    looks = {device: [s for s in range(1000) if device in found.to_look_for(s)] for device in (2,)}[2]
    assert looks[:4] == [LOOK_S, 3 * LOOK_S, 7 * LOOK_S, 15 * LOOK_S] and looks[-1] - looks[-2] == MAX_LOOK_S


def test_a_device_that_is_back_makes_more_ranks_possible() -> None:
    found = devices(4, 2, 1)
    assert found.fault(3, True, 0.0)
    found.choose()
    assert found.fault(1, True, 0.0)
    assert found.choose().num_ranks == 2 and found.used == [0, 2] and not found.can_grow
    found.is_back(1, 5.0)
    assert not found.can_grow and found.back_for_s(7.0) == 2.0  # three are still two ranks
    found.is_back(3, 6.0)
    assert found.can_grow and found.is_degraded and found.back_for_s(7.0) == 2.0
    assert found.choose().num_ranks == 4 and not found.left_out and not found.is_degraded
