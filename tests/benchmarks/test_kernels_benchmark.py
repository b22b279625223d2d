"""The kernels' benchmark runs every op on this machine, and counts their bytes and FLOPs right."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.benchmarks import kernels, offline
from octavo.benchmarks.kernels import Load, Shape, Types, works
from octavo.kernels import backend

BF16 = torch.bfloat16
SHAPE, LOAD = Shape(64, 4, 2, 16, 96, 80), Load(2, 3, 20)
OPS = {
    "matmul, QKV",
    "matmul, attention out",
    "gated_matmul",
    "matmul, down",
    "matmul, logits",
    "gated_matmul_4bit",
    "matmul_4bit, down",
    "dequantize_4bit, down",
    "paged_attention",
    "rotary_kv_write",
    "rms_norm with residual",
    "silu_mul",
    "embedding",
    "all_reduce, sum of 2",
    "sample",
    "checksum, of a weight",
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = backend.kernels(), backend.device()
    monkeypatch.setattr(kernels, "SHAPES", {"tiny": SHAPE, "other": SHAPE})
    monkeypatch.setattr(kernels, "LOADS", {"mixed": LOAD, "decode": Load(1, 1, 7)})
    monkeypatch.setattr(kernels, "FLUSH_BYTES", {"cpu": 1 << 12, "cuda": 1 << 12})
    monkeypatch.setattr(kernels, "GPU_MATMUL_SIZE", 64)
    monkeypatch.setattr(offline, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(offline, "MATMUL_SIZE", 64)
    yield
    backend.select(*before)


def test_bytes_and_flops() -> None:
    found = {work.op: work for work in works(SHAPE, LOAD, Types(BF16, BF16))}
    assert found.keys() == OPS
    m = 6
    assert found["matmul, QKV"].num_bytes == 2 * (128 * 64 + m * 64 + m * 128)
    assert found["matmul, QKV"].flops == 2 * m * 128 * 64
    assert found["gated_matmul"].num_bytes == 2 * (192 * 64 + m * 64 + m * 96)
    assert found["matmul, logits"].num_bytes == 2 * (80 * 64 + 2 * 64) + 4 * 2 * 80
    # Half a byte for a code; a float32 for 64 of them, or two float16 for 32; 16 float32 of a table.
    assert found["gated_matmul_4bit"].num_bytes == 192 * (64 // 2 + 4) + 64 + 2 * (m * 64 + m * 96)
    assert found["matmul_4bit, down"].num_bytes == 64 * 3 * (32 // 2 + 4) + 64 + 2 * (m * 96 + m * 64)
    assert found["dequantize_4bit, down"].num_bytes == 64 * 3 * (32 // 2 + 4) + 64 + 2 * 64 * 96
    # 40 cached tokens, keys and values of 2 heads of 16; each of 6 queries in and out; tokens see 18, 19 and 20.
    assert found["paged_attention"].num_bytes == 40 * 2 * 2 * 16 * 2 + 2 * m * 64 * 2
    assert found["paged_attention"].flops == 2 * (18 + 19 + 20) * 4 * 16 * 4
    quantised = {work.op: work for work in works(SHAPE, LOAD, Types(BF16, torch.int8))}
    assert quantised["paged_attention"].num_bytes == 40 * 2 * 2 * (16 + 4) + 2 * m * 64 * 2
    assert found["sample"].num_bytes == 2 * 80 * 4


@pytest.mark.parametrize("flags", [["--dtype", "float32", "--model", "tiny"], ["--every-type"]])
def test_tables_and_json(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    assert kernels.main([*flags, "--num-tries", "2", "--output", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    rows = result["results"]
    assert {row["op"] for row in rows} == OPS and {row["load"] for row in rows} == {"mixed", "decode"}
    assert all(row["us"] > 0 and row["bytes_per_s"] > 0 and row["share"] > 0 for row in rows)
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 1 + len(rows) and page.read_text().splitlines()[-len(rows) :] == table[1:]
    if flags == ["--every-type"]:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (torch.bfloat16, torch.float32)]
        for op, blocks in (("paged_attention", (16, 32, 64)), ("matmul, QKV", (16,))):
            types = {row["types"] for row in rows if row["op"] == op}
            assert types >= {f"{dtype}, block {block}" for dtype in dtypes for block in blocks}
            assert backend.device().type == "cuda" or len(types) == 2 * len(blocks)
    else:
        assert len(rows) == 2 * len(OPS) and {row["types"] for row in rows} == {"float32, block 16"}


def test_it_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--model", "none"])
    assert "there are tiny, other" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "_kernels", "triton")
    assert kernels.main([]) == 1
    assert "mean nothing" in capsys.readouterr().err
