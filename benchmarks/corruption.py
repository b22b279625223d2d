"""Flips bits of an engine while it works, one for each engine, and counts what finds them and what comes out wrong.

    python -m octavo.benchmarks.corruption MODEL --ranks 2 --flips 200 --clean-steps 100000

Sites: a rank's weights, its KV cache (blocks that hold something), its activations (any buffer, before any op of a
step), its logits. Requests come in two waves, the second beginning as the first does, so that it finds blocks in the
prefix cache. Every output is compared with that of an engine in which no bit was flipped. Audits are on, but count
apart, since they are not by default. Ranks are threads of this process; a flip strikes rank 0, or, where that is seen
from rank 0, any of them. Each flip appends a line of JSON to the log, which is gone on with if it is there already.
"""

import argparse
import itertools
import json
import os
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from octavo.server.config import EngineConfig
from octavo.server.engine.bit_flips import BitFlips
from octavo.server.engine.engine import Engine, Rank
from octavo.server.engine.integrity import RECHECK_STEPS, Corruption
from octavo.server.engine.peers import Place
from octavo.server.engine.process import follow
from octavo.server.engine.progress import Progress
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.engine.runner import Runner

SITES = ("weights", "kv", "activations", "logits")
NUM_REQUESTS, NUM_TOKENS, PROMPT_LEN = 6, 40, 100  # of each wave; the longest prompt


@dataclass
class Outcome:
    """What came of one flip."""

    number: int
    site: str
    ranks: int
    interval: int  # of --rank-check-interval
    rank: int
    detector: str = ""  # that found it: of `epoch.DETECTORS`, or finite: logits were not; empty: none
    audited: bool = False  # an audit found it, after all others had not
    wrong: int = 0  # choices with another output, as far as they came
    steps: int = 0  # from the flip to its finding, with the step itself
    seconds: float = 0.0


class Group:
    """Rank 0's engine, and the other ranks as threads. `runners` by rank."""

    def __init__(self, config: EngineConfig) -> None:
        num_ranks = config.tensor_parallel_size
        self._memory, self._progress = os.memfd_create("octavo"), Progress()
        leader, ends = Place(0, num_ranks, memory=self._memory), []
        self._channels, self._threads = leader.channels, []
        runners: dict[int, Runner] = {}
        load = Rank.load

        def loaded(rank: Rank, *args: Any) -> Runner:
            runners[rank.shard.rank] = load(rank, *args)
            return runners[rank.shard.rank]

        Rank.load = loaded  # type: ignore[assignment, method-assign]
        try:
            for rank in range(1, num_ranks):
                ours, theirs = socket.socketpair()
                leader.channels.append(ours)
                ends.append(theirs)
                place = replace(leader, rank=rank, channels=[theirs])
                thread = threading.Thread(target=follow, args=(config, place, self._progress), daemon=True)
                thread.start()
                self._threads.append(thread)
            self.engine = Engine(config, leader)
        finally:
            Rank.load = load  # type: ignore[method-assign]
        self._ends = ends
        self.runners = [runners[rank] for rank in range(num_ranks)]

    def close(self) -> None:
        """Ends the other ranks."""
        for channel in self._channels:
            channel.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10.0)
        for end in [*self._channels, *self._ends]:
            end.close()
        self._progress.close()
        os.close(self._memory)


@contextmanager
def group_of(config: EngineConfig) -> Iterator[Group]:
    """A group that ends with the block."""
    group = Group(config)
    try:
        yield group
    finally:
        group.close()


def waves(vocab_size: int) -> list[list[GenerationRequest]]:
    """Requests, greedy and seeded; those of the second wave have prompts that begin as those of the first."""
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab_size) for _ in range(PROMPT_LEN)] for _ in range(NUM_REQUESTS)]
    params = [
        SamplingParams(NUM_TOKENS, temperature=0.0 if i % 2 else 0.8, seed=i, logprobs=1) for i in range(NUM_REQUESTS)
    ]
    return [
        [
            GenerationRequest(f"{wave}-{i}", [*prompts[i][: 40 + 12 * i], wave], params[i], n=1 + (i == 2))
            for i in range(NUM_REQUESTS)
        ]
        for wave in range(2)
    ]


