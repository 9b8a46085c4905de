"""What a rank takes of its device while it trains for a moment: tensors alive in the steps of an
engine, on made-up images.

On the CPU every storage that an operation gives is counted after each operation: exact, and the
same every time, unlike resident memory; it does not see the inside of an operation. On GPUs it is
the allocator's own peak.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rcmae import config, dist
from rcmae.config import Recipe
from rcmae.data.batch import Batch
from rcmae.data.masking import random_ids, visible_count
from rcmae.engines.build import make_engine
from rcmae.engines.protocol import DTYPES
from rcmae.models.build import new_student, new_teacher
from rcmae.models.tuning import attention
from rcmae.models.tuning.attention import Shape
from rcmae.models.vit import Encoder
from rcmae.objectives import Objective, make_objective

MASK_RATIO = 0.75  # of made-up batches


def made_up_batch(model: Encoder, size: int, device: torch.device) -> Batch:
    """Normal noise for images, with the masks of a run."""
    num_patches = model.num_patches
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, model.in_channels, *model.image_size, generator=generator)
    ids = torch.stack(
        [torch.from_numpy(random_ids(0, position, num_patches)) for position in range(size)]
    )
    return Batch(
        images=images.to(device),
        ids_shuffle=ids.to(device),
        num_visible=visible_count(num_patches, MASK_RATIO),
        labels=None,
        keys=(),
        positions=torch.arange(size),
        crops=torch.zeros(size, 5, dtype=torch.int64),
    )


def attention_shapes(
    objective: Objective, student: nn.Module, teacher: nn.Module | None, precision: str
) -> set[Shape]:
    """The shapes of attention in a training step, found by one on the meta device, where nothing is
    computed. None for a network or objective that made-up batches do not do for.
    """
    if not isinstance(student, Encoder):
        return set()
    meta = torch.device("meta")
    batch = made_up_batch(student, 1, torch.device("cpu"))
    batch = replace(batch, labels=torch.zeros(1, dtype=torch.int64)).to(meta)
    theirs = None if teacher is None else _on_meta(teacher, precision)
    with attention.noting() as found, torch.no_grad():
        try:
            objective(cast(Any, _on_meta(student, precision)), cast(Any, theirs), batch, 0.0)
        except (RuntimeError, LookupError, TypeError, ValueError):
            return set()  # it looks at numbers, which are not there
    return found


def _on_meta(model: nn.Module, precision: str) -> Callable[..., Any]:
    """The model's forward without its weights, in the type that it will compute in."""
    dtype = DTYPES[precision]
    state = {name: param.to("meta", dtype) for name, param in model.named_parameters()}
    state |= {name: table.to("meta") for name, table in model.named_buffers()}
    return lambda *args, **named: torch.func.functional_call(model, state, args, named)


def _as_copied(batch: Batch) -> Batch:
    """Another such batch as it comes from the stream: uint8."""
    images = batch.images.to(torch.uint8)
    return replace(batch, images=images, ids_shuffle=batch.ids_shuffle.clone())


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations gave and that are alive, looked at after each
    operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ReferenceType[torch.UntypedStorage]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do the operation and look."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes back here with the local tensors
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if (
                isinstance(item, torch.Tensor)
                and not isinstance(item, DTensor)
                and item.device.type != "meta"
            ):
                storage = item.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes alive."""
        total = 0
        for key, reference in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()  # asked each time: FSDP2 resizes
        return total

    def reset(self) -> None:
        """Look for a new peak."""
        self.peak = 0


class Allocated:
    """The same by a GPU's allocator."""

    def __enter__(self) -> Allocated:
        torch.cuda.empty_cache()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def peak(self) -> int:
        """The most bytes since `reset`."""
        return torch.cuda.max_memory_allocated()

    def now(self) -> int:
        """Bytes alive."""
        return torch.cuda.memory_allocated()

    def reset(self) -> None:
        """Look for a new peak."""
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def _collecting_little() -> Iterator[None]:
    """What lives now is passed over by the collections inside: with torch imported, there is a
    lot of it.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measure(recipe: Recipe) -> dict[str, int]:
    """This rank's bytes when everything is built, and the most in the second step.

    Collective: every rank calls.
    """
    sizes = config.resolve(recipe, world=dist.world(), samples_per_epoch=recipe.batch.images)
    objective = make_objective(recipe, sizes)
    engine_config = {}
    if recipe.engine.name == "deepspeed":
        from rcmae.engines.deepspeed_config import read_config

        engine_config = read_config(recipe.engine.config or "")
    with _collecting_little(), Allocated() if dist.device().type == "cuda" else LiveBytes() as live:
        student = new_student(recipe)
        teacher = new_teacher(student, objective.teacher_outputs)
        plain = student
        engine = make_engine(recipe, sizes, student, teacher, engine_config)
        del student, teacher
        gc.collect()
        ready = live.now()
        for _ in range(2):
            live.reset()
            for micro in range(sizes.accumulation):
                batch = made_up_batch(plain, sizes.per_device, dist.device())
                ahead = _as_copied(batch)  # the next one's, in a training
                sums = objective(engine.student, engine.teacher, batch, 0.0)
                engine.backward(
                    torch.stack(list(sums.values())).sum() / 1000,
                    last=micro == sizes.accumulation - 1,
                )
                del sums, batch
            engine.step(lr=1e-4, weight_decay=0.05)
            engine.update_teacher(0.99)
            del ahead
        peak = live.peak
        del engine, plain
        gc.collect()
    return {"ready": ready, "peak": peak}
