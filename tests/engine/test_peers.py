"""What ranks tell each other: a plan that is not rank 0's is never executed."""

import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from octavo.server.engine.channel import Failed, RankInfo
from octavo.server.engine.peers import (
    HEADER_BYTES,
    Follower,
    Leader,
    PeerError,
    Place,
    decode_plan,
    encode_plan,
)
from octavo.server.engine.plan import NewChoice, StepPlan
from octavo.server.engine.request import SamplingParams
from octavo.server.errors import DeviceError, StartupError

INFO = RankInfo(1, 2, 3, 4, 5, 6.0)


def plan(step: int = 1, epoch: int = 4) -> StepPlan:
    params = SamplingParams(max_tokens=9, temperature=0.5, seed=2**63, logit_bias=((3, -1.5),), stop_token_ids=(7,))
    choice = NewChoice(2, 0, [5, 6, 300, 70000], 3, params, True)
    return StepPlan(epoch, step, [choice], [(2, [9, 4]), (0, [1])], [0, 2], [17, 0], [1, 4], [True, False])


@pytest.fixture
def group() -> Iterator[tuple[Leader, list[Follower]]]:
    pairs = [socket.socketpair() for _ in range(2)]
    leader = Leader(Place(0, 3, 4, channels=[ours for ours, _ in pairs]))
    followers = [Follower(Place(rank, 3, 4, channels=[pairs[rank - 1][1]])) for rank in (1, 2)]
    yield leader, followers
    for pair in pairs:
        for end in pair:
            end.close()


def test_plans_arrive_as_they_are(group: tuple[Leader, list[Follower]]) -> None:
    leader, followers = group
    for step in (1, 2, 3):
        leader.broadcast(plan(step))
    for follower in followers:
        assert [follower.receive() for _ in range(3)] == [plan(step) for step in (1, 2, 3)]


def test_the_least_memory_decides(group: tuple[Leader, list[Follower]]) -> None:
    leader, followers = group
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(follower.agree, blocks) for follower, blocks in zip(followers, (70, 50), strict=True)]
        assert leader.agree(60) == 50
        assert [future.result() for future in found] == [50, 50]
    assert Leader(Place()).agree(60) == 60


def test_any_other_plan_is_found_out() -> None:
    """Flipped bits, and plans that are whole but not those of rank 0."""
    rng = random.Random(0)
    right = encode_plan(plan())
    assert decode_plan(right) == plan()
    num_found = 0
    for _ in range(2000):
        wrong = bytearray(right)
        for _ in range(rng.choice((1, 1, 2, 5))):
            wrong[rng.randrange(len(wrong))] ^= 1 << rng.randrange(8)
        try:
            assert decode_plan(bytes(wrong)) == plan()  # in other bytes
        except PeerError:
            num_found += 1
    for end in range(len(right)):
        with pytest.raises(PeerError):
            decode_plan(right[:end])
    for other in (
        replace(plan(), slots=[2, 0]),
        replace(plan(), starts=[16, 0]),
        replace(plan(), samples=[True, True]),
        replace(plan(), new_blocks=[(2, [9, 5]), (0, [1])]),
        replace(plan(), new_choices=[replace(plan().new_choices[0], token_ids=[5, 6, 301, 70000])]),
    ):
        with pytest.raises(PeerError, match="the plan of step 1 is not rank 0's"):
            decode_plan(right[:HEADER_BYTES] + encode_plan(other)[HEADER_BYTES:])
    assert num_found > 1500


@pytest.mark.parametrize("wrong", [plan(2), plan(1, epoch=3), plan(0)])
def test_a_plan_that_is_missing_or_of_another_epoch(wrong: StepPlan, group: tuple[Leader, list[Follower]]) -> None:
    leader, followers = group
    leader.broadcast(wrong)
    with pytest.raises(PeerError, match=r"\(epoch, step\) .*, expected \(4, 1\)"):
        followers[1].receive()


def test_who_cannot_start_says_why(group: tuple[Leader, list[Follower]]) -> None:
    leader, followers = group
    followers[0].loaded(INFO)
    followers[1].failed(Failed.to_start(DeviceError("it is lost"), 2))
    with pytest.raises(DeviceError, match="rank 2: it is lost") as error:
        leader.wait_until_loaded()
    assert error.value.rank == 2


def test_who_is_gone() -> None:
    ours, theirs = socket.socketpair()
    leader, follower = Leader(Place(0, 2, channels=[ours])), Follower(Place(1, 2, channels=[theirs]))
    ours.shutdown(socket.SHUT_RDWR)
    assert follower.receive() is None
    with pytest.raises(PeerError):
        follower.agree(1)
    with pytest.raises(StartupError, match="rank 1 ended while it started"):
        leader.agree(1)
    with pytest.raises(PeerError):
        leader.broadcast(plan())
    ours.close()
    theirs.close()
