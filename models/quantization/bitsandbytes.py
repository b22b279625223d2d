"""bitsandbytes checkpoints in NF4 and FP4, plain and nested, as transformers saves them (arXiv 2305.14314).

w = table[code] * absmax of its block of `blocksize` weights, counted through all rows. `weight` holds two codes a byte,
the first in the high half; `weight.quant_map` is the table; `weight.quant_state.bitsandbytes__nf4` (or fp4) is JSON as
bytes. Nested, `weight.absmax` is itself codes: absmax = nested_quant_map[code] * nested_absmax of its block + offset.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.checkpoint import Checkpoint, CheckpointError, TensorSpec
from octavo.models.quantization.base import Quantization, QuantizedRows
from octavo.models.quantization.setting import Setting

# Quantiles of the normal distribution (QLoRA, appendix E), as float32.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# One bit of sign, two of exponent, one of mantissa, over the greatest: as float32.
_FP4_POSITIVE = (torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12.0).tolist()
FP4 = (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE))
TABLES = {"nf4": NF4, "fp4": FP4}
STATE = "weight.quant_state.bitsandbytes__"
# types in which the codes' bytes may be stored, and their sizes
STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class _State:
    kind: str
    block_size: int
    nested_block_size: int  # 0: not nested
    nested_offset: float
    shape: list[int]


class BitsAndBytes(Quantization):
    """Modules that have a quant_state. Raises ConfigError for settings that are not supported."""

    description = "bitsandbytes"

    def __init__(self, raw: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        setting = Setting(raw)
        for key in ("load_in_8bit", "_load_in_8bit"):
            setting.one_of(key, (False,), False)
        setting.one_of("load_in_4bit", (True,), raw.get("_load_in_4bit"))
        kind = setting.one_of("bnb_4bit_quant_type", tuple(TABLES), "fp4")
        self.description = f"bitsandbytes {kind}"
        self._kind, self._checkpoint = kind, checkpoint
        self._states: dict[str, _State] = {}

    def _holds(self, name: str) -> bool:
        return f"{name}.{STATE}{self._kind}" in self._checkpoint.tensors

    def _format(self, name: str, n: int, k: int) -> CodeFormat:
        # Blocks that span rows are cut where rows end.
        return CodeFormat(TABLES[self._kind], gcd(self._state(name).block_size, k))

    def _tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        found, state = self._checkpoint.tensors.get(f"{name}.weight"), self._state(name)
        item_size = STORAGE.get(found.dtype, 1) if found is not None else 1
        num_blocks = -(-n * k // state.block_size)
        specs = {
            f"{name}.weight": TensorSpec((n * k // 2 // item_size, 1), tuple(STORAGE)),
            f"{name}.weight.absmax": TensorSpec((num_blocks,), ("U8" if state.nested_block_size else "F32",)),
            f"{name}.weight.quant_map": TensorSpec((16,), ("F32",)),
            f"{name}.{STATE}{self._kind}": TensorSpec((None,), ("U8",)),
        }
        if state.nested_block_size:
            num_nested = -(-num_blocks // state.nested_block_size)
            specs[f"{name}.weight.nested_absmax"] = TensorSpec((num_nested,), ("F32",))
            specs[f"{name}.weight.nested_quant_map"] = TensorSpec((256,), ("F32",))
        return specs

    def _read(self, name: str, n: int, k: int, tensors: Mapping[str, Tensor]) -> QuantizedRows:
        form, state, where = self._format(name, n, k), self._state(name), self._checkpoint.tensors
        if state.shape != [n, k]:
            raise CheckpointError(f"{where[f'{name}.{STATE}{self._kind}']} says shape {state.shape}, expected {[n, k]}")
        if tuple(tensors[f"{name}.weight.quant_map"].tolist()) != form.table:
            raise CheckpointError(f"{where[f'{name}.weight.quant_map']} is another table than {self._kind}'s")
        packed = tensors[f"{name}.weight"].view(torch.uint8).view(n, k // 2)
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
        absmax = tensors[f"{name}.weight.absmax"]
        if state.nested_block_size:
            of_block = tensors[f"{name}.weight.nested_absmax"].repeat_interleave(state.nested_block_size)
            nested = tensors[f"{name}.weight.nested_quant_map"][absmax.long()] * of_block[: len(absmax)]
            absmax = nested + torch.tensor(state.nested_offset)
        scales = absmax.repeat_interleave(state.block_size // form.group_size)[: n * k // form.group_size]
        return QuantizedRows(form, codes, scales.view(n, -1))

    def _state(self, name: str) -> _State:
        """A module's quant_state. Raises CheckpointError."""
        if name not in self._states:
            key = f"{name}.{STATE}{self._kind}"
            info = self._checkpoint.tensors[key]
            TensorSpec((None,), ("U8",)).check(info)
            self._states[name] = _parse(bytes(self._checkpoint.read(key).tolist()), self._kind, str(info))
        return self._states[name]


def _parse(data: bytes, kind: str, where: str) -> _State:
    try:
        raw = json.loads(data)
        state = _State(
            kind=raw["quant_type"],
            block_size=raw["blocksize"],
            nested_block_size=raw.get("nested_blocksize", 0),
            nested_offset=float(raw.get("nested_offset", 0.0)),
            shape=raw["shape"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{where}: expected JSON with quant_type, blocksize and shape") from None
    sizes = (16 << shift for shift in range(12))
    if state.kind != kind or state.block_size not in sizes or type(state.nested_block_size) is not int:
        raise CheckpointError(f"{where}: quant_type {state.kind!r} in blocks of {state.block_size!r} is not supported")
    return state
