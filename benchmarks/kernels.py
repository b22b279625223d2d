"""Each op of kernels/ by itself, over the shapes that models give it, beside what this machine could reach.

    python -m octavo.benchmarks.kernels --model smollm2-135m,llama-8b

It runs on a GPU where there is one, else on the CPU's kernels. Before each call the caches are filled with something
else; the figure is the median of a few calls. The last line of stdout is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.benchmarks import serving
from octavo.benchmarks.offline import Machine, measure_machine
from octavo.benchmarks.serving import BenchmarkError
from octavo.kernels import backend
from octavo.kernels.activation_mul import silu_mul
from octavo.kernels.all_reduce import all_reduce
from octavo.kernels.checks import compute_dtypes
from octavo.kernels.checksum import Rows, checksum
from octavo.kernels.embedding import embedding
from octavo.kernels.matmul import PackedWeight, empty_packed, gated_matmul, matmul
from octavo.kernels.matmul_4bit import (
    CodeFormat,
    Packed4Bit,
    dequantize_4bit,
    empty_packed_4bit,
    gated_matmul_4bit,
    matmul_4bit,
    packed_4bit_bytes,
)
from octavo.kernels.paged_attention import BLOCK_SIZES, paged_attention
from octavo.kernels.ranks import Ranks
from octavo.kernels.rms_norm import rms_norm
from octavo.kernels.rotary_kv_write import QUANTISED, rotary_kv_write
from octavo.kernels.sample import EDIT, ROW, sample


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's sizes the ops see."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Load:
    """A step's sequences, all alike."""

    num_sequences: int
    query_len: int
    context_len: int  # the new tokens included

    @property
    def num_tokens(self) -> int:
        """New ones."""
        return self.num_sequences * self.query_len

    @property
    def num_attended(self) -> int:
        """Pairs of a new token and a token that it sees."""
        before = self.context_len - self.query_len
        return self.num_sequences * (self.query_len * before + self.query_len * (self.query_len + 1) // 2)


@dataclass(frozen=True, slots=True)
class Types:
    """How activations, weights and KV cache are stored."""

    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = torch.bfloat16
    block_size: int = 16

    def __str__(self) -> str:
        names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.cache_dtype))
        return f"{', '.join(names)}, block {self.block_size}"


@dataclass(frozen=True, slots=True)
class Work:
    """A call of an op, and the least that it must move and compute."""

    op: str
    num_bytes: int
    flops: int
    prepare: Callable[[], Callable[[], object]]  # makes the tensors; the call returns what it has written


SHAPES = {
    "smollm2-135m": Shape(576, 9, 3, 64, 1536, 49152),
    "llama-8b": Shape(4096, 32, 8, 128, 14336, 128256),
}
LOADS = {"decode 1": Load(1, 1, 1024), "decode 32": Load(32, 1, 1024), "prefill 512": Load(1, 512, 512)}
NUM_RANKS = 2  # of the all-reduce
CODEBOOK = CodeFormat(tuple((code / 7.5 - 1) ** 3 for code in range(16)), 64)  # as NF4
ZERO_POINTS = CodeFormat(tuple(map(float, range(16))), 32, torch.float16, "zero")
FLUSH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # on a GPU long enough for the host to launch the op meanwhile
GPU_MATMUL_SIZE = 8192


