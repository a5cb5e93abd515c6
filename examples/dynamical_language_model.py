"""A language model whose weights go on learning while it reads, by a meta-learned rule: a medium-term memory of the article.

    pip install ".[demo]" -c constraints.txt
    python examples/dynamical_language_model.py

After Wolf, Chaumond & Delangue 2018, "Meta-Learning a Dynamical Language Model". Three levels of memory: the recurrent net's hidden state;
fast weights, which the optimizer network updates after every segment; and the static weights, to which the fast ones decay and from which
every passage starts. Three sets of articles: on the first the static model learns; on the second the rule is meta-trained, and the rates of
dynamic evaluation (Krause et al. 2018) are tuned; the figures are of the third. Words are predicted before they are learned from.
"""

import math
from functools import partial
from pathlib import Path

import torch
from language import SEGMENT, Reading, cut, load, rms, sgd, train_static, tuned
from reporting import COLOURS, Report, bootstrap, parser
from torch import nn
from torch.nn import functional as F

from learned_optim import NetworkConfig, OptimizerNetwork
from learned_optim.meta_train.unroll import begin
from learned_optim.rule import update

LONGEST, BINS = 1024, ((1, 64), (65, 128), (129, 256), (257, 512), (513, 1024))  # words of a passage, and positions in it
PAIRS = (("SGD", "static"), ("RMS", "static"), ("learned", "static"), ("learned", "SGD"), ("learned", "RMS"))  # compared in the table
TRUNCATION, REPLICAS = 16, 4  # segments that a meta-gradient sees, passages in it
# Second moments are known beforehand, so their AGE, in steps, is such that nothing is left to correct in them.
CONFIG, AGE = NetworkConfig(hidden_units=4, momentum=0.0, second_moment=0.999, orthogonalize_steps=0), 1e5


class FastWeights(nn.Module):
    """The learned rule, which starts as `rms`: the optimizer network gives each tensor's direction, and how surprising the segment is its
    length, not how far gradients agree, since one alone always does. Each tensor's gain, decay and epsilon are learned with the network."""

    def __init__(self, rate, scale, usual, tensors):
        super().__init__()
        self.network, self.usual = OptimizerNetwork(CONFIG), usual
        self.network.log_step_size.data.fill_(math.log(rate * math.sqrt(AGE / 100)))  # undoes the rule's decay at that age
        controller, self.network.log_vector_gain.data = self.network.controller, torch.zeros(())
        controller.power.data, controller.log_start.data = torch.zeros(2)
        self.gain, self.decay = nn.Parameter(torch.zeros(tensors)), nn.Parameter(torch.full((tensors,), -5.0))
        self.epsilon = nn.Parameter((scale - usual).mean().log().repeat(tensors))

    def forward(self, layout, grad, state, horizon):
        scale = self.usual + layout.spread(self.epsilon.exp())
        aged = {"control": state["control"].index_fill(0, torch.tensor(0), AGE), "second_moment": scale.square().expand_as(grad)}
        change, new = update(self.network, layout, grad, state | aged, horizon)
        surprise = layout.mean((grad / scale).square()).sqrt()
        change = layout.spread(self.gain.exp() * surprise) * change - layout.spread(self.decay.sigmoid()) * state["moved"]
        return change, new | {"moved": state["moved"] + change}


