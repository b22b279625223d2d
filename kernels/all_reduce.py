"""The sum over ranks in rank order: the same bits wherever an element lies, whatever else is in the batch."""

import torch
import torch.distributed as dist
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import check, compute_dtypes

ALIGNMENT = 16  # elements: ranks' slices begin where wide loads may


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Replace x by its sum over the group's ranks, added in float32 from rank 0 upwards, rounded once. Returns x.

    x: [rows, size], of the same shape on every rank. Libraries add in an order that depends on an element's place, so
    they only move bytes here: each rank is sent its slice of every rank's x, adds, and sends the sums to all. Raises
    ValueError on a wrong argument.
    """
    check(x, "x", (None, None), compute_dtypes())
    num_ranks = group.size()
    if num_ranks == 1:
        return x
    size = -(-x.numel() // (num_ranks * ALIGNMENT)) * ALIGNMENT
    whole = torch.zeros((num_ranks, size), dtype=x.dtype, device=x.device)
    whole.view(-1)[: x.numel()] = x.view(-1)
    parts, total = torch.empty_like(whole), torch.empty_like(whole[0])
    dist.all_to_all_single(parts.view(torch.uint8), whole.view(torch.uint8), group=group)
    _sum_ranks(parts, total)
    dist.all_gather_into_tensor(whole.view(torch.uint8).view(-1), total.view(torch.uint8), group=group)
    return x.copy_(whole.view(-1)[: x.numel()].view_as(x))


def _sum_ranks(parts: Tensor, out: Tensor) -> None:
    if kernels() != "triton":
        out.copy_(reference.sum_ranks(parts))
        return
    from octavo.kernels.gpu import all_reduce as gpu  # here, since importing Triton takes its time

    gpu.launch(parts, out)
