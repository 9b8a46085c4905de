"""One training and one teacher, whatever moves the weights. Two real ranks over gloo."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rcmae import checkpoint
from rcmae.engines.local import LocalEngine
from rcmae.engines.protocol import EngineSettings
from rcmae.models.protocol import PUBLISHED, Place, running_buffers
from tests.conftest import Ranks

PROGRAMS = Path(__file__).parent / "programs"
STAGES = ("ddp", "ddp/2", "zero0", "zero1", "zero2", "zero3", "fsdp2")
# the released weights'
# of `tiny`, for engines: they treat each block alike, so two show what many would
SMALL = ("model.depth=2", "model.decoder_depth=1", "batch.images=16")
AS_PUBLISHED = ("teacher.update=micro_step", "teacher.schedule=published", "teacher.momentum=0.9")


def engine_of(stage: str) -> list[str]:
    """Overrides; "ddp/2" is sharded over two ranks."""
    name, _, shards = stage.partition("/")
    if name in ("ddp", "fsdp2"):
        return [f"engine.name={name}", f"engine.shard_ranks={shards or 'null'}"]
    return ["engine.name=deepspeed", f"engine.config={stage}"]


def result(said: str) -> dict[str, Any]:
    line = next(line for line in said.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path, kind: str) -> torch.Tensor:
    """All parameters' tensors of a kind in the run's last checkpoint, concatenated.

    Not the bias before a batch norm, nor the mean that follows it: its gradient is 0, and Adam
    makes steps of what rounding leaves of it.
    """
    noise = ("cls_head.0.bias", "cls_head.1.running_mean")
    manifest = checkpoint.read_manifest(max((run / "checkpoints").glob("step-*")))
    keys = sorted(
        key for key in manifest.tensors if key.startswith(f"{kind}/") and not key.endswith(noise)
    )
    return torch.cat([checkpoint.tensor_of(manifest, key).flatten() for key in keys]).double()


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same training run by every engine: fp32 and bf16, with accumulation and
    without.
    """
    root = tmp_path_factory.mktemp("engines")

    def job(name: str, *overrides: str) -> list[str]:
        folder = root / name.replace("/", "-")
        return [str(tiny), f"run.dir={folder}", *SMALL, "schedule.steps=8", *overrides]

    fp32, bf16 = (("engine.precision=fp32",), ("engine.precision=bf16",))
    two = [
        *(
            job(f"{stage}-fp32-1", *engine_of(stage), *fp32, "batch.per_device=8")
            for stage in STAGES
        ),
        *(
            job(f"{stage}-fp32-2", *engine_of(stage), *fp32, "batch.per_device=4")
            for stage in STAGES
        ),
        *(
            job(f"{stage}-bf16-2", *engine_of(stage), *bf16, "batch.per_device=4")
            for stage in STAGES
        ),
        *(
            job(f"{stage}-micro", *engine_of(stage), *fp32, *AS_PUBLISHED, "batch.per_device=4")
            for stage in STAGES
        ),
    ]
    one = [
        job("local-fp32", *fp32),
        job("local-fp32-2", *fp32, "batch.per_device=8"),
        job("local-bf16", *bf16),
        job("local-micro", *fp32, *AS_PUBLISHED, "batch.per_device=8"),
    ]
    started = [
        Ranks([sys.executable, str(PROGRAMS / "train_many.py"), json.dumps(jobs)], world, root)
        for jobs, world in ((two, 2), (one, 1))
    ]
    for group, jobs in zip(started, (two, one), strict=True):
        assert f"STATUS {[0] * len(jobs)}" in group.succeed()
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_engine_is_the_local_one_in_fp32(runs: Path, stage: str, accumulation: int) -> None:
    run, oracle = runs / f"{stage.replace('/', '-')}-fp32-{accumulation}", runs / "local-fp32"
    assert losses(run) == pytest.approx(losses(oracle), rel=1e-5)
    assert losses(runs / "local-fp32-2") == pytest.approx(losses(oracle), rel=1e-5)
    assert relative(tensors(run, "teacher"), tensors(oracle, "teacher")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_teacher_may_move_at_each_micro_batch(runs: Path, stage: str) -> None:
    run, oracle = runs / f"{stage.replace('/', '-')}-micro", runs / "local-micro"
    assert losses(run) == pytest.approx(losses(oracle), rel=1e-5)
    assert relative(tensors(run, "teacher"), tensors(oracle, "teacher")) < 1e-5
    # another teacher
    assert relative(tensors(oracle, "teacher"), tensors(runs / "local-fp32", "teacher")) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_engine_in_bf16_stays_near_fp32(runs: Path, stage: str) -> None:
    run = runs / f"{stage.replace('/', '-')}-bf16-2"
    assert losses(run) == pytest.approx(losses(runs / "local-fp32"), rel=1e-2)
    accumulator, other = tensors(run, "teacher"), tensors(runs / "local-bf16", "teacher")
    assert relative(accumulator, other) < 1e-3
    assert relative(accumulator.bfloat16().double(), other.bfloat16().double()) < 3e-3  # the copies


@pytest.mark.slow
def test_the_teacher_is_the_average_at_every_stage(ranks: Callable[..., Ranks]) -> None:
    """250 updates against a float64 average, of teachers with a decoder and without; the copy is
    its accumulator rounded.

    Bytes are the formula's.
    """
    engines = ",".join(("local", *STAGES))
    found = result(ranks(str(PROGRAMS / "teacher_stages.py"), engines, "pixels,tokens").succeed())
    print("\nbytes of the teacher on each of two ranks")
    for name, figures in found.items():
        kinds = [
            " + ".join(f"{kind} {size:,}" for kind, size in each.items())
            for each in figures["bytes"]
        ]
        print(
            f"{name:<27} {' | '.join(kinds)} | sum "
            f"{sum(sum(each.values()) for each in figures['bytes']):,}"
        )
        assert figures["error"] < 1e-6, name
        assert figures["copy_is_rounding"], name
        assert figures.get("whole_copy_is_rounding", True), name
        assert figures["bytes"] == figures["formula"], name
    assert len(found) == (2 + 1) * 2 * (1 + len(STAGES))


@pytest.mark.slow
def test_a_nan_on_one_rank_stops_all_and_touches_nothing(ranks: Callable[..., Ranks]) -> None:
    found = result(ranks(str(PROGRAMS / "nan_on_one_rank.py")).succeed())
    assert len(found) == 2 * len(STAGES)
    for name, on_ranks in found.items():
        assert on_ranks == [{"stopped": True, "untouched": True, "goes on": True}] * 2, name


@pytest.mark.slow
def test_savings_of_memory_and_time_change_no_loss(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    def job(name: str, *overrides: str) -> list[str]:
        run = [
            f"run.dir={tmp_path / name}",
            "schedule.steps=6",
            "schedule.warmup_steps=1",
        ]
        return [str(tiny), *run, *SMALL, *overrides]

    zero3 = ["engine.name=deepspeed", "engine.config=zero3.json"]
    # compiled first: stage 3 leaves its own linear in torch, which torch 2.11 compiles wrongly for
    # FSDP2
    jobs = [
        job("compile", "engine.name=fsdp2", "engine.compile=true"),
        job("compile-ddp", "engine.name=ddp", "engine.compile=true"),
        job("plain", *zero3),
        job("torch", *zero3, "engine.activation_checkpointing=torch"),
        job("fairscale", *zero3, "engine.activation_checkpointing=fairscale"),
        job(
            "fairscale_offload",
            "engine.name=fsdp2",
            "engine.activation_checkpointing=fairscale_offload",
        ),
        job("clipped", *zero3, "schedule.clip_grad=0.05"),
        job("clipped-fsdp2", "engine.name=fsdp2", "schedule.clip_grad=0.05"),
        job("clipped-ddp", *engine_of("ddp/2"), "schedule.clip_grad=0.05"),
        job("torch-ddp", "engine.name=ddp", "engine.activation_checkpointing=torch"),
        job("fairscale-ddp", "engine.name=ddp", "engine.activation_checkpointing=fairscale"),
    ]
    said = ranks(str(PROGRAMS / "train_many.py"), json.dumps(jobs)).succeed()
    assert f"STATUS {[0] * len(jobs)}" in said
    changed = ("torch", "fairscale", "fairscale_offload", "compile")
    for name in (*changed, "compile-ddp", "torch-ddp", "fairscale-ddp"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5), name
    for name in ("clipped-fsdp2", "clipped-ddp"):
        clipped = losses(tmp_path / "clipped")
        assert losses(tmp_path / name) == pytest.approx(clipped, rel=1e-5), name


@pytest.mark.slow
def test_the_optimizer_can_live_in_host_memory(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    """DeepSpeed compiles its CPU Adam at the first use: half a minute, then cached."""
    jobs = [
        [
            str(tiny),
            f"run.dir={tmp_path / name}",
            "log.every_steps=1",
            "schedule.steps=6",
            "schedule.warmup_steps=1",
            "engine.name=deepspeed",
            f"engine.config={name}",
            "engine.precision=bf16",
        ]
        for name in ("zero3", "zero3_offload")
    ]
    assert "STATUS [0, 0]" in ranks(str(PROGRAMS / "train_many.py"), json.dumps(jobs)).succeed()
    assert losses(tmp_path / "zero3_offload") == pytest.approx(losses(tmp_path / "zero3"), rel=1e-3)
    same = relative(
        tensors(tmp_path / "zero3_offload", "teacher"), tensors(tmp_path / "zero3", "teacher")
    )
    assert same < 1e-4


# What each objective adds to `tiny`, whose teacher is RC-MAE's.
OBJECTIVES = {
    "mae": ["objective.name=mae"],
    "supmae": [
        "objective.name=supmae",
        "model.num_classes=8",
        "model.class_hidden=16",
        "objective.class_weight=0.1",
    ],
    "rcsupmae": ["objective.terms={class: 0.1}", "model.num_classes=8", "model.class_hidden=16"],
    "bootmae": [
        "objective.name=bootmae",
        "objective.mask=boxes",
        "objective.box_smallest=2",
        "objective.box_largest=6",
        "teacher.schedule=by_epoch",
        "teacher.momentum=0.9",
    ],
    "rcpixio": [
        "objective.name=rcpixio",
        "objective.mask_grid=2",
        "model.class_tokens=3",
        "model.registers=1",
        "model.position_table=learned",
        "model.drop_path=0.4",
    ],
    "mixed": [
        "objective.name=mae",
        "objective.terms={consistency: 1, class: 0.1, features: 1}",
        "model.num_classes=8",
        "objective.teacher_mask=different",
        "model.qkv_bias=qv",
        "model.cls_token=false",
    ],
}


@pytest.mark.slow
def test_every_objective_is_the_local_one_on_every_engine(tiny: Path, tmp_path: Path) -> None:
    """Losses, the teacher and the batch norm's statistics; at stage 3 with a stop and a resume in
    the middle.
    """

    def job(name: str, *overrides: str) -> list[str]:
        run = [f"run.dir={tmp_path / name}", *SMALL, "schedule.steps=6"]
        return [str(tiny), *run, *overrides]

    stages = ("zero2", "zero3", "fsdp2", "ddp")
    two, again = [], []
    for objective, options in OBJECTIVES.items():
        for stage in ("zero2", "fsdp2", "ddp"):
            two.append(job(f"{objective}-{stage}", *options, *engine_of(stage)))
        again.append(job(f"{objective}-zero3", *options, *engine_of("zero3")))
    stopped = [[*each, "run.stop_after_steps=3"] for each in again]
    one = [job(f"{objective}-local", *options) for objective, options in OBJECTIVES.items()]
    started = [
        Ranks([sys.executable, str(PROGRAMS / "train_many.py"), json.dumps(jobs)], world, tmp_path)
        for jobs, world in ((two + stopped + again, 2), (one, 1))
    ]
    assert (
        f"STATUS {[0] * len(two) + [75] * len(stopped) + [0] * len(again)}" in started[0].succeed()
    )
    assert f"STATUS {[0] * len(one)}" in started[1].succeed()
    for objective in OBJECTIVES:
        oracle = tmp_path / f"{objective}-local"
        for stage in stages:
            run = tmp_path / f"{objective}-{stage}"
            assert losses(run) == pytest.approx(losses(oracle), rel=1e-5), run.name
            for kind in ("weight", "teacher", "buffer"):
                if keys_of(oracle, kind):
                    assert keys_of(run, kind) == keys_of(oracle, kind)
                    assert relative(tensors(run, kind), tensors(oracle, kind)) < 1e-5, (
                        f"{run.name} {kind}"
                    )
    taught = keys_of(tmp_path / "bootmae-zero2", "teacher")
    assert taught
    assert all(
        key.startswith(tuple(f"teacher/{part}" for part in PUBLISHED["encoder"])) for key in taught
    )


@pytest.mark.slow
def test_shards_may_lie_on_a_few_ranks_and_copies_on_the_others(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    """Four ranks, two of which share: half a training by one engine, the other half by another."""

    def job(name: str, *overrides: str) -> list[str]:
        run = [f"run.dir={tmp_path / name}", "log.every_steps=1", "schedule.steps=6"]
        return [str(tiny), *run, "schedule.clip_grad=0.5", *overrides]

    engines = {name: engine_of(f"{name}/2") for name in ("ddp", "fsdp2")}
    halves = [
        job(name, *overrides, "run.stop_after_steps=3", "checkpoint.every_steps=2")
        for name, overrides in engines.items()
    ]
    others = [
        job("fsdp2", *engines["ddp"], "engine.precision=fp32"),
        job("ddp", *engines["fsdp2"], "engine.precision=fp32"),
    ]
    one = ranks(str(PROGRAMS / "train_many.py"), json.dumps([job("local")]), world=1)
    four = ranks(str(PROGRAMS / "train_many.py"), json.dumps(halves + others), world=4)
    assert "STATUS [0]" in one.succeed()
    assert "STATUS [75, 75, 0, 0]" in four.succeed()
    for name in engines:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "local"), rel=1e-5)
        for kind in ("weight", "teacher", "exp_avg_sq"):
            wanted = tensors(tmp_path / "local", kind)
            assert relative(tensors(tmp_path / name, kind), wanted) < 1e-5, (name, kind)


def test_fsdp2_gathers_a_small_students_weights_once_and_computes_the_same(
    ranks: Callable[..., Ranks],
) -> None:
    said = ranks(str(PROGRAMS / "fsdp2_gathers.py"), world=2).succeed()
    line = next(line for line in said.splitlines() if line.startswith("RESULT "))
    for ways in json.loads(line.removeprefix("RESULT ")):
        kept, again = ways["kept"], ways["gathered again"]
        assert kept["digest"] == again["digest"]
        assert kept["gathers"] == [0] * 6
        assert min(again["gathers"]) >= 5  # each block's, in each backward pass
        # without a backward pass nothing stays: it would be old after an update
        assert kept["whole"] == {"trained": True, "evaluated": False}
        assert again["whole"] == {"trained": False, "evaluated": False}
        # of three and two blocks all but the last gather the next early, where all are computed
        assert kept["ahead"] == again["ahead"] == {"trained": 4, "evaluated": 0}


def keys_of(run: Path, kind: str) -> list[str]:
    manifest = checkpoint.read_manifest(max((run / "checkpoints").glob("step-*")))
    return sorted(key for key in manifest.tensors if key.startswith(f"{kind}/"))


def quadratic() -> tuple[torch.nn.Module, LocalEngine]:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

        def place_of(self, name: str) -> Place:
            return Place("encoder", layer=0, decays=name.endswith("weight"))

    model = Model()
    return model, LocalEngine(model, None, EngineSettings(clip_grad=0.5))


def test_the_local_engine_is_plain_adamw() -> None:
    """Flat masters, gradients and moments take the very steps of torch's AdamW on the parameters
    themselves.
    """
    model, engine = quadratic()
    twin = torch.nn.Linear(3, 2)
    twin.load_state_dict(
        {name.removeprefix("norm."): value for name, value in model.state_dict().items()}
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [twin.weight], "weight_decay": 0.1},
            {"params": [twin.bias], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(5):
        x = torch.full((4, 3), float(step + 1))
        for micro in range(2):
            engine.backward(engine.student(x).square().mean(), last=micro == 1)
            twin(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        engine.step(lr=1e-2, weight_decay=0.1)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.named_parameters():
        torch.testing.assert_close(
            value, twin.get_parameter(name.removeprefix("norm.")), rtol=1e-6, atol=1e-7
        )
    assert engine.state().optimizer_step == 5


def test_gradients_in_bf16_are_those_of_this_step_summed_in_fp32() -> None:
    """Micro-batches add up in fp32; a parameter that a step does not use has no gradient there."""
    model, _ = quadratic()
    engine = LocalEngine(model, None, EngineSettings(precision="bf16", accumulation=2))
    layer = model.norm
    for step in range(3):
        sums = {name: torch.zeros(param.shape) for name, param in layer.named_parameters()}
        for micro in range(2):
            x = torch.full((4, 3), 1.0 + step + 0.37 * micro, dtype=torch.bfloat16)
            bias = None if step == 1 else layer.bias
            loss = torch.nn.functional.linear(x, layer.weight, bias).square().mean()
            used = {"weight": layer.weight} | ({} if bias is None else {"bias": bias})
            grads = torch.autograd.grad(loss, list(used.values()), retain_graph=True)
            for name, grad in zip(used, grads, strict=True):
                sums[name] += grad  # fp32 + bf16
            engine.backward(loss, last=micro == 1)
        norm = torch.cat([each.flatten() for each in sums.values()]).norm()
        stats = engine.step(lr=1e-2, weight_decay=0.1)
        assert float(stats.grad_norm) == pytest.approx(float(norm), rel=1e-6), step


def test_an_average_takes_running_statistics_as_they_are_and_after_a_load_too() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.norm = torch.nn.BatchNorm1d(2)
            self.register_buffer("table", torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)) * self.table

        def place_of(self, name: str) -> Place:
            return Place("encoder", layer=0, decays=False)

    model = Model()
    assert set(running_buffers(model)) == {
        f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    engine = LocalEngine(model, copy.deepcopy(model), EngineSettings())
    assert engine.teacher is not None
    for _ in range(3):
        loss = engine.student(torch.randn(8, 3)).square().sum()
        engine.backward(loss, last=True)
        engine.step(lr=1e-2, weight_decay=0.0)
        engine.update_teacher(0.9)
        for name, value in engine.teacher.named_buffers():
            assert torch.equal(value, model.get_buffer(name)), name
    assert not torch.equal(engine.teacher.linear.weight, model.linear.weight)
    engine.state().buffers["norm.running_mean"].fill_(7.0)  # as a load writes
    engine.restored(optimizer_step=3, teacher_updates=3)
    assert torch.equal(engine.teacher.get_buffer("norm.running_mean"), torch.full((2,), 7.0))
