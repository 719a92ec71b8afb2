"""Products of tokens with a layer's weights in fp32, by the library that multiplies them fastest on this processor.

PyTorch multiplies fp32 matrices by MKL, which keeps to AVX2 on processors of AMD; oneDNN, which PyTorch brings too,
uses the AVX-512 of Zen 5 and takes half the time. Both round as fp32 does.

oneDNN makes a kernel for every shape, of half a millisecond and a megabyte at most, so tokens come to it in some round
numbers alone: those of a product are filled up with zeros.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

_CPUINFO = Path("/proc/cpuinfo")
_FAMILY, _ZEN_5 = re.compile(r"^cpu family\s*:\s*(\d+)$", re.MULTILINE), 26
# Of a layer's weights; a smaller one is not worth a kernel. Whatever number of tokens comes, a layer keeps its library.
_LEAST = 1 << 16


def times(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``(N, O)``, ``x W^T + b``."""
    if is_worth(x_NI, weight_OI) and not _recorded(x_NI, weight_OI, bias_O):
        return _product(_filled(x_NI), weight_OI, bias_O)[: len(x_NI)]
    if bias_O is None:
        return torch.mm(x_NI, weight_OI.t())
    return torch.addmm(bias_O, x_NI, weight_OI.t())


def times_transposed(grad_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
    """Returns ``(O, I)``, ``g^T x``, the gradient of a layer's weight."""
    large = grad_NO.shape[1] * x_NI.shape[1] >= _LEAST
    if not large or not _fits(x_NI, grad_NO.t()) or _recorded(grad_NO, x_NI):
        return torch.mm(grad_NO.t(), x_NI)
    # Zeros add nothing to the sum over tokens; the wider one stands as weights, which oneDNN reads as they are.
    filled_NO, filled_NI = (_filled(own).contiguous() for own in (grad_NO, x_NI))
    if grad_NO.shape[1] >= x_NI.shape[1]:
        return _product(filled_NI.t(), filled_NO.t()).t()
    return _product(filled_NO.t(), filled_NI.t())


def is_worth(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Says whether ``times`` multiplies otherwise than PyTorch would, of ``(..., I)`` and the weights."""
    return weight_OI.numel() >= _LEAST and _fits(x, weight_OI)


def _fits(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    return (
        x.dtype == torch.float32 == weight_OI.dtype
        and x.device.type == "cpu"
        # One token alone waits for the weights to come from memory, whoever multiplies.
        and x.numel() > x.shape[-1]
        and has_wide_products()
        # Of weights with gaps between them oneDNN multiplies number by number.
        and (weight_OI.is_contiguous() or weight_OI.t().is_contiguous())
    )


def _recorded(*given: torch.Tensor | None) -> bool:
    """Says whether autograd records what is made of these, as for gradients of gradients; it knows PyTorch's way."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given)


def _product(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    made_NO: torch.Tensor = _linear()(x_NI, weight_OI, bias_O, "none", [], "")
    return made_NO


def _filled(x_NI: torch.Tensor) -> torch.Tensor:
    """Returns rows filled up with zeros to a number that has a kernel."""
    tokens, inputs = x_NI.shape
    full = _round(tokens)
    if full == tokens:
        return x_NI
    filled_NI = x_NI.new_empty(full, inputs)
    filled_NI[:tokens].copy_(x_NI)
    filled_NI[tokens:].zero_()
    return filled_NI


def _round(tokens: int) -> int:
    """Returns the next number of tokens that has a kernel: sixteen from a power of two to the next, none below 8."""
    step = max(1 << max(tokens.bit_length() - 5, 0), 8)
    return -(-tokens // step) * step


@cache
def has_wide_products() -> bool:
    """Says whether oneDNN multiplies fp32 matrices faster than MKL on this processor: AMD's from Zen 5 on.

    Those before compute AVX-512 by halves.
    """
    try:
        told = _CPUINFO.read_text("utf-8", "replace")
    except OSError:
        return False
    family = _FAMILY.search(told)
    wide = "AuthenticAMD" in told and family is not None and int(family[1]) >= _ZEN_5
    return wide and torch.backends.cpu.get_cpu_capability() == "AVX512" and has_onednn()


@cache
def has_onednn() -> bool:
    """Says whether this PyTorch multiplies dense fp32 matrices by oneDNN, and as it should."""
    if not torch.backends.mkldnn.is_available():
        return False
    x_NI, weight_OI = torch.linspace(-1.0, 1.0, 24).view(3, 8), torch.linspace(0.5, 2.0, 32).sin().view(4, 8)
    try:
        # PyTorch's own compiler calls it; it is no promise to others.
        made_NO = _linear()(x_NI, weight_OI, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(made_NO, x_NI @ weight_OI.t(), rtol=1e-5, atol=1e-6)


def _linear() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default
