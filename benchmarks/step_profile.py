"""One decode step of the engine on the CPU, in process: where each of its milliseconds is.

    python -m octavo.benchmarks.step_profile MODEL --batch-size 1,32 --context-len 256

Plain and profiled steps take turns on the same choices. A plain step is timed from outside, as a whole. In a profiled
one the ops of the forward pass are run one by one and timed by kind, and so are what follows them (logits, sample) and
the engine's own work around them. Each figure is the median over the steps; the sum of the parts stands beside the
whole plain step, so that what profiling itself costs shows. The last line of stdout is JSON.
"""

import argparse
import ctypes
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from octavo.benchmarks import serving
from octavo.benchmarks.offline import DTYPES, make_requests, measure_machine
from octavo.benchmarks.serving import BenchmarkError
from octavo.kernels import backend
from octavo.kernels.cpu.library import library
from octavo.kernels.program import Program
from octavo.models.config import ConfigError, ModelConfig, read_config
from octavo.models.memory import kv_block_bytes
from octavo.models.resident import resident_tensors
from octavo.server.config import MIB, EngineConfig
from octavo.server.engine import integrity, runner
from octavo.server.engine.engine import Engine, choose_dtype
from octavo.server.engine.request import GenerationRequest
from octavo.server.errors import OctavoError
from octavo.server.pull import resolve_model

Functions = dict[str, tuple[object, str]]  # name of a part -> owner and attribute of the function that does it


