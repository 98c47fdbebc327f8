"""Effective numbers: how many different things a similarity kernel says there are."""

from __future__ import annotations

import torch
from torch import Tensor

from asn_rl.errors import InvalidValue

EIGENVALUE_FLOOR = 1e-12
"""eigenvalues of K/n up to this are rounding errors and count as 0: identical items then give exactly one; a true
eigenvalue of that size would add less than 3e-11 nats"""
_TOLERANCE = 1e-6


def von_neumann_entropy(kernel: Tensor) -> Tensor:
    """(...) float64 entropy of the eigenvalues of K/n, nats, in [0, log n], for similarity kernels K (..., n, n) with
    ones on the diagonal. 0 where all items are identical, log n where all are orthogonal.

    Raises:
        InvalidValue: no items, not square, not finite, not symmetric, not positive semi-definite, or another diagonal.
    """
    eigenvalues = torch.linalg.eigvalsh(_checked(kernel) / kernel.shape[-1])
    if float(eigenvalues.min()) < -_TOLERANCE:
        raise InvalidValue("smallest eigenvalue of K/n", float(eigenvalues.min()), ">= 0", "is it a kernel?")
    share = torch.where(eigenvalues > EIGENVALUE_FLOOR, eigenvalues, 0.0)
    return torch.special.entr(share / share.sum(-1, keepdim=True)).sum(-1).abs()  # abs: -0.0 for a single item


def vendi_score(kernel: Tensor) -> Tensor:
    """(...) float64 effective number of different items, in [1, n], of kernels (..., n, n): the exponential of
    `von_neumann_entropy` (Friedman & Dieng 2022, arXiv:2210.02410, definition 3.1). Exactly 1 for identical items.

    Raises:
        InvalidValue: see `von_neumann_entropy`.
    """
    return von_neumann_entropy(kernel).exp()


def marginal_vendi(kernel: Tensor) -> Tensor:
    """(n,) float64 Vendi score of all n >= 2 items minus that of the others, for each item of a kernel (n, n).

    0 for identical items. Negative for an item that makes the group less even, such as a second copy of one of them.

    Raises:
        InvalidValue: fewer than two items, or see `von_neumann_entropy`.
    """
    if kernel.dim() != 2 or len(kernel) < 2:
        raise InvalidValue("shape of the kernel", tuple(kernel.shape), "(n, n) with n >= 2", "there are no others")
    kept = ~torch.eye(len(kernel), dtype=torch.bool, device=kernel.device)
    without = torch.stack([vendi_score(kernel[rest][:, rest]) for rest in kept])
    return vendi_score(kernel) - without


def _checked(kernel: Tensor) -> Tensor:
    """A kernel in float64."""
    if kernel.dim() < 2 or kernel.shape[-1] != kernel.shape[-2] or kernel.numel() == 0:
        raise InvalidValue("shape of the kernel", tuple(kernel.shape), "(..., n, n) with n >= 1")
    if not kernel.isfinite().all():
        raise InvalidValue("kernel", "NaN or infinite entries", "finite", "is an embedding all zeros?")
    kernel = kernel.double()
    asymmetry = float((kernel - kernel.mT).abs().max())
    if asymmetry > _TOLERANCE:
        raise InvalidValue("largest difference between K and its transpose", asymmetry, f"<= {_TOLERANCE:g}")
    off = float((kernel.diagonal(dim1=-2, dim2=-1) - 1).abs().max())
    if off > _TOLERANCE:
        raise InvalidValue("distance of the kernel's diagonal from 1", off, f"<= {_TOLERANCE:g}", "normalise the items")
    return kernel