def _random(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(backend.device(), dtype)  # the same on every device


def _weight(n: int, k: int, dtype: torch.dtype, num_parts: int = 1) -> PackedWeight:
    weight = empty_packed(n, k, dtype, num_parts)
    rows = _random((min(n, 4096), k), dtype)
    for part in range(num_parts):
        begin, end = n // num_parts * part, n // num_parts * (part + 1)
        for row in range(begin, end, len(rows)):
            weight.write_rows(row, rows[: end - row])
    return weight


def _matmul(op: str, m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> Work:
    gated = op.startswith("gated")
    out_size = (out_dtype or dtype).itemsize * m * n // (2 if gated else 1)

    def prepare() -> Callable[[], object]:
        x, weight = _random((m, k), dtype), _weight(n, k, dtype, 2 if gated else 1)
        return lambda: gated_matmul(x, weight) if gated else matmul(x, weight, out_dtype=out_dtype)

    return Work(op, (n * k + m * k) * dtype.itemsize + out_size, 2 * m * n * k, prepare)


def _weight_4bit(n: int, k: int, dtype: torch.dtype, form: CodeFormat, num_parts: int = 1) -> Packed4Bit:
    weight = empty_packed_4bit(n, k, dtype, form, num_parts)
    scales = (_random((n // num_parts, k // form.group_size), torch.float32).abs() + 0.1) / 16
    for part in range(num_parts):
        codes = torch.randint(16, (n // num_parts, k), dtype=torch.uint8)
        zeros = torch.full_like(scales, 7) if form.shift else None
        weight.write_rows(part * len(scales), codes, scales, zeros)
    return weight


def _matmul_4bit(op: str, m: int, n: int, k: int, dtype: torch.dtype, form: CodeFormat) -> Work:
    gated = op.startswith("gated")

    def prepare() -> Callable[[], object]:
        x, weight = _random((m, k), dtype), _weight_4bit(n, k, dtype, form, 2 if gated else 1)
        return lambda: gated_matmul_4bit(x, weight) if gated else matmul_4bit(x, weight)

    rows_bytes = (m * k + m * n // (2 if gated else 1)) * dtype.itemsize
    return Work(op, packed_4bit_bytes(n, k, form) + rows_bytes, 2 * m * n * k, prepare)


def _dequantize_4bit(n: int, k: int, dtype: torch.dtype, form: CodeFormat) -> Work:
    def prepare() -> Callable[[], object]:
        weight = _weight_4bit(n, k, dtype, form)
        return lambda: dequantize_4bit(weight)

    return Work("dequantize_4bit, down", packed_4bit_bytes(n, k, form) + n * k * dtype.itemsize, 2 * n * k, prepare)


def _cache(shape: Shape, load: Load, types: Types) -> tuple[Tensor, Tensor | None, Tensor]:
    """A layer's cache with its scales, and the sequences' block tables; blocks are scattered."""
    width = -(-load.context_len // types.block_size)
    num_blocks = load.num_sequences * width
    cache = _random((num_blocks, 2, shape.num_kv_heads, types.block_size, shape.head_size), torch.bfloat16)
    scales = None
    if types.cache_dtype in QUANTISED:
        scales = torch.rand(cache.shape[:-1]).to(cache.device)
    tables = torch.randperm(num_blocks).view(load.num_sequences, width).int()
    return cache.to(types.cache_dtype), scales, tables.to(cache.device)


def _kv_token_bytes(shape: Shape, types: Types) -> int:
    scale_bytes = 4 if types.cache_dtype in QUANTISED else 0
    return 2 * shape.num_kv_heads * (shape.head_size * types.cache_dtype.itemsize + scale_bytes)


def _attention(shape: Shape, load: Load, types: Types) -> Work:
    q_size = shape.num_heads * shape.head_size
    num_bytes = load.num_sequences * load.context_len * _kv_token_bytes(shape, types)
    num_bytes += 2 * load.num_tokens * q_size * types.dtype.itemsize

    def prepare() -> Callable[[], object]:
        cache, scales, tables = _cache(shape, load, types)
        qkv = _random((load.num_tokens, q_size), types.dtype)
        begins = torch.arange(load.num_sequences + 1, dtype=torch.int32, device=qkv.device) * load.query_len
        lens = torch.full((load.num_sequences,), load.context_len, dtype=torch.int32, device=qkv.device)
        scale = shape.head_size**-0.5
        return lambda: paged_attention(
            qkv,
            cache,
            tables,
            begins,
            lens,
            shape.num_heads,
            scale,
            kv_scales=scales,
            max_query_len=load.query_len,
            max_context_len=load.context_len,
        )

    return Work("paged_attention", num_bytes, 4 * load.num_attended * q_size, prepare)


def _rotary(shape: Shape, load: Load, types: Types) -> Work:
    tokens, size = load.num_tokens, shape.head_size
    num_rotated, num_heads = shape.num_heads + shape.num_kv_heads, shape.num_heads + 2 * shape.num_kv_heads
    token_bytes = (num_heads + num_rotated) * size * types.dtype.itemsize + _kv_token_bytes(shape, types) + 4 * size

    def prepare() -> Callable[[], object]:
        cache, scales, tables = _cache(shape, load, types)
        qkv, table = _random((tokens, num_heads * size), types.dtype), _random((load.context_len, size), torch.float32)
        new = torch.arange(load.context_len - load.query_len, load.context_len, device=qkv.device)
        slots = tables[:, new // types.block_size].long() * types.block_size + new % types.block_size
        positions = new.int().repeat(load.num_sequences)

        def call() -> tuple[Tensor | None, ...]:
            rotary_kv_write(qkv, table, positions, slots.view(-1), cache, shape.num_heads, scales)
            return qkv, cache, scales

        return call

    return Work("rotary_kv_write", tokens * token_bytes, 3 * tokens * num_rotated * size, prepare)


def _rms_norm(shape: Shape, load: Load, dtype: torch.dtype) -> Work:
    tokens, size = load.num_tokens, shape.hidden

    def prepare() -> Callable[[], object]:
        x, residual = (_random((tokens, size), dtype) for _ in range(2))
        weight, out = _random((size,), torch.float32), torch.empty_like(x)
        return lambda: (rms_norm(x, weight, 1e-5, out, residual), residual)

    return Work("rms_norm with residual", 4 * tokens * size * dtype.itemsize + 4 * size, 5 * tokens * size, prepare)


def _silu_mul(shape: Shape, load: Load, dtype: torch.dtype) -> Work:
    tokens, size = load.num_tokens, shape.intermediate

    def prepare() -> Callable[[], object]:
        x = _random((tokens, 2 * size), dtype)
        return lambda: silu_mul(x)

    return Work("silu_mul", 3 * tokens * size * dtype.itemsize, 5 * tokens * size, prepare)


def _embedding(shape: Shape, load: Load, dtype: torch.dtype) -> Work:
    def prepare() -> Callable[[], object]:
        weight = _weight(shape.vocab, shape.hidden, dtype)
        ids = torch.randint(shape.vocab, (load.num_tokens,), dtype=torch.int32).to(backend.device())
        return lambda: embedding(ids, weight)

    return Work("embedding", load.num_tokens * (2 * shape.hidden * dtype.itemsize + 4), 0, prepare)


def _all_reduce(shape: Shape, load: Load, dtype: torch.dtype) -> Work:
    rows, size = -(-load.num_tokens // NUM_RANKS), shape.hidden  # about a rank's slice

    def prepare() -> Callable[[], object]:
        parts, residual = _random((NUM_RANKS, rows * size), torch.float32), _random((rows, size), dtype)
        out = torch.empty_like(residual)
        return lambda: all_reduce(parts.view(NUM_RANKS, rows, size), out, Ranks(), residual=residual)

    num_bytes = rows * size * (4 * NUM_RANKS + 2 * dtype.itemsize)
    return Work(f"all_reduce, sum of {NUM_RANKS}", num_bytes, NUM_RANKS * rows * size, prepare)


def _sample(shape: Shape, load: Load) -> Work:
    rows = load.num_sequences

    def prepare() -> Callable[[], object]:
        logits = _random((rows, shape.vocab), torch.float32)
        parameters = np.zeros(rows, ROW)
        parameters["temperature"], parameters["top_p"], parameters["repetition_penalty"] = 1.0, 1.0, 1.0
        parameters["slot"], parameters["num_top"], parameters["target"] = range(rows), -1, -1
        tokens = torch.zeros((rows, 1), dtype=torch.int32, device=logits.device)
        return lambda: sample(logits, parameters, tokens, np.array([], EDIT), np.array([], np.int32)).token_ids

    return Work("sample", rows * shape.vocab * 4, 0, prepare)


def _checksum(shape: Shape, load: Load, dtype: torch.dtype) -> Work:
    def prepare() -> Callable[[], object]:
        rows = _random((8, shape.hidden * shape.intermediate // 8), dtype)
        out = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        memory = Rows([rows])
        return lambda: checksum(memory, out)

    return Work("checksum, of a weight", shape.hidden * shape.intermediate * dtype.itemsize, 0, prepare)


def works(shape: Shape, load: Load, types: Types) -> list[Work]:
    """Every op of a step; `gated_matmul` is the whole of an MLP's first half, which `silu_mul` may be a part of."""
    m, dtype = load.num_tokens, types.dtype
    q_size = shape.num_heads * shape.head_size
    return [
        _matmul("matmul, QKV", m, q_size + 2 * shape.num_kv_heads * shape.head_size, shape.hidden, dtype),
        _matmul("matmul, attention out", m, shape.hidden, q_size, dtype),
        _matmul("gated_matmul", m, 2 * shape.intermediate, shape.hidden, dtype),
        _matmul("matmul, down", m, shape.hidden, shape.intermediate, dtype),
        _matmul("matmul, logits", load.num_sequences, shape.vocab, shape.hidden, dtype, torch.float32),
        _matmul_4bit("gated_matmul_4bit", m, 2 * shape.intermediate, shape.hidden, dtype, CODEBOOK),
        _matmul_4bit("matmul_4bit, down", m, shape.hidden, shape.intermediate, dtype, ZERO_POINTS),
        _dequantize_4bit(shape.hidden, shape.intermediate, dtype, ZERO_POINTS),
        _attention(shape, load, types),
        _rotary(shape, load, types),
        _rms_norm(shape, load, dtype),
        _silu_mul(shape, load, dtype),
        _embedding(shape, load, dtype),
        _all_reduce(shape, load, dtype),
        _sample(shape, load),
        _checksum(shape, load, dtype),
    ]


def every_type() -> Iterator[Types]:
    """What the kernels in use may be given here; of the caches and blocks the first is the usual one."""
    for dtype in compute_dtypes():
        caches = (dtype, *quantised()) if backend.kernels() == "triton" else (dtype,)
        for cache_dtype in caches:
            yield from (Types(dtype, cache_dtype, block_size) for block_size in BLOCK_SIZES)


def quantised() -> tuple[torch.dtype, ...]:
    """What the GPU converts."""
    from octavo.kernels.gpu.device import has_float8

    return QUANTISED if has_float8(backend.device()) else (torch.int8,)


def seconds(call: Callable[[], object], num_tries: int) -> float:
    """The median time of a call that finds the caches full of something else."""
    device = backend.device()
    flush = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)
    times_s = []
    for i in range(1 + num_tries):  # the first compiles
        flush.fill_(i % 2)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times_s.append(start.elapsed_time(end) / 1e3)
        else:
            start_s = time.perf_counter()
            call()
            times_s.append(time.perf_counter() - start_s)
    return float(median(times_s[1:]))


def ceiling(dtype: torch.dtype) -> Machine:
    """What torch reaches here: bandwidth, and the rate of matrix products."""
    if backend.device().type == "cpu":
        return measure_machine(dtype)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=backend.device())
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source), 5)
    left, right = (_random((GPU_MATMUL_SIZE, GPU_MATMUL_SIZE), dtype) for _ in range(2))
    matmul_rate = 2 * GPU_MATMUL_SIZE**3 / seconds(lambda: left @ right, 5)
    return Machine(bandwidth, matmul_rate, torch.get_num_threads())


def measure(work: Work, machine: Machine, num_tries: int) -> dict[str, Any]:
    """A row of the table. `share`: the least time that this machine needs for the work, of the time it took."""
    time_s = seconds(work.prepare(), num_tries)
    return {
        "op": work.op,
        "us": time_s * 1e6,
        "bytes_per_s": work.num_bytes / time_s,
        "flops": work.flops / time_s,
        "share": machine.seconds(work.num_bytes, work.flops) / time_s,
    }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows in Markdown."""
    lines = [
        "| op | model | load | types | µs | GB/s | TFLOP/s | share of the ceiling |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        flops = f"{row['flops'] / 1e12:.3g}" if row["flops"] else "-"
        lines.append(
            f"| {row['op']} | {row['model']} | {row['load']} | {row['types']} "
            f"| {row['us']:.1f} | {row['bytes_per_s'] / 1e9:.1f} | {flops} | {row['share']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def device_name() -> str:
    """The chip, for people."""
    return torch.cuda.get_device_name() if backend.device().type == "cuda" else str(serving.machine()["cpu"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints what it runs on and a table. Raises BenchmarkError."""
    if torch.cuda.is_available():
        backend.select("triton", "cuda")
    elif backend.kernels() == "triton":
        raise BenchmarkError("Triton's kernels without a GPU are executed step by step: their times mean nothing")
    kinds = list(every_type()) if args.every_type else [Types(args.dtype, args.dtype)]
    machines = {dtype: ceiling(dtype) for dtype in dict.fromkeys(kind.dtype for kind in kinds)}
    head = f"{device_name()}, kernels: {backend.description()}.\n"
    for dtype, machine in machines.items():
        head += (
            f"torch reaches {machine.bandwidth / 1e9:.0f} GB/s and, in {str(dtype).removeprefix('torch.')}, "
            f"{machine.matmul_rate / 1e12:.3g} TFLOP/s.\n"
        )
    print(head, flush=True)
    rows = []
    for kind in kinds:
        is_usual = kind == Types(kind.dtype, kind.dtype)
        for model in args.model:
            for name, load in LOADS.items():
                for work in works(SHAPES[model], load, kind):
                    if is_usual or work.op in ("paged_attention", "rotary_kv_write"):  # others do not see the cache
                        row = measure(work, machines[kind.dtype], args.num_tries)
                        rows.append(row | {"model": model, "load": name, "types": str(kind)})
    print(table(rows), flush=True)
    if args.output:
        args.output.write_text(f"# Kernels on {device_name()}\n\nMade by `make gpu`.\n\n{head}\n{table(rows)}")
    return {
        "machine": serving.machine() | {"device": device_name(), "kernels": backend.description()},
        "ceilings": {
            str(dtype).removeprefix("torch."): {"bandwidth": machine.bandwidth, "matmul_rate": machine.matmul_rate}
            for dtype, machine in machines.items()
        },
        "results": rows,
    }


def models(text: str) -> list[str]:
    """Argument type: names of SHAPES, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"no such shape: {name}; there are {', '.join(SHAPES)}")
    return names


def make_parser() -> argparse.ArgumentParser:
    """All flags of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="kernels", description="Each op by itself, as a share of what this machine could reach."
    )
    add = parser.add_argument
    add("--model", type=models, default=list(SHAPES), metavar="A,B", help=f"shapes (default: {','.join(SHAPES)})")
    add(
        "--dtype",
        type=lambda name: {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name],
        default=torch.bfloat16,
        help="bfloat16, float16 (on a GPU alone) or float32 (default: bfloat16)",
    )
    add("--every-type", action="store_true", help="all types of weights and KV cache, and all block sizes")
    add("--num-tries", type=serving.count, default=10, help="calls of which the median counts (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the table there, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if it could not be run, 2 for wrong flags (by SystemExit)."""
    args = make_parser().parse_args(argv)
    try:
        print(json.dumps(run(args)))
    except (BenchmarkError, OSError) as error:
        print(f"kernels: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
