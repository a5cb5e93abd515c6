"""Modules that have no second derivative as they are, computed so that they have: exact meta-gradients need it."""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def prepare(module: nn.Module) -> bool:
    """Replaces, in this one module, the forward of layers whose own has no second derivative.

    Returns:
        whether there are recurrent layers, for `differentiable`.
    """
    for part in module.modules():
        if type(part) is nn.EmbeddingBag:
            part.forward = types.MethodType(_bag, part)  # type: ignore[method-assign]
    return any(isinstance(part, nn.RNNBase) for part in module.modules())


@contextlib.contextmanager
def differentiable(recurrent: bool) -> Iterator[None]:
    """Inside, PyTorch takes none of the fast paths that have no second derivative: of attention, and cuDNN's of recurrent layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


MISSING = re.compile(r"derivative for .* (?:is )?not implemented|differentiate twice|[Dd]ouble backward")


def missing(error: RuntimeError) -> str | None:
    """What to do where PyTorch says that there is no second derivative; None for other errors."""
    if not MISSING.search(str(error)):
        return None
    reason = str(error).splitlines()[0].rstrip(".")
    return (
        f"the model or its loss has no second derivative ({reason}), which exact meta-gradients need; choose "
        'estimators={"": "first_order"} or {"": "pes"}, or write that operation with others that have one'
    )


def _bag(self: nn.EmbeddingBag, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
    """`nn.EmbeddingBag.forward` of bags (B, L), or of bags laid end to end (N,) that begin at offsets (B,). Returns (B, D)."""
    if self.max_norm is not None or (offsets is not None and self.mode == "max"):
        return nn.EmbeddingBag.forward(self, input, offsets, per_sample_weights)
    rows = F.embedding(input, self.weight)
    counted = torch.ones_like(rows[..., 0]) if self.padding_idx is None else (input != self.padding_idx).to(rows)
    if self.mode == "max":
        lowest = rows.masked_fill(counted[..., None] == 0, -torch.inf).amax(1)
        return lowest.masked_fill(counted.sum(1, keepdim=True) == 0, 0)
    rows = rows * (counted if per_sample_weights is None else counted * per_sample_weights)[..., None]
    if offsets is None:
        sums, counts = rows.sum(1), counted.sum(1)
    else:
        count = len(offsets) - self.include_last_offset
        bags = torch.bucketize(torch.arange(len(input), device=input.device), offsets[:count], right=True) - 1
        sums = rows.new_zeros(count, rows.shape[1]).index_add(0, bags, rows)
        counts = counted.new_zeros(count).index_add(0, bags, counted)
    return sums / counts.clamp(min=1)[:, None] if self.mode == "mean" else sums
