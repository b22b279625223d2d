"""Fills a model from a checkpoint: tensor by tensor, every name, shape and type checked."""

from math import prod
from typing import Protocol

from octavo.models.checkpoint import Checkpoint, CheckpointError
from octavo.models.layers import Parameters
from octavo.models.llama import Llama
from octavo.models.quantization.base import HEAD


class Progress(Protocol):
    """A progress bar, as tqdm has them."""

    total: float | None

    def update(self, num_bytes: int) -> object:
        """Told of bytes that are placed."""


def load(checkpoint: Checkpoint, model: Llama, progress: Progress) -> int:
    """Fill every parameter of the model; `progress` is told the elements in all, and as they are placed.

    Returns the bytes of the checkpoint that were looked at: a rank's, of tensors that are not quantised.

    Where the head is tied to the embedding, an lm_head.weight in the file is left unread. Raises CheckpointError: for
    tensors that are missing or not expected, and for wrong shapes and types, before anything is placed; for values that
    are wrong or cannot be read, at the tensor.
    """
    config, parameters = model.config, model.parameters()
    wanted = _check(parameters, checkpoint)
    for name in checkpoint.tensors.keys() - wanted:
        tied = config.tie_word_embeddings and name == f"{HEAD}.weight"
        if not tied and not config.quantization.ignores(name):
            raise CheckpointError(f"{checkpoint.tensors[name]} is not part of this architecture")
    sizes = {name: prod(checkpoint.tensors[name].shape) for name in wanted}
    progress.total = sum(
        parameter.share * sum(sizes[name] for name in parameter.tensors) for parameter in parameters.values()
    )
    num_bytes = 0.0
    for parameter in parameters.values():
        tensors = {name: checkpoint.read(name) for name in parameter.tensors}
        parameter.place(tensors)
        progress.update(int(parameter.share * sum(sizes[name] for name in tensors)))
        num_bytes += parameter.share * sum(tensor.nbytes for tensor in tensors.values())
    return round(num_bytes)


def fill(parameters: Parameters, checkpoint: Checkpoint) -> None:
    """Fill a part of a model, whose tensors alone are looked at. Raises CheckpointError."""
    _check(parameters, checkpoint)
    for parameter in parameters.values():
        parameter.place({name: checkpoint.read(name) for name in parameter.tensors})


def _check(parameters: Parameters, checkpoint: Checkpoint) -> set[str]:
    """The names of the tensors that are wanted. Raises CheckpointError unless all are there as they are to be."""
    wanted = {name: spec for parameter in parameters.values() for name, spec in parameter.tensors.items()}
    for name, spec in wanted.items():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        spec.check(checkpoint.tensors[name])
    return set(wanted)
