"""The Triton kernels beside `rule.update`: on a GPU where there is one, elsewhere in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_helpers import acting_network
from test_kernels import FORMATS, assert_near, assert_states_near, network_of
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learned_optim import LearnedOptimizer, OptimizerNetwork, rule
from learned_optim.features import Layout

pytest.importorskip("triton", reason="Triton is not installed")
from learned_optim.kernels import gpu, gpu_passes, gpu_replay, replay

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# The last but one is larger than a block, and the last one a multiple of what a thread loads at once besides. The interpreter takes about
# a second for a block and step, hence few of both.
SHAPES = [(), (1,), (17,), (1, 9), (5, 7), (7, 5), (40, 3, 3, 3), (32, 40)]
FEW = [(17,), (5, 7)]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are orthogonalised as in the rule, so that all else can be compared closely."""
    monkeypatch.setattr(gpu, "MATRIX_DTYPE", None)


def gradients(step: int, shapes: list[tuple[int, ...]], scale: float = 1.0) -> list[Tensor]:
    generator = Generator().manual_seed(step)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]


def start(shape: tuple[int, ...]) -> Tensor:
    """Ones; but matrices that look fresh, of all shapes but one."""
    fresh = min(shape[:2], default=0) > 1 and shape != (7, 5)
    return torch.randn(shape, generator=Generator().manual_seed(0)) if fresh else torch.ones(shape)


def train(
    kernel: str,
    network: OptimizerNetwork,
    shapes: list[tuple[int, ...]] = SHAPES,
    grads: Callable[[int, list[tuple[int, ...]]], list[Tensor]] = gradients,
    dtype: torch.dtype = torch.float32,
    steps: int = 2,
    **options: float,
) -> tuple[list[Tensor], LearnedOptimizer]:
    """Parameters after some steps, in fp32, and the optimizer."""
    params = [nn.Parameter(start(shape).to(DEVICE, dtype)) for shape in shapes]
    optimizer = LearnedOptimizer(params, network, total_steps=20, kernel=kernel, **options)
    for step in range(steps):
        for param, grad in zip(params, grads(step, shapes), strict=True):
            param.grad = grad.to(DEVICE, dtype)
        optimizer.step()
    return [param.detach().float() for param in params], optimizer


def compare(network: OptimizerNetwork, tolerance: float = 1e-4, **options: object) -> None:
    (mine, optimizer), (theirs, reference) = (train(kernel, network, **options) for kernel in ("triton", "reference"))
    assert optimizer.kernels == {DEVICE.type: "triton"}
    assert_near(mine, theirs, tolerance)
    if tolerance <= 1e-4:
        assert_states_near(optimizer, reference)


def test_equals_the_rule() -> None:
    compare(acting_network(hidden_units=2, lstm_format="float32"), weight_decay=0.1, lr=0.5)


@pytest.mark.parametrize("units", [1, 3, gpu.MAX_UNITS])
def test_hidden_units(units: int) -> None:
    compare(acting_network(hidden_units=units, lstm_format="float32"), shapes=FEW)


@pytest.mark.parametrize(("moments", "units"), FORMATS)
def test_stored_formats(moments: str, units: str) -> None:
    """Both round by the same random bits, so what differs are values on a border, and what these lead to."""
    network = network_of("default", moment_format=moments, lstm_format=units)
    (mine, optimizer), (theirs, reference) = (train(kernel, network, shapes=[(17,), (40, 27)]) for kernel in ("triton", "reference"))
    assert_near(mine, theirs, 0.02)
    for one, other in zip(optimizer.state.values(), reference.state.values(), strict=True):
        for key, value in other.items():
            assert one[key].dtype == value.dtype
            assert (one[key].float() - value.float()).abs().mean() <= 0.01 * value.float().abs().max() + 1e-7, key


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    compare(network_of("default"), max(2e-4, 8 * torch.finfo(dtype).eps), shapes=FEW, dtype=dtype, weight_decay=0.1)


@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_tiny_and_huge_gradients(scale: float) -> None:
    """As in `test_kernels`."""
    compare(network_of("default"), 2e-4, shapes=FEW, grads=lambda step, shapes: gradients(step, shapes, scale))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e20])
