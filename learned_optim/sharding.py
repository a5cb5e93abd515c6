"""Models that are spread over processes: what the update rule sums over them, and how matrices are put together to be orthogonalised.

A DTensor (FSDP2, tensor parallelism, both) is one tensor of which each process holds a part. All that belongs to coordinates is computed
where they are. What a tensor has once is computed from sums over the whole of it, which one small all-reduce gives to all processes for all
tensors together; so `control` is the same everywhere. Random bits go by a coordinate's place in the whole tensor. A step is
therefore that of one process, up to the order of sums, however the tensor is cut, and a checkpoint may be cut in another way.

A matrix is orthogonalised as a whole, by one of the processes that share it, so that each of `R` processes does about one `R`-th of the
work. With `N` weights in such matrices, a process sends the 4 N / R bytes of its own parts and gets as many of others, and the same again
on the way back; each as often as there are dimensions of the mesh that the matrices are cut along. State is 16 bytes for each weight that a
process holds. For the step it needs some 24 N / R bytes beside that (directions, what goes out and comes in, matrices before and after) and
what Newton-Schulz multiplies, at most three times the matrices of one shape. Matrices are not cut: where one is larger than all others, the
process that has it holds all of it, and the others wait.

Replicas (of a mesh with Replicate placements) do the same work side by side. Stacked matrices travel too, even if no cut goes through one.

`Parts` is for optimizers each of which has some whole tensors of a model, as in ZeRO and in pipelines. There only means over all tensors
and the number of matrices are agreed on.

Shapes: as in `learned_optim.rule`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .features import Layout

if TYPE_CHECKING:  # importing these takes as long as the whole package, and who shards a model has done so
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

Item = TypeVar("Item")


class Region(NamedTuple):
    """The box of a tensor that a process holds."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(begin, begin + size) for begin, size in zip(self.offset, self.shape, strict=True))


class Run(NamedTuple):
    """Where a box lies among the coordinates of a tensor: stretches of `width`, the first one at `first`, each `pitch` after the last."""

    first: int
    width: int
    pitch: int


class Shards(NamedTuple):
    """How a tensor is cut up: along `dims`, dimensions of the mesh."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(dim for dim, placement in enumerate(self.placements) if not placement.is_replicate())

    def region(self, coordinate: Sequence[int] | None = None) -> Region:
        """The box of the process at a coordinate of the mesh; None is this process."""
        place = self.mesh.get_coordinate() if coordinate is None else coordinate
        assert place is not None  # a process outside a mesh holds no parameter of it
        return region_of(tuple(self.shape), tuple(self.mesh.shape), self.placements, tuple(place))

    def run(self) -> Run | None:
        """This process's box in stretches; None where those are not evenly spaced."""
        offset, local = self.region()
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        first = sum(map(math.prod, zip(offset, strides, strict=True)))
        cut = [dim for dim, (part, whole) in enumerate(zip(local, self.shape, strict=True)) if part != whole]
        if not cut or cut == [0]:
            return Run(first, max(1, math.prod(local)), max(1, math.prod(local)))
        if cut[:-1] not in ([], [0]):
            return None
        return Run(first, max(1, math.prod(local[cut[-1] :])), math.prod(self.shape[cut[-1] :]))

    def places(self, device: torch.device) -> Tensor:
        """Which coordinates of the whole tensor this process holds, (n,)."""
        places = torch.zeros((), dtype=torch.int64, device=device)
        for begin, count, size in zip(*self.region(), self.shape, strict=True):
            places = places[..., None] * size + torch.arange(begin, begin + count, device=device)
        return places.flatten()


@functools.lru_cache(maxsize=2**16)  # many matrices of a model are cut alike
def region_of(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Placement, ...], coordinate: tuple[int, ...]) -> Region:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    part, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
    # Where nothing is left, torch puts the offset at the end of the tensor, or beyond.
    return Region(tuple(map(min, offset, shape)), tuple(part))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; importing its class would cost more than the whole package."""
    return is_sharded_type(type(tensor))


def is_sharded_type(kind: type) -> bool:
    return hasattr(kind, "device_mesh")


def shards_of(param: Any) -> Shards:
    return Shards(param.device_mesh, tuple(param.placements), param.shape)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, the same object each time and with its memory; any other tensor itself."""
    sharded: Any = tensor
    return sharded._local_tensor if is_sharded(tensor) else tensor