def decode_engine(model: str, prompt_lens: Sequence[int], output_len: int, max_model_len: int | None = None) -> Engine:
    """An engine that prefills such prompts in one step and holds them with `output_len` tokens more each.

    Raises ConfigError and StartupError.
    """
    block_size = EngineConfig().block_size
    num_blocks = sum(-(-(prompt_len + output_len) // block_size) for prompt_len in prompt_lens)
    config = read_config(Path(model))
    block_bytes = kv_block_bytes(config, block_size, choose_dtype("auto", config.dtype))
    return Engine(
        EngineConfig(
            model=model,
            device="cpu",
            max_model_len=max_model_len,
            max_num_seqs=len(prompt_lens),
            max_num_batched_tokens=max(EngineConfig().max_num_batched_tokens, sum(prompt_lens)),
            kv_cache_memory_bytes=max(512 * MIB, num_blocks * block_bytes),
        )
    )


@contextmanager
def decoding(engine: Engine, requests: Sequence[GenerationRequest]) -> Iterator[None]:
    """While it lasts all requests, whose prompts fit one step, are prefilled and decode."""
    for request in requests:
        engine.add(request)
    assert len(engine.step()) == len(requests), "the prompts do not fit one step"
    yield
    for request in requests:
        engine.abort(request.request_id)


def kernels(engine: Engine) -> Functions:
    """The parts of a step that are kernels."""
    work = engine.runner
    return {
        "forward": (work._forward, "run"),
        "logits": (work.model, "logits"),
        "sample": (runner, "sample"),
        "checksum": (integrity, "checksum"),
    }


@contextmanager
def timed(functions: Functions, seconds: dict[str, float]) -> Iterator[None]:
    """While it lasts, adds to `seconds`, by name, how long the functions take."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start_s = time.perf_counter()
            result = function(*args, **options)
            seconds[name] += time.perf_counter() - start_s
            return result

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in functions.items():
            stack.enter_context(patch.object(owner, attribute, wrap(name, getattr(owner, attribute))))
        yield


def op_names(program: Program) -> list[str]:
    """The kind of each op of a program: its name, and for a matmul its outputs x inputs."""
    names = []
    for op, args in program._recorded:
        shape = args if op == "octavo_matmul" else args.weight if op == "octavo_matmul_compressed" else None
        names.append(op.removeprefix("octavo_") + (f" {shape.n}x{shape.k}" if shape else ""))
    return names


def profile_step(engine: Engine) -> dict[str, float]:
    """Runs a step and gives the seconds of its parts: the forward pass by kind of op, without what profiling adds.

    Raises BenchmarkError where there are no native ops.
    """
    lib, program = library(), engine.runner._forward
    if lib is None or backend.kernels() != "native":
        raise BenchmarkError("a step has no ops to time one by one where there are no native kernels")
    names, calls, one = op_names(program), program._calls, ctypes.c_int64(1)
    ops, others = defaultdict[str, float](float), defaultdict[str, float](float)

    def run_ops(num_rows: int, *_: int) -> None:
        rows = ctypes.c_int64(num_rows)
        for name, call in zip(names, calls, strict=True):
            at = ctypes.byref(call)
            start_s = time.perf_counter()
            lib.octavo_run_program(at, one, rows)
            ops[name] += time.perf_counter() - start_s

    host: Functions = {
        "plan": (engine.scheduler, "plan_step"),
        "fill batch": (engine.runner, "_fill_batch"),
        "apply": (engine.scheduler, "apply"),
    }
    with patch.object(program, "run", run_ops), timed(kernels(engine) | host, others):
        start_s = time.perf_counter()
        engine.step()
        rest_s = time.perf_counter() - start_s - sum(others.values())
    del others["forward"]
    return {**ops, **others, "rest": rest_s}


def bytes_of(engine: Engine, part: str) -> int:
    """Bytes of the model's `embedding` or `head`, as they lie in the memory of rank 0."""
    tensors = resident_tensors(engine.runner.model)
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(f"{part}."))


def streamed_bytes(
    config: ModelConfig, names: Sequence[str], dtype_bytes: int, contexts: Sequence[int], head_bytes: int
) -> Counter[str]:
    """Bytes of weights and KV that a decode step reads, by part, each choice attending to as many tokens."""
    num_bytes = Counter({"logits": head_bytes})
    for name in names:
        op, _, shape = name.partition(" ")
        if shape:
            n, k = map(int, shape.split("x"))
            num_bytes[name] += n * k * 3 // 2 if op == "matmul_compressed" else n * k * dtype_bytes
    num_attended = sum(min(window or length, length) for window in config.windows for length in contexts)
    num_bytes["paged_attention"] = num_attended * 2 * config.kv_size * dtype_bytes
    return num_bytes


def profile(engine: Engine, config: ModelConfig, batch_size: int, context_len: int, num_steps: int) -> dict[str, Any]:
    """The profile at one batch size, as it stands in the JSON. Raises BenchmarkError as `profile_step` does."""
    wholes, parts = [], []
    output_len = 2 * num_steps + 2
    requests = make_requests(batch_size, context_len, output_len, config.vocab_size, f"profile{batch_size}")
    with decoding(engine, requests):
        for _ in range(num_steps):
            start_s = time.perf_counter()
            engine.step()
            wholes.append(time.perf_counter() - start_s)
            parts.append(profile_step(engine))
    all_parts = dict.fromkeys(name for part in parts for name in part)
    seconds = {name: median(part.get(name, 0.0) for part in parts) for name in all_parts}
    sum_s = sum(seconds.values())
    names = op_names(engine.runner._forward)
    num_calls = Counter(names)
    head_bytes = bytes_of(engine, "embedding" if engine.runner.model.head is None else "head")
    contexts = [context_len + num_steps] * batch_size
    num_bytes = streamed_bytes(config, names, DTYPES[engine.info.dtype].itemsize, contexts, head_bytes)
    rows = [
        {
            "part": name,
            "num_calls": num_calls.get(name, 1),
            "ms": part_s * 1e3,
            "share": part_s / sum_s,
            "bytes_per_s": num_bytes[name] / part_s if name in num_bytes else None,
        }
        for name, part_s in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return {"batch_size": batch_size, "step_ms": median(wholes) * 1e3, "sum_ms": sum_s * 1e3, "parts": rows}


def report(result: Mapping[str, Any]) -> str:
    """The profile of one batch size as a table."""
    lines = [f"\nbatch {result['batch_size']:<22}{'calls':>7}{'ms':>9}{'share':>8}{'GB/s':>8}"]
    for row in result["parts"]:
        rate = f"{row['bytes_per_s'] / 1e9:.1f}" if row["bytes_per_s"] else "-"
        lines.append(f"{row['part']:<28}{row['num_calls']:>7}{row['ms']:>9.3f}{row['share']:>8.1%}{rate:>8}")
    lines.append(f"{'sum of the parts':<35}{result['sum_ms']:>9.3f}")
    lines.append(f"{'the whole step, plain':<35}{result['step_ms']:>9.3f}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the bandwidth, then a table per batch size. Raises BenchmarkError, ConfigError and StartupError."""
    config = read_config(Path(args.model))
    dtype = choose_dtype("auto", config.dtype)
    bandwidth = measure_machine(dtype).bandwidth  # first: the engine leaves torch a single thread
    output_len = 2 * args.num_steps + 2
    prompt_lens = [args.context_len] * max(args.batch_size)
    engine = decode_engine(args.model, prompt_lens, output_len, args.context_len + output_len)
    info = engine.info
    print(
        f"{info.model_name} in {info.dtype} with {args.context_len} tokens of context, kernels {info.kernels}, "
        f"{info.num_threads} threads; torch reads {bandwidth / 1e9:.1f} GB/s here",
        flush=True,
    )
    results = []
    for batch_size in args.batch_size:
        results.append(profile(engine, config, batch_size, args.context_len, args.num_steps))
        print(report(results[-1]), flush=True)
    return {
        "model": info.model_name,
        "dtype": info.dtype,
        "context_len": args.context_len,
        "num_steps": args.num_steps,
        "machine": serving.machine()
        | {"kernels": info.kernels, "num_threads": info.num_threads, "bandwidth": bandwidth},
        "results": results,
    }


def make_parser() -> argparse.ArgumentParser:
    """All flags of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="step_profile", description="Where each millisecond of a decode step is. The last line is JSON."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a Hugging Face folder or a pulled name (default: the default model)")
    add("--batch-size", type=serving.counts, default=[1, 32], metavar="N,N", help="a profile at each (default: 1,32)")
    add("--context-len", type=serving.count, default=256, help="tokens of each prompt (default: %(default)s)")
    add("--num-steps", type=serving.count, default=20, help="steps of either kind (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if it could not be run, 2 for wrong flags (by SystemExit)."""
    args = make_parser().parse_args(argv)
    try:
        args.model = str(resolve_model(args.model))
        print(json.dumps(run(args)))
    except (BenchmarkError, ConfigError, OctavoError, OSError) as error:
        print(f"step_profile: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
