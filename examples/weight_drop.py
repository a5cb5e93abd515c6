"""A language model with tied embeddings and weight drop, as a task of the engine.

Shapes: `B` windows of `T` words.
"""

import functools

import torch
from language import load
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim.meta_train import ModuleTask
from learned_optim.meta_train.families.text import token_loss

BATCH, LENGTH = 8, 12  # windows, and words of each
DROP = {"recurrent": 0.3, "inputs": 0.2, "outputs": 0.2}


class WeightDropLSTM(nn.Module):
    """One layer, spelled out so that it can be vmapped and differentiated twice."""

    def __init__(self, words: int, width: int, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.input, self.recurrent = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width, bias=False)
        self.head = nn.Linear(width, words)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, words)."""
        recurrent = F.dropout(self.recurrent.weight, DROP["recurrent"], self.training)
        inputs = self.embedding(words)
        inputs = self.input(inputs * F.dropout(torch.ones_like(inputs[:, :1]), DROP["inputs"], self.training))
        hidden = cell = torch.zeros_like(inputs[:, 0, : recurrent.shape[1]])
        outputs = []
        for projected in inputs.unbind(1):
            gate_in, forget, gate_out, candidate = (projected + hidden @ recurrent.mT).chunk(4, -1)
            cell = forget.sigmoid() * cell + gate_in.sigmoid() * candidate.tanh()
            hidden = gate_out.sigmoid() * cell.tanh()
            outputs.append(hidden)
        outputs = torch.stack(outputs, 1)
        return self.head(outputs * F.dropout(torch.ones_like(outputs[:, :1]), DROP["outputs"], self.training))


def make_task(width: int, tied: bool = True) -> ModuleTask:
    """Next words of Python's manual."""
    vocabulary, train, _, test = load(None)

    def sample(stream: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(stream) - LENGTH, (BATCH, 1), generator=generator) + torch.arange(LENGTH + 1)
        return stream[index[:, :-1]], stream[index[:, 1:]]

    train, test = (functools.partial(sample, torch.cat(part)) for part in (train, test))
    return ModuleTask(lambda: WeightDropLSTM(len(vocabulary), width, tied), train, token_loss, test)
