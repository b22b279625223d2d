"""How a decode step's cost grows with the ranks that divide the model: measured, and by a simple model.

The model adds up what all ranks of one machine must do, which has one bandwidth and one rate however many they are:

- compute: the longer of reading all ranks' weights and KV once and of computing their products;
- bandwidth: reading what ranks have of each other, parts of sums and logits;
- latency: the step's barriers, each as long as one takes as many processes that do nothing else;
- host: what one rank's step takes outside forward pass and output head, as often as ranks share a core.
"""

import os
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from octavo.benchmarks.offline import Machine, ModelCost, make_requests
from octavo.benchmarks.rank_processes import in_group
from octavo.benchmarks.step_profile import bytes_of, decoding, kernels, timed
from octavo.kernels.ranks import SharedMemoryRanks
from octavo.models.config import read_config
from octavo.models.shard import Shard
from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine

INPUT_LEN = 64
NUM_BARRIERS = 1000


@dataclass(frozen=True, slots=True)
class Measured:
    """Decode steps of one group."""

    num_ranks: int
    batch_size: int
    step_s: float
    host_s: float  # of it, outside the forward pass and the output head
    shares: list[float]  # of each rank: of its steps' time, in collectives
    context_len: float  # on average
    weight_bytes: list[int]  # of each rank
    unread_bytes: int  # of these, about, of an embedding that is not the head as well: a step reads a few rows
    itemsize: int


def measure_group(model: str, num_ranks: int, batch_sizes: list[int], num_steps: int) -> list[Measured]:
    """Decode steps of as many ranks, each a process of its own."""

    def measure(engine: Engine, figures: Any) -> list[dict[str, Any]]:
        found = []
        products = {name: kernels(engine)[name] for name in ("forward", "logits")}
        for batch_size in batch_sizes:
            for turn in range(2):  # the first is to warm up
                requests = make_requests(
                    batch_size, INPUT_LEN, num_steps + 2, engine.info.vocab_size, f"{batch_size}/{turn}"
                )
                seconds = defaultdict[str, float](float)
                with decoding(engine, requests), timed(products, seconds):
                    before, begin_s = figures(), time.perf_counter()
                    for _ in range(num_steps):
                        engine.step()
                    step_s = (time.perf_counter() - begin_s) / num_steps
            spent = [
                (a.step_s - b.step_s, a.collective_s - b.collective_s) for a, b in zip(figures(), before, strict=True)
            ]
            found.append(
                {
                    "batch_size": batch_size,
                    "step_s": step_s,
                    "host_s": step_s - sum(seconds.values()) / num_steps,
                    "shares": [collective_s / step_s for step_s, collective_s in spent],
                    "context_len": INPUT_LEN + num_steps / 2,
                    "weight_bytes": [rank.weight_bytes for rank in engine.info.ranks],
                    "unread_bytes": num_ranks * bytes_of(engine, "embedding") * (engine.runner.model.head is not None),
                    "itemsize": 2 if engine.info.dtype == "bfloat16" else 4,
                }
            )
        return found

    config = EngineConfig(
        model,
        device="cpu",
        tensor_parallel_size=num_ranks,
        max_model_len=INPUT_LEN + num_steps + 16,
        max_num_seqs=max(batch_sizes),
        max_num_batched_tokens=max(512, INPUT_LEN * max(batch_sizes)),
    )
    return [Measured(num_ranks, **row) for row in in_group(config, measure)]


def barrier_s(num_ranks: int) -> float:
    """Seconds of a barrier of so many processes that do nothing else. Raises RuntimeError where one fails."""
    memory, (read, write) = os.memfd_create("ranks"), os.pipe()
    pids = []
    for rank in range(num_ranks):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                ranks = SharedMemoryRanks(rank, num_ranks, memory, 1)
                for _ in range(NUM_BARRIERS // 10):
                    ranks.wait()
                begin_s = time.perf_counter()
                for _ in range(NUM_BARRIERS):
                    ranks.wait()
                if rank == 0:
                    os.write(write, repr((time.perf_counter() - begin_s) / NUM_BARRIERS).encode())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    if any([os.waitpid(pid, 0)[1] for pid in pids]):
        raise RuntimeError("a process of a barrier failed")
    seconds = float(os.read(read, 100))
    for descriptor in (memory, read, write):
        os.close(descriptor)
    return seconds


def modelled(measured: Measured, alone: Measured, model: str, machine: Machine, barrier: float) -> dict[str, float]:
    """Milliseconds of a step's parts by the model, their sum, and the bytes that a rank has of others.

    alone: the same of one rank.
    """
    dtype = {2: torch.bfloat16, 4: torch.float32}[measured.itemsize]
    config, cost = read_config(Path(model)), ModelCost.of(Path(model), dtype)
    num_ranks, rows = measured.num_ranks, measured.batch_size
    shards = Shard(0, num_ranks, num_ranks).peers
    kv_heads = sum(len(shard.kv_heads(config)) for shard in shards) / config.num_kv_heads
    num_bytes = sum(measured.weight_bytes) - measured.unread_bytes
    num_bytes += int(rows * measured.context_len * cost.kv_token_bytes * kv_heads)
    flops = cost.flops(rows, int(rows * measured.context_len), rows)
    num_sums = 2 * config.num_layers + 1
    of_others = (num_ranks - 1) / num_ranks
    exchanged = num_sums * rows * config.hidden_size * (4 + measured.itemsize) * of_others  # of each rank
    logits = 4 * rows * config.vocab_size * of_others  # of rank 0
    barriers = 2 * num_sums + 3 if num_ranks > 1 else 0  # beside the sums': two of the logits', one of the tokens'
    cores = len(os.sched_getaffinity(0))
    parts = {
        "compute_ms": machine.seconds(num_bytes, flops) * 1e3,
        "bandwidth_ms": (num_ranks * exchanged + logits) / machine.bandwidth * 1e3,
        "latency_ms": barriers * barrier * 1e3,
        "host_ms": alone.host_s * -(-num_ranks // cores) * 1e3,
    }
    return {**parts, "model_ms": sum(parts.values()), "exchanged_bytes": exchanged}


def row(measured: Measured, alone: Measured, model: str, machine: Machine, barrier: float) -> dict[str, Any]:
    """A line of the table."""
    return {
        "ranks": measured.num_ranks,
        "batch_size": measured.batch_size,
        "tokens_per_s": measured.batch_size / measured.step_s,
        "step_ms": measured.step_s * 1e3,
        **modelled(measured, alone, model, machine, barrier),
        "barrier_us": barrier * 1e6,
        "collective_share": mean(measured.shares),
        "weight_bytes": max(measured.weight_bytes),
    }