def like(param: Any, part: Tensor, copies: int) -> Tensor:
    """Parts (copies, *local shape) as one tensor (copies, *shape) that is sharded like a parameter."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((copies, *param.shape))
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(part, param.device_mesh, behind(param), run_check=False, shape=shape, stride=strides)


def behind(param: Any) -> tuple[Placement, ...]:
    """A parameter's placements with one more dimension in front of the tensor."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    def moved(placement: Any) -> Placement:
        if isinstance(placement, _StridedShard):
            return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
        return Shard(placement.dim + 1) if placement.is_shard() else placement

    return tuple(map(moved, param.placements))


def part_of(value: Tensor, param: Any) -> Tensor:
    """This process's part of state (copies, *shape) that is sharded like a parameter, or whole."""
    if is_sharded(value):
        return local(value)
    slices = (slice(None), *shards_of(param).region().slices)
    return value[slices]


def gradient_of(grad: Any, param: Any) -> Tensor:
    """This process's part of a gradient, cut up like its parameter. Where each process has a summand, as of the weights of a norm in
    sequence parallelism, all are added up here."""
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        grad = grad.redistribute(param.device_mesh, param.placements)
    part: Any = grad._local_tensor
    found: Tensor = part.wait() if hasattr(part, "trigger_wait") else part  # that of a collective which runs on
    return found


def is_behind(value: Any, param: Any) -> bool:
    """Whether state (copies, *shape) is sharded like a parameter."""
    return value.device_mesh == param.device_mesh and tuple(value.placements) == behind(param)


def whole(param: Any) -> Tensor:
    """A parameter with the parts that other processes have, which must all ask for it together."""
    gathered: Tensor = param.full_tensor() if is_sharded(param) else param
    return gathered


def rows_in_use(param: Any, grad: Tensor) -> float:
    """The share of a matrix's rows of which the gradient is not zero.

    Args:
        grad: where the matrix is sharded, this process's part; all processes must ask together then.
    """
    largest = (grad.abs() > 0).float()  # what is not a number counts as none
    if is_sharded(param):
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(largest, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride())
        return float((whole.full_tensor().amax(1)).mean())
    return float(largest.amax(1).mean())


def trouble(param: Any) -> str | None:
    """Why a DTensor's parts cannot be trained, or None."""
    shards = shards_of(param)
    if any(placement.is_partial() for placement in shards.placements):
        return "is a sum that no process has (a Partial placement)"
    if len(shards.dims) != sum(placement.is_shard() or hasattr(placement, "split_factor") for placement in shards.placements):
        return f"has the placements {shards.placements}, of which only Shard and Replicate are known"
    if tuple(param._local_tensor.shape) != shards.region().shape:
        shape = tuple(param._local_tensor.shape)
        return f"holds a part of shape {shape}, where its placements {shards.placements} say {shards.region().shape}"
    if not any(hasattr(placement, "split_factor") for placement in shards.placements):
        return None
    boxes = [shards.region(place) for place in itertools.product(*map(range, shards.mesh.shape))]
    distinct = set(boxes)
    even = len({box.shape for box in boxes}) == 1 and all(
        begin % size == 0 for box in distinct for begin, size in zip(box.offset, box.shape, strict=True) if size
    )
    if not (even and sum(box.size for box in distinct) == param.numel()):
        return f"is cut twice along one dimension, unevenly ({shards.placements} of {tuple(shards.shape)})"
    return None


Origin = tuple[int, ...]
Traffic = list[list[tuple[int, Origin]]]  # for each process along a dimension of the mesh, parts of matrices


