"""exp and log, the same in every bit as those of kernels/cpu/vec.h: the same operations in the same order.

Kernels that use them are compiled with enable_fp_fusion=False: a multiply-add is fused only where tl.fma says so.
"""

import triton
import triton.language as tl

_EXP_MIN = tl.constexpr(-87.0)
_EXP_MAX = tl.constexpr(88.0)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def exp(x):
    """e^x of float32, error under 2 ulp; 0 below -87, x above 88 taken as 88. After Cephes (S. Moshier, expf)."""
    flush = x < _EXP_MIN
    x = tl.where(flush, _EXP_MIN, x)
    x = tl.where(x > _EXP_MAX, _EXP_MAX, x)
    shifted = tl.fma(x, 1.44269504088896341, _MAGIC)
    n = shifted - _MAGIC
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440e-4, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    exponent = (shifted.to(tl.int32, bitcast=True) - _MAGIC_BITS + 127) << 23
    return tl.where(flush, 0.0, p * exponent.to(tl.float32, bitcast=True))


@triton.jit
def log(x):
    """Natural logarithm of positive, normal, finite float32, error under 2 ulp. After Cephes (S. Moshier, logf)."""
    bits = x.to(tl.int32, bitcast=True)
    e = ((bits >> 23) & 0xFF) - 126
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # in [0.5, 1)
    low = m < 0.707106781186547524
    m = tl.where(low, m + m, m) - 1.0
    n = (e - low.to(tl.int32)).to(tl.float32)
    z = m * m
    p = tl.fma(m, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, m, 1.1676998740e-1)
    p = tl.fma(p, m, -1.2420140846e-1)
    p = tl.fma(p, m, 1.4249322787e-1)
    p = tl.fma(p, m, -1.6668057665e-1)
    p = tl.fma(p, m, 2.0000714765e-1)
    p = tl.fma(p, m, -2.4999993993e-1)
    p = tl.fma(p, m, 3.3333331174e-1)
    p = p * (m * z)
    p = tl.fma(n, -2.12194440e-4, p)
    p = tl.fma(z, -0.5, p)
    return tl.fma(n, 0.693359375, m + p)
