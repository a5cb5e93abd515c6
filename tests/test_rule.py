"""Properties that the update rule must have whatever its weights are."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from rule_helpers import SHAPES, assert_updates_close, draw, flat, fresh, layout_of, rms, run, step, steps_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learned_optim.config import NetworkConfig
from learned_optim.network import OptimizerNetwork
from learned_optim.rule import CONTROL, SHORT_RUN, Control, init_state, update

MATRICES = [(16, 16), (32, 8), (8, 32), (12, 3, 3, 3)]
VECTORS = [(9,), (1, 9), (9, 1)]


def test_layout() -> None:
    layout = layout_of([torch.ones(shape) for shape in SHAPES])
    assert layout.fans == [(1, 1), (1, 1), (7, 1), (1, 6), (5, 3), (6, 1), (3, 8), (4, 12), (4, 12), (8, 3)]
    assert layout.is_matrix == [False] * 4 + [True, False] + [True] * 4
    values = torch.arange(len(SHAPES), dtype=torch.float32).expand(2, -1)
    spread = layout.spread(values)
    assert [part.unique().tolist() for part in spread.split(layout.sizes, -1)] == [[k] for k in range(len(SHAPES))]
    torch.testing.assert_close(layout.mean(spread), values)


@pytest.mark.parametrize("size", [1, 4, 10, 1000])
def test_blocks_cover_every_coordinate_once(size: int) -> None:
    layout = layout_of([torch.ones(shape) for shape in SHAPES])
    blocks = layout.blocks(size)
    assert [block.begin for block in blocks] == [0, *[block.end for block in blocks[:-1]]]
    assert blocks[-1].end == sum(layout.sizes)
    values = torch.arange(len(SHAPES), dtype=torch.float32)
    for block in blocks:
        assert block.end - block.begin < 2 * size + max(layout.sizes)
        assert torch.equal(block.spread(values).expand(block.end - block.begin), layout.spread(values)[block.begin : block.end])


def test_init_state() -> None:
    layout = layout_of([torch.ones(shape) for shape in [(3,), (), (2, 4)]])
    state = init_state(layout, NetworkConfig(hidden_units=3), torch.ones(6, 12, dtype=torch.float64))
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "control": (CONTROL, 6, 3),
        "momentum": (6, 12),
        "second_moment": (6, 12),
        "hidden": (3, 6, 12),
        "cell": (3, 6, 12),
    }
    assert all(value.dtype == torch.float64 for value in state.values())
    assert Control.of(state["control"]).trained.eq(torch.tensor([-1, -1, 0])).all()
    zeros = state | {"control": Control.of(state["control"])._replace(trained=torch.zeros(6, 3)).rows()}
    assert not any(value.any() for value in zeros.values())


def test_update_is_pure(network: OptimizerNetwork, generator: torch.Generator) -> None:
    """It leaves its arguments as they were, and what it returns shares no memory with them, so the caller may write to it."""
    params, grads = draw(SHAPES, generator), draw(SHAPES, generator)
    _, state = run(network, params, [grads])
    weights = copy.deepcopy(network.state_dict())
    arguments = (flat(grads), state, torch.full((len(SHAPES),), 10.0))
    before = copy.deepcopy(arguments)
    change, new_state = update(network, layout_of(params), *arguments)
    for result in [change, *new_state.values()]:
        result.fill_(math.nan)
    torch.testing.assert_close(arguments, before, rtol=0, atol=0)
    torch.testing.assert_close(dict(network.state_dict()), dict(weights), rtol=0, atol=0)


def test_update_is_deterministic(network: OptimizerNetwork, generator: torch.Generator) -> None:
    params, gradients = draw(SHAPES, generator), [draw(SHAPES, generator) for _ in range(3)]
    torch.testing.assert_close(run(network, params, gradients), run(network, params, gradients), rtol=0, atol=0)


def test_default_dtype_does_not_matter(network: OptimizerNetwork, generator: torch.Generator) -> None:
    """Whoever works in float64 by default gets the same fp32 rule, also after someone else used a layout of these shapes."""
    params, gradients = draw([(13,), (7, 5)], generator), [draw([(13,), (7, 5)], generator)]
    torch.set_default_dtype(torch.float64)
    try:
        state = fresh(params, network)
        change, _ = update(network, layout_of(params), flat(gradients[0]), state, torch.full((2,), 9.0, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert change.dtype == torch.float32
    torch.testing.assert_close(change, flat(run(network, params, gradients, total_steps=9.0)[0][0]), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
def test_scale_of_the_loss_does_not_matter(network: OptimizerNetwork, generator: torch.Generator, scale: float) -> None:
    params, gradients = draw(SHAPES, generator), [draw(SHAPES, generator) for _ in range(6)]
    scaled = [[grad * scale for grad in grads] for grads in gradients]
    assert_updates_close(run(network, params, scaled)[0], run(network, params, gradients)[0], rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_untrained_rule_needs_no_learning_rate(untrained: OptimizerNetwork, generator: torch.Generator, scale: float) -> None:
    """A badly scaled regression is learned at every scale of its loss with the same weights."""
    inputs = torch.randn(64, 6, generator=generator) * torch.logspace(-1, 1, 6)
    target = (inputs @ torch.randn(6, 2, generator=generator)).tanh()
    params = [0.3 * param for param in draw([(16, 6), (16,), (2, 16), (2,)], generator)]
    state, losses = fresh(params, untrained), []
    for _ in range(60):
        params = [param.detach().requires_grad_() for param in params]
        hidden = nn.functional.linear(inputs, params[0], params[1]).tanh()
        loss = scale * (nn.functional.linear(hidden, params[2], params[3]) - target).square().mean()
        losses.append(loss.item() / scale)
        grads = torch.autograd.grad(loss, params)
        updates, state = step(untrained, params, grads, state, total_steps=60.0)
        params = [param + change for param, change in zip(params, updates, strict=True)]
    assert losses[-1] < 0.15 * losses[0]


def test_normalised_momentum_is_that_of_adam(network: OptimizerNetwork, generator: torch.Generator) -> None:
    """What the LSTM sees first is Adam's step, bias corrections included."""
    gradients = [draw([(9,)], generator) for _ in range(5)]
    seen = []
    network.coordinate.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].odd[0]))
    run(network, [torch.zeros(9)], gradients)
    param = nn.Parameter(torch.zeros(9))
    adam = torch.optim.Adam([param], lr=1.0, betas=(network.config.momentum, network.config.second_moment), eps=0.0)
    for (grad,), slow in zip(gradients, seen, strict=True):
        before = param.detach().clone()
        param.grad = grad
        adam.step()
        torch.testing.assert_close(slow, before - param.detach(), rtol=1e-4, atol=1e-5)


