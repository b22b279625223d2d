"""Weights of 4-bit codes for tests, of every kind of format."""

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat, Packed4Bit, empty_packed_4bit

CODEBOOK = tuple(torch.linspace(-1, 1, 16).pow(3).tolist())  # no number of it fits 16 bits, nor is one a sum of others
INTEGERS = tuple(float(code - 8) for code in range(16))
FORMS = [
    CodeFormat(CODEBOOK, 64),
    CodeFormat(INTEGERS, 16, torch.bfloat16),
    CodeFormat(INTEGERS, 32, torch.float16, "offset"),
    CodeFormat(tuple(map(float, range(16))), 128, torch.float16, "zero"),
    CodeFormat(CODEBOOK, 48, torch.float32, "zero"),  # a group that no tile is a multiple of
    CodeFormat(CODEBOOK, 384, torch.bfloat16, "offset"),
]


def form_id(form: CodeFormat) -> str:
    """A test's name."""
    return f"{str(form.scale_dtype).removeprefix('torch.')}-{form.shift or 'scale'}-{form.group_size}"


def random_weight(n: int, k: int, dtype: torch.dtype, form: CodeFormat, num_parts: int = 1) -> Packed4Bit:
    """Random codes, all of which occur, scales and offsets or zero points."""
    weight = empty_packed_4bit(n, k, dtype, form, num_parts)
    codes = torch.randint(16, (n, k), dtype=torch.uint8)
    codes.view(-1)[:16] = torch.arange(16)
    scales = torch.rand(n, k // form.group_size) + 0.1
    offsets = {None: None, "zero": torch.randint(1, 16, scales.shape).float(), "offset": torch.randn(scales.shape)}
    for part in range(num_parts):
        rows = slice(n // num_parts * part, n // num_parts * (part + 1))
        shift = offsets[form.shift]
        weight.write_rows(rows.start, codes[rows], scales[rows], None if shift is None else shift[rows])
    return weight


def placed(weight: Packed4Bit, in_poison: Callable[..., Tensor]) -> Packed4Bit:
    """The same, amid codes that are none of its and scales that are not numbers."""
    codes, margin = weight.codes, 64
    around = torch.full((codes.numel() + 2 * margin,), 0xA5, dtype=torch.uint8, device=codes.device)
    inside = around[margin:-margin].view_as(codes).copy_(codes)
    offsets = None if weight.offsets is None else in_poison(weight.offsets)
    form, shape = weight.format, (weight.n, weight.k, weight.dtype)
    return Packed4Bit(
        form, *shape, in_poison(weight.table), inside, in_poison(weight.scales), offsets, weight.num_parts
    )
