"""What goes wrong in code for a GPU that runs without one."""


class GpuError(RuntimeError):
    """Base of all that is wrong with a kernel, as far as executing it shows."""


class Unsupported(GpuError):
    """An instruction, or a form of one, that is not executed here."""


class OutOfBounds(GpuError, IndexError):
    """An access outside of the tensors passed to the kernel, or outside of its shared memory."""


class Misaligned(GpuError):
    """An access at an address that is no multiple of its size."""


class Race(GpuError):
    """Two warps use the same shared memory, at least one of them writes, and no barrier lies between."""


class StepLimit(GpuError):
    """More instructions than any kernel here should need: an endless loop."""


class Trap(GpuError):
    """The kernel gave up by itself: `tl.device_assert`, or a trap."""
