"""The processes that compute one model together, as the ops see them: where they meet, and what moves between them."""

import ctypes
import fcntl
import math
import mmap
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from octavo.kernels.backend import device
from octavo.kernels.cpu.library import Args, launch

ALIGNMENT = 64  # bytes between buffers
HEADER_BYTES = 4096  # at the beginning of shared memory; also what regions are multiples of
SIOCGIFADDR = 0x8915  # asks Linux for an interface's IPv4 address
SPINS = 2000  # looks at a barrier before sleeping, where each rank has a core: about what ranks are apart in a step


class NativeRanks(ctypes.Structure):
    """`Ranks` of kernels/cpu/ranks.h."""

    _fields_ = [
        ("header", ctypes.c_void_p),
        ("regions", ctypes.c_void_p),
        ("region_bytes", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("num_ranks", ctypes.c_int64),
        ("spins", ctypes.c_int64),
        ("nanoseconds", ctypes.c_void_p),
    ]


class _BarrierArgs(Args):
    _fields_ = [("rows", ctypes.c_int64), ("ranks", NativeRanks)]


def buffer_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a buffer takes."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Ranks:
    """A process alone, and what others override: the ranks of a group all make the same calls in the same order."""

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros that the collectives can take: each rank has one of its own. To be made before the first collective."""
        return torch.zeros(*shape, dtype=dtype, device=device())

    def gather(self, columns: Tensor, widths: Sequence[int], out: Tensor) -> Tensor:
        """On rank 0 all ranks' columns side by side; what comes of it elsewhere is not to be looked at.

        columns: [rows, widths[rank]], the beginning of a buffer; out: [rows, sum of widths], on rank 0 filled, unless
        there is one rank, whose columns are returned as they are.
        """
        return columns

    def broadcast(self, values: Tensor) -> None:
        """Make a buffer hold what it holds on rank 0. Returns when all ranks are there."""

    def of_all(self, values: Tensor) -> Tensor:
        """On rank 0 what the buffer `values` holds on each rank, [ranks, ...], on the host; of no use elsewhere.

        To be called where a collective has come since the values were written, and before they are written again.
        """
        return values[None].cpu()

    def wait(self) -> None:
        """Returns when nobody looks any more at what this rank has shared: to be called where a step ends otherwise."""

    @property
    def collective_s(self) -> float:
        """Seconds in collectives so far, waiting for other ranks included."""
        return 0.0


class SharedMemoryRanks(Ranks):
    """Processes of one machine that share memory. Bytes are moved by native ops."""

    def __init__(self, rank: int, num_ranks: int, memory: int, region_bytes: int) -> None:
        """memory: a descriptor of memory that is all zeros, the same for all; region_bytes: of all buffers of a rank.

        Raises OSError where there is not so much memory.
        """
        super().__init__(rank, num_ranks)
        region_bytes = -(-region_bytes // HEADER_BYTES) * HEADER_BYTES
        size = HEADER_BYTES + num_ranks * region_bytes
        os.ftruncate(memory, size)
        self._mapped = torch.frombuffer(mmap.mmap(memory, size), dtype=torch.uint8)
        self._regions = self._mapped[HEADER_BYTES:].view(num_ranks, region_bytes)
        self._used = 0
        self._nanoseconds = ctypes.c_int64(0)
        own_cores = num_ranks <= len(os.sched_getaffinity(0))
        self.native = NativeRanks(
            self._mapped.data_ptr(),
            self._regions.data_ptr(),
            region_bytes,
            rank,
            num_ranks,
            SPINS if own_cores else 0,
            ctypes.addressof(self._nanoseconds),
        )

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in this rank's region, at the same place on every rank. Raises ValueError where it does not fit."""
        begin, self._used = self._used, self._used + buffer_bytes(shape, dtype)
        if self._used > self._regions.shape[1]:
            raise ValueError(f"buffers of {self._used} bytes do not fit the {self._regions.shape[1]} that are shared")
        num_bytes = math.prod(shape) * dtype.itemsize
        return self._regions[self.rank, begin : begin + num_bytes].view(dtype).view(*shape).zero_()

    def offset(self, tensor: Tensor) -> int:
        """Where a tensor that is part of a buffer begins, in each rank's region. Raises ValueError if it is not."""
        offset = tensor.data_ptr() - self._regions[self.rank].data_ptr()
        if not 0 <= offset <= self._used - tensor.nbytes:
            raise ValueError("the tensor is not part of a buffer that ranks share")
        return offset

    def gather(self, columns: Tensor, widths: Sequence[int], out: Tensor) -> Tensor:
        """See `Ranks`."""
        rows, offset = columns.shape[0], self.offset(columns)
        self.wait()
        if self.rank == 0:
            parts = [
                region[offset : offset + rows * width * columns.dtype.itemsize].view(columns.dtype).view(rows, width)
                for region, width in zip(self._regions, widths, strict=True)
            ]
            torch.cat(parts, dim=1, out=out)
        self.wait()  # nobody's columns change before they are read
        return out

    def broadcast(self, values: Tensor) -> None:
        """See `Ranks`."""
        self.wait()
        offset = self.offset(values)
        if self.rank:
            values.view(-1).view(torch.uint8).copy_(self._regions[0, offset : offset + values.nbytes])

    def of_all(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        offset = self.offset(values)
        parts = self._regions[:, offset : offset + values.nbytes].contiguous()
        return parts.view(values.dtype).view(self.num_ranks, *values.shape)

    @property
    def collective_s(self) -> float:
        """See `Ranks`."""
        return self._nanoseconds.value / 1e9

    def wait(self) -> None:
        """See `Ranks`: all ranks are there."""
        launch("octavo_barrier", _BarrierArgs(0, self.native))


class DistributedRanks(Ranks):
    """Processes that torch.distributed joins: GPUs over NCCL, or CPUs over gloo."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self.group, self._collective_s = group, 0.0

    @classmethod
    def meet(
        cls, rank: int, num_ranks: int, memory: int, meeting_point: tuple[str, int] | None, listener: int | None
    ) -> "DistributedRanks":
        """Meet the other processes: those of one machine over memory that all share, and on loopback alone.

        meeting_point: where ranks of several machines meet: host and port; listener: on rank 0, the descriptor of a
        socket that listens there. They use the network that leads there, unless the environment names another.
        """
        if meeting_point is None:
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
            store: Any = dist.FileStore(  # type: ignore[attr-defined]
                f"/proc/self/fd/{memory}", num_ranks
            )
        else:
            if interface := interface_towards(*meeting_point):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
            store = dist.TCPStore(  # type: ignore[attr-defined]
                *meeting_point, num_ranks, rank == 0, wait_for_workers=False, master_listen_fd=listener
            )
        dist.init_process_group(
            "nccl" if device().type == "cuda" else "gloo", store=store, rank=rank, world_size=num_ranks
        )
        assert dist.group.WORLD is not None
        return cls(dist.group.WORLD)

    def gather(self, columns: Tensor, widths: Sequence[int], out: Tensor) -> Tensor:
        """See `Ranks`."""
        with self.counted():
            self._gather(columns, widths, out)
        return out

    def _gather(self, columns: Tensor, widths: Sequence[int], out: Tensor) -> None:
        rows, widest = columns.shape[0], max(widths)
        padded = torch.zeros((rows, widest), dtype=columns.dtype, device=columns.device)
        padded[:, : columns.shape[1]] = columns
        parts = [torch.empty_like(padded) for _ in widths] if self.rank == 0 else None
        dist.gather(padded, parts, group=self.group, group_dst=0)
        if parts is not None:
            torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1, out=out)

    def of_all(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        parts = [torch.empty_like(values) for _ in range(self.num_ranks)] if self.rank == 0 else None
        with self.counted():
            dist.gather(values, parts, group=self.group, group_dst=0)
        return torch.stack(parts or [values]).cpu()

    def broadcast(self, values: Tensor) -> None:
        """See `Ranks`."""
        with self.counted():
            dist.broadcast(values, group=self.group, group_src=0)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around a collective. Those of a GPU are only launched here, so their time is not known."""
        begin_s = time.perf_counter()
        yield
        if device().type == "cpu":
            self._collective_s += time.perf_counter() - begin_s

    @property
    def collective_s(self) -> float:
        """See `Ranks`; 0.0 on a GPU."""
        return self._collective_s


def interface_towards(host: str, port: int) -> str | None:
    """Name of the network interface by which a host is reached; None where that cannot be found out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((host, port))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                request = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, name.encode().ljust(40, b"\0"))
                if request[20:24] == own:
                    return name
    return None
