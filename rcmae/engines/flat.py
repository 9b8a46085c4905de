"""Optimizer groups as flat tensors: what the engines without DeepSpeed or FSDP2 keep.

A group's fp32 masters lie end to end in one tensor, and so do the weights that the network computes
with, of which its parameters are views: an update is a handful of kernels, however many parameters
there are. Masters may be whole on each rank, or cut in equal shards over a few ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from rcmae import dist
from rcmae.engines.optim import moments, param_groups
from rcmae.engines.protocol import DTYPES, EngineSettings, Piece
from rcmae.engines.teacher import Teacher
from rcmae.engines.updates import has_all
from rcmae.objectives.terms import ARRIVES

ALIGNED = 8  # elements that a shard is a multiple of: 16 bytes in bf16, as collectives like them

# its name since torch 2.13
_all_gather = getattr(torch_dist, "all_gather_single", torch_dist.all_gather_into_tensor)


class Cut(NamedTuple):
    """Which of the equal parts of a flat tensor this rank keeps."""

    part: int = 0
    parts: int = 1
    group: torch_dist.ProcessGroup | None = None  # of the ranks that have the parts, in order

    @classmethod
    def of_ranks(cls, shards: int) -> Cut:
        """Over `shards` neighbouring ranks, which divide all. Collective: every rank calls."""
        if shards == 1:
            return cls()
        return cls(dist.rank() % shards, shards, dist.mesh(shards).get_group("shards"))

    def padded(self, size: int) -> int:
        """Elements of a flat tensor of so many, padded so that it can be cut."""
        if self.parts == 1:
            return size
        unit = ALIGNED * self.parts
        return math.ceil(size / unit) * unit

    def of(self, flat: Tensor) -> Tensor:
        """This rank's part of a padded tensor: a view."""
        if self.parts == 1:
            return flat
        size = flat.numel() // self.parts
        return flat.narrow(0, self.part * size, size)


class Run(NamedTuple):
    """Elements of a parameter that lie together in this rank's part of a group."""

    group: int
    param: int  # index in the group
    start: int  # in the flattened parameter
    at: int  # in this rank's part
    length: int

    def of(self, part: Tensor) -> Tensor:
        """These elements of a tensor that lies as the part does: a view."""
        return part.narrow(0, self.at, self.length)


