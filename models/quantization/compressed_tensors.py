"""compressed-tensors checkpoints of format pack-quantized with 4 bits, as llm-compressor writes them.

w[n, k] = (code - zero point) * scale; codes and zero points are stored with 8 added, eight in an int32, lowest bits
first. `weight_packed` [n, k / 8] holds eight inputs, `weight_zero_point` [n / 8, groups] eight outputs (older files
have it as int8, as it is); `weight_scale` is [n, groups], `weight_shape` (n, k); `weight_g_idx` [k] the group of each
input where they are not in order.
"""

from collections.abc import Mapping
from math import gcd
from typing import Any

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

FORMAT = "pack-quantized"


class CompressedTensors(Quantization):
    """Modules that have a weight_packed. Raises ConfigError for settings, CheckpointError for groups, not supported."""

    description = "compressed-tensors"

    def __init__(self, raw: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        setting = Setting(raw)
        setting.one_of("format", (FORMAT,))
        setting.one_of("quantization_status", ("compressed",), "compressed")
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if raw.get(key):
                raise ConfigError(f"quantization_config.{key} is not supported")
        self._group_size, self._is_symmetric = _one_scheme(raw.get("config_groups"))
        self._checkpoint = checkpoint
        self._orders: dict[str, Tensor] = {}
        for name, info in checkpoint.tensors.items():
            if name.endswith(".weight_g_idx") and self._group_size:
                TensorSpec((None,), ("I32",)).check(info)
                order = group_order(checkpoint.read(name), self._group_size, checkpoint, name)
                if order is not None:
                    self._orders[name.removesuffix(".weight_g_idx")] = order
        self.has_orders = bool(self._orders)

    def order(self, name: str) -> Tensor | None:
        """From weight_g_idx."""
        return self._orders.get(name)

    def _holds(self, name: str) -> bool:
        return f"{name}.weight_packed" in self._checkpoint.tensors

    def _format(self, name: str, n: int, k: int) -> CodeFormat:
        size = gcd(self._group_size or k, k)
        form = CodeFormat(SIGNED, size) if self._is_symmetric else CodeFormat(UNSIGNED, size, shift="zero")
        return with_scales(form, self._checkpoint, f"{name}.weight_scale")

    def _tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        groups, found = -(-k // (self._group_size or k)), self._checkpoint.tensors
        specs = {
            f"{name}.weight_packed": TensorSpec((n, k // 8), ("I32",)),
            f"{name}.weight_scale": TensorSpec((n, groups)),
            f"{name}.weight_shape": TensorSpec((2,), ("I64", "I32")),
        }
        if not self._is_symmetric:
            zeros = found.get(f"{name}.weight_zero_point")
            is_plain = zeros is not None and zeros.dtype == "I8"
            shape, dtype = ((n, groups), "I8") if is_plain else ((n // 8, groups), "I32")
            specs[f"{name}.weight_zero_point"] = TensorSpec(shape, (dtype,))
        if f"{name}.weight_g_idx" in found:
            specs[f"{name}.weight_g_idx"] = TensorSpec((k,), ("I32",))
        return specs

    def _read(self, name: str, n: int, k: int, tensors: Mapping[str, Tensor]) -> QuantizedRows:
        if (shape := tensors[f"{name}.weight_shape"].tolist()) != [n, k]:
            raise CheckpointError(f"{self._checkpoint.tensors[f'{name}.weight_shape']} says {shape}, expected {[n, k]}")
        size = self._group_size or k
        scales, zeros = tensors[f"{name}.weight_scale"], None
        if not self._is_symmetric:
            stored = tensors[f"{name}.weight_zero_point"]
            zeros = stored + 8 if stored.shape[0] == n else unpack_nibbles(stored.T).T
            zeros = regroup(zeros.to(scales.dtype), size, k)
        codes = sorted_by_group(unpack_nibbles(tensors[f"{name}.weight_packed"]), self._orders.get(name))
        return QuantizedRows(self._format(name, n, k), codes, regroup(scales, size, k), zeros)


def _one_scheme(groups: Any) -> tuple[int, bool]:
    """Group size, 0 for all of a row's inputs, and symmetry: what all groups of modules must share."""
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ConfigError("quantization_config.config_groups: expected an object of objects")
    schemes = set()
    for name, group in groups.items():
        where = f"config_groups.{name}"
        for key in ("input_activations", "output_activations"):
            if group.get(key):
                raise ConfigError(f"quantization_config.{where}.{key}: quantised activations are not supported")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise ConfigError(f"quantization_config.{where}.weights: expected an object")
        setting = Setting({f"{where}.weights.{key}": value for key, value in weights.items()})
        setting.one_of(f"{where}.weights.num_bits", (4,))
        setting.one_of(f"{where}.weights.type", ("int",), "int")
        strategy = setting.one_of(f"{where}.weights.strategy", ("group", "channel"))
        symmetric = setting.one_of(f"{where}.weights.symmetric", (True, False), True)
        schemes.add((Setting(weights).group_size() if strategy == "group" else 0, symmetric))
    if len(schemes) > 1:
        raise ConfigError("quantization_config.config_groups: groups that differ in their weights are not supported")
    return schemes.pop()