def start(static, passages):
    unroll = begin(Reading(static, passages), 0, None, len(passages), CONFIG, "cpu", horizon=LONGEST // SEGMENT, horizon_known=False)
    unroll.optimizees.state["moved"] = torch.zeros_like(unroll.optimizees.params)
    return unroll


@torch.no_grad()
def costs_of(rule, static, passages):
    """What each word but the first costs, in nats, (R, words); the passages, longest first, are filled up with -1."""
    found = []
    for part in passages.split(8):
        unroll = start(static, part.clamp(min=0))
        now, costs = unroll.optimizees, []
        for t in range(math.ceil(int((part >= 0).sum(1).max() - 1) / SEGMENT)):
            now = unroll.train_step(t, now, rule)[1].map(torch.Tensor.detach)
            costs.append(now.buffers["costs"])
        found.append(F.pad(torch.cat(costs, 1), (0, LONGEST - len(costs) * SEGMENT)))
    return torch.cat(found).masked_fill(passages[:, 1:] < 0, 0)


def meta_train(rule, static, articles, stretches):
    """Exact meta-gradients, stretch by stretch of passages from anywhere in the articles."""
    length = LONGEST + SEGMENT + 1
    passages = torch.cat([article.unfold(0, length, SEGMENT) for article in articles if len(article) >= length])
    optimizer = torch.optim.Adam([{"params": rule.network.parameters()}, {"params": rule.parameters(recurse=False), "lr": 5e-2}], 3e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, stretches)
    for stretch in range(stretches):
        t = stretch * TRUNCATION % (LONGEST // SEGMENT)
        if t == 0:
            unroll = start(static, passages[torch.randint(len(passages), (REPLICAS,))])
            now = unroll.optimizees
        now, losses = now.map(torch.Tensor.detach), []
        now.params.requires_grad_()
        for step in range(t, t + TRUNCATION):
            loss, now = unroll.train_step(step, now, rule, create_graph=True)
            losses.append(loss.mean())
        loss = (sum(losses[1:]) + unroll.measure(t + TRUNCATION, now).mean()) / TRUNCATION
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rule.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main(argv=None):
    options = parser(__doc__, "dynamical_language_model")
    options.add_argument("--data", type=Path, help="folder of WikiText-2's valid.txt and test.txt; Python's manual by default")
    options.add_argument("--static-steps", type=int, default=1000)
    options.add_argument("--stretches", type=int, default=128, help="meta-steps")
    options.add_argument("--passages", type=int, default=32, help="to test on, at most; half as many to tune on")
    arguments = options.parse_args(argv)
    report, (vocabulary, train, meta, test) = Report(arguments.out), load(arguments.data)
    static, usual = train_static(torch.cat(train), len(vocabulary), arguments.static_steps)
    (_, tune), (article, passages) = cut(meta, LONGEST, arguments.passages // 2), cut(test, LONGEST, arguments.passages)

    def cost(rule):
        return costs_of(rule, static, tune).sum().nan_to_num(math.inf).item()

    scales = [(rate, usual + share * usual.mean()) for share in (0.25, 0.5, 1.0) for rate in (0.003, 0.004, 0.0056, 0.008, 0.011)]
    rules = {"static": partial(sgd, 0.0, 0.0), "SGD": tuned([partial(sgd, rate) for rate in (0.1, 0.2, 0.3, 0.4, 0.6)], cost)}
    rules["RMS"] = tuned([partial(rms, *scale) for scale in scales], cost)
    rules["learned"] = FastWeights(*rules["RMS"].args[:2], usual, len(static))
    meta_train(rules["learned"], static, meta, arguments.stretches)
    costs = {name: costs_of(rule, static, passages) for name, rule in rules.items()}

    words, place, known = passages[:, 1:], torch.arange(1, LONGEST + 1), passages[:, 1:] >= 0
    bins = {f"{low}-{high}": known & (low <= place) & (place <= high) for low, high in BINS}
    saved = {f"{one} over {other}": costs[other] - costs[one] for one, other in PAIRS}
    gains = {name: [bootstrap(each, where, article) for where in (known, *bins.values())] for name, each in saved.items()}
    rows = [[name, *(f"{costs[name][where].mean().exp():.2f}" for where in (known, *bins.values()))] for name in rules]
    rows += [[name, *map("{0[0]:.3f} ({0[1]:.3f} to {0[2]:.3f})".format, each)] for name, each in gains.items()]
    title = f"Perplexity on {len(passages)} passages of {len(test)} held-out articles by position; nats saved a word, with 95 % intervals."
    report.table(title, [["", "all", *bins], *rows])

    before = torch.stack([(words[:, :t] == words[:, t : t + 1]).sum(1) for t in range(LONGEST)], 1).clamp(max=8)  # occurrences
    often = [bootstrap(saved["learned over static"], known & (before == count), article) for count in range(9)]
    each = torch.zeros(len(vocabulary)).index_add(0, words[known], saved["learned over static"][known])
    seen = torch.bincount(words[known], minlength=len(vocabulary))
    most = [f"{vocabulary[i]!r} ({int(seen[i])} x {each[i] / seen[i]:.2f} nats)" for i in each[1:].topk(12).indices + 1]
    report.note(f"Words that gain most, <unk> left out: {', '.join(most)}.")
    figure, ((left, middle, right),) = report.figure(3)
    for colour, (name, each) in zip(COLOURS, costs.items(), strict=False):
        left.plot(list(bins), [each[where].mean().exp() for where in bins.values()], "o-", color=colour, label=name)
    for colour, (name, each) in zip(COLOURS[1:], gains.items(), strict=False):
        mean, low, high = zip(*each[1:], strict=True)
        middle.plot(list(bins), mean, "o-", color=colour, label=name)
        middle.fill_between(list(bins), low, high, color=colour, alpha=0.15)
    right.bar([*map(str, range(8)), "8+"], [gain for gain, *_ in often], color=COLOURS[3])
    left.set(xlabel="position in the passage, in words", ylabel="perplexity")
    middle.set(xlabel="position in the passage, in words", ylabel="nats saved a word (95 % intervals)")
    right.set(xlabel="earlier occurrences in the passage", ylabel="nats saved a word, learned over static")
    learned = {name: getattr(rules["learned"], name) for name in ("gain", "decay", "epsilon")} | {"tensors": list(static)}
    report.save({"table": rows, "gains": gains, "by occurrence": often, "words": most, "learned": learned}, figure)


if __name__ == "__main__":
    main()