class Trial:
    """One engine that runs both waves, and perhaps a flip."""

    def __init__(self, group: Group) -> None:
        self._group, self._engine = group, group.engine
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.failed = 0  # choices that ended with an error
        self.num_steps = 0
        self._to_audit: list[Any] = []

    def run(self, strike_at: int = -1, flip: "Flip | None" = None) -> None:
        """Raises Corruption where a detector finds something."""
        for wave in waves(self._engine.info.vocab_size):
            for request in wave:
                self._engine.add(request)
            while self._engine.scheduler._choices:
                if self.num_steps == strike_at and flip is not None:
                    flip.strike()
                self._step()
                self._to_audit += self._engine.scheduler._to_audit  # not before all others have had their turn
                self._engine.scheduler._to_audit.clear()
            for runner in self._group.runners:  # the second wave comes a little later
                if runner.kv_checksums is not None:
                    runner.kv_checksums._checked_at -= RECHECK_STEPS

    def finish(self) -> None:
        """Has the weights looked at once, as if time went by, then all audits run."""
        weights = self._engine.runner.weights
        for _ in range(weights.num_slices):
            weights.check_next()
        self._engine.scheduler._to_audit.extend(self._to_audit)
        while self._engine.has_work:
            self._step()

    def _step(self) -> None:
        self.num_steps += 1
        for delta in self._engine.step():
            self.outputs.setdefault((delta.request_id, delta.choice_index), []).extend(delta.token_ids)
            self.failed += delta.finish_reason == "error"


class Flip:
    """A flip at a site, on a rank; remembers when it struck."""

    def __init__(self, group: Group, site: str, rank: int, seed: int) -> None:
        self._group, self._site = group, site
        self._flips = BitFlips(group.runners[rank], seed)
        self.at_s = 0.0

    def strike(self) -> None:
        """Flips the bit, or has the next step flip it."""
        self.at_s = time.monotonic()
        if self._site == "kv":
            scheduler = self._group.engine.scheduler
            owned = {block for choice in scheduler._running for block in choice.blocks}
            self._flips.kv(sorted(owned | set(scheduler._cache._hashes)))
        else:
            self._flips.flip(self._site)


def suffer(config: EngineConfig, number: int, site: str, expected: dict[tuple[str, int], list[int]]) -> Outcome:
    """A new engine, in which one bit is flipped."""
    rng = random.Random(number)
    num_ranks = config.tensor_parallel_size
    rank = 0 if site == "weights" else rng.randrange(num_ranks)
    outcome = Outcome(number, site, num_ranks, config.rank_check_interval, rank)
    with group_of(config) as group:
        trial, flip = Trial(group), Flip(group, site, rank, number)
        strike_at = rng.randrange(1, 2 * NUM_TOKENS - 4)  # in either wave, and not behind the last step
        try:
            trial.run(strike_at, flip)
            stats = group.engine.stats()
            if stats.kv_blocks_dropped:
                outcome.detector = "kv"
            elif trial.failed:
                outcome.detector = "finite"
            outcome.wrong = _num_wrong(trial.outputs, expected)
            trial.finish()
        except Corruption as error:
            outcome.wrong = _num_wrong(trial.outputs, expected)
            if error.detector == "audit":
                outcome.audited = not outcome.detector
            else:
                outcome.detector = outcome.detector or error.detector
        outcome.seconds = time.monotonic() - flip.at_s
        outcome.steps = trial.num_steps - strike_at
    return outcome


def _num_wrong(outputs: dict[tuple[str, int], list[int]], expected: dict[tuple[str, int], list[int]]) -> int:
    return sum(tokens != expected[key][: len(tokens)] for key, tokens in outputs.items())


def clean(config: EngineConfig, num_steps: int) -> int:
    """Runs so many steps in which nothing is flipped. Raises Corruption on a false alarm."""
    done = 0
    with group_of(config) as group:
        while done < num_steps:
            trial = Trial(group)
            trial.run()
            done += trial.num_steps
    return done


CHOICES, BLOCK_STEPS = 32, 16  # that decode; of a measurement, with a detector or without
COST_TOKENS = 10 * BLOCK_STEPS + 8


