"""A server whose ranks are lost: every stream goes on, in every bit as if nothing had happened.

A sample of the matrix that `benchmarks/chaos.py` goes through.
"""

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from servers import command, launched

from octavo.benchmarks.chaos import Chaos, Outcome, Planned, matrix, suffering, table

NUM_RANKS = 2
SAMPLE = [
    Planned("kill", "idle", 1),
    Planned("kill", "prefill", 0),
    Planned("segv", "decode", 1),
    Planned("stop", "decode", 0),
    Planned("slow", "decode", 1),
    Planned("drop", "plan", 1),
    Planned("hang", "idle", 1),
    Planned("kill", "collective", 1),
    Planned("raise", "sampling", 0),
    Planned("raise", "warm-up", 1),
    Planned("kill", "recovery", 0),
]


@pytest.fixture(scope="module")
def model(served_checkpoint: Callable[[str], Path]) -> Path:
    return served_checkpoint("smollm2")


@pytest.fixture(scope="module")
def chaos(model: Path, runner: asyncio.Runner) -> Iterator[Chaos]:
    """One server for all faults."""
    context = suffering(str(model), NUM_RANKS, "--kv-cache-memory-bytes", "8M", num_tokens=60)
    yield runner.run(context.__aenter__())
    runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("planned", SAMPLE, ids=lambda planned: f"{planned.kind}-{planned.phase}-{planned.rank}")
def test_nothing_is_lost_and_no_token_is_wrong(planned: Planned, chaos: Chaos, runner: asyncio.Runner) -> None:
    assert planned in matrix(NUM_RANKS)
    outcome = runner.run(chaos.suffer(0, planned))
    print(asdict(outcome))
    assert outcome.effective
    assert (outcome.lost, outcome.wrong, outcome.leaked) == (0, 0, 0)
    assert outcome.recoveries == (0 if planned.kind == "slow" else 1)


async def flip(chaos: Chaos, site: str, rank: int, detector: str) -> None:
    """Has a bit of a rank change while requests run, and waits until it is found."""
    (chaos._faults / f"flip-{site}@decode:{rank}").touch()
    before = await chaos._recoveries()
    await chaos._run()  # tokens before it is found may be wrong, or none where logits are not finite
    async with asyncio.timeout(20.0):
        while (await chaos._recoveries())["count"] == before["count"]:
            await asyncio.sleep(0.02)
    text = (await chaos._http.get("/metrics")).text
    assert re.search(rf'^octavo:corruptions_total{{.*detector="{detector}".*}} 1.0$', text, re.M)
    assert [stream.output() for stream in await chaos._run()] == chaos._expected


def test_a_rank_whose_weights_have_changed_is_replaced(chaos: Chaos, runner: asyncio.Runner) -> None:
    runner.run(flip(chaos, "weights", 1, "weights"))


def test_a_stopped_launcher_holds_up_nobody(chaos: Chaos, runner: asyncio.Runner) -> None:
    os.kill(chaos.launcher_pid, signal.SIGSTOP)
    outcome = runner.run(chaos.suffer(0, Planned("kill", "idle", 1)))
    assert (outcome.lost, outcome.wrong, outcome.recoveries) == (0, 0, 1)
    assert outcome.seconds["start"] < 10  # and not as long as a start may take


@pytest.mark.parametrize(
    ("exactness", "ranks"), [pytest.param("batch", [3, 2, 1, 4], marks=pytest.mark.slow), ("ranks", [2, 2, 1, 4])]
)
def test_devices_are_lost_one_after_another(
    exactness: str, ranks: list[int], model: Path, runner: asyncio.Runner
) -> None:
    async def lose() -> Outcome:
        flags = "--kv-cache-memory-bytes", "8M", "--exactness", exactness
        async with suffering(str(model), 4, *flags, num_tokens=150) as chaos:
            return await chaos.lose_devices(exactness == "ranks")

    outcome = runner.run(lose())
    print(asdict(outcome))
    assert outcome.effective and outcome.ranks == ranks and outcome.recoveries == len(set(ranks)) - 1
    assert (outcome.lost, outcome.wrong) == (0, 0)


def test_the_table_counts_what_went_wrong() -> None:
    outcomes = [
        Outcome(0, "kill", "decode", 0, effective=True, recoveries=1, lost=1, wrong=2, first_s=1.0, all_s=3.0),
        Outcome(1, "kill", "decode", 1, effective=True, recoveries=1, leaked=0.5, first_s=2.0, all_s=2.5),
        Outcome(2, "kill", "idle", 1),  # it did not strike
    ]
    assert table(outcomes).splitlines()[2:] == [
        "| decode | 2 | 2 | 1 | 2 | 1 | 2.00 | 2.00 | 2.00 | 3.00 | 3.00 |",
        "| all | 2 | 2 | 1 | 2 | 1 | 2.00 | 2.00 | 2.00 | 3.00 | 3.00 |",
    ]


def test_faults_are_for_tests(model: Path, tmp_path: Path) -> None:
    with launched(tmp_path / "log", *command(model), OCTAVO_FAULTS=str(tmp_path)) as server:
        assert server.process.wait(20) == 1
        assert server.log == "octavo: error: OCTAVO_FAULTS is set, which is for tests alone: with --test-faults\n"
