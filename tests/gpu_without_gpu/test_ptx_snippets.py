"""Hand-written PTX with known answers: each family of instructions, and each check."""

import struct
from collections.abc import Sequence

import pytest
import torch

from gpu_without_gpu import run_ptx
from gpu_without_gpu.errors import GpuError, Misaligned, OutOfBounds, Race, Trap, Unsupported

LANE = torch.arange(32, dtype=torch.int64)


def kernel(body: str, threads: int = 32, declarations: str = "") -> str:
    """A kernel over x and out, both pointers to 64-bit elements. In %rd3 and %rd4: this thread's element of each."""
    return f"""
.version 8.7
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
{declarations}
.visible .entry snippet(.param .u64 .ptr .global .align 1 snippet_param_0, .param .u64 snippet_param_1)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<40>;
    ld.param.b64 %rd1, [snippet_param_0];
    ld.param.b64 %rd2, [snippet_param_1];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd3, %r0, 8, %rd1;
    mad.wide.u32 %rd4, %r0, 8, %rd2;
    {body}
    ret;
}}
"""


def run(
    body: str, x: torch.Tensor | None = None, threads: int = 32, shared_bytes: int = 0, blocks: int = 1
) -> torch.Tensor:
    out = torch.full((threads,), -7, dtype=torch.int64)
    run_ptx(kernel(body, threads), (blocks, 1, 1), x, out, shared_bytes=shared_bytes)
    return out


def evaluate(instruction: str, *rows: Sequence[int], bits: int = 32, result_bits: int | None = None) -> list[int]:
    """`instruction` names its operands $0 (the result), $1, ...: its values, in turn, for the operands in `rows`."""
    x = torch.zeros(32, 4, dtype=torch.int64)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            x[i, j] = (value + (1 << 63)) % (1 << 64) - (1 << 63)
    prefix, names = {16: ("h", "u16"), 32: ("r", "u32"), 64: ("rd", "u64")}[bits]
    out_prefix, out_names = {16: ("h", "u16"), 32: ("r", "u32"), 64: ("rd", "u64")}[result_bits or bits]
    base = 20 if bits > 16 else 1
    loads = ["mad.wide.u32 %rd5, %r0, 32, %rd1;"]
    for j in range(4):
        loads.append(f"ld.global.b{bits} %{prefix}{base + j}, [%rd5+{8 * j}];")
        instruction = instruction.replace(f"${j + 1}", f"%{prefix}{base + j}")
    target = f"%{out_prefix}{5 if result_bits == 16 else base + 4}"
    body = "\n".join([*loads, instruction.replace("$0", target) + ";"])
    if (result_bits or bits) == 64:
        body += f"\nst.global.b64 [%rd4], {target};"
    else:
        body += f"\ncvt.u64.{out_names} %rd6, {target};\nst.global.b64 [%rd4], %rd6;"
    out = torch.zeros(32, dtype=torch.int64)
    run_ptx(kernel(body), (1, 1, 1), x, out)
    return [value % (1 << 64) for value in out[: len(rows)].tolist()]


