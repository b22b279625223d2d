"""How the cost grows: a step's with the choices that run, scheduling's with those that wait, attention's with context,
and a step's with the ranks that divide the model.

    python -m octavo.benchmarks.scaling MODEL --plot FOLDER

- overhead: what a decode step takes beside its kernels (forward pass, logits, sampling), and to encode its message to
  the front end; wall time, the median over the steps.
- admission: the scheduler alone under steady traffic, for every choice that ends a new one is queued; CPU time of
  queueing a request and of a step's planning and applying, on average.
- attention: one layer's paged attention for one decode step, on KV blocks in random order, no block twice until all are
  read; wall time, the median over the calls. Linear growth shows as a constant cost per context token.
- ranks: decode steps of as many ranks, each a process; mean wall time, the share of it in collectives (waiting for
  other ranks included), and beside them what a simple model says: `rank_scaling.py`.

Prints a table for each, and draws them with --plot (which needs matplotlib). The last line of stdout is JSON.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from octavo.benchmarks import rank_scaling, serving
from octavo.benchmarks.offline import make_requests, measure_machine
from octavo.benchmarks.serving import BenchmarkError
from octavo.benchmarks.step_profile import decode_engine, decoding, kernels, timed
from octavo.kernels.cpu.library import set_num_threads, variant
from octavo.kernels.paged_attention import paged_attention
from octavo.kernels.program import Program
from octavo.models.config import ConfigError, ModelConfig, read_config
from octavo.models.memory import kv_block_shape
from octavo.server.config import EngineConfig
from octavo.server.engine.channel import StepOutput, encode_frame
from octavo.server.engine.engine import Engine, choose_dtype
from octavo.server.engine.plan import StepResult
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.engine.scheduler import Scheduler
from octavo.server.errors import OctavoError
from octavo.server.pull import resolve_model

TARGETS_MS = {32: 0.7, 256: 3.0}  # running choices -> most that overhead and message are to take together
BLOCK_SIZE = EngineConfig().block_size
NUM_RUNNING, INPUT_LEN, MAX_OUTPUT_LEN, NUM_SCHEDULER_STEPS = 32, 64, 32, 500  # the traffic of the admission part
NUM_CALLS = 20  # of the attention op

PARTS = ("overhead", "admission", "attention", "ranks")
Rows = list[dict[str, Any]]


def prompt_lens(batch_size: int) -> list[int]:
    """Short, and such that in each step some choices need a new block, as they do under real traffic."""
    return [2 + index % BLOCK_SIZE for index in range(batch_size)]


def measure_overhead(engine: Engine, batch_size: int, num_steps: int) -> dict[str, Any]:
    """Milliseconds per decode step of `batch_size` choices, of which the engine must hold as many."""
    requests = [
        make_requests(1, length, num_steps + 2, engine.info.vocab_size, f"overhead{batch_size}/{index}")[0]
        for index, length in enumerate(prompt_lens(batch_size))
    ]
    steps, overheads, messages = [], [], []
    kernel_s = defaultdict[str, float](float)
    with decoding(engine, requests), timed(kernels(engine), kernel_s):
        for _ in range(num_steps):
            kernel_s.clear()
            start_s = time.perf_counter()
            deltas = engine.step()
            end_s = time.perf_counter()
            encode_frame(StepOutput(0, deltas, engine.stats()))
            messages.append(time.perf_counter() - end_s)
            steps.append(end_s - start_s)
            overheads.append(steps[-1] - sum(kernel_s.values()))
    return {
        "batch_size": batch_size,
        "step_ms": median(steps) * 1e3,
        "overhead_ms": median(overheads) * 1e3,
        "message_ms": median(messages) * 1e3,
        "total_ms": median(map(sum, zip(overheads, messages, strict=True))) * 1e3,
        "target_ms": TARGETS_MS.get(batch_size),
    }


def measure_admission(num_waiting: int) -> dict[str, Any]:
    """CPU microseconds of the scheduler, with `num_waiting` requests in the queue beside those that run."""
    max_len = INPUT_LEN + MAX_OUTPUT_LEN
    scheduler = Scheduler(
        num_blocks=NUM_RUNNING * -(-max_len // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_seqs=NUM_RUNNING,
        max_num_batched_tokens=EngineConfig().max_num_batched_tokens,
        max_model_len=max_len,
        enable_prefix_caching=True,
    )
    num_added, add_s, step_s = 0, 0.0, 0.0

    def add(num_requests: int) -> float:
        nonlocal num_added
        requests = [
            # The first token tells the prompts apart, and with it the hashes of all their blocks.
            GenerationRequest(
                str(number), [number, *range(INPUT_LEN - 1)], SamplingParams(max_tokens=1 + number % MAX_OUTPUT_LEN)
            )
            for number in range(num_added, num_added + num_requests)
        ]
        num_added += num_requests
        start_s = time.thread_time()
        for request in requests:
            scheduler.add(request)
        return time.thread_time() - start_s

    def step() -> tuple[float, int]:
        start_s = time.thread_time()
        plan = scheduler.plan_step(0.0)
        assert plan is not None
        deltas = scheduler.apply(StepResult(plan.epoch, plan.step, [7] * sum(plan.samples)), plan)
        return time.thread_time() - start_s, sum(delta.finish_reason is not None for delta in deltas)

    add(NUM_RUNNING + num_waiting)
    for _ in range(MAX_OUTPUT_LEN):  # the first choices begin together, later ones as others end
        add(step()[1])
    num_before = num_added
    for _ in range(NUM_SCHEDULER_STEPS):
        seconds, num_ended = step()
        step_s += seconds
        add_s += add(num_ended)
    return {
        "num_waiting": num_waiting,
        "add_us": add_s / (num_added - num_before) * 1e6,
        "step_us": step_s / NUM_SCHEDULER_STEPS * 1e6,
    }


def measure_attention(config: ModelConfig, batch_sizes: Sequence[int], context_lens: Sequence[int]) -> Rows:
    """Microseconds of one layer's attention in a decode step, at each batch size and context."""
    dtype = choose_dtype("auto", config.dtype)
    num_blocks = max(batch_sizes) * -(-max(context_lens) // BLOCK_SIZE)
    cache = torch.empty(kv_block_shape(config, num_blocks, BLOCK_SIZE), dtype=dtype).uniform_(-1, 1)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).int()
    token_bytes = 2 * config.kv_size * dtype.itemsize
    rows: Rows = []
    for batch_size in batch_sizes:
        qkv = torch.empty((batch_size, config.q_size + 2 * config.kv_size), dtype=dtype).uniform_(-1, 1)
        out = torch.empty((batch_size, config.q_size), dtype=dtype)
        begins = torch.arange(batch_size + 1, dtype=torch.int32)
        for context_len in context_lens:
            table = torch.empty((batch_size, -(-context_len // BLOCK_SIZE)), dtype=torch.int32)
            num_tables = num_blocks // table.numel()
            tables = order[: num_tables * table.numel()].view(num_tables, *table.shape)
            lens = torch.full((batch_size,), context_len, dtype=torch.int32)
            scale = config.head_size**-0.5

            def attend(_: int, args: Any = (qkv, cache, table, begins, lens, config.num_heads, scale, 0, out)) -> None:
                paged_attention(*args)

            program = Program(attend, batch_size)  # as a step runs it: without the checks of its arguments
            times = []
            for call in range(1 + NUM_CALLS):
                table.copy_(tables[call % num_tables])
                start_s = time.perf_counter()
                program.run(batch_size)
                times.append(time.perf_counter() - start_s)
            seconds, num_tokens = median(times[1:]), batch_size * context_len
            rows.append(
                {
                    "batch_size": batch_size,
                    "context_len": context_len,
                    "call_us": seconds * 1e6,
                    "token_ns": seconds / num_tokens * 1e9,
                    "bytes_per_s": num_tokens * token_bytes / seconds,
                }
            )
    return rows


def measure_ranks(args: argparse.Namespace) -> Rows:
    """Decode steps of so many ranks, at each batch size. To be called before this process has threads."""
    sizes = args.rank_batch_size
    measured, barriers = {}, {}
    for num_ranks in sorted({1, *args.ranks}):
        measured[num_ranks] = rank_scaling.measure_group(args.model, num_ranks, sizes, args.num_steps)
        barriers[num_ranks] = rank_scaling.barrier_s(num_ranks)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    machine = measure_machine(torch.bfloat16 if measured[1][0].itemsize == 2 else torch.float32)
    return [
        rank_scaling.row(measured[n][i], measured[1][i], args.model, machine, barriers[n])
        for i in range(len(sizes))
        for n in args.ranks
    ]


def report(rows: Rows) -> str:
    """Rows of one part as a table, a column per key."""
    lines = ["".join(f"{name:>17}" for name in rows[0])]
    for row in rows:
        cells = [
            "-" if value is None else f"{value:.3g}" if isinstance(value, float) else value for value in row.values()
        ]
        lines.append("".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def plot(result: dict[str, Any], folder: Path) -> None:
    """Writes a picture of each part that was measured."""
    from matplotlib.figure import Figure

    def draw(name: str, x: str, label: str, lines: dict[str, tuple[Rows, str]], targets: dict[int, float]) -> None:
        figure = Figure(figsize=(6, 4), layout="constrained")
        axis = figure.subplots()
        for line, (rows, key) in lines.items():
            axis.plot([row[x] for row in rows], [row[key] for row in rows], marker="o", label=line)
        if targets:
            axis.plot(list(targets), list(targets.values()), "k_", markersize=16, label="target: below")
        axis.set_title(f"{name}: {result['model']}, {result['dtype']}")
        axis.set_xlabel(x)
        axis.set_ylabel(label)
        axis.set_xscale("symlog", base=2)
        ticks = sorted({row[x] for rows, _ in lines.values() for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(folder / f"{name}.png")

    def by_batch(rows: Rows) -> dict[str, Rows]:
        sizes = sorted({row["batch_size"] for row in rows})
        return {f"batch {size}": [row for row in rows if row["batch_size"] == size] for size in sizes}

    if rows := result.get("overhead"):
        keys = {"overhead": "overhead_ms", "message": "message_ms", "both": "total_ms"}
        draw("overhead", "batch_size", "ms per step", {name: (rows, key) for name, key in keys.items()}, TARGETS_MS)
    if rows := result.get("admission"):
        keys = {"add, per request": "add_us", "plan and apply, per step": "step_us"}
        draw("admission", "num_waiting", "CPU \u00b5s", {name: (rows, key) for name, key in keys.items()}, {})
    if rows := result.get("attention"):
        lines = {name: (some, "token_ns") for name, some in by_batch(rows).items()}
        draw("attention", "context_len", "ns per context token, one layer", lines, {})
    if rows := result.get("ranks"):
        lines = {
            f"{name}, {what}": (some, key)
            for name, some in by_batch(rows).items()
            for what, key in (("measured", "step_ms"), ("model", "model_ms"))
        }
        draw("ranks", "ranks", "ms per decode step", lines, {})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the parts and prints a table for each. Raises ConfigError, StartupError and RuntimeError."""
    config = read_config(Path(args.model))
    num_threads = len(os.sched_getaffinity(0))
    parts: dict[str, Rows] = {}

    def measure(name: str, title: str, rows: Callable[[], Rows]) -> None:
        if name in args.parts:
            parts[name] = rows()
            print(f"\n{title}\n{report(parts[name])}", flush=True)

    def overhead() -> Rows:
        engine = decode_engine(args.model, prompt_lens(max(args.batch_size)), args.num_steps + 2)
        return [measure_overhead(engine, batch_size, args.num_steps) for batch_size in args.batch_size]

    # First: nothing else may have started threads.
    measure("ranks", "decode steps of several ranks", lambda: measure_ranks(args))
    set_num_threads(num_threads)
    measure(
        "attention",
        "attention of one layer in a decode step",
        lambda: measure_attention(config, args.attention_batch_size, args.context_len),
    )
    measure(
        "admission",
        "the scheduler, with requests waiting",
        lambda: [measure_admission(num_waiting) for num_waiting in args.num_waiting],
    )
    measure("overhead", "overhead of a decode step", overhead)
    return {
        "model": Path(args.model).name,
        "dtype": str(choose_dtype("auto", config.dtype)).removeprefix("torch."),
        "machine": serving.machine() | {"kernels": variant(), "num_threads": num_threads},
        **parts,
    }


def part_names(text: str) -> list[str]:
    """Argument type: names of parts, with commas between."""
    if unknown := set(names := text.split(",")) - set(PARTS):
        raise argparse.ArgumentTypeError(f"not among {', '.join(PARTS)}: {', '.join(sorted(unknown))}")
    return names


def counts_or_zero(text: str) -> list[int]:
    """Argument type: integers that are not negative, with commas between."""
    return [serving.count_or_zero(part) for part in text.split(",")]


def make_parser() -> argparse.ArgumentParser:
    """All flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="scaling", description="How the cost grows. The last line is JSON.")
    add = parser.add_argument

    def add_list(flag: str, default: list[int], type: Callable[[str], list[int]] = serving.counts) -> None:
        told = ",".join(map(str, default))
        add(flag, type=type, default=default, metavar="N,N", help=f"(default: {told})")

    add("model", metavar="MODEL", nargs="?", help="a Hugging Face folder or a pulled name (default: the default model)")
    add("--parts", type=part_names, default=list(PARTS), metavar="NAME,NAME", help=f"(default: {','.join(PARTS)})")
    add_list("--batch-size", [1, 8, 32, 64, 128, 256])
    add("--num-steps", type=serving.count, default=32, help="decode steps at each batch size (default: %(default)s)")
    add_list("--num-waiting", [0, 100, 1000, 10000], counts_or_zero)
    add_list("--attention-batch-size", [1, 32])
    add_list("--context-len", [512, 1024, 2048, 4096, 8192])
    add_list("--ranks", [1, 2, 4, 8])
    add_list("--rank-batch-size", [1, 32])
    add("--plot", type=Path, metavar="FOLDER", help="draw a picture of each part")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if it could not be run, 2 for wrong flags (by SystemExit)."""
    args = make_parser().parse_args(argv)
    try:
        if args.plot:  # better said before the run than after
            if not args.plot.is_dir():
                raise BenchmarkError(f"{args.plot} is not a folder")
            import matplotlib  # noqa: F401
        args.model = str(resolve_model(args.model))
        result = run(args)
        if args.plot:
            plot(result, args.plot)
        print(json.dumps(result))
    except (BenchmarkError, ConfigError, OctavoError, ImportError, OSError, RuntimeError) as error:
        print(f"scaling: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
