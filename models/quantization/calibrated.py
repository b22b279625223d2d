"""Codes and scales of least error in a layer's outputs, for the inputs that it gets: calibrated quantising.

A row of weights w becomes q with the sum of (w x - q y)^2 over many tokens small, where y, [k, 1], are the inputs that
q will get, and x those that w gets at the same tokens in the exact model (Li et al., arXiv 2504.02692). With
G = sum of y y^T and D = sum of (x - y) y^T that is (w' - q) G (w' - q)^T and a constant, for w' = w + w D G^-1. Codes
are first chosen as GPTQ does (Frantar et al., arXiv 2210.17323): column by column, those of the largest inputs first,
what a column is off being made up for by the columns that follow. Then scales are fitted to the codes by least squares,
and each code is chosen anew given all others (Behdin et al., arXiv 2309.01885), in turns.
"""

from math import inf

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.quantization.base import QuantizedRows
from octavo.models.quantization.online import one_thread

DAMPING = 0.01  # of G's mean diagonal, added to it: what the inputs say nothing about stays as it is
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the greatest weight, that the table's end may stand for
ROUNDS = 3  # of scales and codes in turns
BLOCK = 96  # columns at a time: their updates stay in the cache
ROWS = 4096  # at a time, so that a large head needs little memory
NUMBERS = 1 << 24  # at a time, of what scales are fitted from: a row's inputs times its groups


def quantize_for(weight: Tensor, form: CodeFormat, gram: Tensor, drift: Tensor) -> QuantizedRows:
    """weight: [n, k], of any float dtype; form: with a table and without shifts; gram, drift: float32, G and D."""
    gram = gram + DAMPING * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram))
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    move = torch.linalg.solve(gram, drift, left=False)
    with one_thread():  # columns are small
        parts = [_Fit(part + part @ move, form, gram, order, factor) for part in map(Tensor.float, weight.split(ROWS))]
        return QuantizedRows(form, torch.cat([part.codes() for part in parts]), torch.cat([p.scales for p in parts]))


class _Fit:
    """Rows on the way: `places` [n, k] int32, in the table as it is sorted, and `scales` [n, groups]."""

    def __init__(self, weight: Tensor, form: CodeFormat, gram: Tensor, order: Tensor, factor: Tensor) -> None:
        assert form.table is not None and form.shift is None
        self._weight, self._form, self._gram = weight, form, gram
        self._values, self._code_of_place = torch.sort(torch.tensor(form.table), stable=True)
        self._borders = (self._values[:-1] + self._values[1:]) / 2
        self.scales = self._first_scales()
        self._compensate(order, factor)
        for _ in range(ROUNDS):
            self._fit_scales()
            self._choose_again()

    def codes(self) -> Tensor:
        """[n, k] uint8."""
        return self._code_of_place.to(torch.uint8)[self._places]

    def _scales_of_weights(self) -> Tensor:
        return self.scales.float().repeat_interleave(self._form.group_size, dim=1)

    def _nearest(self, numbers: Tensor) -> Tensor:
        """Places in the table."""
        return torch.bucketize(numbers, self._borders, out_int32=True)

    def _usable(self, scales: Tensor) -> Tensor:
        """In the format's type; never 0, which nothing could be divided by."""
        least = torch.finfo(self._form.scale_dtype).tiny
        scales = torch.where(scales.abs() < least, least, scales)
        return scales.to(self._form.scale_dtype)

    def _first_scales(self) -> Tensor:
        """Of a few, the one of least squared error, each column's weighed by its inputs' squares."""
        groups = self._weight.unflatten(1, (-1, self._form.group_size))
        weights = self._gram.diagonal().view(1, *groups.shape[1:])
        greatest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)).squeeze(2) / self._values.abs().max()
        best, least = self._usable(greatest), torch.full_like(greatest, inf)
        for share in (*SHARES, *(-share for share in SHARES)):  # negative: a table's ends need not be alike
            scales = self._usable(greatest * share)
            spread = scales.float().unsqueeze(2)
            error = ((self._values[self._nearest(groups / spread)] * spread - groups) ** 2 * weights).sum(dim=2)
            best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
        return best

    def _compensate(self, order: Tensor, factor: Tensor) -> None:
        """GPTQ. factor: [k, k], upper: of the inverse of G, its columns in this order."""
        n, k = self._weight.shape
        left, scales = self._weight.T[order], self._scales_of_weights().T[order]  # [k, n]
        places = torch.empty((k, n), dtype=torch.int32)
        for begin in range(0, k, BLOCK):
            columns = slice(begin, min(begin + BLOCK, k))
            errors = torch.empty_like(left[columns])
            for j in range(columns.start, columns.stop):
                places[j] = self._nearest(left[j] / scales[j])
                error = errors[j - begin] = (left[j] - self._values[places[j]] * scales[j]) / factor[j, j]
                left[j + 1 : columns.stop].addmm_(factor[j, j + 1 : columns.stop, None], error[None], alpha=-1)
            left[columns.stop :].addmm_(factor[columns, columns.stop :].T, errors, alpha=-1)
        self._places = torch.empty_like(places).index_copy_(0, order, places).T.contiguous()

    def _fit_scales(self) -> None:
        """Those of least error with these codes: for each row as many linear equations as it has groups."""
        size, k = self._form.group_size, len(self._gram)
        by_groups, wanted = self._gram.view(-1, size, k), self._weight @ self._gram
        num_rows = max(1, NUMBERS // (k * (k // size)))
        for begin in range(0, len(self._weight), num_rows):
            rows = slice(begin, begin + num_rows)
            values = self._values[self._places[rows]].unflatten(1, (-1, size))  # [rows, groups, size]
            left = torch.einsum("rgi,gik->rgk", values, by_groups).unflatten(2, (-1, size))
            left = (left * values.unsqueeze(1)).sum(dim=3)  # [rows, groups, groups]
            diagonal = left.diagonal(dim1=1, dim2=2)
            diagonal += 1e-6 * diagonal.mean(dim=1, keepdim=True) + 1e-30
            right = (wanted[rows].unflatten(1, (-1, size)) * values).sum(dim=2)
            self.scales[rows] = self._usable(torch.linalg.solve(left, right))

    def _choose_again(self) -> None:
        """Each code given all others, once."""
        k, scales = len(self._gram), self._scales_of_weights().T.contiguous()
        places = self._places.T.contiguous()
        off = self._weight.T - self._values[places] * scales  # [k, n]
        for begin in range(0, k, BLOCK):
            columns = slice(begin, min(begin + BLOCK, k))
            within = self._gram[columns, columns]
            slopes = self._gram[columns] @ off
            for j in range(columns.start, columns.stop):
                now = self._values[places[j]] * scales[j]
                places[j] = self._nearest((now + slopes[j - begin] / within[j - begin, j - begin]) / scales[j])
                change = self._values[places[j]] * scales[j] - now
                off[j] -= change
                slopes.addmm_(within[:, j - begin, None], change[None], alpha=-1)
        self._places = places.T.contiguous()
