"""Block types of GGUF files, all of which stay codes: of 4 bits, or, where the kernels take these, of 8.

A block of Q4_0 is a float16 scale d and 32 codes, w = (code - 8) * d; of Q4_1 scale d, offset m and 32 codes,
w = code * d + m; codes i and i + 16 share a byte, the first in the low half. Q8_0: a scale and 32 int8. Q6_K: of 256
codes the low 4 bits, then the high 2 bits, then 16 int8 scales, then a float16 scale of these.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat, takes_8_bit_codes
from octavo.models.checkpoint import FLOATS, Checkpoint, TensorSpec
from octavo.models.quantization.base import SIGNED, UNSIGNED, Quantization, QuantizedRows

_FORMATS = {
    "Q4_0": CodeFormat(SIGNED, 32, torch.float16),
    "Q4_1": CodeFormat(UNSIGNED, 32, torch.float16, shift="offset"),
    "Q8_0": CodeFormat(None, 32, torch.float16),
    "Q6_K": CodeFormat(None, 16, torch.float32),  # a scale is the product of the two
}
_TYPES = (*FLOATS, "Q4_0", "Q4_1", "Q8_0", "Q6_K")


class Gguf(Quantization):
    """Modules whose weight has a quantised type."""

    description = "GGUF"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._types = {name: info.dtype for name, info in checkpoint.tensors.items()}

    def _holds(self, name: str) -> bool:
        return True

    def _format(self, name: str, n: int, k: int) -> CodeFormat | None:
        form = _FORMATS.get(self._types.get(f"{name}.weight", ""))
        return None if form is not None and form.table is None and not takes_8_bit_codes() else form

    def _tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        return {f"{name}.weight": TensorSpec((n, k), _TYPES)}

    def _read(self, name: str, n: int, k: int, tensors: Mapping[str, Tensor]) -> Tensor | QuantizedRows:
        weight, kind = tensors[f"{name}.weight"], self._types[f"{name}.weight"]
        if kind in FLOATS:
            return weight
        if kind == "Q6_K":
            return _read_q6_k(weight)
        blocks = weight.view(n, k // 32, -1)  # bytes
        scales, rest = _halves(blocks[:, :, :2]), blocks[:, :, 2:]
        shifts = None
        if kind == "Q8_0":
            return QuantizedRows(_FORMATS[kind], rest.flatten(1), scales)
        if kind == "Q4_1":
            shifts, rest = _halves(rest[:, :, :2]), rest[:, :, 2:]
        codes = torch.cat((rest & 15, rest >> 4), dim=2).flatten(1)
        return QuantizedRows(_FORMATS[kind], codes, scales, shifts)


def _halves(data: Tensor) -> Tensor:
    """[rows, blocks, 2] bytes -> [rows, blocks] float16."""
    return data.contiguous().view(torch.float16).squeeze(2)


def _read_q6_k(data: Tensor) -> QuantizedRows:
    low, high, scales, scale = data.unflatten(1, (-1, 210)).split((128, 64, 16, 2), dim=2)
    # Of each half of a block: 64 bytes of low and 32 of high bits for four runs of 32 codes.
    low = low.unflatten(2, (2, 1, 2, 32))
    high = high.unflatten(2, (2, 1, 32))
    low = torch.cat((low & 15, low >> 4), dim=3).flatten(3, 4)  # [rows, blocks, 2, 4, 32]
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=3)
    codes = (low | high << 4).flatten(1) - 32  # which wraps around to the bits of signed numbers
    per_group = scales.contiguous().view(torch.int8).float() * _halves(scale).float().unsqueeze(2)
    return QuantizedRows(_FORMATS["Q6_K"], codes, per_group.flatten(1))
