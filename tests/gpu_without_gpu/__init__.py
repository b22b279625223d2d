"""Runs Triton kernels without a GPU: the compiler is the real one, and its PTX is executed on the CPU.

    import gpu_without_gpu
    gpu_without_gpu.install(arch=80)
    kernel[grid](tensor, ...)  # tensors on the CPU

docs/gpu_without_gpu.md tells what is checked on the way.
"""

import os

from triton.backends.compiler import GPUTarget

from gpu_without_gpu.driver import activate, compile_only, run_ptx

__all__ = ["compile_only", "install", "run_ptx"]


def install(arch: int | None = None) -> None:
    """Let Triton launch without a GPU, compiling for sm_80 or sm_90; call it again to switch.

    The default is $GPU_WITHOUT_GPU_ARCH, else 80.
    With TRITON_INTERPRET=1 in the environment (before triton is imported), Triton's own interpreter is mended instead.
    """
    if arch is None:
        arch = int(os.environ.get("GPU_WITHOUT_GPU_ARCH", "80"))
    if arch not in (80, 90):
        raise ValueError(f"arch is {arch}, expected 80 or 90: only those are executed")
    activate(GPUTarget("cuda", arch, 32))
    if os.environ.get("TRITON_INTERPRET") == "1":
        from gpu_without_gpu import interpreter

        interpreter.mend()
