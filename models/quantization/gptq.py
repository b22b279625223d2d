"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them (Frantar et al., arXiv 2210.17323).

w[n, k] = (code - zero point) * scale. `qweight` [k / 8, n] holds eight inputs in an int32 and `qzeros` [groups, n / 8]
eight outputs, lowest bits first; `scales` are [groups, n]; `g_idx` [k] is the group of each input, which with
activation order (desc_act) may be any. The first version of the format has 1 taken off each zero point, by one
subtraction for the eight of an int32.
"""

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.checkpoint import Checkpoint, CheckpointError, TensorSpec
from octavo.models.config import ConfigError
from octavo.models.quantization.base import (
    SIGNED,
    UNSIGNED,
    Quantization,
    QuantizedRows,
    group_order,
    regroup,
    sorted_by_group,
    unpack_nibbles,
    with_scales,
)
from octavo.models.quantization.setting import Setting

ONES = 0x11111111


class Gptq(Quantization):
    """Modules that have a qweight. Raises ConfigError for settings, CheckpointError for groups, not supported."""

    description = "GPTQ"

    def __init__(self, raw: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        setting = Setting(raw)
        setting.one_of("bits", (4,))
        version = setting.one_of("checkpoint_format", ("gptq", "gptq_v2"), raw.get("format") or "gptq")
        setting.one_of("pack_dtype", ("int32",), "int32")
        setting.one_of("is_marlin_format", (False,), False)
        if any(not str(pattern).startswith("-:") for pattern in raw.get("dynamic") or {}):
            raise ConfigError("quantization_config.dynamic: settings that differ from module to module")
        self._zeros_less_one = version == "gptq"
        self._is_symmetric = setting.one_of("sym", (True, False), False)
        self._checkpoint, self._group_size = checkpoint, setting.group_size()
        self._orders: dict[str, Tensor] = {}
        for name, info in checkpoint.tensors.items():
            if name.endswith(".g_idx") and self._group_size:
                TensorSpec((None,), ("I32",)).check(info)
                order = group_order(checkpoint.read(name), self._group_size, checkpoint, name)
                if order is not None:
                    self._orders[name.removesuffix(".g_idx")] = order
        self.has_orders = bool(self._orders)

    def order(self, name: str) -> Tensor | None:
        """From g_idx."""
        return self._orders.get(name)

    def ignores(self, name: str) -> bool:
        """Some writers give every module a bias, of zeros where the model has none."""
        module, _, kind = name.rpartition(".")
        return kind == "bias" and self._holds(module) and not self._checkpoint.read(name).any()

    def _holds(self, name: str) -> bool:
        return f"{name}.qweight" in self._checkpoint.tensors

    def _format(self, name: str, n: int, k: int) -> CodeFormat:
        size = gcd(self._group_size or k, k)
        form = CodeFormat(SIGNED, size) if self._is_symmetric else CodeFormat(UNSIGNED, size, shift="zero")
        return with_scales(form, self._checkpoint, f"{name}.scales")

    def _tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        groups = -(-k // (self._group_size or k))
        specs = {
            f"{name}.qweight": TensorSpec((k // 8, n), ("I32",)),
            f"{name}.qzeros": TensorSpec((groups, n // 8), ("I32",)),
            f"{name}.scales": TensorSpec((groups, n)),
        }
        if f"{name}.g_idx" in self._checkpoint.tensors:
            specs[f"{name}.g_idx"] = TensorSpec((k,), ("I32",))
        return specs

    def _read(self, name: str, n: int, k: int, tensors: Mapping[str, Tensor]) -> QuantizedRows:
        size = self._group_size or k
        codes = unpack_nibbles(tensors[f"{name}.qweight"].T)  # [n, k]
        zeros = unpack_nibbles(tensors[f"{name}.qzeros"] + ONES * self._zeros_less_one).T  # [n, groups]
        scales = tensors[f"{name}.scales"].T
        if self._is_symmetric and not torch.all(zeros == 8):
            raise CheckpointError(
                f"{self._checkpoint.tensors[f'{name}.qzeros']} has other zero points than 8, but "
                "quantization_config.sym is True"
            )
        return QuantizedRows(
            self._format(name, n, k),
            sorted_by_group(codes, self._orders.get(name)),
            regroup(scales, size, k),
            None if self._is_symmetric else regroup(zeros.to(scales.dtype), size, k),
        )
