"""AWQ checkpoints in the layout of its gemm kernels, as AutoAWQ writes them (Lin et al., arXiv 2306.00978).

w[n, k] = (code - zero point) * scale. `qweight` [k, n / 8] and `qzeros` [groups, n / 8] hold eight outputs in an int32,
in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up; `scales` are [groups, n].
"""

from collections.abc import Mapping
from math import gcd
from typing import Any

from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.checkpoint import Checkpoint, TensorSpec
from octavo.models.quantization.base import (
    UNSIGNED,
    Quantization,
    QuantizedRows,
    regroup,
    unpack_nibbles,
    with_scales,
)
from octavo.models.quantization.setting import Setting

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # output -> which four bits of the int32, from the lowest up


class Awq(Quantization):
    """Modules that have a qweight. Raises ConfigError for settings that are not supported."""

    description = "AWQ"

    def __init__(self, raw: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        setting = Setting(raw)
        setting.one_of("bits", (4,))
        setting.one_of("zero_point", (True,), True)
        for key in ("version", "format", "checkpoint_format"):  # the layout, by whoever wrote it
            setting.one_of(key, ("gemm",), "gemm")
        self._checkpoint, self._group_size = checkpoint, setting.group_size()

    def _holds(self, name: str) -> bool:
        return f"{name}.qweight" in self._checkpoint.tensors

    def _format(self, name: str, n: int, k: int) -> CodeFormat:
        form = CodeFormat(UNSIGNED, gcd(self._group_size or k, k), shift="zero")
        return with_scales(form, self._checkpoint, f"{name}.scales")

    def _tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        groups = -(-k // (self._group_size or k))
        return {
            f"{name}.qweight": TensorSpec((k, n // 8), ("I32",)),
            f"{name}.qzeros": TensorSpec((groups, n // 8), ("I32",)),
            f"{name}.scales": TensorSpec((groups, n)),
        }

    def _read(self, name: str, n: int, k: int, tensors: Mapping[str, Tensor]) -> QuantizedRows:
        size = self._group_size or k
        codes, zeros = (_unpack(tensors[f"{name}.{part}"]) for part in ("qweight", "qzeros"))
        scales = tensors[f"{name}.scales"]
        return QuantizedRows(
            self._format(name, n, k),
            codes.T.contiguous(),
            regroup(scales.T, size, k),
            regroup(zeros.T.to(scales.dtype), size, k),
        )


def _unpack(words: Tensor) -> Tensor:
    """[rows, words] -> [rows, 8 words] uint8, outputs in order."""
    in_words: Tensor = unpack_nibbles(words).unflatten(1, (-1, 8))
    return in_words[:, :, list(PLACES)].flatten(1)
