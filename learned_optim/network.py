"""The optimizer network: a coordinate-wise LSTM for directions and a per-tensor controller for step sizes.

Shapes: `N` coordinates of `K` tensors laid end to end, `H` hidden units of the LSTM, `...` any leading dimensions.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn

from .config import NetworkConfig
from .features import EVEN, ODD, CoordinateFeatures
from .weights import Pretrained

MOST = 3.0  # of the correction, a logarithm, on either side of 0

# The trend that says for certain that steps only bounce about in noise, and the steps before it counts in full.
BOUND, LEAD = 0.1, 30.0

# Of the warm-up: how much slower than it climbs it falls back, how far below its first step it can get, and how much further it would have
# climbed by the time that full steps have proved themselves. By how much tensors that were trained before climb in a step, at most; and by
# how much where gradients say nothing, times the step's number.
RETREAT, DEPTH, PROOF = 0.5, 2.0, 2.0
HASTE, CREEP = 0.2, 0.7


class CoordinateLSTM(nn.Module):
    """One LSTM shared by every weight of the optimizee (Andrychowicz et al. 2016, section 2.1), made odd.

    A plain LSTM treats a positive and a negative gradient differently. Here the candidate is an odd function of odd inputs, without bias,
    and the gates see even inputs only. Hence a flip of the gradient's sign flips the update and nothing else, a weight that never had a
    gradient never moves, and meta-training need not learn either.

        i, f, o = sigmoid(W_gate [even, |h|] + b)
        a       = tanh(W_candidate [odd, h])
        c'      = f c + i a
        h'      = o tanh(c')
        d       = skip . odd + w . h'

    At initialisation `w = 0` and `skip = (1, 0)`: the untrained rule moves along the normalised momentum.
    """

    def __init__(self, hidden_units: int) -> None:
        super().__init__()
        self.gate_weight = nn.Parameter(torch.empty(3 * hidden_units, EVEN + hidden_units))
        self.gate_bias = nn.Parameter(torch.empty(3 * hidden_units))
        self.candidate_weight = nn.Parameter(torch.empty(hidden_units, ODD + hidden_units))
        self.skip = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.out = nn.Parameter(torch.zeros(hidden_units))
        nn.init.normal_(self.gate_weight, std=0.1)
        nn.init.normal_(self.candidate_weight, std=0.3)
        # Chrono initialisation (Tallec & Ollivier 2018): the cells start as running means over 2 .. 128 steps.
        spans = torch.logspace(1, 7, hidden_units, base=2.0)
        forget = torch.log(spans - 1)
        with torch.no_grad():
            self.gate_bias.copy_(torch.cat([-forget, forget, torch.zeros(hidden_units)]))

    def forward(self, features: CoordinateFeatures, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Runs one step.

        Args:
            features: of every coordinate, (ODD, ..., N) and (EVEN, ..., N).
            hidden, cell: the LSTM's state, (H, ..., N).

        Returns:
            direction (..., N), new hidden and new cell (H, ..., N).
        """
        bias = self.gate_bias.reshape(-1, *[1] * (hidden.ndim - 1))
        gates = torch.tensordot(self.gate_weight, torch.cat([features.even, hidden.abs()]), 1) + bias
        gate_in, gate_forget, gate_out = gates.sigmoid().chunk(3)
        candidate = torch.tanh(torch.tensordot(self.candidate_weight, torch.cat([features.odd, hidden]), 1))
        cell = gate_forget * cell + gate_in * candidate
        hidden = gate_out * cell.tanh()
        direction = torch.tensordot(torch.cat([self.skip, self.out]), torch.cat([features.odd, hidden]), 1)
        return direction, hidden, cell