class FlatGroups:
    """The trainable parameters of a student, one flat tensor a group.

    Args:
        student: its parameters become views of `copies`.
        settings: precision, weight decay and layer decay.
        cut: which part of the masters this rank keeps.
    """

    def __init__(
        self, student: nn.Module, settings: EngineSettings, cut: Cut | None = None
    ) -> None:
        self.cut = cut or Cut()
        dtype = DTYPES[settings.precision]
        # as the optimizer takes them, with the student's parameters
        self.groups = param_groups(student, settings.weight_decay, settings.layer_decay)
        self.names = [list(group["param_names"]) for group in self.groups]
        self.params = [list(group["params"]) for group in self.groups]
        self.shapes = {name: tuple(param.shape) for name, param in student.named_parameters()}
        whole = [self._flatten(params) for params in self.params]
        # what the network computes with
        self.copies = whole if dtype == torch.float32 else [flat.to(dtype) for flat in whole]
        parts = [self.cut.of(flat) for flat in whole]
        if self.cut.parts > 1 and dtype != torch.float32:
            parts = [part.clone() for part in parts]
        self.masters = [nn.Parameter(part) for part in parts]
        for params, copy in zip(self.params, self.copies, strict=True):
            for param, view in zip(params, views(copy, params), strict=True):
                param.data = view

    def _flatten(self, params: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([param.detach().float().flatten() for param in params])
        missing = self.cut.padded(flat.numel()) - flat.numel()
        return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat

    @property
    def optimizer_groups(self) -> list[dict[str, object]]:
        """The groups with a master each in the place of the parameters."""
        found = []
        for group, master in zip(self.groups, self.masters, strict=True):
            found.append({**group, "params": [master], "param_names": [group["name"]]})
        return found

    def runs(self) -> list[Run]:
        """What this rank keeps of each parameter, in the order of the groups."""
        found = []
        for index, params in enumerate(self.params):
            size = self.masters[index].numel()
            low = self.cut.part * size
            offset = 0
            for number, param in enumerate(params):
                first = max(offset, low)
                last = min(offset + param.numel(), low + size)
                if last > first:
                    found.append(Run(index, number, first - offset, first - low, last - first))
                offset += param.numel()
        return found

    @torch.no_grad()
    def round(self) -> None:
        """This rank's part of what the network computes with, up to the masters."""
        mine = [self.cut.of(copy) for copy in self.copies]
        if mine and mine[0].dtype != torch.float32:  # in fp32 they are the same memory
            torch._foreach_copy_(mine, [master.data for master in self.masters])

    def pieces(self, tensors: Mapping[int, Mapping[str, Tensor]]) -> list[Piece]:
        """The parts of this rank as a checkpoint has them; `tensors`: of each group, by kind."""
        found = []
        for run in self.runs():
            views_of = {kind: run.of(part) for kind, part in tensors[run.group].items()}
            found.append(Piece(self.names[run.group][run.param], run.start, views_of))
        return found

    def add_teacher(self, teacher: nn.Module) -> tuple[list[int], list[Tensor]]:
        """The groups that a teacher has, and a flat tensor for each, of which its parameters
        become views; it computes with them.
        """
        theirs = dict(teacher.named_parameters())
        indices = [index for index, names in enumerate(self.names) if has_all(theirs, names)]
        flats = [self.copies[index].clone() for index in indices]
        for index, flat in zip(indices, flats, strict=True):
            parts = views(flat, self.params[index])
            for name, part in zip(self.names[index], parts, strict=True):
                theirs[name].data = part
        return indices, flats


def views(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """A view of a flat tensor for each of the parameters that lie in it."""
    sizes = [param.numel() for param in params]
    parts = flat.narrow(0, 0, sum(sizes)).split(sizes)
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]


def held(
    flat: FlatGroups, optimizer: torch.optim.Optimizer, ema: Teacher | None, taught: Sequence[int]
) -> dict[int, dict[str, Tensor]]:
    """What this rank holds of each group, by the kinds of a `Piece`: live views.

    Args:
        flat, optimizer: whose masters they are.
        ema, taught: the teacher, and the indices of the groups that it has.
    """
    averages = dict(zip(taught, ema.accumulators, strict=True)) if ema is not None else {}
    found = {}
    for index, master in enumerate(flat.masters):
        state = optimizer.state[master]
        tensors = {"weight": master.data} | {key: state[key] for key in moments(optimizer)}
        if index in averages:
            tensors["teacher"] = averages[index]
        found[index] = tensors
    return found


def arrive_by_forward(network: nn.Module, gather: Gather) -> None:
    """A network computes when its weights are there; an objective lets it compute late."""
    network.register_forward_pre_hook(lambda *_: gather.wait())
    setattr(network, ARRIVES, True)


class Gather:
    """One all-gather a flat tensor: brings the parts of its ranks together, while other work
    continues. It is a `teacher.Publication`.

    Args:
        flats: whole tensors, padded so that they can be cut.
        cut: the part that is this rank's.
    """

    def __init__(self, flats: Sequence[Tensor], cut: Cut) -> None:
        self.flats = flats
        self.shards = [cut.of(flat) for flat in flats]
        self._group = cut.group
        self._under_way: list[torch_dist.Work] = []

    def begin(self) -> None:
        """Start sending. Collective: every rank calls."""
        for flat, shard in zip(self.flats, self.shards, strict=True):
            work = _all_gather(flat, shard.clone(), group=self._group, async_op=True)
            if work is not None:
                self._under_way.append(work)

    def wait(self) -> None:
        """Return when nothing is under way; on a GPU, when later work will find that so."""
        while self._under_way:
            self._under_way.pop(0).wait()
