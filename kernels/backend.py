"""Which kernels the ops run on, and on which device: one choice for a process, made before it allocates anything.

Weights and KV cache lie in memory as the chosen kernels read them, so the choice does not change while they exist.
"""

import importlib
import os
from typing import Literal, get_args

import torch

from octavo.kernels.cpu.library import library, variant

Kernels = Literal["native", "triton", "torch"]  # C++ on a CPU, Triton on a GPU, plain torch

_kernels: Kernels | None = None
_device = torch.device("cpu")
_exact = True


def kernels() -> Kernels:
    """What `select` was told, else $OCTAVO_KERNELS, else native where those are built, else torch."""
    if _kernels is None:
        select(os.environ.get("OCTAVO_KERNELS") or ("torch" if library() is None else "native"))
    assert _kernels is not None
    return _kernels


def device() -> torch.device:
    """Where the ops' tensors lie."""
    return _device


def exact() -> bool:
    """Whether a row's bits must not depend on its batch. If not, Triton's matrix products give way to the vendor's."""
    return _exact


def select(name: str, device: torch.device | str = "cpu", exact: bool = True) -> None:
    """Choose the kernels. Triton's on the CPU are compiled as for a GPU, and what the compiler emits is executed.

    Raises ValueError where these kernels are not to be had here.
    """
    global _kernels, _device, _exact
    where = torch.device(device)
    if name not in get_args(Kernels):
        raise ValueError(f"OCTAVO_KERNELS is {name!r}, expected one of {', '.join(get_args(Kernels))}")
    if where.type == "cuda" and name != "triton":
        raise ValueError(f"OCTAVO_KERNELS is {name!r}, but on {where} the kernels are Triton's")
    if name == "native" and library() is None:
        raise ValueError("OCTAVO_KERNELS is 'native', but no native kernels are built: make install, with g++")
    if name == "triton" and where.type == "cpu":
        try:
            gpu_without_gpu = importlib.import_module("gpu_without_gpu")
        except ModuleNotFoundError as error:
            if error.name != "gpu_without_gpu":
                raise
            raise ValueError(
                "OCTAVO_KERNELS is 'triton' without a GPU: put the folder tests/ of the repository on PYTHONPATH"
            ) from None
        gpu_without_gpu.install()
    _kernels, _device, _exact = name, where, exact  # type: ignore[assignment]


def description() -> str:
    """The kernels in words, for people."""
    if kernels() == "native":
        return variant() or ""
    if kernels() == "torch":
        return "plain torch: slow and not exact (install g++, then make install)"
    return "triton" if _device.type == "cuda" else "triton, executed on the CPU"