def test_coordinates_of_negligible_gradient_are_damped(untrained: OptimizerNetwork) -> None:
    """At a hundredth of the tensor's gradient a coordinate moves as far as the others; at a millionth, hardly."""
    change = run(untrained, [torch.zeros(6)], [[torch.tensor([1.0, -1.0, 1.0, -1.0, 1e-2, 1e-6])]])[0][0][0].abs()
    assert change[4] > 0.9 * change[0]
    assert 0 < change[5] < 0.05 * change[0]


def test_flipped_gradients_flip_the_updates(network: OptimizerNetwork, generator: torch.Generator) -> None:
    params, gradients = draw(SHAPES, generator), [draw(SHAPES, generator) for _ in range(6)]
    flipped = [[-grad for grad in grads] for grads in gradients]
    expected = [[-change for change in updates] for updates in run(network, params, gradients)[0]]
    assert_updates_close(run(network, params, flipped)[0], expected, rtol=1e-5)


def test_order_of_tensors_does_not_matter(network: OptimizerNetwork, generator: torch.Generator) -> None:
    params, gradients = draw(SHAPES, generator), [draw(SHAPES, generator) for _ in range(4)]
    horizons = [10.0 + k for k in range(len(SHAPES))]
    backwards = run(network, params[::-1], [grads[::-1] for grads in gradients], horizons[::-1])[0]
    assert_updates_close([updates[::-1] for updates in backwards], run(network, params, gradients, horizons)[0], rtol=1e-5)


