"""matmul, embedding and packing against the float64 product, and the promise that a row's bits stand by themselves."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.kernels import backend
from octavo.kernels.cpu.library import set_num_threads
from octavo.kernels.embedding import embedding
from octavo.kernels.matmul import PackedWeight, empty_packed, gated_matmul, matmul, packed_bytes

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


def packed(weight: torch.Tensor) -> PackedWeight:
    result = empty_packed(weight.shape[0], weight.shape[1], weight.dtype)
    result.write_rows(0, weight)
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("n", "k"), [(16, 2), (1, 8), (17, 34), (64, 64), (100, 576), (576, 1536), (333, 130)])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 7, 13, 64])
def test_product(m: int, n: int, k: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(n * k + m)
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    bias, residual = torch.randn(n), torch.randn(m, n).to(dtype)
    exact = x.double() @ w.double().T
    weight = packed(w)
    scale = k**0.5
    for out, want in [
        (matmul(x, weight), exact),
        (matmul(x, weight, bias=bias), exact + bias.double()),
        (matmul(x, weight, residual=residual), exact + residual.double()),
        (matmul(x, weight, bias=bias, residual=residual), exact + bias.double() + residual.double()),
    ]:
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, atol=tolerance * scale, rtol=tolerance)
    wide = matmul(x, weight, out_dtype=torch.float32)
    torch.testing.assert_close(wide.double(), exact, atol=1e-5 * scale, rtol=1e-5)


class Allocations(TorchDispatchMode):
    """Notes the device and the type of every tensor that comes about meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.add((result.device.type, result.dtype))
        return result


def test_tensors_of_a_checkpoint_are_converted_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would take memory on a GPU that nobody has planned, and that torch keeps."""
    monkeypatch.setattr(backend, "_kernels", "torch")
    monkeypatch.setattr(backend, "_device", torch.device("meta"))
    weight, rows = empty_packed(32, 8, torch.bfloat16), torch.randn(16, 10)[:, :8]
    with Allocations() as allocations:
        weight.write_rows(16, rows)
    assert ("meta", torch.bfloat16) in allocations.seen and ("meta", torch.float32) not in allocations.seen


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("n", "k"), [(32, 2), (64, 34), (96, 64), (3072, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_product(biased: bool, n: int, k: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(n + k)
    x, w, bias = torch.randn(70, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n) if biased else None
    weight = empty_packed(n, k, dtype, num_parts=2)
    for begin in (0, n // 2):
        weight.write_rows(begin, w[begin : begin + 9])
        weight.write_rows(begin + 9, w[begin + 9 : begin + n // 2])
    gate, up = (x.double() @ w.double().T + (0.0 if bias is None else bias.double())).chunk(2, dim=1)
    want = gate / (1 + (-gate).exp()) * up
    whole = gated_matmul(x, weight, bias)
    torch.testing.assert_close(whole.double(), want, atol=tolerance * k, rtol=tolerance)
    for m in (1, 2, 3, 6, 7, 16, 17, 33, 64, 65):
        assert torch.equal(gated_matmul(x[:m], weight, bias), whole[:m]), m


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(960, 576), (576, 1536), (2048, 5632), (2560, 2048), (49152, 64)])
def test_row_alone_has_the_bits_it_has_in_a_batch(n: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, k).to(dtype), packed(torch.randn(n, k).to(dtype))
    whole = matmul(x, weight)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 33, 64):
        for begin in (0, 3):
            assert torch.equal(matmul(x[begin : begin + m], weight), whole[begin : begin + m]), (m, begin)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    set_num_threads(1)
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_bits_do_not_depend_on_threads(threads: int, restore_threads: None) -> None:
    torch.manual_seed(0)
    cases = [(m, n, k) for m in (1, 9, 40) for n, k in ((592, 576), (5000, 64), (16, 32))]
    inputs = [(torch.randn(m, k).bfloat16(), packed(torch.randn(n, k).bfloat16())) for m, n, k in cases]
    set_num_threads(1)
    want = [matmul(x, weight) for x, weight in inputs]
    set_num_threads(threads)
    for _ in range(200):  # thousands of loops one after the other: threads that are late for one meet the next
        for (x, weight), out in zip(inputs, want, strict=True):
            assert torch.equal(matmul(x, weight), out)


def test_more_threads_than_one_may_call(restore_threads: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 576), packed(torch.randn(592, 576))
    want = matmul(x, weight)
    set_num_threads(3)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: torch.equal(matmul(x, weight), want), range(400)))


def test_strided_rows() -> None:
    torch.manual_seed(0)
    wide, weight = torch.randn(5, 96), packed(torch.randn(20, 32))
    assert torch.equal(matmul(wide[:, 32:64], weight), matmul(wide[:, 32:64].contiguous(), weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_written_in_pieces_and_looked_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w = torch.randn(45, 32).to(dtype)
    weight = empty_packed(45, 32, dtype)
    for begin, end in [(7, 23), (0, 7), (23, 45)]:
        weight.write_rows(begin, w[begin:end])
    ids = torch.tensor([44, 0, 7, 16, 15, 44], dtype=torch.int32)
    assert torch.equal(embedding(ids, weight), w[ids])
    for first_id in (-7, 5):  # zeros for the ids of other shards
        inside = ((ids >= first_id) & (ids < first_id + 45))[:, None]
        want = torch.where(inside, w[(ids - first_id).clamp(0, 44)], torch.zeros((), dtype=dtype))
        assert torch.equal(embedding(ids, weight, first_id=first_id), want)
    assert packed_bytes(45, 32, dtype) == weight.data.numel() * dtype.itemsize


def test_wrong_arguments_are_named() -> None:
    weight = packed(torch.randn(20, 32))
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: matmul(torch.randn(2, 31), weight), r"x: shape is \(2, 31\), expected \(any, 32\)"),
        (lambda: matmul(torch.randn(2, 32).double(), weight), "x: dtype is torch.float64"),
        (lambda: matmul(torch.randn(32, 2).T, weight), "x: strides"),
        (lambda: matmul(torch.randn(2, 32), weight, bias=torch.randn(19)), "bias: shape"),
        (lambda: matmul(torch.randn(2, 32), weight, residual=torch.randn(3, 20)), "residual: shape"),
        (lambda: weight.write_rows(10, torch.randn(11, 32)), r"rows \[10, 21\) do not fit the 20 rows"),
        (lambda: empty_packed(4, 3, torch.bfloat16), "k: is 3, expected an even number"),
        (lambda: empty_packed(4, 4, torch.float16), "dtype: is torch.float16"),
        (lambda: empty_packed(48, 4, torch.float32, num_parts=2), "n: is 48, expected a multiple of 2 parts of 16"),
        (lambda: gated_matmul(torch.randn(2, 32), weight), "weight: has 1 parts, expected 2"),
        (lambda: matmul(torch.randn(2, 32), empty_packed(32, 32, torch.float32, 2)), "weight: has 2 parts, expected 1"),
        (lambda: matmul(torch.randn(2, 32), weight, out_dtype=torch.float64), "out_dtype: is torch.float64"),
        (lambda: matmul(torch.randn(2, 32), weight, out_dtype=torch.float16), "out_dtype: is torch.float16"),
    ]
    for call, words in wrong:
        with pytest.raises(ValueError, match=words):
            call()
