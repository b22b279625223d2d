"""A driver for Triton that needs no GPU: ordinary launches compile for real, and the PTX is executed here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import expand_signature, make_tensordesc_arg

from gpu_without_gpu.errors import Unsupported
from gpu_without_gpu.formats import FORMATS
from gpu_without_gpu.machine import Code, execute
from gpu_without_gpu.memory import GlobalMemory
from gpu_without_gpu.program import load

# Of an A100 and an H100, what the compiler and autotuning ask for.
PROPERTIES = {
    80: {"max_shared_mem": 166_912, "multiprocessor_count": 108},
    90: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
}
COMMON = {
    "max_num_regs": 65_536,
    "warpSize": 32,
    "sm_clock_rate": 1_500_000,
    "mem_clock_rate": 1_500_000,
    "mem_bus_width": 5120,
}


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
        return COMMON | PROPERTIES[device]

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    """Calls a compiled kernel: arguments become raw bits, tensors become ranges of addresses."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._metadata = metadata
        self._signature = list(source.signature.values())
        self._descriptors = getattr(metadata, "tensordesc_meta", None)
        self._types = expand_signature(self._signature, self._descriptors)
        if "nvTmaDesc" in self._types:
            raise Unsupported("not executed without a GPU: tensor descriptors of the tensor memory accelerator")
        names = list(source.signature)
        self._names = names if len(names) == len(self._types) else [f"argument {i}" for i in range(len(self._types))]

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
        memory = GlobalMemory()
        values: list[int] = []
        for kind, name, argument in zip(self._types, self._names, self._expand(arguments), strict=True):
            _flatten(kind, name, argument, memory, values)
        blocks = grid_x * grid_y * grid_z
        scratch = []
        for size in (self._metadata.global_scratch_size, self._metadata.profile_scratch_size):
            scratch.append(torch.empty(blocks * size + 256, dtype=torch.uint8))
            values.append(-(-scratch[-1].data_ptr() // 256) * 256)
            memory.add(values[-1], blocks * size, "scratch memory")
        execute(function, memory, values, (grid_x, grid_y, grid_z), self._metadata.shared)

    def _expand(self, arguments: Sequence[Any]) -> list[Any]:
        expanded: list[Any] = []
        for kind, argument in zip(self._signature, arguments, strict=True):
            if isinstance(kind, str) and kind.startswith("tensordesc"):
                expanded.extend(make_tensordesc_arg(argument, None))
            else:
                expanded.append(argument)
        return expanded


def _flatten(kind: Any, name: str, argument: Any, memory: GlobalMemory, values: list[int]) -> None:
    """Append the raw bits of one argument, of the Triton type `kind`, or of all in a tuple."""
    if kind == "constexpr":
        return
    if isinstance(kind, tuple):
        for i, (inner_kind, inner) in enumerate(zip(kind, argument, strict=True)):
            _flatten(inner_kind, f"{name}[{i}]", inner, memory, values)
    elif kind.startswith("*"):
        tensor = getattr(argument, "base", argument) if hasattr(argument, "data_ptr") else None
        if tensor is None:
            values.append(int(argument or 0))
            return
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {tensor.device}")
        memory.add_tensor(tensor, name)
        values.append(argument.data_ptr())
    elif kind in ("fp16", "bf16", "fp32", "fp64"):
        form = FORMATS[{"fp16": "f16", "bf16": "bf16", "fp32": "f32", "fp64": "f64"}[kind]]
        number = np.array([argument], np.float64 if kind == "fp64" else np.float32)
        values.append(int(form.encode(number)[0]))
    else:
        values.append(int(argument))


class WithoutGpu(DriverBase):  # type: ignore[misc]
    """The driver. A device's number is its architecture, so that Triton keeps what it compiled for each apart."""

    def __init__(self, arch: int) -> None:
        if arch not in PROPERTIES:
            raise ValueError(f"arch is {arch}, expected one of {', '.join(map(str, PROPERTIES))}")
        super().__init__()
        self.arch = arch
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

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


def activate(arch: int) -> None:
    """From now on Triton compiles for sm_`arch` and launches here."""
    before = triton.runtime.driver._active
    hook = triton.knobs.runtime.kernel_load_start_hook
    if isinstance(before, WithoutGpu):
        hook.remove(before.utils.read)
    driver = WithoutGpu(arch)
    hook.add(driver.utils.read)
    triton.runtime.driver.set_active(driver)
