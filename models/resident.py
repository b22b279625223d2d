"""What of a model stays in memory from when it is loaded: compressed where possible, and bit for bit."""

from collections.abc import Iterator

from torch import Tensor

from octavo.kernels.cpu.library import reads_compressed
from octavo.kernels.matmul import PackedWeight, compress
from octavo.models.config import ModelConfig
from octavo.models.llama import Llama
from octavo.models.shard import Shard


def resident_tensors(model: Llama) -> dict[str, Tensor]:
    """All tensors that a model's ops read and nobody writes, by where they are: `layers[3].mlp.down.weights[0].data`.

    Whatever a layer is made of is found, so that nothing has to be listed, and nothing is forgotten.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _parts("", model):
        if isinstance(tensor, Tensor) and tensor.numel() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor
    return found


def compress_weights(model: Llama) -> int:
    """Compress, without loss, the weights of a model that is loaded, where that pays. Returns the bytes saved."""
    if not reads_compressed():
        return 0
    weights = {id(part): part for _, part in _parts("", model) if isinstance(part, PackedWeight)}
    return compress(list(weights.values()))


def _parts(name: str, part: object) -> Iterator[tuple[str, object]]:
    """The part, and all that it is made of, by name."""
    yield name, part
    if isinstance(part, (list, tuple)):
        for i, item in enumerate(part):
            yield from _parts(f"{name}[{i}]", item)
    elif type(part).__module__.startswith("octavo.") and not isinstance(part, (ModelConfig, Shard)):
        attributes = getattr(type(part), "__slots__", None) or vars(part)
        for attribute in attributes:
            if not attribute.startswith("_"):
                yield from _parts(f"{name}.{attribute}".lstrip("."), getattr(part, attribute))
