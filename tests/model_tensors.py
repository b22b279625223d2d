"""What a model has allocated."""

import torch

from octavo.kernels.matmul import PackedWeight
from octavo.kernels.matmul_4bit import Packed4Bit


def tensors_of(root: object) -> list[torch.Tensor]:
    """Every tensor that a model holds, each once."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            found[item.data_ptr()] = item
        elif isinstance(item, PackedWeight):
            todo.append(item.data)
        elif isinstance(item, Packed4Bit):
            todo += [item.table, item.codes, item.scales, item.offsets]
        elif isinstance(item, list):
            todo += item
        elif type(item).__module__.startswith("octavo.models") and id(item) not in seen and hasattr(item, "__dict__"):
            seen.add(id(item))
            todo += vars(item).values()
    return list(found.values())
