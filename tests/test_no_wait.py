"""The device decides about a bad update, and nobody waits for it where nothing is written: with the
same end as if the host had waited.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from rcmae.data.batch import Batch
from rcmae.engines import updates
from rcmae.engines.local import LocalEngine
from rcmae.engines.protocol import EngineSettings, StepStats
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.process import garbage
from rcmae.run.loop.batches import Batches, Copies
from rcmae.run.loop.evaluation import Evaluation
from rcmae.run.loop.recording import Recorder
from rcmae.run.loop.recovery import Recovery
from rcmae.run.loop.saving import Saving
from runs import Folder, equal, start

POISONED = 32 * 12 + 5  # a sample of the thirteenth step; checkpoints are of steps 10 and 20
SIZES = {
    "image_size": (16, 16),
    "patch_size": 4,
    "in_channels": 3,
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 2,
    "decoder_dim": 20,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


# ------------------------------------------------------------------------------ the same as waiting


@pytest.mark.parametrize("action", ["stop", "skip", "rewind"])
def test_a_bad_step_that_is_learnt_of_late_ends_as_one_that_was_waited_for(
    tiny: Path, tmp_path: Path, action: str
) -> None:
    waited, late = Folder(tmp_path / "waited"), Folder(tmp_path / "late")
    words = [f"guard.drill_nan_position={POISONED}", f"guard.action={action}"]
    status = 1 if action == "stop" else 0
    assert start(tiny, waited.path, *words, "log.every_steps=1") == status
    assert start(tiny, late.path, *words, "log.every_steps=10") == status
    (found,), (wanted,) = late.events("not_finite"), waited.events("not_finite")
    for name in ("step", "data_step", "action", "samples", "jumped"):
        assert found[name] == wanted[name], name
    assert found["step"] == 12
    assert late.outcome()["step"] == waited.outcome()["step"]
    assert late.committed() == waited.committed()
    assert equal(late.state(), waited.state())
    bundles = []
    for folder in (waited, late):
        document = json.loads((folder.path / "replay" / "step-00000012.json").read_text())
        bundles.append({**document, "recipe": None, "checkpoint": None})
    assert json.dumps(bundles[0]) == json.dumps(bundles[1])  # nan equals nan in text
    rows = {row["step"]: row for row in waited.rows()}
    for row in late.rows():
        assert row["loss"] == rows[row["step"]]["loss"]
        assert row["images_seen"] == rows[row["step"]]["images_seen"]


def test_a_bad_step_before_a_stop_is_settled_before_it_is_committed(
    tiny: Path, tmp_path: Path
) -> None:
    folders = []
    for name, every in (("waited", 1), ("late", 20)):
        folder = Folder(tmp_path / name)
        words = [f"guard.drill_nan_position={POISONED}", "guard.action=skip"]
        words += [f"log.every_steps={every}", "run.stop_after_steps=13"]
        assert start(tiny, folder.path, *words) == 75
        assert folder.committed()[-1] == 13
        assert [event["step"] for event in folder.events("not_finite")] == [12]
        folders.append(folder)
    assert equal(folders[0].state(), folders[1].state())


def engine_of(**changes: Any) -> LocalEngine:
    draws = torch.Generator().manual_seed(0)
    networks = [MaskedAutoencoder(NetworkSizes(**SIZES)) for _ in range(2)]
    with torch.no_grad():
        for param in networks[0].parameters():
            param.copy_(torch.randn(param.shape, generator=draws))
    return LocalEngine(*networks, EngineSettings(**changes))


def moved(engine: LocalEngine) -> list[torch.Tensor]:
    found = [part.clone() for each in engine.state().pieces for part in each.tensors.values()]
    assert engine.teacher is not None
    return [*found, *(param.clone() for param in engine.teacher.parameters())]


@pytest.mark.parametrize("accumulate", ["fp32_shard", "stochastic"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_device_leaves_a_bad_update_and_its_average_out(
    precision: str, accumulate: str
) -> None:
    engine = engine_of(precision=precision, teacher_accumulate=accumulate, clip_grad=1.0)
    other = engine_of(precision=precision, teacher_accumulate=accumulate, clip_grad=1.0)

    def step(trained: LocalEngine, scale: float) -> StepStats:
        params = [param for param in trained.student.parameters() if param.requires_grad]
        loss = torch.stack([(param * scale).float().square().sum() for param in params]).sum()
        trained.backward(loss, last=True)
        stats = trained.step(lr=0.01, weight_decay=0.05)
        trained.update_teacher(0.9)
        return stats

    assert step(engine, 1.0).finite
    step(other, 1.0)
    before = moved(engine)
    assert not step(engine, float("nan")).finite
    assert all(torch.equal(one, two) for one, two in zip(moved(engine), before, strict=True))
    engine.take_back()
    step(engine, 0.5)
    step(other, 0.5)  # which never saw it
    assert all(map(torch.equal, moved(engine), moved(other)))
    for name in ("optimizer_step", "teacher_updates"):
        assert getattr(engine.state(), name) == getattr(other.state(), name) == 2


# ----------------------------------------------------------------------------------------- no waits

# what reads numbers of the device, or of samples that lie in host memory, and may
MAY: list[tuple[Any, str]] = [
    (Batches, "_read_on"),
    (Recorder, "record"),
    (Recorder, "show"),
    (Saving, "begin"),
]
MAY += [(Evaluation, "when_due"), (Batches, "_look_at"), (Saving, "collect")]
MAY += [(Recovery, "settle")]  # of the step before, while the device is a step further
MAY += [(updates, "read_telemetry")]  # at log steps


@contextlib.contextmanager
def around(enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    """Call these around what may wait."""

    def within(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **named: Any) -> Any:
            enter()
            try:
                return call(*args, **named)
            finally:
                leave()

        return called

    with contextlib.ExitStack() as stack:
        for where, name in MAY:
            stack.enter_context(patch.object(where, name, within(getattr(where, name))))
        yield


READS = ("item", "tolist", "numpy", "__array__", "cpu", "nonzero")
READS += ("__bool__", "__float__", "__int__", "__index__")


def reads_between_log_steps(
    tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str
) -> list[str]:
    """What a run of 17 steps reads off tensors where it may not. The thread of a save may."""
    inside = 0
    waits: list[str] = []
    steps = 0
    may_wait = False  # the host decides, or the step is logged: of its norm

    def enter() -> None:
        nonlocal inside
        inside += 1

    def leave() -> None:
        nonlocal inside
        inside -= 1

    def watched(name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)

        def called(self: torch.Tensor, *args: Any, **named: Any) -> Any:
            is_main = threading.current_thread() is threading.main_thread()
            if steps and is_main and not inside and not (may_wait and name == "numpy"):
                waits.append(f"{name} after {steps} steps")
            return read(self, *args, **named)

        return called

    step, must_wait, ready = LocalEngine.step, Recovery.must_wait, Batches.ready

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args, **named)

    def asked(self: Recovery) -> bool:
        nonlocal may_wait
        may_wait = must_wait(self)
        return may_wait

    def begun(self: Batches, batch: Batch) -> Batch:
        nonlocal may_wait
        may_wait = False
        return ready(self, batch)

    monkeypatch.setattr(LocalEngine, "step", counted)
    monkeypatch.setattr(Recovery, "must_wait", asked)
    monkeypatch.setattr(Batches, "ready", begun)
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    with around(enter, leave):
        assert start(tiny, folder, "log.every_steps=8", "schedule.steps=17", *words) == 0
    assert steps == 17
    return waits


@pytest.mark.parametrize("objective", ["mae", "rcmae"])
def test_no_number_is_read_off_a_tensor_between_log_steps(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """On a GPU each would wait for the device."""
    named = f"objective.name={objective}"
    assert reads_between_log_steps(tiny, tmp_path / "run", monkeypatch, named) == []


def test_a_hidden_read_of_the_norm_is_seen(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.count(1)
    hidden = {10: "cpu", 11: "numpy", 12: "tolist", 13: "item", 14: "__array__"}

    def leaky(norm: torch.Tensor) -> torch.Tensor:
        if name := hidden.get(next(steps)):
            getattr(norm, name)()
        return updates.is_bad(norm)

    monkeypatch.setattr("rcmae.engines.local.is_bad", leaky)
    found = reads_between_log_steps(tiny, tmp_path / "run", monkeypatch)
    for step, name in hidden.items():
        assert f"{name} after {step} steps" in found
    assert {int(told.split()[2]) for told in found} == set(hidden)


def test_micro_batches_are_copied_one_ahead_in_the_order_in_which_they_are_used(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    taken: list[tuple[int, bool]] = []  # first position, whether it was under way
    begin, take = Copies.begin, Copies.take

    def beginning(self: Copies, batch: Batch) -> None:
        begun.append(int(batch.positions[0]))
        begin(self, batch)

    def taking(self: Copies, batch: Batch) -> Batch:
        under_way = self._under_way
        taken.append((int(batch.positions[0]), bool(under_way and under_way[0] is batch)))
        return take(self, batch)

    monkeypatch.setattr(Copies, "begin", beginning)
    monkeypatch.setattr(Copies, "take", taking)
    words = ["schedule.steps=4", "batch.per_device=8"]  # four micro-batches a step
    assert start(tiny, tmp_path / "run", *words) == 0
    firsts = list(range(0, 4 * 32, 8))
    assert [first for first, _ in taken] == firsts
    assert begun == firsts[1:]  # the run's first is copied when it is needed
    assert [ahead for _, ahead in taken] == [False] + 15 * [True]


def test_nothing_is_collected_between_log_steps(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    collected: list[int] = []
    monkeypatch.setattr(garbage, "gc", gc)  # conftest.py has another
    gc.unfreeze()
    step, collect = LocalEngine.step, gc.collect

    def looked(*args: Any, **named: Any) -> Any:
        seen.append(gc.isenabled())
        return step(*args, **named)

    def counted(*args: Any) -> int:
        collected.append(len(seen))
        return collect(*args)

    monkeypatch.setattr(LocalEngine, "step", looked)
    monkeypatch.setattr(gc, "collect", counted)
    assert start(tiny, tmp_path / "run", "schedule.steps=10", "log.every_steps=5") == 0
    assert seen == [False] * 10
    assert [steps for steps in collected if steps] == [5, 10]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_between_log_steps(tiny: Path, tmp_path: Path) -> None:
    """torch raises in a call that waits for the device."""
    step, steps = LocalEngine.step, 0

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        torch.cuda.set_sync_debug_mode("error")
        return step(*args, **named)

    def allow() -> None:
        torch.cuda.set_sync_debug_mode("default")

    def forbid() -> None:
        torch.cuda.set_sync_debug_mode("error" if steps else "default")

    try:
        with patch.object(LocalEngine, "step", counted), around(allow, forbid):
            words = ["log.every_steps=8", "schedule.steps=17", "engine.precision=bf16"]
            assert start(tiny, tmp_path / "run", *words) == 0
    finally:
        allow()
    assert steps == 17
