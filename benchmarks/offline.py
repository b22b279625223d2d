"""The engine by itself on the CPU, in process and without HTTP: prefill and decode rates beside the machine's ceiling.

    python -m octavo.benchmarks.offline MODEL --batch-size 1,8,32

States the ceiling first: what a token costs in bytes and FLOPs by the model's own shape, and the read bandwidth and
matmul rate that torch reaches here, measured in the same run. Then measures each phase by itself and gives it as a
share of its ceiling; where weights are compressed, reading takes less than is stated. The last line of stdout is JSON.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from octavo.benchmarks import serving
from octavo.benchmarks.serving import BenchmarkError
from octavo.kernels.matmul import packed_bytes
from octavo.models.checkpoint import CheckpointError, open_checkpoint
from octavo.models.config import ConfigError, read_config
from octavo.models.memory import kv_block_bytes, linear_shapes, weight_bytes
from octavo.models.quantization.choose import with_quantization
from octavo.server.config import MIB, EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.request import Delta, GenerationRequest, SamplingParams
from octavo.server.errors import OctavoError
from octavo.server.pull import resolve_model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STREAM_BYTES = 1 << 30
MATMUL_SIZE = 2048
NUM_TRIES = 5  # the ceiling is the best of these


class StepEngine(Protocol):
    """What is asked of `octavo.server.engine.engine.Engine`."""

    @property
    def has_work(self) -> bool:
        """Whether a choice is waiting or running."""

    def add(self, request: GenerationRequest) -> None:
        """Queues a request."""

    def step(self) -> list[Delta]:
        """One forward pass."""


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Work per token of a dense decoder."""

    layer_params: int  # parameters of all layers' matrices: each token is multiplied by all of them
    head_params: int  # those of the output head: only positions that sample are multiplied by them
    vocab_size: int
    attention_width: int  # num_layers * num_query_heads * head_size
    step_bytes: int  # of weights, codes where they are quantised, that one step reads, whatever its batch
    kv_token_bytes: int  # KV bytes of one token

    @classmethod
    def of(cls, model: Path, dtype: torch.dtype) -> "ModelCost":
        """From the model's own accounting. Raises ConfigError and CheckpointError where no supported model is."""
        config = read_config(model)
        config = with_quantization(config, open_checkpoint(model, config))
        head_params = config.vocab_size * config.hidden_size
        num_params = sum(rows * columns for rows, columns in linear_shapes(config))
        # Of an embedding that is not the head as well a step reads a few rows.
        unread_bytes = packed_bytes(config.vocab_size, config.hidden_size, dtype) if config.has_head else 0
        return cls(
            layer_params=num_params - (2 if config.has_head else 1) * head_params,
            head_params=head_params,
            vocab_size=config.vocab_size,
            attention_width=config.num_layers * config.q_size,
            step_bytes=weight_bytes(config, dtype) - unread_bytes,
            kv_token_bytes=kv_block_bytes(config, 1, dtype),
        )

    def flops(self, num_tokens: int, num_context: int, num_samples: int) -> int:
        """FLOPs of a step: `num_context` is the sum over its tokens of the positions each attends to."""
        matmul = 2 * (num_tokens * self.layer_params + num_samples * self.head_params)
        return matmul + 4 * self.attention_width * num_context


