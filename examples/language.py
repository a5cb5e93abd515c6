"""What the dynamical language model reads and remembers: text in articles, a recurrent net trained
on it, and dynamic evaluation.

Shapes: `N` coordinates of its weights, `S` words, `...` any leading dimensions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from learned_optim.features import Layout
from learned_optim.meta_train.tasks import Batch, Buffers, Params
from learned_optim.rule import State

UNITS = 48
SEGMENT = 16  # words
SHORTEST = 128  # words of an article
KNOWN = 4  # times that a word must occur in the articles for training; all others are <unk>


def load(folder: Path | None, known: int = 4000) -> tuple[list[str], list[Tensor], list[Tensor], list[Tensor]]:
    """The vocabulary, and articles as indices into it in three sets of about 2 : 1 : 1, without an article in common.

    Args:
        folder: of WikiText-2's valid.txt and test.txt (Merity et al. 2016); None for Python's manual.
        known: the vocabulary's size at most.
    """
    articles = sorted(_wikitext(folder) if folder else _manual(), key=len, reverse=True)
    articles = [article for article in articles if len(article) > SHORTEST]
    train, second, third = ([article for i, article in enumerate(articles) if i % 4 in part] for part in ((0, 3), (2,), (1,)))
    counts = Counter(word for article in train for word in article if word != "<unk>")
    vocabulary = ["<unk>", *(word for word, count in counts.most_common(known) if count >= KNOWN)]
    index = {word: i for i, word in enumerate(vocabulary)}
    sets = ([torch.tensor([index.get(word, 0) for word in article]) for article in part] for part in (train, second, third))
    return vocabulary, *sets


def _manual() -> list[list[str]]:
    seen: set[str] = set()
    found = []
    for topic in sorted(topics.values(), key=len, reverse=True):
        paragraphs = [part.strip("\n") for part in topic.split("\n\n")]  # some topics repeat parts of others: they count once
        found.append(re.findall(r"\w+|[^\w\s]|\n", "\n".join(part for part in paragraphs if part not in seen)))
        seen |= set(paragraphs)
    return found


def _wikitext(folder: Path) -> list[list[str]]:
    text = "\n" + "\n".join((folder / f"{part}.txt").read_text(encoding="utf-8") for part in ("valid", "test"))
    return [article.replace("\n", " <eos> ").split() for article in re.split(r"\n = [^=\n]+ = \n", text)[1:]]


def read(params: Params, words: Tensor, hidden: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """A gated recurrent net with tied embeddings: what words[1:] cost in nats, (..., S), and the new hidden state (..., UNITS)."""
    inputs, outputs = F.dropout(params["embedding"][words[..., :-1]], dropout) @ params["input"].mT + params["bias"], []
    for projected in inputs.unbind(-2):
        (a, b, c), (x, y, z) = projected.chunk(3, -1), (hidden @ params["recurrent"].mT).chunk(3, -1)
        keep = torch.sigmoid(b + y)
        hidden = keep * hidden + (1 - keep) * torch.tanh(c + torch.sigmoid(a + x) * z)
        outputs.append(hidden)
    logits = F.dropout(torch.stack(outputs, -2), dropout) @ params["embedding"].mT + params["unigram"]
    return -logits.log_softmax(-1).gather(-1, words[..., 1:, None]).squeeze(-1), hidden


def train_static(stream: Tensor, size: int, steps: int) -> tuple[Params, Tensor]:
    """The static weights, and the root mean square of each one's gradient on a segment, (N,)."""
    shapes = {"embedding": (size, UNITS), "input": (3 * UNITS, UNITS), "recurrent": (3 * UNITS, UNITS)}
    params = {name: nn.Parameter(torch.randn(shape) / 8) for name, shape in shapes.items()}
    params |= {"bias": nn.Parameter(torch.zeros(3 * UNITS)), "unigram": nn.Parameter(torch.zeros(size))}
    optimizer = torch.optim.AdamW(params.values(), 4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parts, at, hidden = stream[: len(stream) // 32 * 32].view(32, -1), 0, torch.zeros(32, UNITS)
    for _ in range(steps):
        costs, hidden = read(params, parts[:, at : at + 2 * SEGMENT + 1], hidden.detach(), dropout=0.4)
        optimizer.zero_grad()
        costs.mean().backward()
        optimizer.step()
        schedule.step()
        at = at + 2 * SEGMENT if at + 4 * SEGMENT < parts.shape[1] else int(torch.randint(SEGMENT, ()))
    segments = stream[: len(stream) // SEGMENT * SEGMENT].view(-1, SEGMENT)[::5]
    grads = [torch.autograd.grad(read(params, one, torch.zeros(UNITS))[0].mean(), [*params.values()]) for one in segments]
    square = sum(torch.cat([grad.flatten() for grad in each]).square() for each in grads) / len(grads)
    return {name: param.detach() for name, param in params.items()}, square.sqrt()


def cut(articles: list[Tensor], length: int, count: int) -> tuple[Tensor, Tensor]:
    """Passages of at most `length` words and one: of which article each is, (P,), and their words, (P, length + 1), filled up with -1.

    At most about `count` of them, spread over the articles; the longest first.
    """
    parts = [(len(part), i, part) for i, one in enumerate(articles) for part in one.split(length) if len(part) >= SHORTEST]
    parts = sorted(parts[:: -(-len(parts) // count)], key=lambda part: -part[0])
    return torch.tensor([i for _, i, _ in parts]), torch.stack([F.pad(x, (0, length + 1 - n), value=-1) for n, _, x in parts])


class Reading:
    """A task of the engine: to read a passage, a segment a step. Place, hidden state and costs go from step to step as buffers."""

    def __init__(self, static: Params, passages: Tensor) -> None:
        self.static, self.rows, self.shapes = static, iter(passages), {name: param.shape for name, param in static.items()}

    def init(self, generator: Generator) -> tuple[Params, Buffers]:
        place = {"at": torch.tensor(0), "hidden": torch.zeros(UNITS), "costs": torch.zeros(SEGMENT)}
        return self.static, place | {"passage": next(self.rows)}

    def batch(self, generator: Generator) -> Batch:
        return (torch.zeros(()),)

    def loss(self, params: Params, buffers: Buffers, batch: Batch, training: bool = True) -> tuple[Tensor, Buffers]:
        segment = buffers["passage"][buffers["at"] * SEGMENT + torch.arange(SEGMENT + 1)]
        costs, hidden = read(params, segment, buffers["hidden"])
        return costs.mean(), buffers | {"at": buffers["at"] + 1, "hidden": hidden, "costs": costs}


def sgd(rate: float, decay: float, layout: Layout, grad: Tensor, state: State, horizon: Tensor) -> tuple[Tensor, State]:
    """Dynamic evaluation (Krause et al. 2018, section 3); "moved" is the way from the static weights."""
    change = -rate * grad - decay * state["moved"]
    return change, state | {"moved": state["moved"] + change}


def rms(rate: float, usual: Tensor, decay: float, layout: Layout, grad: Tensor, state: State, horizon: Tensor) -> tuple[Tensor, State]:
    """The same with RMS normalisation (section 4 there); `usual` is each weight's root mean square of gradients, plus epsilon."""
    change = -rate * grad / usual - (decay * usual / usual.mean()).clamp(max=1) * state["moved"]
    return change, state | {"moved": state["moved"] + change}


def tuned(candidates: list[Callable], cost: Callable[[Callable], float]) -> Callable:
    """The best of the rules without decay, with the best decay."""
    best = min(candidates, key=lambda rule: cost(partial(rule, 0.0)))
    return min((partial(best, decay) for decay in (0.0, 0.001, 0.003, 0.01)), key=cost)
