"""What the ops compile: every kernel with every set of constants that a launch may choose."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of a kernel. Each op's module yields its own from `variants()`."""

    name: str
    kernel: Any  # what `triton.jit` makes
    args: tuple[Any, ...]  # a dtype for each tensor, an int or float for each number, None where an argument is absent
    options: dict[str, Any]  # constants, warps and stages, as launches pass them

    def compile(self) -> Any:
        """The compiled kernel, for the active driver's target; nothing is launched."""
        return self.kernel.warmup(*self.args, grid=(1,), **self.options)
