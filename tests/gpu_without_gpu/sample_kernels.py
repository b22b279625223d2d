"""Small Triton kernels for the tests of this package."""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@triton.jit
def convert(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


@triton.jit
def fused(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.fma(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)))


@triton.jit
def extremes(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    """Rows of out: max, min, max of all x, min of all x, sum of all x."""
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, tl.maximum(x, y))
    tl.store(out_ptr + BLOCK + offsets, tl.minimum(x, y))
    tl.store(out_ptr + 2 * BLOCK, tl.max(x, 0))
    tl.store(out_ptr + 3 * BLOCK, tl.min(x, 0))
    tl.store(out_ptr + 4 * BLOCK, tl.sum(x, 0))


@triton.jit
def copy_rows(x_ptr, out_ptr, x_stride, num_columns, factor, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    mask = (row >= 0) & (columns < num_columns)  # of a scalar and a block
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask)
    tl.store(out_ptr + row * x_stride + columns, (x * factor).to(x.dtype), mask=mask)


@triton.jit
def matmul(
    a_ptr, b_ptr, out_ptr, k_size, a_stride_m, a_stride_k, b_stride_n, b_stride_k,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """[M, k_size] @ [N, k_size].T, the first times SCALE, which if not 1 moves it through registers."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[:, None], tl.arange(0, BLOCK_K)[None, :]
    kind: tl.constexpr = tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([M, N], kind)
    for start in range(0, k_size, BLOCK_K):
        a = tl.load(a_ptr + m * a_stride_m + (start + k) * a_stride_k)
        b = tl.load(b_ptr + n * b_stride_n + (start + k) * b_stride_k)
        if SCALE != 1:
            a = (a.to(tl.float32) * SCALE).to(a.dtype)
        total = tl.dot(a, tl.trans(b), total, out_dtype=kind)
    tl.store(out_ptr + m * N + tl.trans(n), total)


@triton.jit
def sum_loop(x_ptr, lengths_ptr, out_ptr, row_stride, BLOCK: tl.constexpr):
    """Each program has a loop of its own length, and those without a row leave at once."""
    row = tl.program_id(0)
    length = tl.load(lengths_ptr + row)
    if length == 0:
        return
    total = 0.0
    for start in range(0, length, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x_ptr + row * row_stride + offsets, mask=offsets < length, other=0.0), 0)
    tl.store(out_ptr + row, total)


@triton.jit
def tickets(counter_ptr, out_ptr, total_ptr, largest_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    ticket = tl.atomic_add(counter_ptr, 1)
    tl.store(out_ptr + ticket * BLOCK + offsets, offsets + tl.program_id(0))
    tl.atomic_add(total_ptr + offsets % 4, 1.0)
    tl.atomic_max(largest_ptr, tl.program_id(0))


@triton.jit
def sort_and_scan(x_ptr, sorted_ptr, sums_ptr, best_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(sorted_ptr + offsets, tl.sort(x, descending=True))
    tl.store(sums_ptr + offsets, tl.cumsum(x, 0))
    _, best = tl.max(x, 0, return_indices=True)
    tl.store(best_ptr, best)


@triton.jit
def functions(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Rows of out: exp2, log2, rsqrt, sqrt, reciprocal, exp, log."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.exp2(x))
    tl.store(out_ptr + BLOCK + offsets, tl.log2(x))
    tl.store(out_ptr + 2 * BLOCK + offsets, tl.rsqrt(x))
    tl.store(out_ptr + 3 * BLOCK + offsets, tl.sqrt_rn(x))
    tl.store(out_ptr + 4 * BLOCK + offsets, tl.div_rn(1.0, x))
    tl.store(out_ptr + 5 * BLOCK + offsets, tl.exp(x))
    tl.store(out_ptr + 6 * BLOCK + offsets, tl.log(x))


@triton.jit
def noise(out_ptr, seed, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.rand(seed, offsets))


@triton.jit
def checked(x_ptr, limit):
    x = tl.load(x_ptr)
    tl.device_assert(x < limit, "too large")
    tl.debug_barrier()
    tl.store(x_ptr, x + 1)


@triton.jit
def descriptor_copy(x, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tile = x.load([0, 0])
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], tile)


@triton.jit
def spin(x_ptr):
    while tl.load(x_ptr, volatile=True) == 0:
        pass
    tl.store(x_ptr, 2)


@triton.jit
def clock(out_ptr):
    tl.store(
        out_ptr, tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    )