class Exchange:
    """Matrices that are cut along the same dimensions of a mesh, on their way to the processes that orthogonalise them and back.

    They travel along one dimension after the other. A part is known by its matrix's index and by its origin, the coordinates, along those
    dimensions, of the process that it comes from. All know where all others' parts lie, so nothing but numbers travels.

    Args:
        shards: of each matrix, by index.
        costs: what it costs to orthogonalise each.
    """

    def __init__(self, shards: dict[int, Shards], costs: dict[int, int]) -> None:
        self.shards = shards
        first = next(iter(shards.values()))
        self.mesh, self.dims = first.mesh, first.dims
        place = self.mesh.get_coordinate()
        assert place is not None
        self.mine = tuple(place[dim] for dim in self.dims)
        self.origins = list(itertools.product(*(range(self.mesh.shape[dim]) for dim in self.dims)))
        # Who orthogonalises which: the costliest first, each to who has least to do.
        load = dict.fromkeys(self.origins, 0)
        owners: dict[int, Origin] = {}
        for k in sorted(shards, key=lambda k: (-costs[k], k)):
            owners[k] = min(self.origins, key=lambda origin: (load[origin], origin))
            load[owners[k]] += costs[k]
        self.owned = [k for k in shards if owners[k] == self.mine]
        self.boxes: dict[tuple[int, Origin], Region] = {}
        for k, shard in shards.items():
            for origin in self.origins:
                coordinate = list(place)
                for dim, value in zip(self.dims, origin, strict=True):
                    coordinate[dim] = value
                self.boxes[k, origin] = shard.region(coordinate)
        # For each dimension, which parts go to each process along it and which come from each.
        self.stages: list[tuple[int, Traffic, Traffic]] = []
        for i, dim in enumerate(self.dims):
            passed = list(itertools.product(*(range(self.mesh.shape[before]) for before in self.dims[:i])))
            held = [k for k in shards if owners[k][:i] == self.mine[:i]]
            peers = range(self.mesh.shape[dim])
            out = [[(k, (*before, *self.mine[i:])) for k in held if owners[k][i] == peer for before in passed] for peer in peers]
            kept = [k for k in held if owners[k][i] == self.mine[i]]
            into = [[(k, (*before, peer, *self.mine[i + 1 :])) for k in kept for before in passed] for peer in peers]
            self.stages.append((dim, out, into))

    def collect(self, directions: Sequence[Tensor]) -> dict[int, Tensor]:
        """The whole matrices that this process orthogonalises, by index, (count,), of the parts of all tensors."""
        parts = {(k, self.mine): directions[k] for k in self.shards}
        for dim, out, into in self.stages:
            parts = self._send(dim, parts, out, into, directions[0])
        whole = {}
        for k in self.owned:
            matrix = directions[0].new_empty(self.shards[k].shape)
            for origin in self.origins:
                box = self.boxes[k, origin]
                matrix[box.slices] = parts[k, origin].view(box.shape)
            whole[k] = matrix.view(-1)
        return whole

    def hand_out(self, whole: dict[int, Tensor], like: Tensor) -> dict[int, Tensor]:
        """The way back: what this process holds of each matrix, (n,)."""
        matrices = {k: whole[k].to(like.dtype).view(self.shards[k].shape) for k in self.owned}
        parts = {(k, origin): matrices[k][self.boxes[k, origin].slices] for k in self.owned for origin in self.origins}
        for dim, into, out in reversed(self.stages):
            parts = self._send(dim, parts, out, into, like)
        return {k: parts[k, self.mine] for k in self.shards}

    def _send(
        self, dim: int, parts: dict[tuple[int, Origin], Tensor], out: Traffic, into: Traffic, like: Tensor
    ) -> dict[tuple[int, Origin], Tensor]:
        """Sends parts to the processes along a dimension and gives those that came."""
        sent = [parts[key].reshape(-1) for peer in out for key in peer]
        outgoing = torch.cat(sent) if sent else like.new_empty(0)
        given, taken = ([[self.boxes[key].size for key in peer] for peer in peers] for peers in (out, into))
        incoming = like.new_empty(sum(map(sum, taken)))
        dist.all_to_all_single(incoming, outgoing, list(map(sum, taken)), list(map(sum, given)), group=self.mesh.get_group(dim))
        keys = list(itertools.chain.from_iterable(into))
        return dict(zip(keys, incoming.split(list(itertools.chain.from_iterable(taken))), strict=True)) if keys else {}


