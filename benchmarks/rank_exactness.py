"""What the number of ranks does to results: nothing to what is promised.

    python -m octavo.benchmarks.rank_exactness MODEL --exactness 3,4,7 --closeness 1,2,4,8

- exactness: in bfloat16, requests of all kinds, each alone, then all at once with prefills cut small and large, with
  their prefixes cached, and with too few blocks, so that choices are preempted: tokens and log-probabilities that are
  not the same bits are counted.
- closeness: log-probabilities of real text, teacher-forced, in bfloat16: their mean distance from one rank in float32,
  and how that compares to the distance of one rank in bfloat16.

The last line of stdout is JSON. Status 1 where a bit differs or a distance is over 1.1 times that of one rank.
"""

import argparse
import json
import random
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from octavo.benchmarks import perplexity, serving
from octavo.benchmarks.rank_processes import in_group
from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.engine.scheduler import Scheduler
from octavo.server.errors import OctavoError
from octavo.server.pull import resolve_model

MAX_LEN, MAX_BATCH, NUM_TOKENS = 640, 12, 24
PROMPT_LENS = (1, 16, 17, 65, 100, 128, 300, 520)
MOST = 1.1  # times the distance of one rank
OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2**63},
    {"temperature": 0.9, "presence_penalty": 0.5, "repetition_penalty": 1.1, "seed": 4},
)
Outputs = dict[tuple[str, int], list[tuple[int, bytes]]]  # by request and choice: tokens, bits of log-probabilities


def requests(vocab_size: int) -> list[GenerationRequest]:
    """Greedy and seeded, with and without options, one with two choices."""
    rng = random.Random(0)
    return [
        GenerationRequest(
            str(index),
            [rng.randrange(vocab_size) for _ in range(length)],
            SamplingParams(max_tokens=NUM_TOKENS, logprobs=3, **OPTIONS[index % len(OPTIONS)]),
            n=2 if index == 4 else 1,
        )
        for index, length in enumerate(PROMPT_LENS)
    ]


def generate(engine: Engine, which: Iterable[GenerationRequest]) -> Outputs:
    """All outputs of requests that are added at once."""
    out: Outputs = {}
    for request in which:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            for entry in delta.logprobs or []:
                values = [entry.logprob, *(value for pair in entry.top for value in pair)]
                bits = struct.pack(f"<{len(values)}d", *values)
                out.setdefault((delta.request_id, delta.choice_index), []).append((entry.token_id, bits))
    return out


def check_exactness(engine: Engine, _: object) -> dict[str, Any]:
    """Tokens that were compared, and for each case those that differ in a bit from the request's alone."""

    def reset(budget: int = 512, num_blocks: int = 400, caching: bool = False) -> None:
        """Another scheduler over the same memory; to other ranks steps go on being counted."""
        steps = engine.stats().step
        engine.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=16,
            max_num_seqs=MAX_BATCH,
            max_num_batched_tokens=budget,
            max_model_len=MAX_LEN,
            enable_prefix_caching=caching,
        )
        engine.scheduler._num_planned_steps = engine.scheduler._step = steps

    mine = requests(engine.info.vocab_size)
    alone: Outputs = {}
    for request in mine:
        reset()
        alone |= generate(engine, [request])
    differing: dict[str, int] = {}

    def compare(case: str, **options: Any) -> None:
        reset(**options)
        got = generate(engine, mine)
        differing[case] = sum(a != b for key in alone for a, b in zip(alone[key], got[key], strict=True))

    compare("batch")
    compare("prefill in chunks of 48", budget=48)
    compare("prefix cache, empty", caching=True)
    got = generate(engine, mine)
    differing["prefix cache, full"] = sum(a != b for key in alone for a, b in zip(alone[key], got[key], strict=True))
    hits = engine.stats().prefix_cache_hits
    compare("preemption", num_blocks=44)
    return {
        "num_ranks": len(engine.info.ranks),
        "tokens": sum(map(len, alone.values())),
        "differing": differing,
        "prefix_cache_hits": hits,
        "preemptions": engine.stats().num_preemptions,
    }


def logprobs_of(windows: list[list[int]]) -> Callable[[Engine, object], list[float]]:
    """Measures the log-probabilities of all tokens but each window's first."""

    def measure(engine: Engine, _: object) -> list[float]:
        found: dict[int, list[float]] = {}
        for index, window in enumerate(windows):
            engine.add(GenerationRequest(str(index), window, SamplingParams(max_tokens=0, prompt_logprobs=0)))
        while engine.has_work:
            for delta in engine.step():
                found[int(delta.request_id)] = [entry.logprob for entry in delta.prompt_logprobs or [] if entry]
        return [logprob for index in sorted(found) for logprob in found[index]]

    return measure


def check_closeness(model: str, counts: list[int]) -> list[dict[str, Any]]:
    """By number of ranks: the mean distance from float32, and its ratio to that of one rank."""
    windows = perplexity.windows(Path(model), perplexity.TEXTS)
    measure = logprobs_of(windows)
    exact: list[float] = in_group(EngineConfig(model, device="cpu", dtype="float32"), measure)

    def distance(num_ranks: int) -> float:
        config = EngineConfig(model, device="cpu", dtype="bfloat16", tensor_parallel_size=num_ranks)
        got: list[float] = in_group(config, measure)
        return sum(abs(a - b) for a, b in zip(exact, got, strict=True)) / len(exact)

    one = distance(1)
    rows = []
    for num_ranks in counts:
        mean = one if num_ranks == 1 else distance(num_ranks)
        rows.append({"num_ranks": num_ranks, "tokens": len(exact), "distance": mean, "ratio": mean / one})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Runs both parts; 1 also if they could not be run, 2 for wrong flags (by SystemExit)."""
    parser = argparse.ArgumentParser(prog="rank_exactness", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a folder or pulled name (default: the default model)"
    )
    for name, text in (("exactness", "3,4,7"), ("closeness", "1,2,4,8")):
        parser.add_argument(f"--{name}", type=serving.counts, default=[], metavar="N,N", help=f"for instance {text}")
    args = parser.parse_args(argv)
    try:
        model = str(resolve_model(args.model))
        exactness = []
        for num_ranks in args.exactness:
            config = EngineConfig(
                model,
                device="cpu",
                dtype="bfloat16",
                tensor_parallel_size=num_ranks,
                max_model_len=MAX_LEN,
                max_num_seqs=MAX_BATCH,
            )
            exactness.append(in_group(config, check_exactness))
            print(exactness[-1], flush=True)
        closeness = check_closeness(model, args.closeness) if args.closeness else []
        print(*closeness, sep="\n")
    except (OctavoError, RuntimeError) as error:
        print(f"ranks: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"exactness": exactness, "closeness": closeness}))
    proved = all(row["prefix_cache_hits"] and row["preemptions"] for row in exactness)
    return int(
        not proved
        or any(sum(row["differing"].values()) for row in exactness)
        or any(r["ratio"] > MOST for r in closeness)
    )


if __name__ == "__main__":
    sys.exit(main())
