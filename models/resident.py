"""What of a model stays in memory, bit for bit, from when it is loaded."""

from collections.abc import Iterator

from torch import Tensor

from octavo.models.config import ModelConfig
from octavo.models.llama import Llama
from octavo.models.shard import Shard


def resident_tensors(model: Llama) -> dict[str, Tensor]:
    """All tensors that a model's ops read and nobody writes, by where they are: `layers[3].mlp.down.weights[0].data`.

    Whatever a layer is made of is found, so that nothing has to be listed, and nothing is forgotten.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _tensors("", model):
        if tensor.numel() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor
    return found


def _tensors(name: str, part: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, (list, tuple)):
        for i, item in enumerate(part):
            yield from _tensors(f"{name}[{i}]", item)
    elif type(part).__module__.startswith("octavo.") and not isinstance(part, (ModelConfig, Shard)):
        attributes = getattr(type(part), "__slots__", None) or vars(part)
        for attribute in attributes:
            if not attribute.startswith("_"):
                yield from _tensors(f"{name}.{attribute}".lstrip("."), getattr(part, attribute))
