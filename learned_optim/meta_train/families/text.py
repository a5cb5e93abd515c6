"""Families of language models: next-character prediction in Python's own source code, which every machine has.

Shapes: `B` windows of a batch, `T` characters of a window.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..tasks import ModuleTask, Sampler, Task
from .sampling import VALIDATION, choose

CHARACTERS = 96  # the printable ones of ASCII


@functools.cache
def source_text() -> Tensor:
    """Python's source code as character indices below 96, shape (characters,)."""
    modules = ("argparse", "ast", "inspect", "pathlib", "tarfile", "typing", "unittest.mock", "zipfile")
    origins = [spec.origin for name in modules if (spec := importlib.util.find_spec(name)) and spec.origin]
    text = b"".join(Path(origin).read_bytes() for origin in origins)
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    codes = torch.where(codes == ord("\n"), 127, codes)
    return (codes[(codes >= 32) & (codes < 128)] - 32).clone()


def windows(text: Tensor, length: int, size: int) -> Sampler:
    """Draws `size` windows of `length` characters and their successors."""

    def sample(generator: Generator) -> tuple[Tensor, ...]:
        index = torch.randint(len(text) - length, (size, 1), generator=generator) + torch.arange(length + 1)
        window = text[index]
        return window[:, :-1], window[:, 1:]

    return sample


def text_samplers(generator: Generator, length: int, size: int) -> tuple[Sampler, Sampler]:
    """Windows of a random part of the source code, for training and for validation."""
    text = source_text()
    part = min(len(text), 60_000)
    start = int(torch.randint(len(text) - part + 1, (), generator=generator))
    text = text[start : start + part]
    border = len(text) - len(text) // VALIDATION
    return windows(text[:border], length, size), windows(text[border:], length, size)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class TextModel(nn.Module):
    """Embedding, a stack of blocks and a read-out, which may be tied to the embedding."""

    def __init__(self, width: int, blocks: Sequence[nn.Module], positions: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        nn.init.normal_(self.embedding.weight, std=0.02 if tied else 0.3)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width)) if positions else None
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.positions is not None:
            hidden = hidden + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


class Block(nn.Module):
    """A pre-norm transformer block; attention is spelled out because fused kernels have no second derivative."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(size, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, width / heads)
        scores = query @ key.mT / math.sqrt(width // self.heads)
        if self.causal:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1), -1e9)
        x = x + self.project((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return mixed


class Recurrence(nn.Module):
    """A gated recurrent layer (minimal GRU), spelled out so that it can be vmapped and differentiated twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.recurrent = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, outputs = torch.zeros_like(x[:, 0]), []
        for projected in self.input(x).unbind(1):
            update, candidate = projected.chunk(2, -1)
            recurrent_update, recurrent_candidate = self.recurrent(hidden).chunk(2, -1)
            gate = torch.sigmoid(update + recurrent_update)
            hidden = hidden + gate * (torch.tanh(candidate + recurrent_candidate) - hidden)
            outputs.append(hidden)
        return torch.stack(outputs, 1)


def transformer(generator: Generator) -> Task:
    """A small transformer, tied or not."""
    width, depth, length = choose(generator, (16, 24, 32)), choose(generator, (1, 2)), choose(generator, (12, 16))
    tied = choose(generator, (False, True))
    train, validation = text_samplers(generator, length, choose(generator, (8, 16)))
    return ModuleTask(lambda: TextModel(width, [Block(width, 4) for _ in range(depth)], length, tied), train, token_loss, validation)


def recurrent(generator: Generator) -> Task:
    """A small recurrent net, tied or not."""
    width, length = choose(generator, (16, 24, 32)), choose(generator, (8, 12))
    tied = choose(generator, (False, True))
    train, validation = text_samplers(generator, length, choose(generator, (8, 16)))
    return ModuleTask(lambda: TextModel(width, [Recurrence(width)], 0, tied), train, token_loss, validation)
