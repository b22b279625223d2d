"""A driver for Triton that needs no GPU: ordinary launches compile for real, and the PTX is executed here."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import make_tensordesc_arg

from gpu_without_gpu.errors import Unsupported
from gpu_without_gpu.formats import FORMATS
from gpu_without_gpu.machine import Code, execute
from gpu_without_gpu.memory import GlobalMemory
from gpu_without_gpu.program import load

PROPERTIES = {  # of an H100, what the compiler and autotuning ask for
    "max_shared_mem": 232_448,
    "multiprocessor_count": 132,
    "max_num_regs": 65_536,
    "warpSize": 32,
    "sm_clock_rate": 1_755_000,
    "mem_clock_rate": 2_619_000,
    "mem_bus_width": 5120,
}
MAX_SHARED = {80: 166_912}  # where it differs


class _Utils:
    """What the driver's C module offers to Triton, as far as it is called."""

    def __init__(self) -> None:
        self._code: Code | Unsupported | None = None

    def read(self, module: object, function: object, name: str, files: dict[str, str], hash: str) -> None:
        """Triton is about to load a kernel, whose files are these: take its PTX instead of its machine code."""
        (path,) = (path for file, path in files.items() if file.endswith(".ptx"))
        try:
            self._code = load(Path(path).read_text())
        except Unsupported as error:  # compiling is fine: tell whoever launches it
            self._code = error

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[None, Code | Unsupported | None, int, int, int]:
        code, self._code = self._code, None
        return None, code, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES | {"max_shared_mem": MAX_SHARED.get(device, PROPERTIES["max_shared_mem"])}

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    """Calls a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._metadata = metadata
        self._names = list(source.signature)
        self._kinds = list(source.signature.values())
        if getattr(metadata, "tensordesc_meta", None):
            raise Unsupported("not executed without a GPU: descriptors for the tensor memory accelerator")

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: object,
        function: Code | Unsupported,
        packed_metadata: object,
        launch_metadata: object,
        enter_hook: object,
        exit_hook: object,
        *arguments: Any,
    ) -> None:
        if isinstance(function, Unsupported):
            raise function
        named = list(_flat(self._kinds, self._names, arguments))
        blocks = grid_x * grid_y * grid_z
        for size in (self._metadata.global_scratch_size, self._metadata.profile_scratch_size):
            named.append(("scratch memory", torch.empty(blocks * size, dtype=torch.uint8)))
        run(function, (grid_x, grid_y, grid_z), named, self._metadata.shared)


def _flat(kinds: Sequence[Any], names: Sequence[str], arguments: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The arguments that reach the kernel: no constants, tuples and tensor descriptors in parts."""
    for kind, name, argument in zip(kinds, names, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, [name] * len(kind), argument)
        elif kind.startswith("tensordesc"):
            yield from ((name, part) for part in make_tensordesc_arg(argument, None))
        elif kind != "constexpr":
            yield name, argument


def run(code: Code, grid: tuple[int, int, int], arguments: Sequence[tuple[str, Any]], shared_bytes: int) -> None:
    """Execute a kernel with named arguments: tensors on the CPU, numbers, None for a null pointer."""
    memory = GlobalMemory()
    values = []
    for (name, argument), kind in zip(arguments, code.kernel.parameters.values(), strict=True):
        if hasattr(argument, "data_ptr"):
            tensor = getattr(argument, "base", argument)  # of a triton.TensorWrapper
            if tensor.device.type != "cpu":
                raise ValueError(f"{name}: expected a tensor on the CPU, got one on {tensor.device}")
            memory.add_tensor(tensor, name)
            values.append(tensor.data_ptr())
        elif kind in ("f32", "f64"):
            values.append(int(FORMATS[kind].encode(np.array([argument], np.float64))[0]))
        else:
            values.append(int(argument or 0))
    execute(code, memory, values, grid, shared_bytes)


def run_ptx(text: str, grid: tuple[int, int, int], *arguments: Any, shared_bytes: int = 0) -> None:
    """Execute the one kernel in a PTX text."""
    run(load(text), grid, [(f"argument {i}", argument) for i, argument in enumerate(arguments)], shared_bytes)


class WithoutGpu(DriverBase):  # type: ignore[misc]
    """The driver. Each target counts as a device of its own, so that Triton keeps apart what it compiled for each."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__()
        self.target = target
        self.device = target.arch if isinstance(target.arch, int) else int(target.arch.removeprefix("gfx"), 16)
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """For autotuning: all configurations are run, and all take equally long."""

        def benchmark(call: Callable[[], object], quantiles: object = None, **options: object) -> list[float]:
            call()
            return [0.0, 0.0, 0.0]

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


def activate(target: GPUTarget) -> None:
    """From now on Triton compiles for this target and launches here."""
    hook = triton.knobs.runtime.kernel_load_start_hook
    if isinstance(before := triton.runtime.driver._active, WithoutGpu):
        hook.remove(before.utils.read)
    driver = WithoutGpu(target)
    hook.add(driver.utils.read)
    triton.runtime.driver.set_active(driver)


def compile_only(kernel: Any, *arguments: Any, target: str, **options: Any) -> Any:
    """Compile as a launch with these arguments would, for "sm_80", "sm_90", "sm_100" or AMD's "gfx942" and the like.

    A torch dtype stands for an aligned tensor of it. Returns Triton's CompiledKernel, whose `asm` has the texts ("ptx",
    "amdgcn") and binaries ("cubin", "hsaco"); an autotuned kernel gives a list of them. Executes nothing.
    """
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(WithoutGpu(gpu))
    try:
        return kernel.warmup(*arguments, grid=(1,), **options)
    finally:
        triton.runtime.driver.set_active(before)