@dataclass(frozen=True, slots=True)
class Machine:
    """What torch reaches here."""

    bandwidth: float  # bytes read per second
    matmul_rate: float  # FLOP per second in the compute dtype
    num_threads: int

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Least time for this work: reading and computing may overlap."""
        return max(num_bytes / self.bandwidth, flops / self.matmul_rate)


def measure_machine(dtype: torch.dtype) -> Machine:
    """Read bandwidth, and the matmul rate at 2048^3 in `dtype`."""
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    matmul_rate = 2 * MATMUL_SIZE**3 / _best_s(lambda: left @ right)
    return Machine(_measure_bandwidth(), matmul_rate, torch.get_num_threads())


def _measure_bandwidth() -> float:
    """Bytes per second of the fastest of several reductions over more memory than any cache holds."""
    stream = torch.ones(STREAM_BYTES // 4)
    matrix, vector = stream.view(-1, 4096), torch.ones(4096)
    reads: list[Callable[[], object]] = [
        stream.sum,
        lambda: torch.dot(stream, stream),
        lambda: torch.mv(matrix, vector),
    ]
    return STREAM_BYTES / min(_best_s(read) for read in reads)


def _best_s(work: Callable[[], object]) -> float:
    times_s = []
    for _ in range(NUM_TRIES):
        start_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


def make_requests(
    num_requests: int, input_len: int, output_len: int, vocab_size: int, salt: str
) -> list[GenerationRequest]:
    """Greedy requests of random prompts that run to their full length."""
    requests = []
    for index in range(num_requests):
        rng = random.Random(f"{salt}/{index}")
        prompt = [rng.randrange(vocab_size) for _ in range(input_len)]
        params = SamplingParams(max_tokens=output_len, temperature=0.0)
        requests.append(GenerationRequest(f"{salt}-{index}", prompt, params))
    return requests


def measure_prefill(engine: StepEngine, requests: Sequence[GenerationRequest]) -> float:
    """Seconds until every request, of one output token each, is done."""
    for request in requests:
        engine.add(request)
    start_s = time.perf_counter()
    _finish(engine)
    return time.perf_counter() - start_s


@dataclass(slots=True)
class DecodeWindow:
    """The steps in which all requests decode: after the last one's prefill, before the first one's end."""

    num_steps: int = 0
    num_tokens: int = 0
    num_context: int = 0  # sum over steps and choices of the positions attended to
    seconds: float = 0.0


def measure_decode(engine: StepEngine, requests: Sequence[GenerationRequest]) -> DecodeWindow:
    """Runs the requests to their end. Raises BenchmarkError where there is no step in which all decode."""
    for request in requests:
        engine.add(request)
    window, started = DecodeWindow(), set[str]()
    num_held = sum(len(request.prompt_token_ids) for request in requests)
    while engine.has_work:
        full = len(started) == len(requests)
        start_s = time.perf_counter()
        deltas = engine.step()
        seconds = time.perf_counter() - start_s
        if any(delta.finish_reason for delta in deltas):
            break
        started |= {delta.request_id for delta in deltas}
        num_tokens = sum(len(delta.token_ids) for delta in deltas)
        if full:
            window.num_steps += 1
            window.num_tokens += num_tokens
            window.num_context += num_held
            window.seconds += seconds
        num_held += num_tokens
    _finish(engine)
    if not window.num_steps:
        raise BenchmarkError("--output-len: no step in which all requests decode; ask for more tokens")
    return window


def _finish(engine: StepEngine) -> None:
    while engine.has_work:
        engine.step()


def prefill_result(
    seconds: float, num_prompts: int, input_len: int, max_num_batched_tokens: int, cost: ModelCost, machine: Machine
) -> dict[str, Any]:
    """Prefill rate and its share of the ceiling."""
    num_tokens = num_prompts * input_len
    num_context = num_prompts * input_len * (input_len + 1) // 2
    num_steps = -(-num_tokens // max_num_batched_tokens)
    least_s = machine.seconds(num_steps * cost.step_bytes, cost.flops(num_tokens, num_context, num_prompts))
    return {
        "phase": "prefill",
        "batch_size": num_prompts,
        "tokens_per_s": num_tokens / seconds,
        "ceiling_tokens_per_s": num_tokens / least_s,
        "share": least_s / seconds,
    }


def decode_result(window: DecodeWindow, batch_size: int, cost: ModelCost, machine: Machine) -> dict[str, Any]:
    """Decode rate and its share of the ceiling."""
    num_bytes = window.num_steps * cost.step_bytes + window.num_context * cost.kv_token_bytes
    least_s = machine.seconds(num_bytes, cost.flops(window.num_tokens, window.num_context, window.num_tokens))
    return {
        "phase": "decode",
        "batch_size": batch_size,
        "tokens_per_s": window.num_tokens / window.seconds,
        "ceiling_tokens_per_s": window.num_tokens / least_s,
        "share": least_s / window.seconds,
        "step_ms": window.seconds / window.num_steps * 1e3,
    }


def run(args: argparse.Namespace, make_engine: Callable[[EngineConfig], StepEngine]) -> dict[str, Any]:
    """Prints the ceiling, then a line per phase. Raises BenchmarkError, ConfigError and StartupError."""
    dtype = DTYPES[args.dtype]
    cost = ModelCost.of(Path(args.model), dtype)
    machine = measure_machine(dtype)
    print(
        f"machine: {machine.bandwidth / 1e9:.1f} GB/s read, {machine.matmul_rate / 1e9:.0f} GFLOP/s in {args.dtype}, "
        f"{machine.num_threads} threads\n"
        f"model:   {cost.step_bytes / 1e6:.1f} MB of weights a step, {cost.kv_token_bytes} B of KV a token, "
        f"{2 * cost.layer_params / 1e6:.1f} MFLOP a token and {2 * cost.head_params / 1e6:.1f} a sample",
        flush=True,
    )
    max_num_seqs = max([*args.batch_size, args.num_prompts])
    # A block more for each choice: its last one is partly filled.
    num_kv_tokens = max_num_seqs * (args.input_len + args.output_len + EngineConfig().block_size)
    engine = make_engine(
        EngineConfig(
            model=args.model,
            device="cpu",
            dtype=args.dtype,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_memory_bytes=max(512 * MIB, num_kv_tokens * cost.kv_token_bytes),
            enable_prefix_caching=False,
        )
    )

    def requests(name: str, num_requests: int, output_len: int) -> list[GenerationRequest]:
        return make_requests(num_requests, args.input_len, output_len, cost.vocab_size, name)

    measure_prefill(engine, requests("warmup", 1, 2))
    print(f"{'phase':<8}{'batch':>6}{'tok/s':>12}{'ceiling':>12}{'share':>9}{'step ms':>10}")
    seconds = measure_prefill(engine, requests("prefill", args.num_prompts, 1))
    rows = [prefill_result(seconds, args.num_prompts, args.input_len, args.max_num_batched_tokens, cost, machine)]
    _print_row(rows[-1])
    for batch_size in args.batch_size:
        window = measure_decode(engine, requests(f"decode{batch_size}", batch_size, args.output_len))
        rows.append(decode_result(window, batch_size, cost, machine))
        _print_row(rows[-1])
    return {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "exactness": EngineConfig().exactness,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "cost": asdict(cost),
        "machine": serving.machine() | asdict(machine) | {"torch": torch.__version__},
        "results": rows,
    }


def _print_row(row: dict[str, Any]) -> None:
    step = f"{row['step_ms']:>10.2f}" if "step_ms" in row else f"{'-':>10}"
    print(
        f"{row['phase']:<8}{row['batch_size']:>6}{row['tokens_per_s']:>12.1f}{row['ceiling_tokens_per_s']:>12.1f}"
        f"{row['share']:>9.1%}{step}",
        flush=True,
    )


def make_parser() -> argparse.ArgumentParser:
    """All flags of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="octavo bench offline",
        description="Measure the engine in process beside the machine's ceiling. The last line is JSON.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a folder, a GGUF file or a pulled name (default: the default model)")
    add("--input-len", type=serving.count, default=256, help="prompt tokens (default: %(default)s)")
    add("--output-len", type=serving.count, default=128, help="tokens to generate (default: %(default)s)")
    add("--batch-size", type=serving.counts, default=[1, 8, 32], metavar="N,N", help="decode at each (default: 1,8,32)")
    add("--num-prompts", type=serving.count, default=8, help="prompts to prefill (default: %(default)s)")
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="(default: %(default)s)")
    add("--max-num-batched-tokens", type=serving.count, default=EngineConfig().max_num_batched_tokens)
    add("--save-result", type=Path, metavar="FILE", help="write the JSON to a file as well")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if it could not be run, 2 for wrong flags (by SystemExit)."""
    args = make_parser().parse_args(argv)
    try:
        if args.save_result and not args.save_result.parent.is_dir():
            raise BenchmarkError(f"{args.save_result.parent} is not a folder")
        args.model = str(resolve_model(args.model))
        line = json.dumps(run(args, Engine))
        print(line)
        if args.save_result:
            args.save_result.write_text(line + "\n")
    except (BenchmarkError, CheckpointError, ConfigError, OctavoError, OSError) as error:
        print(f"offline: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