class Parts:
    """Optimizers of a process group, each with tensors of its own of one model."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Parts:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("an optimizer with a parts_group cannot be pickled, as processes cannot; save its state_dict()")

    def device(self) -> torch.device:
        """Where tensors must be to be exchanged."""
        return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(self.group) else torch.device("cpu")

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether something is so in any process."""
        flag = torch.tensor([float(here)], device=device)
        dist.all_reduce(flag, group=self.group)
        return bool(flag)

    def gather(self, rows: Tensor, matrices: int) -> tuple[Tensor, slice, int]:
        """The columns of all, which of them are this process's, and how many matrices there are in all.

        Args:
            rows: (R, k), with `k` tensors here.
            matrices: how many of them are here.

        Returns:
            (R, K), a slice of K, and the number.
        """
        ranks = dist.get_world_size(self.group)
        counts = torch.tensor([rows.shape[-1], matrices], device=rows.device)
        found = counts.new_empty(ranks, 2)
        dist.all_gather_single(found.view(-1), counts, group=self.group)
        columns, total = found[:, 0].tolist(), int(found[:, 1].sum())
        most = max(columns)
        padded = torch.nn.functional.pad(rows, (0, most - rows.shape[-1])).contiguous()
        everyone = padded.new_empty(ranks, *padded.shape)
        dist.all_gather_single(everyone.view(-1), padded.view(-1), group=self.group)
        begin = sum(columns[: dist.get_rank(self.group)])
        joined = torch.cat([part[:, :count] for part, count in zip(everyone, columns, strict=True)], -1)
        return joined, slice(begin, begin + rows.shape[-1]), total


