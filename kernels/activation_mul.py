"""The gate of an MLP: an activation of one half times the other half."""

from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import check, compute_dtypes, output


def silu_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, in float32, rounded once; silu(g) = g / (1 + exp(-g)).

    x: [rows, 2 * size], gate first, rows may be strided. Returns [rows, size], in `out` if given. Raises ValueError on
    a wrong argument. Shazeer, arXiv 2002.05202.
    """
    return _activation_mul(x, out, gelu=False)


def gelu_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up, as `silu_mul`; gelu(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))).

    This is the approximation that Gemma was trained with. Hendrycks and Gimpel, arXiv 1606.08415.
    """
    return _activation_mul(x, out, gelu=True)


def _activation_mul(x: Tensor, out: Tensor | None, gelu: bool) -> Tensor:
    check(x, "x", (None, None), compute_dtypes(), contiguous=False)
    rows, width = x.shape
    if width % 2:
        raise ValueError(f"x: width is {width}, expected an even number")
    out = output(out, (rows, width // 2), x.dtype)
    if kernels() != "triton":
        return out.copy_(reference.gelu_mul(x) if gelu else reference.silu_mul(x))
    from octavo.kernels.gpu import activation_mul as gpu  # here, since importing Triton takes its time

    gpu.launch(x, out, gelu)
    return out