def cost(model: str, num_ranks: int, num_rounds: int) -> str:
    """The time that detectors add to decodes, and what they take of the time by their own clocks, prefill included.

    A round is prompts that begin alike and decodes of 32 choices. Of the latter, 16 steps with all detectors and 16
    without take turns, and neighbours are compared.
    """
    config = EngineConfig(model, device="cpu", tensor_parallel_size=num_ranks, max_model_len=512)
    ratios, own_s, all_s, rng, count = [], {"weights": 0.0, "kv": 0.0}, 0.0, random.Random(0), itertools.count()
    with group_of(config) as group:
        engine, runners = group.engine, group.runners
        saved = [(r.weights._share, r.kv_checksums, r.replicas.interval) for r in runners]
        common = [rng.randrange(1000) for _ in range(96)]

        def steps(on: bool, number: int = BLOCK_STEPS) -> float:
            for runner, (share, kv_checksums, interval) in zip(runners, saved, strict=True):
                runner.weights._share, runner.weights._at_s = share * on, time.monotonic()
                runner.kv_checksums = kv_checksums if on else None
                runner.replicas.interval = interval * on
            begin_s = time.perf_counter()
            for _ in range(number):
                engine.step()
            return time.perf_counter() - begin_s

        for _ in range(num_rounds):
            for kv_checksums in (kv_checksums for _, kv_checksums, _ in saved if kv_checksums is not None):
                kv_checksums._checked_at -= RECHECK_STEPS  # hits are compared in each round
            for i in range(CHOICES):
                prompt = [*common, *(rng.randrange(1000) for _ in range(32 + i))]
                params = SamplingParams(COST_TOKENS, temperature=0.0)
                engine.add(GenerationRequest(str(next(count)), prompt, params))
            before = engine.stats()
            begin_s = time.perf_counter()
            while engine.scheduler.num_decodes_and_prefills() != (CHOICES, 0):
                steps(True, 1)
            for pair in range(4):
                first = pair % 2 == 0
                seconds = {on: steps(on) for on in (first, not first)}
                ratios.append(seconds[True] / seconds[False] - 1.0)
                begin_s += seconds[False]
            after = engine.stats()
            all_s += time.perf_counter() - begin_s
            own_s["weights"] += after.weight_check_s - before.weight_check_s
            own_s["kv"] += after.kv_check_s - before.kv_check_s
            while engine.has_work:
                engine.step()
    low, middle, high = statistics.quantiles(ratios, n=4)
    own = ", ".join(f"{name} {100 * seconds / all_s:.2f} %" for name, seconds in own_s.items())
    return (
        f"{num_ranks} ranks: detectors add {100 * middle:+.2f} % to decodes, quartiles {100 * low:+.2f} and "
        f"{100 * high:+.2f} %, {len(ratios)} pairs; by rank 0's clocks, prefill included: {own}"
    )


def table(outcomes: list[Outcome]) -> str:
    """By site and number of ranks, as Markdown."""
    lines = [
        "| ranks | compared every | site | flips | benign | found by | wrong tokens before | escaped | by audits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks, interval, site in sorted({(o.ranks, o.interval, SITES.index(o.site)) for o in outcomes}):
        some = [o for o in outcomes if (o.ranks, o.interval, o.site) == (ranks, interval, SITES[site])]
        found = [o for o in some if o.detector]
        by = {name: sum(o.detector == name for o in found) for name in sorted({o.detector for o in found})}
        escaped = [o for o in some if not o.detector and o.wrong]
        row: list[object] = [ranks, f"{interval} steps" if ranks > 1 else "-", SITES[site], len(some)]
        row += [len(some) - len(found) - len(escaped)]
        row += [", ".join(f"{name} {count}" for name, count in by.items()) or "-"]
        row += [sum(o.wrong > 0 for o in found), len(escaped), sum(o.audited for o in escaped)]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs what is not in the log yet. Status 1 for a false alarm."""
    parser = argparse.ArgumentParser(prog="python -m octavo.benchmarks.corruption", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rank-check-interval", type=int, default=EngineConfig().rank_check_interval)
    parser.add_argument("--sites", nargs="+", choices=SITES, default=SITES)
    parser.add_argument("--flips", type=int, default=200, help="of each site")
    parser.add_argument(
        "--cost", type=int, default=0, metavar="PAIRS", help="measure throughput with detectors and without"
    )
    parser.add_argument("--clean-steps", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("corruption.jsonl"))
    arguments = parser.parse_args(argv)
    log: Path = arguments.log
    outcomes = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    config = EngineConfig(
        arguments.model,
        device="cpu",
        dtype="bfloat16",
        tensor_parallel_size=arguments.ranks,
        max_model_len=256,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=4 << 20,
        rank_check_interval=arguments.rank_check_interval,
        audit=1.0,
    )
    if arguments.cost:
        print(cost(arguments.model, arguments.ranks, arguments.cost))
        return 0
    with group_of(config) as group:
        trial = Trial(group)
        trial.run()
        expected = trial.outputs
    mine = arguments.ranks, arguments.rank_check_interval
    seen = {(o.site, o.number) for o in outcomes if (o.ranks, o.interval) == mine}
    for number in range(arguments.flips):
        for site in arguments.sites:
            if (site, number) not in seen:
                outcomes.append(suffer(config, number, site, expected))
                with log.open("a") as file:
                    file.write(json.dumps(asdict(outcomes[-1])) + "\n")
    print(table(outcomes))
    for detector in sorted({o.detector for o in outcomes if o.detector}):
        some = [o for o in outcomes if o.detector == detector]
        print(f"{detector}: found after {statistics.median(o.steps for o in some):.0f} steps in the median,", end=" ")
        print(f"{max(o.steps for o in some)} at most")
    if arguments.clean_steps:
        try:
            done = clean(replace(config, audit=0.05), arguments.clean_steps)
        except Corruption as error:
            print(f"false alarm of {error.detector}: {error}")
            return 1
        print(f"{done} clean steps on {arguments.ranks} ranks: no false alarm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