def test_poison_stays_in_its_tensors(poison: float) -> None:
    """As in `test_kernels`. The others count the tensor as one with a gradient of zero, since nobody waits to see which one it is."""

    def grads(step: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        values = gradients(step, shapes)
        if step == 1:
            values[0][5] = poison
        return values

    network = network_of("default", moment_format="bfloat16", lstm_format="int8")
    (first, before), (mine, optimizer), (clean, _) = (
        train("triton", network, FEW, each, steps=steps, weight_decay=0.1) for each, steps in ((grads, 1), (grads, 2), (gradients, 2))
    )
    assert mine[0].equal(first[0])
    states = [list(each.state.values()) for each in (optimizer, before)]
    assert all(states[0][0][key].equal(value) for key, value in states[1][0].items())
    assert_near(mine[1:], clean[1:], 0.2)
    assert optimizer.skipped == 1
    assert all(value.isfinite().all() for value in states[0][1].values())


def test_non_contiguous_gradients_and_parameters() -> None:
    params = {kernel: nn.Parameter(start((5, 7)).to(DEVICE).T) for kernel in ("triton", "reference")}
    for kernel, param in params.items():
        optimizer = LearnedOptimizer([param], network_of("default"), weight_decay=0.1, kernel=kernel)
        for step in range(2):
            param.grad = torch.randn(5, 21, generator=Generator().manual_seed(step)).to(DEVICE)[:, ::3].T
            optimizer.step()
        assert not param.is_contiguous()
    assert_near([params["triton"].detach()], [params["reference"].detach()])


def test_kinds_of_tensors_that_share_no_launch() -> None:
    """Aligned or not, and dtypes of gradients and parameters; also one that is left to torch between others."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    shapes = [(64,), (17,), (3,), (5, 7)]
    results = []
    for kernel in ("triton", "reference"):
        params = [nn.Parameter(torch.full(shape, 2.0**-6, dtype=dtype, device=DEVICE)) for shape, dtype in zip(shapes, dtypes, strict=True)]
        optimizer = LearnedOptimizer(params, network_of("default"), total_steps=20, kernel=kernel)
        for step in range(2):
            for param, grad in zip(params, gradients(step, shapes), strict=True):
                param.grad = grad.to(DEVICE, param.dtype)
            optimizer.step()
        results.append([param.detach().float() for param in params])
    assert_near(*results, 0.02)


def test_odd_to_the_last_bit() -> None:
    """A flip of the gradient's sign flips the update and nothing else."""
    network, shapes = network_of("default", lstm_format="float32"), [(17,)]
    ways = [train("triton", network, shapes, functools.partial(gradients, scale=sign))[1] for sign in (1, -1)]
    moments, states = ([next(iter(way.state.values()))[key] for way in ways] for key in ("moments", "lstm"))
    assert states[0].equal(-states[1])
    assert moments[0][0].equal(-moments[1][0])


def test_tensor_lr() -> None:
    shapes = [(3,)]
    results = [train("triton", network_of("default"), shapes, lr=lr)[0] for lr in (0.25, torch.tensor(0.25, device=DEVICE))]
    assert results[0][0].equal(results[1][0])


def test_matrices_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton-Schulz in 8 bits of precision moves singular values by more than it rounds."""
    monkeypatch.setattr(gpu, "MATRIX_DTYPE", torch.bfloat16)
    monkeypatch.setattr(rule, "SMALL", 16)  # the interpreter is too slow for what is larger
    matrices_in_bfloat16((24, 16))


def matrices_in_bfloat16(shape: tuple[int, int]) -> None:
    (mine,), (theirs,) = (train(kernel, network_of("default"), [shape])[0] for kernel in ("triton", "reference"))
    moved, expected = mine - start(shape).to(DEVICE), theirs - start(shape).to(DEVICE)
    assert not moved.equal(expected)  # fewer bits were at work
    assert 0.001 < (moved - expected).norm() / expected.norm() < 0.05


def test_resumes_with_the_same_bits() -> None:
    network = network_of("default", moment_format="bfloat16", lstm_format="int8")
    params, optimizer = train("triton", network, FEW, steps=1)
    copies = [nn.Parameter(param.clone()) for param in params]
    resumed = LearnedOptimizer(copies, network, total_steps=20, kernel="triton")
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    originals = optimizer.param_groups[0]["params"]
    for members, each in ((originals, optimizer), (copies, resumed)):
        for param, grad in zip(members, gradients(1, FEW), strict=True):
            param.grad = grad.to(DEVICE)
        each.step()
    for one, other in zip(originals, copies, strict=True):
        assert one.equal(other)
        assert all(value.equal(resumed.state[other][key]) for key, value in optimizer.state[one].items())


def test_steps_upload_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a gradient lies elsewhere."""
    uploads = []
    monkeypatch.setattr(gpu, "upload", lambda numbers, device: uploads.append(numbers) or upload(numbers, device))
    upload = gpu.upload_by_kernels  # the other way; the table is the same
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    param.grad = torch.ones(3, device=DEVICE)
    optimizer = LearnedOptimizer([param], kernel="triton")
    optimizer.step()
    optimizer.step()
    assert len(uploads) == 1
    kept, param.grad = param.grad, torch.ones(3, device=DEVICE)
    optimizer.step()
    assert len(uploads) == 2
    assert kept.data_ptr() != param.grad.data_ptr()


def entries(rows: list[dict[str, int]]) -> list[int]:
    return [row.get(field, 0) for row in rows for field in gpu_passes.FIELDS]


def test_tables() -> None:
    layout = Layout(tuple(torch.Size([size]) for size in (5, 3 * gpu_passes.BLOCK, gpu_passes.BLOCK + 1)), DEVICE)
    places = [(2**48, 2, 2, 2), (2**48 + 1, 0, 3, 3), (2**48 + 2, 1, 0, 0)]
    numbers = entries([dict(zip(("size", "order", "first_block", "first_chunk"), row, strict=True)) for row in places])
    slow, fast = (gpu.Tables.make(layout, tuple(numbers), way) for way in (gpu.upload_by_kernels, gpu.upload))
    assert slow.tensors.flatten().tolist() == fast.tensors.flatten().tolist() == numbers
    assert slow.blocks.tolist() == fast.blocks.tolist() == [[2, 0], [2, 1], [0, 0], [1, 0], [1, 1], [1, 2]]


def test_means_in_chunks() -> None:
    """Of tensors of one chunk, of two, and of more than are added up at once."""
    many = gpu_passes.CHUNKS + 2
    sizes = [3, gpu_passes.BLOCK * gpu_passes.CHUNK + 1, many * gpu_passes.BLOCK * gpu_passes.CHUNK]
    layout = Layout(tuple(torch.Size([size]) for size in sizes), DEVICE)
    counts = [-(-size // gpu_passes.BLOCK) for size in sizes]
    firsts, chunks, order = [counts[2], counts[2] + counts[0], 0], [many, many + 1, 0], [2, 0, 1]
    named = zip(sizes, order, firsts, chunks, strict=True)
    rows = [{"size": size, "count": size, "order": nth, "first_block": block, "first_chunk": chunk} for size, nth, block, chunk in named]
    numbers = entries(rows)
    tables = gpu.Tables.make(layout, tuple(numbers), gpu.upload)
    assert len(tables.chunks) == many + 3
    sums = torch.rand(len(tables.blocks), 4, generator=Generator().manual_seed(0)).to(DEVICE)
    totals, means = sums.new_empty(many + 3, 4, dtype=torch.float64), sums.new_empty(4, 3)
    gpu_passes.add_up[many + 3,](tables.tensors, tables.chunks, sums, totals, 4)
    gpu_passes.means[3,](tables.tensors, totals, means, 3, 4)
    expected = [sums[first : first + count].double().sum(0) / size for first, count, size in zip(firsts, counts, sizes, strict=True)]
    torch.testing.assert_close(means, torch.stack(expected, -1).float(), rtol=1e-6, atol=0)


def test_optimizers_keep_tables_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of them, one for each parameter say, do not upload theirs again at each step; and each keeps a few."""
    monkeypatch.setattr(gpu, "KEPT_TABLES", 1)
    uploads = []
    monkeypatch.setattr(gpu, "upload", lambda numbers, device: uploads.append(numbers) or upload(numbers, device))
    upload = gpu.upload_by_kernels
    params = [nn.Parameter(torch.ones(size, device=DEVICE)) for size in range(1, 3)]
    optimizers = [LearnedOptimizer([param], kernel="triton") for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert len(uploads) == len(params)
    kept, params[0].grad = params[0].grad, torch.ones_like(params[0])
    optimizers[0].step()
    assert kept is not None
    assert len(uploads) == len(params) + 1
    assert len(optimizers[0]._ledgers[DEVICE].memory["tables"]) == gpu.KEPT_TABLES


class Operations(TorchDispatchMode):
    """Those of the rule that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in replay.PLAIN:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_recordings_equal_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "REPLAYED", True)
    compare(acting_network(hidden_units=1, lstm_format="float32"), shapes=[(3,), (1,)], weight_decay=0.1)


def test_what_tensors_have_once_takes_no_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would cost the host some microseconds. What the recordings would give is of no interest here."""
    monkeypatch.setattr(gpu, "REPLAYED", True)
    monkeypatch.setattr(gpu_replay, "_replay", {(1,): lambda *_: None})
    network = network_of("acting", orthogonalize_steps=0)
    with Operations() as operations:
        _, optimizer = train("triton", network, FEW, steps=1, weight_decay=0.1)
    assert len(operations.found) > 100
    programs = optimizer._ledgers[DEVICE].memory["replay"].programs
    assert {name for name, _ in programs} == {"before directions", "before update"}
    assert all(isinstance(program, gpu_replay.Program) for program in programs.values()), programs
    with Operations() as operations:
        optimizer.step()
    assert not operations.found


def test_in_a_compiled_function() -> None:
    """As in `test_kernels`; what tensors have once is written back to addresses too."""
    results = []
    for wrap in (lambda function: function, lambda function: torch.compile(function, backend="eager")):
        param = nn.Parameter(torch.ones(5, device=DEVICE))
        optimizer = LearnedOptimizer([param], network_of("default"), kernel="triton")
        param.grad = torch.arange(5.0, device=DEVICE)
        for _ in range(2):
            wrap(optimizer.step)()
        results.append([param, *optimizer.state[param].values()])
        assert optimizer.state[param]["control"][0] == 2
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_names_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="runs on CUDA devices, and a parameter is on cpu"):
        LearnedOptimizer([nn.Parameter(torch.zeros(2))], kernel="triton")
    with pytest.raises(RuntimeError, match=f"up to {gpu.MAX_UNITS} hidden units, and this one has 9"):
        LearnedOptimizer([nn.Parameter(torch.zeros(2))], acting_network(hidden_units=9), kernel="triton")


def test_without_triton() -> None:
    """By name it is missed, and importing the package does not look for it."""
    program = """if True:
        import sys, torch, warnings
        from learned_optim import LearnedOptimizer
        assert "triton" not in sys.modules
        sys.modules["triton"] = None
        param = torch.nn.Parameter(torch.zeros(2))
        try:
            LearnedOptimizer([param], kernel="triton")
        except RuntimeError as error:
            assert "pip install triton" in str(error)
        optimizer = LearnedOptimizer([param])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):  # as for parameters that moved
                assert optimizer._choose_kernel(torch.device("cuda"), stacklevel=1) == "reference"
        assert len(caught) == 1 and "CUDA devices take PyTorch operations" in str(caught[0].message)
        print("done")"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "done\n"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
class TestOnADevice:
    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it does not see everything
    def test_is_chosen_and_never_waits(self) -> None:
        params = [nn.Parameter(start(shape).to(DEVICE)) for shape in SHAPES]
        optimizer = LearnedOptimizer([{"params": params[:4], "lr": 0.5}, {"params": params[4:], "weight_decay": 0.1}])
        for step in range(4):
            for param, grad in zip(params, gradients(step, SHAPES), strict=True):
                param.grad = grad.to(DEVICE)  # elsewhere each time
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the network moves at the first step
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert optimizer.kernels == {"cuda": "triton"}

    @pytest.mark.parametrize(("moments", "units"), FORMATS)
    def test_many_blocks(self, moments: str, units: str) -> None:
        """More than a program adds up at once, in tensors of two kinds."""
        network = network_of("default", moment_format=moments, lstm_format=units)
        shapes = [(gpu_passes.CHUNK * gpu_passes.BLOCK + 16,), (2 * gpu_passes.CHUNK * gpu_passes.BLOCK + 3,), (17,)]
        mine, theirs = (train(kernel, network, shapes=shapes)[0] for kernel in ("triton", "reference"))
        assert_near(mine, theirs, 0.02)

    def test_large_matrices_in_bfloat16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "MATRIX_DTYPE", torch.bfloat16)
        matrices_in_bfloat16((3 * rule.SMALL // 2, rule.SMALL))

    @pytest.mark.parametrize("captured_backward", [False, True])
    def test_runs_in_a_cuda_graph(self, captured_backward: bool) -> None:
        """Also where backward allocates the gradients while it is captured, so that tables cannot be there before."""
        results = []
        for graphed in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(DEVICE)
            inputs = torch.randn(32, 8, device=DEVICE)
            optimizer = LearnedOptimizer(model.parameters(), total_steps=20, kernel="triton")

            def step(model: nn.Module = model, inputs: Tensor = inputs, optimizer: LearnedOptimizer = optimizer) -> None:
                model(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=captured_backward)

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            if graphed:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
            for _ in range(5):
                graph.replay() if graphed else step()
            results.append([param.detach().clone() for param in model.parameters()])
        assert all(one.equal(other) for one, other in zip(*results, strict=True))
