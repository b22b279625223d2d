"""Every kernel is assembled for every chip, and what the compilers make of it is what the snapshot says."""

import difflib
import itertools
import re
from collections import defaultdict

import pytest
import torch
import triton
import triton.language as tl
from gpu.compile_matrix import RENEW, SNAPSHOT, Compiled, compile_variant, matrix, ops, text, thinned
from gpu.kernels_page import PAGE, compiled_table, estimates_table

from octavo.kernels.gpu.variant import Variant

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="of compiled kernels only")


@pytest.fixture(scope="module")
def lines() -> list[Compiled]:
    return matrix()


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes, where nothing is compiled yet
def test_the_snapshot_is_up_to_date(lines: list[Compiled]) -> None:
    difference = difflib.unified_diff(
        SNAPSHOT.read_text().splitlines(), text(lines).splitlines(), "snapshot", "compiled", n=0, lineterm=""
    )
    differs = "\n".join(difference)
    assert not differs, f"{differs}\nIf this is as it should be, renew the snapshot: {RENEW}"


@pytest.mark.slow
def test_the_page_is_up_to_date(lines: list[Compiled]) -> None:
    """But for the numbers of tests, which change often."""
    shown = PAGE.read_text()
    for table in (compiled_table(lines), estimates_table()):
        assert table in shown, f"docs/kernels.md is not up to date: {RENEW}"


@pytest.mark.slow
def test_only_float8_is_refused_and_only_by_a_chip_without_it(lines: list[Compiled]) -> None:
    refused = [line for line in lines if line.refused]
    assert {line.target for line in refused} <= {"sm_80"}
    assert all("fp8e4nv" in line.refused and "float8" in line.variant for line in refused)
    assert len(refused) == sum("float8" in line.variant and line.target == "sm_80" for line in lines)


@pytest.mark.slow
def test_nothing_is_spilled(lines: list[Compiled]) -> None:
    assert [str(line) for line in lines if line.spilled and line.target.startswith("sm_")] == []


@pytest.mark.slow
def test_products_of_8_and_16_bits_are_by_tensor_cores(lines: list[Compiled]) -> None:
    narrow = [line for line in lines if line.has_narrow_dot]
    assert {line.op for line in narrow} == {"matmul", "matmul_4bit", "paged_attention"}
    assert [str(line) for line in narrow if not line.tensor_core] == []


@pytest.mark.slow
def test_exact_products_are_by_one_instruction_on_each_chip(lines: list[Compiled]) -> None:
    instructions: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line in lines:
        if line.has_narrow_dot and line.target.startswith("sm_"):
            instructions[line.op, line.target] |= {part.split(" ")[0] for part in line.tensor_core.split(", ")}
    assert len(instructions) == 9 and all(names == {"HMMA.16816"} for names in instructions.values()), instructions


@pytest.mark.slow
def test_exact_products_deal_out_k_in_one_order(lines: list[Compiled]) -> None:
    """A thread holds two neighbours of k at a time, as the instruction has them; more would be another order."""
    products = [line for line in lines if line.has_narrow_dot and line.op.startswith("matmul")]
    assert {line.k_width for line in products if line.target.startswith("sm_")} == {2}


@pytest.mark.slow
def test_matrices_are_read_16_bytes_at_a_time(lines: list[Compiled]) -> None:
    products = [line for line in lines if line.has_narrow_dot and line.target.startswith("sm_")]
    # A tile of 64 keys of 16 bytes leaves 8 for each of 128 threads.
    tiny = [line for line in products if re.search("(int8|float8_e4m3fn), head 16,", line.variant)]
    assert [str(line) for line in products if not line.loads.startswith("16 x ") and line not in tiny] == []


def test_every_op_has_variants_with_names_of_their_own() -> None:
    assert set(ops()) == {
        "activation_mul",
        "all_reduce",
        "dequantize_4bit",
        "embedding",
        "matmul",
        "matmul_4bit",
        "paged_attention",
        "rms_norm",
        "rotary_kv_write",
        "sample",
    }
    for op, module in ops().items():
        names = [variant.name for variant in module.variants()]
        assert names and len(names) == len(set(names)), op


def test_the_compiler_of_amd_is_told_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("maxnreg" in variant.options for module in ops().values() for variant in module.variants())
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert not any("maxnreg" in variant.options for module in ops().values() for variant in module.variants())


def test_thinning_keeps_every_pair() -> None:
    kernel = ops()["embedding"].embedding_kernel
    full = [
        Variant(f"{dtype}, {block}, {warps}", kernel, (dtype, None, 1), {"BLOCK": block, "num_warps": warps})
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for block in (1, 2, 4, 8)
        for warps in (1, 2, 4)
    ]
    some = thinned(full)
    assert len(some) < 16 and thinned(full[:24]) == full[:24]

    def pairs(variants: list[Variant]) -> set[tuple[object, object]]:
        return {
            pair
            for variant in variants
            for pair in itertools.combinations((variant.args[0], *variant.options.items()), 2)
        }

    assert pairs(some) == pairs(full)


@triton.jit  # type: ignore[untyped-decorator]
def _probe_kernel(x_ptr, w_ptr, out_ptr, SIZE: tl.constexpr, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Holds NUM tiles at once, and multiplies."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    w = tl.load(w_ptr + at)
    for i in tl.static_range(NUM):
        total = tl.dot(tl.load(x_ptr + i * SIZE * SIZE + at), w, total)
    tl.store(out_ptr + at, total)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA.16816"), ("sm_90", "HGMMA.64"), ("sm_100", "UTC"), ("gfx942", "mfma_f32")],
)
def test_what_is_read_from_machine_code(target: str, instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose registers do not suffice: everything that the matrix would show is seen."""
    module = ops()["embedding"]
    bf16, f32 = torch.bfloat16, torch.float32
    options = {"SIZE": 128, "NUM": 2, "num_warps": 4} | ({"maxnreg": 64} if target == "sm_80" else {})
    monkeypatch.setattr(module, "variants", lambda: [Variant("probe", _probe_kernel, (bf16, bf16, f32), options)])
    line = compile_variant("embedding", "probe", target)
    assert line.has_narrow_dot and instruction in line.tensor_core, line
    assert line.loads.startswith("16 x ") and line.shared >= 32768 and line.warps == 4
    assert 0 < line.occupancy < 1 and line.registers >= 64
    assert (line.spilled > 0) == (target == "sm_80")
