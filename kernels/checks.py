"""Checks at an op's door: ValueError that names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch

from octavo.kernels import backend

COMPUTE_DTYPES = (torch.bfloat16, torch.float32)


def compute_dtypes() -> tuple[torch.dtype, ...]:
    """What weights and activations may be: float16 as well where the kernels are Triton's."""
    return (*COMPUTE_DTYPES, torch.float16) if backend.kernels() == "triton" else COMPUTE_DTYPES


def check(
    tensor: torch.Tensor,
    name: str,
    shape: Sequence[int | None],
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    contiguous: bool = True,
    any_device: bool = False,
) -> None:
    """Raise ValueError unless `tensor` has the dtype and the shape (None: any size), is where the ops work, and dense.

    With `contiguous=False` only the last dimension must be dense; with `any_device` it may be anywhere.
    """
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: dtype is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape is {tuple(tensor.shape)}, expected ({wanted})")
    if tensor.device.type != backend.device().type and not any_device:
        raise ValueError(f"{name}: device is {tensor.device}, expected {backend.device()}")
    if not (tensor.is_contiguous() if contiguous else tensor.stride(-1) == 1 or tensor.shape[-1] <= 1):
        raise ValueError(f"{name}: strides are {tensor.stride()}, expected {'all' if contiguous else 'the last'} dense")


def output(out: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`out`, checked, or a new tensor where it is None."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=backend.device())
    check(out, "out", shape, dtype)
    return out
