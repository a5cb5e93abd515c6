"""The optimizer network: a coordinate-wise LSTM for directions and a per-tensor LSTM for step sizes.

Shapes: `N` coordinates of one tensor, `H` hidden units of the coordinate-wise LSTM, `K` tensors, `C` hidden units of the controller, `S`
statistics of a tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import NetworkConfig
from .features import STATISTICS, CoordinateFeatures

ODD, EVEN = 2, 3  # features of `features.CoordinateFeatures`


class CoordinateLSTM(nn.Module):
    """One LSTM shared by every weight of the optimizee (Andrychowicz et al. 2016, section 2.1), made odd.

    A plain LSTM treats a positive and a negative gradient differently. Here the candidate is an odd function of odd inputs, without bias, and
    the gates see even inputs only. Hence a flip of the gradient's sign flips the update and nothing else, a weight that never had a
    gradient never moves, and meta-training need not learn either.

        i, f, o = sigmoid(W_gate [even, |h|] + b + context)
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

    def forward(self, features: CoordinateFeatures, context: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Args: features of N coordinates; context (3 H,), added to the gates' bias; hidden and cell (H, N).

        Returns: direction (N,), new hidden (H, N), new cell (H, N).
        """
        gates = self.gate_weight @ torch.cat([features.even, hidden.abs()]) + (self.gate_bias + context).unsqueeze(-1)
        gate_in, gate_forget, gate_out = gates.sigmoid().chunk(3)
        candidate = torch.tanh(self.candidate_weight @ torch.cat([features.odd, hidden]))
        cell = gate_forget * cell + gate_in * candidate
        hidden = gate_out * cell.tanh()
        return self.skip @ features.odd + self.out @ hidden, hidden, cell


class Controller(nn.Module):
    """A per-tensor LSTM that chooses each tensor's step size, since no single coordinate sees the scale of its layer (VeLO, Metz et al. 2022,
    section 2.1).

    It reads every tensor's statistics beside their mean over all tensors, and writes the logarithm of a correction to the prior step size,
    bounded to exp(±3), and a bias for the gates of the coordinate-wise LSTM. Both are zero at initialisation.
    """

    def __init__(self, control_units: int, hidden_units: int) -> None:
        super().__init__()
        self.input = nn.Linear(2 * STATISTICS + control_units, 4 * control_units)
        self.output = nn.Linear(control_units, 1 + 3 * hidden_units)
        nn.init.normal_(self.input.weight, std=1 / math.sqrt(2 * STATISTICS + control_units))
        nn.init.zeros_(self.input.bias)
        nn.init.ones_(self.input.bias[control_units : 2 * control_units])  # the forget gate
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, statistics: Tensor, control: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Args: statistics (K, S); control (K, 2, C), the hidden state and cell.

        Returns: log step-size correction (K,), context (K, 3 H), new control (K, 2, C).
        """
        hidden, cell = control.unbind(1)
        everywhere = statistics.mean(0).expand_as(statistics)
        gates = self.input(torch.cat([statistics, everywhere, hidden], dim=-1))
        gate_in, gate_forget, gate_out, candidate = gates.chunk(4, dim=-1)
        cell = gate_forget.sigmoid() * cell + gate_in.sigmoid() * candidate.tanh()
        hidden = gate_out.sigmoid() * cell.tanh()
        output = self.output(hidden)
        return 3 * torch.tanh(output[:, 0] / 3), output[:, 1:], torch.stack([hidden, cell], dim=1)


class OptimizerNetwork(nn.Module):
    """The meta-parameters: everything that meta-training learns.

    Args:
        config: shape of the network and constants of the rule.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.coordinate = CoordinateLSTM(config.hidden_units)
        self.controller = Controller(config.control_units, config.hidden_units)
        # Logarithms of the prior step size with a known horizon and without, and of the vectors' step over the matrices'.
        self.log_step_size = nn.Parameter(torch.tensor([math.log(0.04), math.log(0.08)]))
        self.log_vector_gain = nn.Parameter(torch.tensor(math.log(0.15)))
