"""silu_mul and gelu_mul against torch's own activations."""

import pytest
import torch

from octavo.kernels.activation_mul import gelu_mul, silu_mul


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_products(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 96).to(dtype)[:, :80]
    gate, up = x.double().chunk(2, dim=1)
    for got, want in [
        (silu_mul(x), torch.nn.functional.silu(gate) * up),
        (gelu_mul(x), torch.nn.functional.gelu(gate, approximate="tanh") * up),
    ]:
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