@pytest.mark.parametrize("shape", [(11,), (6, 5), (5, 9)], ids=str)
def test_order_of_coordinates_does_not_matter(network: OptimizerNetwork, generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """A vector's coordinates, and a matrix's rows and columns, may be numbered in any order."""
    params, gradients = draw([shape], generator), [draw([shape], generator) for _ in range(6)]
    orders = [torch.randperm(size, generator=generator) for size in shape]

    def permute(tensor: Tensor) -> Tensor:
        for dim, order in enumerate(orders):
            tensor = tensor.index_select(dim, order)
        return tensor

    permuted = run(network, [permute(params[0])], [[permute(grads[0])] for grads in gradients])[0]
    expected = [[permute(updates[0])] for updates in run(network, params, gradients)[0]]
    assert_updates_close(permuted, expected, rtol=1e-4)


def test_convolution_kernel_counts_as_its_flattened_matrix(network: OptimizerNetwork, generator: torch.Generator) -> None:
    params, gradients = draw([(4, 3, 2, 2)], generator), [draw([(4, 3, 2, 2)], generator) for _ in range(4)]
    flat = run(network, [params[0].reshape(4, 12)], [[grads[0].reshape(4, 12)] for grads in gradients])[0]
    assert_updates_close([[updates[0].reshape(4, 12)] for updates in run(network, params, gradients)[0]], flat, rtol=1e-6)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_spectral_norm_of_matrix_updates(untrained: OptimizerNetwork, generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """sqrt(max(1, fan_out / fan_in)) times the step size, to the accuracy of the Newton-Schulz iteration."""
    shapes = [shape, (4, 6), (6, 4)]
    params, gradients = draw(shapes, generator), [draw(shapes, generator)]
    change = run(untrained, params, gradients, total_steps=SHORT_RUN)[0][0][0].flatten(1)
    fan_out, fan_in = change.shape
    expected = untrained.log_step_size.exp().item() * math.sqrt(max(1.0, fan_out / fan_in))
    assert 0.6 < torch.linalg.matrix_norm(change, 2).item() / expected < 1.3


def test_matrices_of_shallow_models_take_longer_steps(untrained: OptimizerNetwork, generator: torch.Generator) -> None:
    """In all the same: up to three share what one matrix would do alone. Vectors count for nothing, and get nothing."""
    shapes = [(9, 4), (5,), (7, 7), (4, 9), (3, 8)]
    params, gradients = draw(shapes, generator), draw(shapes, generator)
    lengths = [list(map(rms, run(untrained, params[:count], [gradients[:count]])[0][0])) for count in (1, 3, 4, 5)]
    assert [each[0] for each in lengths] == pytest.approx([3 * lengths[-1][0], 1.5 * lengths[-1][0], *[lengths[-1][0]] * 2])
    assert [each[1] for each in lengths[1:]] == pytest.approx([lengths[-1][1]] * 3)


@pytest.mark.parametrize("shape", [*VECTORS, ()], ids=str)
def test_size_of_vector_updates(untrained: OptimizerNetwork, generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """The root mean square is the step size times the learned gain, exactly."""
    params, gradients = draw([shape], generator), [draw([shape], generator)]
    change = run(untrained, params, gradients, total_steps=SHORT_RUN)[0][0][0]
    expected = (untrained.log_step_size + untrained.log_vector_gain).exp().item()
    assert rms(change) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [*VECTORS, *MATRICES], ids=str)
def test_length_of_the_direction_does_not_matter(network: OptimizerNetwork, generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """The LSTM chooses where to go, never how far."""
    params, gradients = draw([shape], generator), [draw([shape], generator) for _ in range(4)]
    louder = copy.deepcopy(network)
    louder.coordinate.out.mul_(8)
    louder.coordinate.skip.mul_(8)
    assert_updates_close(run(louder, params, gradients)[0], run(network, params, gradients)[0], rtol=1e-4)


def test_matrices_without_orthogonalisation_are_sized_as_vectors(generator: torch.Generator) -> None:
    plain = OptimizerNetwork(NetworkConfig(orthogonalize_steps=0)).requires_grad_(False)
    plain.controller.log_start.zero_()
    change = run(plain, draw([(6, 5)], generator), [draw([(6, 5)], generator)], total_steps=SHORT_RUN)[0][0][0]
    assert rms(change) == pytest.approx((plain.log_step_size + plain.log_vector_gain).exp().item(), rel=1e-5)


def test_coordinates_without_gradient_never_move(network: OptimizerNetwork, generator: torch.Generator) -> None:
    """Rows and columns of a matrix (an embedding's unused words), and single coordinates of a vector."""
    shapes = [(8,), (6, 5), (5, 6), (6, 5)]  # matrices of one shape are orthogonalised together
    params = draw(shapes, generator)
    masks = [torch.ones(shape) for shape in shapes]
    masks[0][[1, 4]] = 0
    masks[1][2] = 0
    masks[2][:, 3] = 0
    masks[3][4] = 0
    gradients = [[grad * mask for grad, mask in zip(draw(shapes, generator), masks, strict=True)] for _ in range(8)]
    history, state = run(network, params, gradients)
    for updates in history:
        for change, mask in zip(updates, masks, strict=True):
            assert torch.equal(change != 0, mask != 0)
    for key in ("momentum", "second_moment", "hidden", "cell"):
        assert not (state[key] * (1 - flat(masks))).any()


def test_clock_starts_with_the_first_gradient(network: OptimizerNetwork, generator: torch.Generator) -> None:
    """Zero gradients before it change nothing at all: neither the parameters, nor the state, nor anything that follows."""
    params, gradients = draw(SHAPES, generator), [draw(SHAPES, generator) for _ in range(4)]
    zeros = [[torch.zeros_like(param) for param in params]] * 3
    waiting, state = run(network, params, zeros)
    assert not any(change.any() for updates in waiting for change in updates)
    torch.testing.assert_close(state, fresh(params, network), rtol=0, atol=0)
    late, late_state = run(network, params, [*zeros, *gradients], total_steps=4.0)
    history, state = run(network, params, gradients, total_steps=4.0)
    torch.testing.assert_close(late[3:], history, rtol=0, atol=0)
    torch.testing.assert_close(late_state, state, rtol=0, atol=0)


def test_gradients_that_vanish_when_squared_count_as_zero(network: OptimizerNetwork, generator: torch.Generator) -> None:
    params, gradients = draw(SHAPES, generator), [[1e-30 * grad for grad in draw(SHAPES, generator)] for _ in range(3)]
    history, state = run(network, params, gradients)
    assert not any(change.any() for updates in history for change in updates)
    assert not steps_of(state).any()


def test_numbers_of_tensors_are_filled_in_once_for_equal_neighbours() -> None:
    """Each fill is a launch on a GPU, and a model may have a group for each of its parameters."""

    class Fills(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten.full.default
            return func(*args, **(kwargs or {}))

    layout = layout_of([torch.ones(2)] * 7)
    rate = torch.tensor(0.25)
    with Fills() as fills:
        numbers = layout.per_tensor([0.5, 0.5, float("0.5"), rate, rate, 3, math.inf])
    assert numbers.tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 3.0, math.inf]
    assert fills.count == 3


def test_clocks_are_per_tensor(network: OptimizerNetwork, generator: torch.Generator) -> None:
    params = draw([(4,), (3, 2)], generator)
    gradients = [[draw([(4,)], generator)[0], torch.zeros(3, 2)] for _ in range(3)] + [draw([(4,), (3, 2)], generator)]
    history, state = run(network, params, gradients)
    assert steps_of(state).tolist() == [4, 1]
    assert not any(updates[1].any() for updates in history[:3])


def test_clock_runs_through_later_zero_gradients(network: OptimizerNetwork, generator: torch.Generator) -> None:
    """Once started, a step without gradient still follows the momentum, as in every optimizer with momentum."""
    params = draw([(4,)], generator)
    history, state = run(network, params, [draw([(4,)], generator), [torch.zeros(4)]])
    assert steps_of(state).item() == 2
    assert history[1][0].abs().min() > 0


@pytest.mark.parametrize("size", [1e-15, 1e-9, 1e9, 1e15])
def test_extreme_gradients_stay_finite(network: OptimizerNetwork, generator: torch.Generator, size: float) -> None:
    params, gradients = draw(SHAPES, generator), [draw(SHAPES, generator) for _ in range(4)]
    gradients[2] = [grad * size for grad in gradients[2]]
    history, state = run(network, params, gradients)
    assert all(change.isfinite().all() for updates in history for change in updates)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("total_steps", [math.inf, 6.0])
def test_replicas_side_by_side_are_a_loop(network: OptimizerNetwork, generator: torch.Generator, total_steps: float) -> None:
    """Leading dimensions are separate models: none sees another."""
    replicas = [(draw(SHAPES, generator), [draw(SHAPES, generator) for _ in range(3)]) for _ in range(4)]
    replicas[2][1][0][3].zero_()  # one replica's tensor starts later than the others'
    layout = layout_of(replicas[0][0])
    state = init_state(layout, network.config, torch.stack([flat(params) for params, _ in replicas]))
    for t in range(3):
        grads = torch.stack([flat(gradients[t]) for _, gradients in replicas])
        change, state = update(network, layout, grads, state, torch.full((4, len(SHAPES)), total_steps))
    for replica, (own, gradients) in enumerate(replicas):
        history, own_state = run(network, own, gradients, total_steps)
        torch.testing.assert_close(change[replica], flat(history[-1]), rtol=1e-4, atol=1e-5)
        mine = {key: value[:, replica] if key in ("control", "hidden", "cell") else value[replica] for key, value in state.items()}
        torch.testing.assert_close(mine, own_state, rtol=1e-4, atol=1e-5)