class Controller(nn.Module):
    """Chooses each tensor's step size, since no single coordinate sees the scale of its layer.

    It sees the trend of a tensor, the recent mean of the cosine between its gradient and its momentum (step 2 in `rule`). In the formulas
    `c` is half the tensor's trend and half the mean over all tensors, `t` the tensor's step, `T` the horizon.

    **Correction.** The logarithm `k` of the step size's correction follows the hypergradient (Baydin et al. 2018, "Online learning rate
    adaptation with hypergradient descent"). While gradients point where the steps before them went, steps are too short. Once they point
    back, steps are too long. With `fading = 1 / (1 + t / patience)`, and `bold = 2 fading` where the horizon is known, else `fading^2`,

        k' = k + (1 - t / T) * (rate * bold * max(c, 0) - shrink * clamp(-c / BOUND, 0, 1) / (t + LEAD)),

    with `|k'| <= MOST`, and without `t / T` where the horizon is not known.

    - `c` is a mean, since one cosine scatters, and a rule that answers one sign more than the other would turn scatter into growth.
    - Lengthening fades. Once the scale is found, the cosine shows the schedule and the noise.
    - With a horizon the controller may be bold at first, since annealing undoes what was too bold. It comes to rest with the horizon, or it
      would undo the annealing.
    - A negative trend means that steps bounce about in noise (Pflug 1983; Chee & Toulis 2018, "Convergence diagnostics for stochastic
      gradient descent"). They shorten by the root of `t`, beside what the schedule does.

    **Warm-up.** First steps are short enough to be undone: steps of the prior's size destroy a model that was trained before within two of
    them, and no gradient shows afterwards what it was. They *climb*, from `e^log_start` of what the rest says, by `climb_rate` times the
    mean of the matrices' trends, and fall back where that is negative. Vectors do not count, where there are matrices: a fine-tuned model's
    bounce long before the rest does. From scratch gradients agree, and full length takes a few steps. In fine-tuning they hardly do, and
    steps settle at the length at which the agreement ends. Full steps have yet to prove themselves, since the trend, a mean of ten steps,
    still speaks of shorter ones: the warm-up is over once gradients have agreed for as long as would have lengthened steps by `e^PROOF`
    more, without turning back. Until then steps still fall back.

    **Care.** Where a new read-out on a trained model starts far off, all gradients agree until it is where it belongs, and tell nothing of
    what the rest bears. But that a matrix was trained can be seen before its first step (`features.unevenness`). How long its steps may be
    cannot, only that there is something to lose. So it climbs by at most `HASTE` in a step. What is fresh, the read-out among them, climbs
    as ever and is done before. Vectors, of which nothing can be seen, are as careful as the mean of the matrices.

    **Creep.** In small batches, behind batch normalisation above all, gradients neither agree nor turn back, however short steps are, and
    what was trained before would stay where it is. So where its evidence is less it climbs by `min(CREEP / t, HASTE)`, in all by about
    `CREEP log(t)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(math.log(0.03)))
        self.log_patience = nn.Parameter(torch.tensor(math.log(300.0)))
        self.shrink = nn.Parameter(torch.tensor(0.5))
        self.power = nn.Parameter(torch.tensor(1.0))  # of the pace, see step 5 in `rule`
        self.log_start = nn.Parameter(torch.tensor(math.log(0.02)))  # at most 0, which is no warm-up
        self.climb_rate = nn.Parameter(torch.tensor(3.0))

    def forward(self, trend: Tensor, age: Tensor, progress: Tensor, known: Tensor, correction: Tensor) -> Tensor:
        """Runs one step; all tensors are (..., K).

        Args:
            trend: recent mean cosine of each tensor's gradient and momentum.
            age: in steps.
            progress: age / horizon in [0, 1]; 0 where the horizon is not known.
            known: 1 where the horizon is known, else 0.
            correction: logarithm of the step size's correction.

        Returns:
            the new correction.
        """
        trend = 0.5 * (trend + trend.mean(-1, keepdim=True))
        fading = 1 / (1 + age / self.log_patience.exp())
        bold = torch.where(known > 0, 2 * fading, fading**2)
        bouncing = (-trend / BOUND).clamp(0, 1) / (age + LEAD)
        change = (1 - progress) * (self.log_rate.exp() * bold * trend.clamp(min=0) - self.shrink * bouncing)
        return (correction + change).clamp(-MOST, MOST)

    def climb(self, trend: Tensor, climbed: Tensor, trained: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the warm-up.

        Args:
            trend: as in `forward`, (..., K).
            climbed: what has been gained so far, a logarithm, (..., K).
            trained: whether a tensor looked trained before its first step, from 0 to 1, or -1 where that cannot be seen, (..., K).
            age: in steps, (..., K).

        Returns:
            the same after this step, and the logarithm of the warm-up's factor.
        """
        is_matrix = 1 - (trained < 0).to(trained.dtype)
        matrices = is_matrix.sum(-1, keepdim=True)
        mean = torch.where(matrices > 0, (trend * is_matrix).sum(-1, keepdim=True) / matrices.clamp(min=1), trend.mean(-1, keepdim=True))
        full = -self.log_start
        rise = self.climb_rate * torch.where(mean > 0, mean, RETREAT * mean)
        share = (trained * is_matrix).sum(-1, keepdim=True) / matrices.clamp(min=1)
        too_fast = (rise - HASTE).clamp(min=0)
        too_slow = ((CREEP / age).clamp(max=HASTE) - rise.clamp(min=0)).clamp(min=0)
        rise = rise + torch.where(trained < 0, share, trained) * (too_slow - too_fast)
        begin = torch.where(rise < 0, torch.minimum(climbed, full), climbed)
        after = torch.where(full + PROOF - climbed > 0, (begin + rise).clamp(min=-DEPTH), climbed)
        climbed = torch.where(full > 0, after, climbed)
        return climbed, (self.log_start + climbed).clamp(max=0)


class OptimizerNetwork(Pretrained):
    """The meta-parameters: everything that meta-training learns; and how they get to files and to the Hugging Face Hub.

    Args:
        config: shape of the network and constants of the rule.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.coordinate = CoordinateLSTM(config.hidden_units)
        self.controller = Controller()
        # Logarithms of the prior step size, and of a vector's update RMS in units of it.
        self.log_step_size = nn.Parameter(torch.tensor(math.log(0.05)))
        self.log_vector_gain = nn.Parameter(torch.tensor(math.log(0.15)))


def load_network(source: str | os.PathLike[str], *, revision: str | None = None) -> OptimizerNetwork:
    """Loads an optimizer network; the same as `OptimizerNetwork.from_pretrained`, which says what may be loaded and what is refused.

    Args:
        source: the name of a bundled set, a local folder, or an id on the Hugging Face Hub ("user/name").
        revision: branch, tag or commit of a Hub repository.

    Examples:
        >>> import torch
        >>> from learned_optim import LearnedOptimizer, load_network
        >>> network = load_network("small")
        >>> network.config.lstm_format
        'int8'
        >>> optimizer = LearnedOptimizer(torch.nn.Linear(4, 1).parameters(), network)
    """
    return OptimizerNetwork.from_pretrained(source, revision)
