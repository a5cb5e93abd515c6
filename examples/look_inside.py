"""What the optimizer network has learned, in pictures.

    pip install ".[demo]" -c constraints.txt
    python examples/look_inside.py

How it answers sequences of gradients, and a matrix of them, beside Adam and Muon; the step size that it gives each tensor of a small
transformer, with a known horizon and without; and the ways of its hidden states. Shapes: `T` steps, `H` hidden units.
"""

import math

import torch
from reporting import COLOURS, Report, parser
from torch import Generator, Tensor

from learned_optim import LearnedOptimizer, load_network
from learned_optim.features import Layout
from learned_optim.meta_train.families.text import Block, TextModel, text_samplers, token_loss
from learned_optim.rule import init_state, orthogonalize, update

WIDTH, LENGTH = 32, 16  # of the transformer, and of its windows in characters
CROWD = 512  # weights with noisy gradients around the probes, since lengths are relative to the tensor's


def sequences(steps: int) -> dict[str, Tensor]:
    """Gradients (T,), in units of the other weights' noise."""
    t, noise = torch.arange(steps), torch.randn(steps, generator=Generator().manual_seed(0))
    return {
        "steady": torch.ones(steps),
        "alternating": 1.0 - 2.0 * (t % 2),
        "turning round": torch.where(t < steps // 2, 1.0, -1.0),
        "one in ten": (t % 10 == 0).float(),
        "noise": noise,
        "signal in noise": 0.3 + noise,
    }


def adam(grads: Tensor) -> Tensor:
    """Directions (T, ...), with the moments' decays 0.9 and 0.999; epsilon is left out."""
    momentum, square, found = torch.zeros_like(grads[0]), torch.zeros_like(grads[0]), []
    for t, grad in enumerate(grads, 1):
        momentum, square = torch.lerp(grad, momentum, 0.9), torch.lerp(grad.square(), square, 0.999)
        found.append(momentum / (1 - 0.9**t) / (square / (1 - 0.999**t) + 1e-12).sqrt())
    return torch.stack(found)


def muon(grads: Tensor) -> Tensor:
    """Directions (T, ...): Nesterov momentum, and of matrices that one orthogonalised (Jordan et al. 2024)."""
    momentum, found = torch.zeros_like(grads[0]), []
    for grad in grads:
        momentum = 0.95 * momentum + grad
        direction = grad + 0.95 * momentum
        found.append(orthogonalize(direction, 5) if grad.ndim == 2 else direction)
    return torch.stack(found)


@torch.no_grad()
def learned(network, grads: Tensor) -> Tensor:
    """Changes with the sign turned (T, ...), of a tensor of that shape."""
    layout, found = Layout((grads.shape[1:],), torch.device("cpu")), []
    state = init_state(layout, network.config, torch.zeros(grads[0].numel()))
    for grad in grads.flatten(1):
        change, state = update(network, layout, grad, state, torch.tensor([math.inf]))
        found.append(-change)
    return torch.stack(found).view_as(grads)


def training(network, steps: int, horizon: int | None) -> tuple[list[float], dict[str, list[float]], Tensor]:
    """Trains a transformer: losses, each tensor's step sizes by name, and the hidden states of 12 weights of a layer, (T, H, 12).

    A step size is the change's length in the units that the rule gives tensors of its kind: the spectral norm of a matrix over
    sqrt(max(1, fan_out / fan_in)), the root mean square of a vector over its constant.
    """
    data = text_samplers(Generator().manual_seed(0), LENGTH, 16)[0]
    torch.manual_seed(0)
    model = TextModel(WIDTH, [Block(WIDTH, 4) for _ in range(2)], LENGTH, tied=False)
    watched, generator = model.blocks[0].up.weight, Generator().manual_seed(0)
    losses, sizes, hidden = [], {name: [] for name, _ in model.named_parameters()}, []
    optimizer, gain = LearnedOptimizer(model.parameters(), network, total_steps=horizon), network.log_vector_gain.exp().item()
    for _ in range(steps):
        before = [param.detach().clone() for param in model.parameters()]
        inputs, targets = data(generator)
        loss = token_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for (name, param), old in zip(model.named_parameters(), before, strict=True):
            change = param.detach() - old
            unit = gain if change.ndim < 2 else math.sqrt(max(1, change.shape[0] / change.shape[1]))
            length = change.square().mean().sqrt() if change.ndim < 2 else torch.linalg.matrix_norm(change, 2)
            sizes[name].append(length.item() / unit)
        hidden.append(optimizer.state[watched]["lstm"].chunk(2)[0].flatten(1)[:, :: watched.numel() // 12].float().clone())
    return losses, sizes, torch.stack(hidden)


def main(argv=None):
    options = parser(__doc__, "look_inside")
    options.add_argument("--weights", default="default", help="a bundled set, a folder or a repository of the Hub")
    options.add_argument("--steps", type=int, default=300, help="of training")
    options.add_argument("--probe-steps", type=int, default=60)
    arguments = options.parse_args(argv)
    report, network, steps = Report(arguments.out), load_network(arguments.weights), arguments.probe_steps

    probes, crowd = sequences(steps), torch.randn(steps, CROWD, generator=Generator().manual_seed(1))
    grads = torch.cat([torch.stack([*probes.values()], 1), crowd], 1)
    ways = {"learned": learned(network, grads), "Adam": adam(grads), "momentum": muon(grads)}
    ways = {name: way / way[:, len(probes) :].square().mean(1, keepdim=True).sqrt() for name, way in ways.items()}
    lengths = {name: [way[steps // 2 :, k].square().mean().sqrt().item() for way in ways.values()] for k, name in enumerate(probes)}
    title = f"Root mean square of a weight's direction over the last {steps - steps // 2} steps, in units of that of {CROWD} weights whose"
    report.table(f"{title} gradients are noise.", [["gradients", *ways], *([name, *each] for name, each in lengths.items())])

    parts = torch.randn(2, 32, 32, generator=Generator().manual_seed(2)).double()
    (left, right), strength = torch.linalg.qr(parts)[0].float(), torch.logspace(0, -3, 32)
    noisy = (left * strength) @ right.mT + 0.003 * torch.randn(30, 32, 32, generator=Generator().manual_seed(3))
    spectra = {"gradient": noisy[-1], "learned": learned(network, noisy)[-1], "Adam": adam(noisy)[-1], "Muon": muon(noisy)[-1]}
    spectra = {name: (values := torch.linalg.svdvals(matrix)) / values.max() for name, matrix in spectra.items()}

    runs = {horizon: training(network, arguments.steps, horizon) for horizon in (None, arguments.steps)}
    marks = (1, arguments.steps // 4, arguments.steps)
    rows = [["tensor", *(f"{name}, step {t}" for name in ("no horizon", "horizon") for t in marks)]]
    rows += [[name, *(sizes[name][t - 1] for _, sizes, _ in runs.values() for t in marks)] for name in runs[None][1]]
    ends = [sum(losses[-20:]) / len(losses[-20:]) for losses, _, _ in runs.values()]
    report.table(f"Step sizes in training a transformer; its loss ends at {ends[0]:.3f} without a horizon, at {ends[1]:.3f} with.", rows)

    figure, axes = report.figure(5, 2, size=(3.4, 2.8))
    *panels, spectrum, endless, annealed, plane = axes.flat
    for one, (k, name) in zip(panels, enumerate(probes), strict=True):
        for colour, (way, directions) in zip(COLOURS, ways.items(), strict=False):
            one.plot(directions[:, k], color=colour, label=way)
        one.plot(grads[:, k], ":", color=COLOURS[7], lw=0.8, label="gradient")
        one.set(title=name, xlabel="step", ylabel="direction")
    for colour, (name, values) in zip((COLOURS[7], *COLOURS), spectra.items(), strict=False):
        spectrum.plot(values, "o-", ms=3, color=colour, label=name)
    spectrum.set(title="a matrix of noisy gradients, step 30", xlabel="singular value", ylabel="share of the largest", yscale="log")
    for one, (horizon, (_, sizes, _)) in zip((endless, annealed), runs.items(), strict=True):
        one.set(title=f"step sizes, horizon {horizon or 'unknown'}; orange: vectors", xlabel="step", ylabel="step size", yscale="log")
        for name, each in sizes.items():
            one.plot(each, lw=0.8, color=COLOURS["norm" in name or "bias" in name])
    hidden = runs[None][2].movedim(1, -1)  # (T, weights, H)
    centred = (hidden - hidden.mean((0, 1))).flatten(0, 1)
    main_plane = torch.linalg.svd(centred, full_matrices=False)[2][:2].mT
    for k, way in enumerate((centred @ main_plane).view(*hidden.shape[:2], -1)[:60, :3].unbind(1)):
        plane.plot(way[:, 0], way[:, -1], lw=0.6, color=COLOURS[k], label=f"weight {k + 1}")
    plane.set(title="hidden states of three weights, 60 steps", xlabel="first principal component", ylabel="second")
    report.save({"lengths": lengths, "step sizes": rows, "losses": ends, "spectra": spectra}, figure)


if __name__ == "__main__":
    main()