def f32(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


M32, M64 = (1 << 32) - 1, (1 << 64) - 1


@pytest.mark.parametrize(
    ("instruction", "operands", "expected"),
    [
        ("add.s32 $0, $1, $2", (M32, 2), 1),
        ("sub.s32 $0, $1, $2", (1, 2), M32),
        ("mul.lo.s32 $0, $1, $2", (1 << 31, 3), 1 << 31),
        ("mul.hi.u32 $0, $1, $2", (M32, M32), M32 - 1),
        ("mul.hi.s32 $0, $1, $2", (M32, 5), M32),
        ("mad.lo.u32 $0, $1, $2, $3", (7, 9, 5), 68),
        ("div.s32 $0, $1, $2", (-7 & M32, 2), -3 & M32),
        ("rem.s32 $0, $1, $2", (-7 & M32, 2), -1 & M32),
        ("div.u32 $0, $1, $2", (-7 & M32, 2), (M32 - 6) // 2),
        ("div.u32 $0, $1, $2", (5, 0), M32),
        ("min.s32 $0, $1, $2", (M32, 0), M32),
        ("min.u32 $0, $1, $2", (M32, 0), 0),
        ("max.s32 $0, $1, $2", (M32, 0), 0),
        ("abs.s32 $0, $1", (M32,), 1),
        ("neg.s32 $0, $1", (5,), -5 & M32),
        ("not.b32 $0, $1", (5,), ~5 & M32),
        ("and.b32 $0, $1, 12", (10,), 8),
        ("or.b32 $0, $1, 0x0c", (10,), 14),
        ("xor.b32 $0, $1, -1", (10,), ~10 & M32),
        ("shl.b32 $0, $1, $2", (3, 31), 1 << 31),
        ("shl.b32 $0, $1, $2", (3, 32), 0),
        ("shr.u32 $0, $1, $2", (M32, 40), 0),
        ("shr.s32 $0, $1, $2", (1 << 31, 40), M32),
        ("shr.s32 $0, $1, 4", (1 << 31,), 0xF8000000),
        ("shf.l.wrap.b32 $0, $1, $2, $3", (0x80000001, 0x7, 36), 0x78),
        ("shf.r.wrap.b32 $0, $1, $2, $3", (0x80000001, 0x7, 4), 0x78000000),
        ("shf.r.clamp.b32 $0, $1, $2, $3", (1, 7, 99), 7),
        ("popc.b32 $0, $1", (0xF0F1,), 9),
        ("clz.b32 $0, $1", (0x00F0,), 24),
        ("clz.b32 $0, $1", (0,), 32),
        ("bfe.u32 $0, $1, 4, 8", (0xABCD,), 0xBC),
        ("bfe.s32 $0, $1, 4, 8", (0xABCD,), 0xBC - 0x100 & M32),
        ("bfe.s32 $0, $1, 28, 8", (0xA0000000,), -6 & M32),
        ("bfe.u32 $0, $1, 4, 0", (0xABCD,), 0),
        ("bfi.b32 $0, $1, $2, 8, 4", (0xAB, 0xFFFFFFFF), 0xFFFFFBFF),
        ("prmt.b32 $0, $1, $2, 0x7610", (0x33221100, 0x77665544), 0x77661100),
        ("prmt.b32 $0, $1, $2, $3", (0x33221180, 0x77665544, 0x0008), 0x808080FF),
        ("lop3.b32 $0, $1, $2, $3, 0x96", (0b1100, 0b1010, 0b1001), 0b1111),
        ("lop3.b32 $0, $1, $2, $3, 0xe8", (0b1100, 0b1010, 0b1001), 0b1000),
        ("selp.b32 $0, $1, $2, -1", (5, 6), 5),
        ("add.s16x2 $0, $1, $2", (0xFFFF0001, 0x00020003), 0x00010004),
        ("mov.b32 $0, {%h1, %h2}", (), None),
        ("add.f32 $0, $1, 0f3F800000", (f32(2.5),), f32(3.5)),
        ("sub.rn.f32 $0, $1, $2", (f32(2.5), f32(1)), f32(1.5)),
        ("mul.ftz.f32 $0, $1, $2", (f32(1e-30), f32(1e-10)), 0),
        ("mul.f32 $0, $1, $2", (f32(1e-30), f32(1e-10)), f32(1e-40)),
        ("div.full.f32 $0, $1, $2", (f32(1), f32(4)), f32(0.25)),
        ("fma.rn.f32 $0, $1, $2, $3", (f32(1 + 2**-12), f32(1 + 2**-12), f32(-1 - 2**-11)), f32(2**-24)),
        ("max.f32 $0, $1, $2", (0x7FC00000, f32(-3)), f32(-3)),
        ("max.NaN.f32 $0, $1, $2", (f32(-3), 0x7FC00000), 0x7FC00000),
        ("min.f32 $0, $1, $2", (f32(0.0), f32(-0.0)), f32(-0.0)),
        ("neg.f32 $0, $1", (f32(2),), f32(-2)),
        ("abs.f32 $0, $1", (f32(-2),), f32(2)),
        ("ex2.approx.ftz.f32 $0, $1", (f32(-2),), f32(0.25)),
        ("ex2.approx.ftz.f32 $0, $1", (f32(-130),), 0),
        ("lg2.approx.f32 $0, $1", (f32(8),), f32(3)),
        ("rsqrt.approx.f32 $0, $1", (f32(4),), f32(0.5)),
        ("sqrt.approx.f32 $0, $1", (f32(4),), f32(2)),
        ("rcp.approx.ftz.f32 $0, $1", (f32(4),), f32(0.25)),
        ("sin.approx.f32 $0, $1", (f32(0),), f32(0)),
        ("cos.approx.f32 $0, $1", (f32(0),), f32(1)),
        ("tanh.approx.f32 $0, $1", (f32(100),), f32(1)),
        ("mul.rn.bf16x2 $0, $1, $2", (0x4000_3F80, 0x4040_4000), 0x40C0_4000),
        ("fma.rn.f16x2 $0, $1, $2, $3", (0x3C00_4000, 0x4000_4000, 0x3C00_0000), 0x4200_4400),
        ("neg.bf16x2 $0, $1", (0x3F80_BF80,), 0xBF80_3F80),
        ("cvt.rn.f32.s32 $0, $1", (M32,), f32(-1)),
        ("cvt.rn.f32.u32 $0, $1", ((1 << 24) + 1,), f32(1 << 24)),
        ("cvt.rzi.s32.f32 $0, $1", (f32(-2.9),), -2 & M32),
        ("cvt.rni.s32.f32 $0, $1", (f32(2.5),), 2),
        ("cvt.rzi.s32.f32 $0, $1", (f32(3e9),), (1 << 31) - 1),
        ("cvt.rzi.u32.f32 $0, $1", (f32(-3),), 0),
        ("cvt.rzi.s32.f32 $0, $1", (0x7FC00000,), 0),
        ("cvt.rmi.f32.f32 $0, $1", (f32(-2.5),), f32(-3)),
        ("cvt.rna.tf32.f32 $0, $1", (0x3F801000,), 0x3F802000),
        ("cvt.rn.tf32.f32 $0, $1", (0x3F801000,), 0x3F800000),
        ("cvt.rn.bf16x2.f32 $0, $1, $2", (f32(1), f32(-2)), 0x3F80_C000),
        ("cvt.rn.f16x2.f32 $0, $1, $2", (f32(1), f32(70000)), 0x3C00_7C00),
    ],
)  # fmt: skip
def test_32_bits(instruction: str, operands: tuple[int, ...], expected: int | None) -> None:
    if expected is None:
        instruction, operands, expected = "mov.b32 {%h1, %h2}, $1;\nmov.b32 $0, {%h2, %h1}", (0x12345678,), 0x56781234
    assert hex(evaluate(instruction, operands)[0]) == hex(expected)


@pytest.mark.parametrize(
    ("instruction", "operands", "expected"),
    [
        ("add.s64 $0, $1, $2", (M64, 2), 1),
        ("mul.hi.u64 $0, $1, $2", (M64, M64), M64 - 1),
        ("mul.hi.s64 $0, $1, $2", (M64, 1 << 62), M64),
        (
            "mul.hi.u64 $0, $1, $2",
            (0x123456789ABCDEF0, 0xFEDCBA9876543210),
            0x123456789ABCDEF0 * 0xFEDCBA9876543210 >> 64,
        ),
        ("mad.lo.s64 $0, $1, $2, $3", (3, 5, M64), 14),
        ("div.s64 $0, $1, $2", (-(1 << 62) & M64, 3), -((1 << 62) // 3) & M64),
        ("shr.s64 $0, $1, 60", (1 << 63,), M64 - 7),
        ("clz.b64 %r30, $1;\ncvt.u64.u32 $0, %r30", (1 << 40,), 23),
        ("popc.b64 %r30, $1;\ncvt.u64.u32 $0, %r30", (M64,), 64),
        ("mov.b64 {%r30, %r31}, $1;\nmul.wide.s32 $0, %r30, %r31", ((2 << 32) | M32,), -2 & M64),
        ("mov.b64 {%r30, %r31}, $1;\nmul.wide.u32 $0, %r30, %r31", ((2 << 32) | M32,), 2 * M32),
        ("mov.b64 {%r30, _}, $1;\ncvt.s64.s32 $0, %r30", (0x5_8000_0000,), -(1 << 31) & M64),
        ("cvt.u32.u64 %r30, $1;\ncvt.u64.u32 $0, %r30", (M64,), M32),
        ("cvt.s8.s64 %h1, $1;\ncvt.s64.s16 $0, %h1", (0x1FF,), M64),
        ("cvt.rn.f64.s64 $0, $1", (3,), 0x4008000000000000),
        ("cvt.rzi.s64.f64 $0, $1", (0x43E0000000000000,), (1 << 63) - 1),
        ("cvt.rzi.s64.f64 $0, $1", (0x7FF8000000000000,), 1 << 63),
        ("setp.lt.s64 %p1, $1, $2;\nselp.b64 $0, 1, 0, %p1", (M64, 0), 1),
        ("setp.lt.u64 %p1, $1, $2;\nselp.b64 $0, 1, 0, %p1", (M64, 0), 0),
        ("setp.ge.and.s64 %p1, $1, $2, !%p0;\nselp.b64 $0, 1, 0, %p1", (5, 5), 1),
    ],
)
def test_64_bits(instruction: str, operands: tuple[int, ...], expected: int) -> None:
    assert hex(evaluate("mov.pred %p0, 0;\n" + instruction, operands, bits=64)[0]) == hex(expected)


@pytest.mark.parametrize(
    ("comparison", "expected"),  # of (1, 2), (2, 2), (NaN, 2)
    [("lt", "100"), ("le", "110"), ("eq", "010"), ("ne", "100"), ("gt", "000"), ("ge", "010"), ("num", "110")]
    + [("ltu", "101"), ("leu", "111"), ("equ", "011"), ("neu", "101"), ("gtu", "001"), ("geu", "011"), ("nan", "001")],
)
def test_comparisons_of_floats(comparison: str, expected: str) -> None:
    values = evaluate(
        f"setp.{comparison}.f32 %p1, $1, $2;\nselp.b32 $0, 1, 0, %p1",
        *((f32(x), f32(2)) for x in (1.0, 2.0, float("nan"))),
    )
    assert values == [int(digit) for digit in expected]


def test_8_bit_floats() -> None:
    instruction = "cvt.rn.satfinite.{0}.f32 %h1, $1, $2;\ncvt.rn.f16x2.{0} $0, %h1"
    rows = [(f32(1.0625), f32(1.1875)), (f32(1e9), f32(-1e9)), (f32(2.0**-10), f32(float("nan")))]
    e4m3 = evaluate(instruction.format("e4m3x2"), *rows)
    assert [hex(v) for v in e4m3[:2]] == ["0x3c003d00", "0x5f00df00"] and e4m3[2] >> 16 == 0
    assert e4m3[2] & 0x7C00 == 0x7C00 and e4m3[2] & 0x3FF  # NaN
    e5m2 = evaluate(instruction.format("e5m2x2"), *rows)
    assert [hex(v) for v in e5m2[:2]] == ["0x3c003d00", "0x7b00fb00"] and e5m2[2] >> 16 == 0x1400


def test_16_bits() -> None:
    assert evaluate("cvt.f32.bf16 $0, $1", (0x3F80,), bits=16, result_bits=32) == [f32(1)]
    assert evaluate("cvt.f32.f16 $0, $1", (0x3C00,), bits=16, result_bits=32) == [f32(1)]
    assert evaluate("cvt.bf16.f16 $0, $1", (0x3C00,), bits=16) == [0x3F80]
    assert evaluate("fma.rn.bf16 $0, $1, $2, $3", (0x3F81, 0x3F81, 0x8000), bits=16) == [0x3F82]
    # 1 + 2**-8 + 2**-20 is above the middle of two bf16 by less than a float32 can tell from it when summed
    assert evaluate("fma.rn.bf16 $0, $1, $2, $3", (0x3B80, 0x3F80, 0x3F80), bits=16) == [0x3F80]
    assert evaluate("fma.rn.bf16 $0, $1, $2, $3", (0x3B81, 0x3F80, 0x3F80), bits=16) == [0x3F81]
    assert evaluate("cvt.rz.bf16.f32 $0, $1", (f32(1.999),), bits=32, result_bits=16) == [0x3FFF]
    assert evaluate("cvt.rz.f16.f32 $0, $1", (f32(65519.0),), bits=32, result_bits=16) == [0x7BFF]
    assert evaluate("cvt.rn.f16.f32 $0, $1", (f32(65520.0),), bits=32, result_bits=16) == [0x7C00]


SHUFFLE = (
    "mul.lo.u32 %r1, %r0, 3;\nshfl.sync.{} %r2|%p1, %r1, {}, -1;\ncvt.u64.u32 %rd5, %r2;\nst.global.b64 [%rd4], %rd5;"
)


@pytest.mark.parametrize(
    ("mode", "constants", "expected"),
    [
        ("bfly.b32", "5, 31", LANE ^ 5),
        ("idx.b32", "7, 31", LANE * 0 + 7),
        ("idx.b32", "1, 0x181f", LANE // 8 * 8 + 1),
        ("up.b32", "3, 0", torch.where(LANE >= 3, LANE - 3, LANE)),
        ("down.b32", "3, 31", torch.where(LANE + 3 < 32, LANE + 3, LANE)),
        ("idx.b32", "%r0, 31", LANE),
    ],
)
def test_shuffles(mode: str, constants: str, expected: torch.Tensor) -> None:
    assert torch.equal(run(SHUFFLE.format(mode, constants)), expected * 3)


def test_votes_and_reductions() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 5;
    vote.sync.ballot.b32 %r1, %p1, -1;
    vote.sync.any.pred %p2, %p1, -1;
    vote.sync.all.pred %p3, %p1, -1;
    mov.b32 %r4, -1;
    redux.sync.add.u32 %r2, %r0, %r4;
    redux.sync.max.s32 %r3, %r0, 0xffffffff;
    @%p2 add.u32 %r1, %r1, 1000;
    @%p3 add.u32 %r1, %r1, 5000;
    mad.lo.u32 %r1, %r2, 10000, %r1;
    mad.lo.u32 %r1, %r3, 10000000, %r1;
    cvt.u64.u32 %rd5, %r1;
    st.global.b64 [%rd4], %rd5;
    """
    assert set(run(body).tolist()) == {310_000_000 + 4_960_000 + 1000 + 31}


def test_vectors_and_narrow_elements() -> None:
    x = torch.arange(128, dtype=torch.int64)
    body = """
    mad.wide.u32 %rd5, %r0, 32, %rd1;
    ld.global.L1::evict_last.v4.b32 {%r1, %r2, %r3, %r4}, [%rd5];
    ld.global.nc.v2.b64 {%rd6, %rd7}, [%rd5+16];
    ld.global.v8.b32 {%r5, _, %r6, _, %r7, _, %r8, _}, [%rd5];
    ld.global.s8 %r9, [%rd5+24];
    ld.global.v2.b16 {%h1, %h2}, [%rd5+8];
    cvt.u32.u16 %r10, %h1;
    add.u32 %r1, %r1, %r3;
    add.u32 %r1, %r1, %r10;
    add.u32 %r1, %r1, %r8;
    add.u32 %r1, %r1, %r9;
    cvt.s64.s32 %rd8, %r1;
    add.s64 %rd8, %rd8, %rd6;
    st.global.b64 [%rd4], %rd8;
    """
    first = LANE * 4
    signed = ((first + 3 + 128) % 256) - 128
    assert torch.equal(run(body, x), first + (first + 1) * 2 + first + 3 + signed + first + 2)


STORE_SHARED = "shl.b32 %r1, %r0, 2;\nst.shared.b32 [%r1], %r0;\n"
READ_NEIGHBOUR = "xor.b32 %r2, %r1, {};\nld.shared.b32 %r3, [%r2];\ncvt.u64.u32 %rd5, %r3;\nst.global.b64 [%rd4], %rd5;"


def test_shared_memory_between_warps_needs_a_barrier() -> None:
    across = READ_NEIGHBOUR.format(128)
    out = run(f"{STORE_SHARED} bar.sync 0;\n{across}", threads=64, shared_bytes=256)
    assert torch.equal(out, torch.arange(64) ^ 32)
    with pytest.raises(Race, match="read of what another warp wrote"):
        run(f"{STORE_SHARED} {across}", threads=64, shared_bytes=256)
    within = READ_NEIGHBOUR.format(4)
    assert torch.equal(run(f"{STORE_SHARED} {within}", threads=64, shared_bytes=256), torch.arange(64) ^ 1)


def test_a_write_over_what_another_warp_reads_is_a_race() -> None:
    """Also where that warp is not the last one to read it: all four read the first element, the third writes it."""
    read = "mov.u32 %r2, 0;\nld.shared.b32 %r3, [%r2];\n"
    write = "setp.eq.u32 %p1, %r0, 64;\n@%p1 st.shared.b32 [%r2], 5;\n"
    run(f"{STORE_SHARED} bar.sync 0; {read} bar.sync 0; {write}", threads=128, shared_bytes=512)
    with pytest.raises(Race, match="write over what another warp read"):
        run(f"{STORE_SHARED} bar.sync 0; {read} {write}", threads=128, shared_bytes=512)
    with pytest.raises(Race, match="write over what another warp wrote"):
        run(f"{STORE_SHARED} mov.u32 %r2, 0; {write}", threads=128, shared_bytes=512)


def test_warps_may_write_the_same_value_to_one_place() -> None:
    run("and.b32 %r1, %r0, 31;\nshl.b32 %r1, %r1, 2;\nst.shared.b32 [%r1], 9;", threads=64, shared_bytes=128)
    with pytest.raises(Race, match="different values"):
        run("mov.u32 %r1, 0;\nst.shared.b32 [%r1], %r0;", shared_bytes=128)


STORE = "st.global.b64 [%rd4], 5;\n"
LOAD_NEIGHBOUR = "xor.b32 %r1, %r0, 1;\nmad.wide.u32 %rd5, %r1, 8, %rd2;\nld.global.b64 %rd6, [%rd5];\n"
ADD_TO_NEIGHBOUR = "xor.b32 %r1, %r0, 1;\nmad.wide.u32 %rd5, %r1, 8, %rd2;\nred.global.add.u64 [%rd5], 1;\n"
STORE_AS_ONE = "setp.eq.u32 %p1, %r0, 40;\n@%p1 st.global.b64 [%rd2], 5;\n"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (STORE, LOAD_NEIGHBOUR, "read of what another thread wrote"),
        (LOAD_NEIGHBOUR, STORE, "write to global memory over what another thread read"),
        (LOAD_NEIGHBOUR + "ld.global.b64 %rd6, [%rd2];\n", STORE_AS_ONE, "over what another thread read"),
        (STORE, STORE_AS_ONE, "write to global memory over what another thread wrote"),
        (ADD_TO_NEIGHBOUR, LOAD_NEIGHBOUR, "read of what another thread wrote"),
        (STORE, ADD_TO_NEIGHBOUR, "over what another thread wrote"),
    ],
)
def test_global_memory_between_threads_needs_a_barrier(first: str, second: str, words: str) -> None:
    part = "setp.lt.u32 %p1, %r0, 5;\n@%p1 bra end;\n"  # some leave, the others meet
    run(f"{first} bar.sync 0;\n{second}", threads=64, blocks=2)
    run(f"{first} {part} bar.sync 0;\n{second} end:", threads=64)
    with pytest.raises(Race, match=words):
        run(f"{first} {second}", threads=64)
    with pytest.raises(Race, match=words):
        run(f"bar.sync 0;\n {first} {second}", threads=64, blocks=2)


def test_threads_may_add_to_one_place_and_use_their_own_without_a_barrier() -> None:
    own = "ld.global.b64 %rd6, [%rd4];\nst.global.b64 [%rd4], %rd6;\nld.global.b64 %rd6, [%rd4];\n"
    run(own, threads=64)
    assert run("red.global.add.u64 [%rd2], 1;\n" * 2, threads=64)[0] == 128 - 7
    with pytest.raises(Race, match="threads write to one place in global memory at once"):
        run("st.global.b64 [%rd2], 5;", threads=64)


def test_unwritten_shared_memory_is_poison() -> None:
    out = run("shl.b32 %r1, %r0, 2;\n" + READ_NEIGHBOUR.format(4), shared_bytes=128)
    assert set(out.tolist()) == {M32}


ASYNC = """
    shl.b32 %r1, %r0, 4;
    mad.wide.u32 %rd5, %r0, 16, %rd1;
    cp.async.cg.shared.global [%r1], [%rd5], 16, {};
    cp.async.commit_group;
    {}
    ld.shared.b64 %rd6, [%r1];
    st.global.b64 [%rd4], %rd6;
"""


def test_asynchronous_copies_arrive_when_waited_for() -> None:
    x = torch.arange(64, dtype=torch.int64)
    assert torch.equal(run(ASYNC.format("16", "cp.async.wait_group 0;"), x, shared_bytes=512), LANE * 2)
    assert torch.equal(run(ASYNC.format("16", "cp.async.wait_all;"), x, shared_bytes=512), LANE * 2)
    assert set(run(ASYNC.format("16", "cp.async.wait_group 1;"), x, shared_bytes=512).tolist()) == {-1}
    zeros = "setp.lt.u32 %p1, %r0, 3;\nselp.b32 %r2, 16, 0, %p1;\n" + ASYNC.format("%r2", "cp.async.wait_group 0;")
    assert run(zeros, x[:6], shared_bytes=512).tolist() == [0, 2, 4] + [0] * 29  # what is not copied is not read


def test_asynchronous_copies_of_each_thread() -> None:
    """Half of the threads commit one more group: waiting for all but one completes the first copy of those alone."""
    more = "setp.lt.u32 %p1, %r0, 16;\n@!%p1 bra $L__on;\ncp.async.commit_group;\n$L__on:\ncp.async.wait_group 1;"
    out = run(ASYNC.format("16", more), torch.arange(64, dtype=torch.int64), shared_bytes=512)
    assert torch.equal(out, torch.where(LANE < 16, LANE * 2, -1))


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_of_8_rows(transposed: str) -> None:
    """Row i of the first matrix lies at 16 * i, of the second at 128 + 16 * i; stored, then loaded again."""
    body = f"""
    and.b32 %r1, %r0, 15;
    shl.b32 %r1, %r1, 4;
    mul.lo.u32 %r2, %r0, 0x20002;
    add.u32 %r2, %r2, 0x10000;
    add.u32 %r3, %r2, 0x1000100;
    stmatrix.sync.aligned.m8n8.x2{transposed}.shared.b16 [%r1], {{%r2, %r3}};
    shl.b32 %r4, %r0, 3;
    ld.shared.b64 %rd5, [%r4];
    ldmatrix.sync.aligned.m8n8.x2{transposed}.shared.b16 {{%r5, %r6}}, [%r1];
    setp.ne.u32 %p1, %r5, %r2;
    @%p1 trap;
    setp.ne.u32 %p1, %r6, %r3;
    @%p1 trap;
    st.global.b64 [%rd4], %rd5;
    """
    matrices = run(body, shared_bytes=256).view(torch.int16).view(2, 8, 8)
    expected = torch.stack([torch.arange(64), torch.arange(64) + 256]).view(2, 8, 8).to(torch.int16)
    assert torch.equal(matrices, expected.mT if transposed else expected)


def test_bounds_and_alignment() -> None:
    x = torch.zeros(32, dtype=torch.int64)
    with pytest.raises(OutOfBounds, match="8 bytes at byte 256 of the 256 of argument 0"):
        run("ld.global.b64 %rd5, [%rd3+8];", x)
    with pytest.raises(OutOfBounds, match="8 bytes at byte -8 of the 256 of argument 1"):
        run("st.global.b64 [%rd4+-8], %rd1;", x)
    with pytest.raises(OutOfBounds):
        run("mov.b64 %rd5, 64;\nld.global.b64 %rd5, [%rd5];", x)
    with pytest.raises(Misaligned):
        run("ld.global.b64 %rd5, [%rd1+4];", x)
    with pytest.raises(Misaligned):
        run("mov.u32 %r1, 8;\nld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];", shared_bytes=512)
    with pytest.raises(OutOfBounds):
        run("mov.u32 %r1, 128;\nld.shared.b32 %r2, [%r1];", shared_bytes=128)
    with pytest.raises(OutOfBounds):
        run("mov.u32 %r1, 0;\ncp.async.ca.shared.global [%r1], [%rd1], 4;")
    assert run("setp.lt.u32 %p1, %r0, 0;\n@%p1 ld.global.b64 %rd5, [%rd3+999];", x).tolist() == [-7] * 32


def test_atomics() -> None:
    body = """
    atom.global.gpu.acq_rel.add.u64 %rd5, [%rd1], 1;
    st.global.b64 [%rd4], %rd5;
    red.global.max.s64 [%rd1+8], %rd5;
    atom.global.cas.b64 %rd6, [%rd1+16], 0, 77;
    atom.global.exch.b64 %rd6, [%rd1+24], %rd5;
    setp.lt.u32 %p1, %r0, 4;
    cvt.rn.f32.u32 %r1, %r0;
    @%p1 red.global.add.f32 [%rd1+32], %r1;
    atom.shared.add.u32 %r2, [global_smem+4], 2;
    """
    x = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(run(f"st.shared.b32 [global_smem+4], 0;\n{body}", x, shared_bytes=16), LANE)
    assert x[:4].tolist() == [32, 31, 77, 31] and x[4:].view(torch.float32)[0] == 6


def test_divergence_and_exits() -> None:
    """Threads loop as often as their number says, some leave early, and the rest meet at a barrier."""
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    setp.eq.u32 %p1, %r0, 9;
    @%p1 ret;
    $L__loop:
    setp.ge.u32 %p1, %r2, %r0;
    @%p1 bra $L__done;
    add.u32 %r2, %r2, 1;
    add.u32 %r1, %r1, %r2;
    setp.eq.u32 %p2, %r2, 20;
    @%p2 bra $L__done;
    bra.uni $L__loop;
    $L__done:
    bar.sync 0;
    cvt.u64.u32 %rd5, %r1;
    st.global.b64 [%rd4], %rd5;
    """
    limit = torch.arange(64).clamp(max=20)
    expected = limit * (limit + 1) // 2
    expected[9] = -7
    assert torch.equal(run(body, threads=64), expected)


def test_threads_meet_at_different_barriers() -> None:
    """Those that have left do not count, those that wait elsewhere do."""
    halves = """
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra $L__first;
    bar.sync 0;
    ret;
    $L__first:
    bar.sync 0;
    """
    run(halves, threads=64)


def test_warp_wide_instructions_want_the_whole_warp() -> None:
    with pytest.raises(GpuError, match="some of the warp's threads elsewhere"):
        run("setp.lt.u32 %p1, %r0, 5;\n@%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;")
    with pytest.raises(GpuError, match="less than the warp"):
        run("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xff;")


def test_registers_must_be_written_first() -> None:
    with pytest.raises(GpuError, match="%r5 is read before anything is written to it"):
        run("add.u32 %r1, %r5, 1;")


def test_inner_scopes_have_registers_of_their_own() -> None:
    body = """
    mov.u32 %r1, 5;
    { .reg .b32 %r1; mov.u32 %r1, 7; add.u32 %r2, %r1, 1; }
    add.u32 %r2, %r2, %r1;
    cvt.u64.u32 %rd5, %r2;
    st.global.b64 [%rd4], %rd5;
    """
    assert set(run(body).tolist()) == {13}


def test_module_level_data() -> None:
    text = kernel(
        """
        mov.u64 %rd5, table;
        cvta.global.u64 %rd5, %rd5;
        ld.global.b32 %r1, [%rd5+4];
        cvt.s64.s32 %rd6, %r1;
        st.global.b64 [%rd4], %rd6;
        """,
        declarations=".global .align 4 .b32 table[2] = {5, -6};",
    )
    out = torch.zeros(32, dtype=torch.int64)
    run_ptx(text, (1, 1, 1), None, out)
    assert set(out.tolist()) == {-6}


@pytest.mark.parametrize(
    "instruction",
    [
        "mbarrier.init.shared::cta.b64 [%r1], 1;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1], [%r1];",
        "cp.reduce.async.bulk.global.shared::cta.add.f32 [%rd1], [%r1], 4;",
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;",
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%r1}, %rd1, %rd1, %p1, 1, 1, 0, 0;",
        "mov.u64 %rd5, %globaltimer;",
        "mov.u32 %r1, %clock;",
        "nanosleep.u32 100;",
        "add.sat.s32 %r1, %r0, %r0;",
        "add.rz.f32 %r1, %r0, %r0;",
        "cvt.sat.u8.s32 %h1, %r0;",
        "cvt.rz.f32.s32 %r1, %r0;",
        "ld.b32 %r1, [%rd1];",
        "ld.local.b32 %r1, [%r0];",
        "ld.global.unheard.b32 %r1, [%rd1];",
        "st.global.b64 [%rd1], %r0;",
        "atom.global.add.noftz.f16x2 %r1, [%rd1], %r0;",
        "bar.sync 1, 64;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "setp.lt.f16x2 %p1|%p2, %r0, %r0;",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r1, %r2};",
        "vote.sync.ballot.b64 %rd1, %p1, -1;",
        "call.uni (%r1), something, (%r2);",
        "frobnicate.b32 %r1, %r0;",
        ".local .align 4 .b8 depot[8];",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(instruction: str) -> None:
    """Wherever it stands, executed or not, by name."""
    name = instruction.split()[0].split(".")[0]
    with pytest.raises(Unsupported, match=f"`.*{name}"):
        run(f"ret;\n{instruction}")


def test_traps() -> None:
    with pytest.raises(Trap, match="in snippet"):
        run("trap;")
    assert run("setp.gt.u32 %p1, %r0, 99;\n@%p1 trap;").tolist() == [-7] * 32
