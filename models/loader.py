"""Fills a model from safetensors: memory-mapped, tensor by tensor, every name and shape checked."""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from octavo.models.layers import Parameters

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Tensors that some checkpoints carry and no model needs: computed from the configuration.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class Progress(Protocol):
    """A progress bar, as tqdm has them."""

    total: float | None

    def update(self, num_bytes: int) -> object:
        """Told of bytes that are placed."""


class CheckpointError(ValueError):
    """A checkpoint that must not be served. The text is one line that names file and tensor."""


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Raises CheckpointError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists():
        files = _indexed_files(folder, index)
    elif single.exists():
        files = [single]
    else:
        unsafe = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"; {unsafe[0]} is not loaded, since pickles can run code: convert it to safetensors" if unsafe else ""
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                names = handle.keys()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from None
        for name in names:
            if name in found:
                raise CheckpointError(f"{file}: tensor {name} is also in {found[name].name}")
            found[name] = file
    return found


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: expected an object with a weight_map of file names") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: missing, but named in {index.name}")
    return [folder / name for name in names]


def load(folder: Path, parameters: Parameters, tied_head: bool, progress: Progress) -> None:
    """Fill every parameter from the checkpoint in `folder`; `progress` is told the bytes in all and as they are placed.

    With `tied_head` an lm_head.weight in the file is left unread. Raises CheckpointError: for a missing or unexpected
    tensor before anything is placed, for a wrong shape or dtype at the tensor.
    """
    found = {name: file for name, file in find_tensors(folder).items() if not name.endswith(IGNORED_SUFFIXES)}
    if tied_head:
        found.pop("lm_head.weight", None)
    for name in parameters.keys() - found.keys():
        raise CheckpointError(f"{folder}: tensor {name} is missing")
    for name in found.keys() - parameters.keys():
        raise CheckpointError(f"{found[name]}: tensor {name} is not part of this architecture")
    progress.total = sum(file.stat().st_size for file in set(found.values()))
    for name, parameter in parameters.items():
        file = found[name]
        try:
            # Opened anew for each tensor, so that its pages are unmapped as soon as it is placed.
            with safe_open(file, framework="pt") as handle:
                view = handle.get_slice(name)
                shape, kind = tuple(view.get_shape()), view.get_dtype()
                if shape != parameter.shape:
                    raise CheckpointError(f"{file}: tensor {name} has shape {shape}, expected {parameter.shape}")
                if kind not in FLOATS:
                    raise CheckpointError(f"{file}: tensor {name} has dtype {kind}, expected {', '.join(FLOATS)}")
                tensor = handle.get_tensor(name)
                parameter.place(tensor)
                progress.update(tensor.nbytes)
                del tensor, view
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from None