class ShardedLayout(Layout):
    """A layout of parts of tensors. Shapes and `counts` are of the whole ones, `sizes` and the coordinates `N` of what is here.

    Args:
        shards: how each tensor is cut up; None where it is whole.
        parts: the processes that have the model's other tensors, if there are any.
        others: matrices that are left out of this step.
    """

    def __init__(
        self,
        shapes: tuple[torch.Size, ...],
        shards: tuple[Shards | None, ...],
        device: torch.device,
        stacked: tuple[bool, ...] = (),
        matrices: tuple[int | None, ...] = (),
        tables: tuple[bool, ...] = (),
        trained: tuple[bool, ...] = (),
        parts: Parts | None = None,
        others: int = 0,
    ) -> None:
        super().__init__(shapes, device, stacked, matrices, tables, trained)
        self.shards, self.parts, self.others = shards, parts, others
        self.sizes = [size if shard is None else shard.region().size for size, shard in zip(self.counts, shards, strict=True)]
        self.here = self.others + self.count_matrices()
        self.everywhere = self.here  # matrices of the whole model, as of the last step
        runs = [Run(0, size, size) if shard is None else shard.run() for size, shard in zip(self.counts, shards, strict=True)]
        self.runs = None if None in runs else [run for run in runs if run is not None]
        # Which tensors are summed over which dimension of which mesh; meshes that share a group are one here.
        found: dict[Any, tuple[DeviceMesh, int, list[int]]] = {}
        for k, shard in enumerate(shards):
            if shard is None:
                continue
            for dim in shard.dims:
                found.setdefault(shard.mesh.get_group(dim).group_name, (shard.mesh, dim, []))[-1].append(k)
        self.sums = [  # indices lie on the device already, so that a step need not wait for it
            (mesh, dim, torch.tensor(members, device=device) if len(members) < len(shapes) else None)
            for mesh, dim, members in found.values()
        ]

    def of_some(self, members: Sequence[int]) -> ShardedLayout:
        def of(each: Sequence[Item]) -> tuple[Item, ...]:
            return tuple(each[k] for k in members)

        kinds = of(self.stacked), of(self.matrices), of(self.tables), of(self.trained)
        arguments = of(self.shapes), of(self.shards), self.device, *kinds, self.parts
        return ShardedLayout(*arguments, self.here - ShardedLayout(*arguments).here)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over whole tensors, of sums over what is here; (..., K)."""
        for mesh, dim, members in self.sums:
            some = (sums if members is None else sums[..., members]).contiguous()
            dist.all_reduce(some, group=mesh.get_group(dim))
            if members is None:
                sums = some
            else:
                sums[..., members] = some
        return sums

    def means(self, values: Sequence[Tensor]) -> Tensor:
        sums = torch.stack([torch.stack([part.sum(-1) for part in each.split(self.sizes, -1)], -1) for each in values])
        return (self.total(sums.double()) / self.divisors).to(sums.dtype)

    def mean(self, values: Tensor) -> Tensor:
        return self.means([values])[0]

    def mean_squares(self, values: Sequence[Tensor], members: Sequence[int]) -> list[Tensor]:
        sums = torch.zeros(len(values), dtype=torch.float64, device=self.device)
        for k in members:
            sums[k] = values[k].square().sum()
        means = (self.total(sums) / self.divisors).to(values[0].dtype)
        return [means[k : k + 1] for k in members]

    @functools.cached_property
    def divisors(self) -> Tensor:
        return torch.tensor(self.counts, dtype=torch.float64, device=self.device)

    def places(self, k: int) -> Tensor:
        shard = self.shards[k]
        return super().places(k) if shard is None else shard.places(self.device)

    def with_others(self, rows: Tensor) -> tuple[Tensor, slice]:
        """See `Parts.gather`; keeps the number of matrices for the step."""
        assert self.parts is not None
        everyone, mine, self.everywhere = self.parts.gather(rows, self.here)
        return everyone, mine

    # Fresh matrices

    @functools.cached_property
    def exchanges(self) -> list[Exchange]:
        """Those that are cut up, by meshes and the dimensions that they are cut along."""
        groups: dict[tuple[Any, ...], dict[int, Shards]] = {}
        for k, shard in enumerate(self.shards):
            if shard is not None and self._is_cut(k):
                groups.setdefault((shard.mesh, shard.dims), {})[k] = shard
        costs = {k: self.counts[k] * min(self.fans[k]) for k in range(len(self.shards))}
        return [Exchange(members, costs) for members in groups.values()]

    def on_whole_matrices(
        self, directions: Sequence[Tensor], function: Callable[[Sequence[Tensor], Layout], dict[int, Tensor]]
    ) -> dict[int, Tensor]:
        """What a function makes of whole fresh matrices, each of which one process puts together, as far as it is here.

        Args:
            directions: of all tensors, each (n,).
            function: (matrices, their layout) -> each one's result, (count,), by its place among them.

        Returns:
            the results of matrices by index, (n,).
        """
        whole = {k: directions[k] for k, fresh in enumerate(self.is_fresh_matrix) if fresh and not self._is_cut(k)}
        for exchange in self.exchanges:
            whole |= exchange.collect(directions)
        indices = list(whole)
        shapes, stacked = tuple(self.shapes[k] for k in indices), tuple(self.stacked[k] for k in indices)
        numbers = tuple(self.matrices[k] or max(1, self.everywhere) for k in indices)
        done = function(list(whole.values()), Layout.of(shapes, self.device, stacked, numbers)) if indices else {}
        results = {indices[place]: result for place, result in done.items()}
        found = {k: result for k, result in results.items() if not self._is_cut(k)}
        for exchange in self.exchanges:
            found |= exchange.hand_out(results, directions[0])
        return found

    def _is_cut(self, k: int) -> bool:
        """Whether a tensor is a fresh matrix of which other processes hold parts."""
        shard = self.shards[k]
        return self.is_fresh_matrix[k] and shard is not None and bool(shard.dims)
