"""Quantised weights against what their codes mean in float64, and in every bit against `matmul` of the numbers."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from instruction_sets import OTHERS, run_tests
from torch import Tensor

from octavo.kernels.backend import kernels
from octavo.kernels.cpu.library import set_num_threads
from octavo.kernels.matmul import PackedWeight, empty_packed, gated_matmul, matmul
from octavo.kernels.matmul_4bit import (
    CodeFormat,
    dequantize_4bit,
    embedding_4bit,
    empty_packed_4bit,
    gated_matmul_4bit,
    matmul_4bit,
    packed_4bit_bytes,
)
from octavo.kernels.program import Program

DTYPES = [torch.float32, torch.bfloat16]
TABLE = tuple(torch.linspace(-1, 1, 16).pow(3).tolist())  # nothing that bfloat16 holds
UNSIGNED, SIGNED = tuple(map(float, range(16))), tuple(map(float, range(-8, 8)))
SYMMETRIC = (-1.5, *(-(i**0.3) for i in range(7, 0, -1)), 0.0, *(i**0.3 for i in range(1, 8)))
FORMATS = {
    "table of floats": CodeFormat(TABLE, 64),
    "zero points": CodeFormat(UNSIGNED, 128, torch.float16, "zero"),
    "offsets": CodeFormat(UNSIGNED, 32, torch.float16, "offset"),
    "symmetric": CodeFormat(SIGNED, 16, torch.bfloat16),
    "symmetric, float16": CodeFormat(SIGNED, 128, torch.float16),
    "symmetric, not linear": CodeFormat(SYMMETRIC, 32),
    "nearly symmetric": CodeFormat((-8.0, -7.5, *SIGNED[2:]), 64, torch.bfloat16),
    "table, offsets": CodeFormat(TABLE, 32, torch.float32, "offset"),
    "zero points, bfloat16": CodeFormat(UNSIGNED, 64, torch.bfloat16, "zero"),
    "8 bits": CodeFormat(None, 32, torch.float16),
    "8 bits, small groups": CodeFormat(None, 16),
    "8 bits, offsets": CodeFormat(None, 64, torch.float16, "offset"),
}
SHAPES = [(16, 128), (17, 128), (100, 640), (144, 1152)]


class Quantised:
    """A random weight [n, k]: packed, and its numbers in float64."""

    def __init__(self, form: CodeFormat, n: int, k: int, dtype: torch.dtype, num_parts: int = 1) -> None:
        torch.manual_seed(n * k + form.group_size)
        codes = torch.randint(0, 2**form.bits, (n, k), dtype=torch.uint8)
        scales = (torch.rand(n, k // form.group_size) * 1.5 - 0.5).to(form.scale_dtype)
        scales[torch.rand_like(scales, dtype=torch.float32) < 0.05] = 0
        shifts = torch.randn_like(scales) if form.shift == "offset" else torch.randint(0, 17, scales.shape)
        offsets = shifts.to(form.scale_dtype) if form.shift else None
        self.packed = empty_packed_4bit(n, k, dtype, form, num_parts)
        part = n // num_parts
        for begin in range(0, n, part):
            for rows in (slice(begin + part // 3, begin + part), slice(begin, begin + part // 3)):
                self.packed.write_rows(
                    rows.start, codes[rows], scales[rows], None if offsets is None else offsets[rows]
                )
        numbers = (
            codes.view(torch.int8).double() if form.table is None else torch.tensor(form.table)[codes.long()].double()
        )
        each = [t.double().repeat_interleave(form.group_size, dim=1) for t in (scales, shifts.to(form.scale_dtype))]
        numbers = (numbers - each[1]) * each[0] if form.shift == "zero" else numbers * each[0]
        self.numbers = numbers + each[1] if form.shift == "offset" else numbers


def packed(weight: Tensor, num_parts: int = 1) -> PackedWeight:
    result = empty_packed(weight.shape[0], weight.shape[1], weight.dtype, num_parts)
    for begin in range(0, len(weight), len(weight) // num_parts):
        result.write_rows(begin, weight[begin : begin + len(weight) // num_parts])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_product(name: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight = Quantised(FORMATS[name], n, k, dtype)
    numbers = dequantize_4bit(weight.packed)
    assert torch.equal(numbers, weight.numbers.float().to(dtype))
    plain = packed(numbers)
    x, bias, residual = torch.randn(140, k).to(dtype), torch.randn(n), torch.randn(140, n).to(dtype)
    exact = x.double() @ numbers.double().T
    torch.testing.assert_close(
        matmul_4bit(x, weight.packed, out_dtype=torch.float32).double(), exact, atol=1e-5 * k, rtol=1e-5
    )
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 24, 25, 33, 64, 140):
        assert torch.equal(matmul_4bit(x[:m], weight.packed), matmul(x[:m], plain)), m
        out = matmul_4bit(x[:m], weight.packed, bias, residual[:m])
        assert torch.equal(out, matmul(x[:m], plain, bias, residual[:m])), m
        out = matmul_4bit(x[:m], weight.packed, bias, out_dtype=torch.float32)
        assert torch.equal(out, matmul(x[:m], plain, bias, out_dtype=torch.float32)), m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(32, 128), (96, 640), (320, 128)])
@pytest.mark.parametrize("name", ["table of floats", "zero points", "symmetric", "8 bits"])
def test_gated_product(name: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight = Quantised(FORMATS[name], n, k, dtype, num_parts=2)
    numbers = dequantize_4bit(weight.packed)
    assert torch.equal(numbers, weight.numbers.float().to(dtype))
    plain = packed(numbers, num_parts=2)
    x, bias = torch.randn(70, k).to(dtype), torch.randn(n)
    for m in (1, 2, 5, 7, 12, 16, 33, 70):
        assert torch.equal(gated_matmul_4bit(x[:m], weight.packed), gated_matmul(x[:m], plain)), m
        assert torch.equal(gated_matmul_4bit(x[:m], weight.packed, bias), gated_matmul(x[:m], plain, bias)), m


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    set_num_threads(1)
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int, restore_threads: None) -> None:
    weight = Quantised(FORMATS["table of floats"], 1000, 128, torch.bfloat16).packed
    x = torch.randn(40, 128).bfloat16()
    set_num_threads(1)
    want = {m: matmul_4bit(x[:m], weight) for m in (1, 9, 40)}
    set_num_threads(threads)
    for m in want:
        assert all(torch.equal(matmul_4bit(x[:m], weight), want[m]) for _ in range(20)), m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["offsets", "symmetric", "8 bits"])
def test_embedding(name: str, dtype: torch.dtype) -> None:
    weight = Quantised(FORMATS[name], 45, 640, dtype)
    numbers = weight.numbers.float().to(dtype)
    ids = torch.tensor([44, 0, 7, 16, 15, 44, *range(40)], dtype=torch.int32)
    assert torch.equal(embedding_4bit(ids, weight.packed), numbers[ids])
    for first_id in (-7, 5):  # zeros for the ids of other shards
        inside = ((ids >= first_id) & (ids < first_id + 45))[:, None]
        want = torch.where(inside, numbers[(ids - first_id).clamp(0, 44)], torch.zeros((), dtype=dtype))
        assert torch.equal(embedding_4bit(ids, weight.packed, first_id=first_id), want)


def test_strided_rows() -> None:
    weight = Quantised(FORMATS["table of floats"], 20, 64, torch.float32).packed
    wide = torch.randn(5, 192)
    assert torch.equal(matmul_4bit(wide[:, 64:128], weight), matmul_4bit(wide[:, 64:128].contiguous(), weight))


def test_recorded() -> None:
    weight = Quantised(FORMATS["table of floats"], 20, 64, torch.float32).packed
    x, out = torch.randn(8, 64), torch.zeros(8, 20)
    program = Program(lambda rows: matmul_4bit(x[:rows], weight, out=out[:rows]), 8)
    program.run(3)
    assert torch.equal(out[:3], matmul_4bit(x[:3], weight)) and not out[3:].any()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_allocated(name: str) -> None:
    weight = empty_packed_4bit(100, 640, torch.bfloat16, FORMATS[name])
    tensors = [weight.codes, weight.scales, weight.table, weight.offsets]
    allocated = sum(t.numel() * t.itemsize for t in tensors if t is not None)
    assert packed_4bit_bytes(100, 640, FORMATS[name]) == allocated


def test_bytes_beside_16_bits() -> None:
    assert packed_4bit_bytes(2048, 2048, CodeFormat(TABLE, 64)) < 0.2813 * 2 * 2048 * 2048


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_has_the_same_numbers(quant_type: str, block_size: int, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    data, state = functional.quantize_4bit(torch.randn(48, 256).to(dtype), blocksize=block_size, quant_type=quant_type)
    codes = torch.stack((data >> 4, data & 15), dim=-1).view(48, 256)
    weight = empty_packed_4bit(48, 256, dtype, CodeFormat(tuple(state.code.tolist()), block_size))
    weight.write_rows(0, codes, state.absmax.view(48, -1))
    assert torch.equal(dequantize_4bit(weight), functional.dequantize_4bit(data, state))


def test_wrong_arguments_are_named() -> None:
    form = FORMATS["zero points"]
    weight = empty_packed_4bit(20, 128, torch.float32, form)
    codes, scales = torch.zeros(11, 128, dtype=torch.uint8), torch.zeros(11, 1)
    double = empty_packed_4bit(32, 128, torch.float32, form, num_parts=2)
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: matmul_4bit(torch.randn(2, 31), weight), r"x: shape is \(2, 31\), expected \(any, 128\)"),
        (lambda: matmul_4bit(torch.randn(2, 128), weight, bias=torch.randn(19)), "bias: shape"),
        (lambda: matmul_4bit(torch.randn(2, 128), weight, residual=torch.randn(3, 20)), "residual: shape"),
        (lambda: matmul_4bit(torch.randn(2, 128), double), "weight: has 2 parts, expected 1"),
        (lambda: gated_matmul_4bit(torch.randn(2, 128), weight), "weight: has 1 parts, expected 2"),
        (lambda: gated_matmul_4bit(torch.randn(2, 128), double, torch.randn(16)), "bias: shape"),
        (lambda: embedding_4bit(torch.zeros(1, dtype=torch.int32), double), "weight: has 2 parts, expected 1"),
        (lambda: embedding_4bit(torch.zeros(1), weight), "token_ids: dtype"),
        (lambda: weight.write_rows(10, codes, scales, scales), r"rows \[10, 21\) do not fit the 20 rows"),
        (lambda: weight.write_rows(0, codes[:, 1:], scales, scales), "codes: shape"),
        (lambda: weight.write_rows(0, codes, scales[1:], scales), "scales: shape"),
        (lambda: weight.write_rows(0, codes, scales, scales[1:]), "offsets: shape"),
        (lambda: weight.write_rows(0, codes, scales), "offsets: missing, but the format's shift is zero"),
        (lambda: empty_packed_4bit(4, 64, torch.float32, form), "k: is 64, expected a multiple of the group size, 128"),
        (lambda: empty_packed_4bit(4, 128, torch.float64, form), "dtype: is torch.float64"),
        (lambda: empty_packed_4bit(48, 128, torch.float32, form, 2), "n: is 48, expected a multiple of 2 parts of 16"),
        (lambda: CodeFormat(TABLE[1:], 64), "table: has 15 entries, expected 16"),
        (lambda: CodeFormat(TABLE, 24), "group_size: is 24, expected a multiple of 16"),
        (lambda: CodeFormat(TABLE, 64, torch.float64), "scale_dtype: is torch.float64"),
    ]
    for call, words in wrong:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.skipif(kernels() != "native", reason="no native kernels")
@pytest.mark.parametrize("name", OTHERS)
def test_other_instruction_sets(name: str) -> None:
    run_tests(name, __file__, "product and (floats or bfloat16) or embedding")
