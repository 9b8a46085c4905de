"""What plan says of memory is what ranks take; what it says of a run is what the run finds."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rcmae import config
from rcmae.commands import plan as command
from rcmae.config import Recipe
from rcmae.data.masking import visible_count
from rcmae.files import shipped
from rcmae.models import kernels
from rcmae.models.activations import Computing, activations, classifier_activations
from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.build import new_network, new_student
from rcmae.models.classifier import Classifier
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new
from rcmae.planning import estimates, planner
from rcmae.planning.hardware import GPUS, peak_flops
from rcmae.planning.live import made_up_batch
from rcmae.planning.memory import footprint
from rcmae.planning.states import PLACEMENTS, MemorySettings, states
from runs import Folder
from tests.conftest import ROOT, Ranks
from tools import bench_memory


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose activations, states and buckets all weigh.

    With DeepSpeed files of small buckets beside it.
    """
    folder = tmp_path_factory.mktemp("middling")
    for stage in (1, 2, 3):
        deepspeed = json.loads((shipped("ds_configs") / f"zero{stage}.json").read_text())
        zero = deepspeed["zero_optimization"] | {"reduce_bucket_size": 2_000_000}
        (folder / f"zero{stage}.json").write_text(
            json.dumps(deepspeed | {"zero_optimization": zero})
        )
    path = folder / "middling.yaml"
    path.write_text(
        """
model: {name: vit_tiny_patch16, image_size: 64, patch_size: 8, embed_dim: 192, depth: 6,
        num_heads: 3,
        decoder_dim: 128, decoder_depth: 2, decoder_heads: 4}
engine: {name: fsdp2, precision: bf16}
data: {shards: unseen.tar, canonical_streams: 8}
batch: {images: 32}
schedule: {steps: 20, lr: 1.0e-3}
"""
    )
    return path


CASES = {
    "zero0 fp32": ["engine.config=zero0", "engine.precision=fp32", "objective.name=mae"],
    "zero1 bf16": ["engine.config={}/zero1.json"],
    "zero1 fp32": ["engine.config={}/zero1.json", "engine.precision=fp32", "batch.per_device=8"],
    "zero2 bf16": ["engine.config={}/zero2.json"],
    "zero3 bf16, recomputed": [
        "engine.config={}/zero3.json",
        "engine.activation_checkpointing=torch",
    ],
    "zero3 fp32": ["engine.config={}/zero3.json", "engine.precision=fp32"],
    "ddp bf16": ["engine.name=ddp"],
    "ddp fp32, two micro-batches": [
        "engine.name=ddp",
        "engine.precision=fp32",
        "batch.per_device=8",
    ],
    "ddp bf16, sharded, two micro-batches": [
        "engine.name=ddp",
        "engine.shard_ranks=2",
        "batch.per_device=8",
    ],
    "fsdp2 bf16": ["engine.name=fsdp2"],
    "fsdp2 bf16, two micro-batches": ["engine.name=fsdp2", "batch.per_device=8"],
    "zero2 bf16, bootmae": ["engine.config={}/zero2.json", "objective.name=bootmae"],
    "fsdp2 fp32, bootmae": ["engine.name=fsdp2", "engine.precision=fp32", "objective.name=bootmae"],
}


@pytest.mark.slow
def test_memory_is_that_of_live_tensors_on_ranks(
    middling: Path, ranks: Callable[..., Ranks]
) -> None:
    """Model states to 1 %; the height of a step above them, on every rank, to 15 %."""
    cases = {
        name: [
            each.format(middling.parent)
            for each in (["engine.name=deepspeed"] if "zero" in name else []) + given
        ]
        for name, given in CASES.items()
    }
    given = ["--images=16", f"--cases={json.dumps(cases)}", "--json=-"]
    said = ranks(bench_memory.__file__, str(middling), *given, world=2).succeed()
    report = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    assert (report["beyond"], list(report["cases"])) == ([], list(CASES))
    for name, case in report["cases"].items():
        assert case["told_ready_bytes"] == pytest.approx(
            max(case["measured_ready_bytes"]), rel=0.01
        ), name
        for measured in case["measured_step_bytes"]:
            assert case["told_step_bytes"] == pytest.approx(measured, rel=0.15), name


def test_the_check_that_is_kept_is_within_its_tolerances() -> None:
    report = json.loads((estimates.RESULTS / "memory_vit_base_cpu.json").read_text())
    assert (report["tool"], report["beyond"]) == ("bench_memory", [])
    assert {(case["placement"], case["checkpointing"]) for case in report["cases"].values()} == {
        (placement, way) for placement in bench_memory.ENGINES for way in ("none", "torch")
    }
    assert all(abs(case["step_off"]) <= 0.15 for case in report["cases"].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "objective",
    [
        new("mae"),
        new("rcmae"),
        new("bootmae"),
        new("bootmae", feature_weight=0),
        pytest.param(new("rcpixio"), id="rcpixio"),
    ],
)
@pytest.mark.parametrize("checkpointing", ["none", "torch"])
def test_saved_activations_are_those_that_autograd_saves(
    middling: Path,
    precision: str,
    objective: Any,
    checkpointing: Any,
    request: pytest.FixtureRequest,
) -> None:
    pixio = [
        "objective.name=rcpixio",
        "objective.mask_grid=2",
        "model.class_tokens=4",
        "model.registers=2",
        "model.position_table=learned",
        "model.drop_path=0.3",
    ]
    bootmae = [
        "objective.name=bootmae",
        f"objective.feature_weight={int('features' in objective.terms)}",
    ]
    own = bootmae if objective.terms["reconstruction"].weight_mask else []
    recipe = config.load(str(middling), pixio if "rcpixio" in request.node.callspec.id else own)
    model = new_student(recipe)
    if precision == "bf16":
        model = model.bfloat16()
    kernels.choose_attention(model, torch.device("cpu"), precision)
    kernels.checkpoint_blocks(model, checkpointing)
    batch = made_up_batch(model, 4, torch.device("cpu"))
    known = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    known |= {
        batch.images.untyped_storage().data_ptr(),
        batch.ids_shuffle.untyped_storage().data_ptr(),
    }
    saved: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sums = objective(model, model, batch, 0.0)
    parts = activations(
        model,
        num_visible=batch.num_visible,
        computing=Computing(
            precision,
            checkpointing,
            kernels.attention_is_fused(torch.device("cpu"), precision),
        ),
        teacher="pixels" in objective.teacher_outputs,
    )
    # the head of BootMAE's pixels is a matrix with its weights in another order: once, however many
    # images there are
    once = model.lm_head.proj.weight.nbytes if isinstance(model, BootstrappedAutoencoder) else 0
    assert 4 * sum(part.saved for part in parts) + once == pytest.approx(
        sum(saved.values()), rel=0.01
    )
    assert sum(part.params for part in parts) == sum(param.numel() for param in model.parameters())
    assert sums


def test_the_largest_batch_fits_and_the_next_does_not(middling: Path) -> None:
    recipe = config.load(str(middling), ["batch.images=3072"])
    sizes = config.resolve(recipe, world=2, samples_per_epoch=3072)
    row = estimates.memory_row(recipe, "fsdp2", sizes, estimates.RESERVED + 2**30)
    largest = row["kept"]["largest_per_device"]
    next_one = min(size for size in estimates.divisors(1536) if size > largest)
    for images, fits in ((largest, True), (next_one, False)):
        settings = estimates.settings_of(recipe, "fsdp2", 2, images)
        found = footprint(estimates.cost_of(recipe), settings)
        assert (estimates.needed(found) <= estimates.RESERVED + 2**30) is fits
    assert row["recomputed"]["largest_per_device"] > largest
    assert not row["kept"]["fits"], "it was asked for all 1,536 at once"


@pytest.mark.parametrize("where", PLACEMENTS)
def test_more_ranks_never_need_more_memory(middling: Path, where: str) -> None:
    cost = estimates.cost_of(config.load(str(middling)))
    needs = []
    for world in (1, 2, 8, 64):
        needs.append(footprint(cost, MemorySettings(where, world=world, per_device=4)).peak)
    assert needs == sorted(needs, reverse=True)
    if where in ("local", "ddp", "zero0"):
        assert len(set(needs)) == 1
    without = estimates.cost_of(config.load(str(middling), ["objective.name=mae"]))
    alone, with_teacher = (
        footprint(each, MemorySettings(where, world=8, per_device=4)) for each in (without, cost)
    )
    assert alone.peak < with_teacher.peak


def test_images_that_wait_on_the_device_are_counted(middling: Path) -> None:
    """One micro-batch is copied ahead; where the device makes them, some steps' are there."""
    device = "data.resize=device"
    told = {}
    for name, words in {
        "copied": [],
        "made": [device],
        "made, two": [device, "batch.per_device=8"],
    }.items():
        recipe = planner.load(str(middling), words)
        per_device = recipe.batch.per_device or 16
        settings = estimates.settings_of(recipe, "fsdp2", 2, per_device)
        told[name] = settings.ahead
        cost = estimates.cost_of(recipe)
        assert cost.ahead_bytes == 64 * 64 * 3 + 8 * 64
        without = footprint(cost, replace(settings, ahead=0))
        more = settings.ahead * per_device * cost.ahead_bytes
        for when, parts in footprint(cost, settings).moments.items():
            assert sum(parts.values()) - sum(without.moments[when].values()) == pytest.approx(more)
    assert told == {"copied": 1, "made": 4, "made, two": 7}


def test_offload_moves_states_to_the_host(middling: Path) -> None:
    cost = estimates.cost_of(config.load(str(middling)))
    kept = MemorySettings(
        "zero3",
        world=2,
        deepspeed={"zero_optimization": {}, "data_types": {"grad_accum_dtype": "fp32"}},
    )
    moved = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    there, here = (
        footprint(cost, each) for each in (kept, MemorySettings("zero3", world=2, deepspeed=moved))
    )
    shard = states(cost.student, kept)["shard"]
    assert here.host == (4 + 8 + 4 + 4) * shard  # master, moments, gradients, teacher
    assert there.host == 0
    assert sum(there.resident.values()) - sum(here.resident.values()) == pytest.approx(here.host)


# --------------------------------------------------------------------------------- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = command.main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


PRETRAINING = sorted(
    path.stem
    for path in config.RECIPES.glob("*_vit_*.yaml")
    if not path.stem.startswith(("finetune", "probe", "segment", "detect"))
)


@pytest.mark.parametrize("recipe", PRETRAINING)
def test_every_shipped_pretraining_has_a_plan(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(capsys, recipe, "--nodes", "2")
    assert status == 0, report["problems"]
    with torch.device("meta"):
        model = new_network(planner.load(recipe, []), norm="torch")
    assert report["parameters"] == sum(param.numel() for param in model.parameters())
    teacher = report["memory"][0]["kept"]["at_peak"]["teacher"]
    assert (teacher > 0) == bool(planner.load(recipe, []).objective.teacher_parts)


def test_bootmaes_step_is_its_regressors_too_and_a_teacher_of_the_whole_image(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, whole = run(capsys, "bootmae_vit_b_16")
    _, alone = run(capsys, "bootmae_vit_b_16", "objective.feature_weight=0")
    model = new_network(planner.load("bootmae_vit_b_16", []), norm="torch")
    flops = [report["speed"]["forward_flops_per_image"] for report in (whole, alone)]
    width, seen, tokens, hidden = 768, 50, 197, 147
    regressor = 2 * width**2 * seen + 2 * width**2 * hidden  # from the encoder, to the features
    for queries in (tokens, hidden):
        regressor += (
            2 * width**2 * (3 * tokens + queries)
            + 4 * queries * tokens * width
            + 16 * width**2 * queries
        )
        # across
        regressor += 4 * width**2 * queries + 4 * width**2 * seen + 4 * queries * seen * width
    assert flops[0] - flops[1] == regressor
    assert whole["speed"]["step_flops_per_image"] == 3 * flops[0] + model.encoder_flops(196)
    assert alone["speed"]["step_flops_per_image"] == 3 * flops[1]
    assert whole["parameters"] > alone["parameters"]


@pytest.mark.parametrize("recipe", ["rcmae_vit_l_16", "rcmae_vit_h_14"])
@pytest.mark.parametrize("nodes", [1, 4, 8])
@pytest.mark.parametrize("gpu", ["a100-40g", "h100-80g", "h200"])
def test_shipped_recipes_can_run(
    recipe: str, nodes: int, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(capsys, recipe, "--nodes", str(nodes), "--gpu", gpu)
    assert status == 0, report["problems"]
    assert report["verdict"] == "can run"
    assert [row["engine"] for row in report["memory"]] == [
        "ddp",
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        "fsdp2",
    ]
    assert [row["engine"] for row in report["memory"] if row["own"]] == [report["engine"]]
    speed = report["speed"]
    assert speed["hours"] == pytest.approx(
        report["sizes"]["total_steps"] * 4096 / speed["images_per_s"] / 3600
    )
    peak = peak_flops(GPUS[gpu].device_name, "bf16")
    assert speed["images_per_s"] * speed["step_flops_per_image"] / (
        8 * nodes * peak
    ) == pytest.approx(0.35)


REFUSED = {
    "ranks that do not divide the batch": (
        ["--nodes", "3"],
        "batch.images=4096 is not divisible by 24 ranks",
    ),
    "streams": (["data.canonical_streams=100"], "data.canonical_streams=100 is not divisible by 8"),
    "too large": (["--gpu", "a10g", "batch.per_device=512"], "use batch.per_device=256"),
    "local on many": (
        ["engine.name=local", "engine.config=null"],
        "engine.name=local is one process, not 8",
    ),
    "no bf16": (
        ["--gpu", "v100-32g", "engine.precision=bf16"],
        "has no bf16; use engine.precision=fp32",
    ),
    "DeepSpeed's JSON against the recipe": (["engine.config={}"], "delete it there"),
    "few samples": (["--samples", "100"], "batch.images=4096 is more than the 100 samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_work_is_refused_with_the_way_out(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "own.json").write_text(
        '{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}'
    )
    arguments, text = REFUSED[name]
    status, report = run(
        capsys, "rcmae_vit_l_16", *(each.format(tmp_path / "own.json") for each in arguments)
    )
    assert status == 2
    assert report["verdict"] == "refused"
    assert text in "\n".join(report["problems"])
    assert ("--gpus 1 plans" in "\n".join(report["advice"])) == (name == "local on many")


def test_wrong_input_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["rcmae_vit_x", "--json"]) == 2
    assert command.main(["rcmae_vit_l_16", "batch.imagse=1"]) == 2
    assert "did you mean 'images'" in capsys.readouterr().err


def test_what_people_read_has_the_same_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["rcmae_vit_l_16", "--nodes", "4", "--cores", "8", "data.workers=1"]) == 0
    said = capsys.readouterr().out
    assert "zero2 *" in said
    assert "better: data.workers=4: 1 decode 700 images/s" in said
    assert "decoding wants 25 cores of a node, it has 8" in said
    assert said.rstrip().endswith("can run")


def test_a_tiny_network_is_bound_by_its_host_and_nothing_silly_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["quickstart", "--gpus", "1", "--cores", "2", "--samples", "2000"]
    tiny = ["model.embed_dim=16", "model.num_heads=2", "model.depth=1", "data.workers=4"]
    tiny += ["evaluate.every_steps=0", "data.shards=unseen.tar", "data.canonical_streams=null"]
    assert command.main([*words, *tiny]) == 0
    said = capsys.readouterr().out
    assert " 0 M" not in said
    assert "0.0 hours" not in said
    assert "launching kernels" in said
    assert "data.workers=10: 4 decode" in said  # not 916: its host launches 6400 images/s at most
    assert "would mix better" not in said
    status, report = run(capsys, *words, *tiny, "data.canonical_streams=256")
    assert status == 0
    assert any("data.canonical_streams=16 would mix better" in each for each in report["advice"])


def test_saves_that_take_longer_than_the_time_between_them_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["rcmae_vit_l_16", "--nodes", "4", "--write-gbps", "0.01"]
    _, report = run(capsys, *words)
    (told,) = [each for each in report["advice"] if each.startswith("a save takes")]
    assert "longer than the" in told
    assert "checkpoint.every_steps=" in told
    _, report = run(capsys, *words[:3])
    assert not [each for each in report["advice"] if each.startswith("a save takes")]


def test_shards_and_a_run_are_looked_at_where_they_are(
    tiny: Path,
    uninterrupted: Folder,
    photo_shards: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    given = [str(tiny), f"run.dir={uninterrupted.path}", "--gpus", "1"]
    status, report = run(capsys, *given)
    assert status == 0
    data, saved = report["data"], report["checkpoint"]
    assert (data["shards"], data["samples"], data["streams_per_rank"]) == (6, 240, 8)
    assert data["decode_from"] == "tried here on these shards"
    assert data["decode_per_core"] > 100
    event = uninterrupted.events("checkpoint")[-1]
    assert saved["bytes"] == pytest.approx(event["bytes"], rel=0.1)  # headers of many small tensors
    assert saved["bytes"] <= event["bytes"]
    assert (saved["seconds"], saved["seconds_from"]) == (event["seconds"], "this run")
    assert report["sizes"]["steps_per_epoch"] == 7
    elsewhere = photo_shards.replace("000005}", "000007}")
    status, report = run(capsys, *given, f"data.shards={elsewhere}")
    assert status == 2
    assert "photo-000006.tar" in report["problems"][0]
    assert "photo-000007.tar" in report["problems"][0]


def test_shards_of_an_evaluation_that_are_missing_are_seen(
    tiny: Path, photo_shards: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sets = ["evaluate.every_steps=5", f"evaluate.train_shards={photo_shards}"]
    given = [str(tiny), f"run.dir={tmp_path}/run", "--gpus", "1", *sets]
    missing = f"evaluate.test_shards={tmp_path}/val/a.tar"
    status, report = run(capsys, *given, missing)
    assert status == 2
    assert report["problems"] == [
        f"evaluate.test_shards: {tmp_path}/val/a.tar: No such file or directory"
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    status, report = run(capsys, *given, f"evaluate.test_shards={tmp_path}")
    assert "is a folder of images; pack them, rcmae shards make" in report["problems"][0]
    status, report = run(capsys, *given, "data.shards=/nowhere/x.tar", missing)
    assert status == 0, "the training's shards cannot be seen from here either"


def whole(*words: str) -> Recipe:
    """A recipe as `plan` asks what was measured of it."""
    return config.with_precision(config.load("rcmae_vit_l_16", ["data.shards=x.tar", *words]), True)


def utilisation(recipe: Recipe, gpu: str = "h200", file: Path | None = None) -> Any:
    return estimates.measured_utilisation(recipe, estimates.cost_of(recipe), gpu, file)


def test_a_measured_utilisation_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESULTS", tmp_path)
    recipe = whole("engine.compile=false")
    assert utilisation(recipe) is None
    peak = peak_flops("NVIDIA H200", "bf16")
    assert peak
    for name, gpu, share in (
        ("a", "NVIDIA H200", 0.3),
        ("b", "NVIDIA H200", 0.4),
        ("c", "NVIDIA H100", 0.9),
    ):
        row = {"variant": "rcmae-lean-bf16-eager", "model_flops_per_s": share * peak}
        other = {"variant": "rcmae-lean-bf16-compiled", "model_flops_per_s": 0.5 * peak}
        (tmp_path / f"{name}.json").write_text(
            json.dumps(
                {
                    "tool": "bench_step",
                    "settings": {"model": "vit_large_patch16"},
                    "hardware": {"gpu": gpu},
                    "variants": [row, other],
                }
            )
        )
    assert utilisation(recipe) == (pytest.approx(0.4), "b.json")
    assert utilisation(whole()) == (pytest.approx(0.5), "b.json")  # compiles: a GPU is asked about
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(ValueError, match="is not a result"):
        utilisation(recipe)


def gpu_day_of(recipe: Recipe, shares: dict[str, float], device: str = "NVIDIA H200") -> str:
    """What tools/gpu_day.py writes of a recipe's step by some engines."""
    of = {"model": recipe.model.name, "variant": estimates.variant_of(recipe)}
    of["step_flops"] = estimates.cost_of(recipe).step_flops
    cases: dict[str, Any] = {"steps/B": {"error": "out of memory"}, "tests": {"result": {}}}
    for name, share in shares.items():
        rate = share * peak_flops(device, "bf16")  # type: ignore[operator]
        result = {"of": {**of, "placement": name}, "flops_per_s": rate}
        cases[name] = {"result": result}
    return json.dumps({"tool": "gpu_day", "hardware": {"gpu": device}, "cases": cases})


def test_what_a_day_on_a_gpu_measured_makes_hours_measured_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "day.json"
    file.write_text(gpu_day_of(whole(), {"local": 0.5, "zero2": 0.44, "fsdp2": 0.9}))
    assert utilisation(whole(), file=file) == (pytest.approx(0.44), "day.json")  # its own engine
    ddp = whole("engine.name=ddp", "engine.config=null")
    assert utilisation(ddp, file=file) == (pytest.approx(0.5), "day.json")
    words = ["rcmae_vit_l_16", "--nodes", "4", "--gpu", "h200"]
    _, computed = run(capsys, *words)
    _, report = run(capsys, *words, "--measured", str(file))
    assert computed["speed"]["hours_from"] == "computed"
    assert report["speed"]["hours_from"] == "measured"
    told = report["speed"]["hours"] / computed["speed"]["hours"]
    assert told == pytest.approx(computed["speed"]["utilisation"] / 0.44)
    assert command.main([*words, "--measured", str(file)]) == 0
    said = capsys.readouterr().out
    assert "at 44% of 989 TFLOP/s (measured, day.json)" in said
    assert "time       measured: " in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "h100-80g"], "has no step of vit_large_patch16"),
        (["model.image_size=192"], "has no step of vit_large_patch16"),  # another length
        (["objective.name=mae"], r"\(mae-lean-bf16-compiled\)"),
        (["--measured", str(estimates.RESULTS / "stream_imagenet_224.json")], "is not a result"),
    ],
)
def test_a_named_file_without_this_step_is_refused(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "day.json"
    file.write_text(gpu_day_of(whole(), {"local": 0.5}))
    given = ["rcmae_vit_l_16", "--gpu", "h200", "--measured", str(file), *words]
    status, report = run(capsys, *given)
    assert status == 2
    assert re.search(told, report["problems"][0])


@pytest.mark.parametrize("recipe", ["rcmae_vit_l_16", "rcmae_vit_h_14"])
def test_the_table_in_the_readme_is_the_planners(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([recipe, "--table", "a100-40g,h100-80g,h200"]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 3 * len(command.TABLE_NODES)
    readme = (shipped("slurm") / "README.md").read_text()
    assert table in readme, (
        f"python tools/plan.py {recipe} --table a100-40g,h100-80g,h200 gives another one"
    )


def test_a_row_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["rcmae_vit_l_16", "batch.per_device=512", "--table", "a10g"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()[2:]
    assert "needs" in first
    assert "use batch.per_device=" in first
    with pytest.raises(SystemExit):
        command.main(["rcmae_vit_l_16", "--table", "h300"])


def test_the_command_runs(middling: Path, ranks: Callable[..., Ranks]) -> None:
    assert (
        "can run"
        in ranks(str(ROOT / "tools" / "plan.py"), str(middling), "--gpus", "2", world=1).succeed()
    )


def test_visible_patches_are_those_of_the_run(middling: Path) -> None:
    cost = estimates.cost_of(config.load(str(middling)))
    assert isinstance(cost.student, MaskedAutoencoder)
    assert cost.forward_flops == cost.student.flops(visible_count(64, 0.75))


@pytest.mark.parametrize("objective", ["finetune", "probe"])
def test_fine_tuning_and_probes_have_a_plan(
    objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(capsys, f"{objective}_rcmae_vit_b_16", "--nodes", "2")
    assert status == 0, report["problems"]
    forward = 2 * 17.6e9  # a ViT-B/16 at 224 px, a multiply-add counted as 2
    passes = 3 if objective == "finetune" else 1
    assert report["speed"]["step_flops_per_image"] == pytest.approx(passes * forward, rel=0.02)
    params = 86.6e6 if objective == "finetune" else 768 * 1000 + 1000
    assert report["parameters"] == pytest.approx(params, rel=0.01)
    weights = report["memory"][0]["kept"]["at_peak"]["weights"]
    assert weights > 85e6 * 2  # the probe's encoder, too


def test_saved_activations_of_a_classifier_are_those_that_autograd_saves() -> None:
    sizes = NetworkSizes((32, 32), 8, 3, embed_dim=64, depth=3, num_heads=4)
    model = Classifier(sizes, num_classes=10)
    saved: dict[int, int] = {}
    alive = []
    known = {param.untyped_storage().data_ptr() for param in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(4, 3, 32, 32)).sum()
    fused = kernels.attention_is_fused(torch.device("cpu"), "fp32")
    parts = classifier_activations(model, sizes, computing=Computing("fp32", fused_attention=fused))
    assert sum(part.params for part in parts) == sum(p.numel() for p in model.parameters())
    assert 4 * sum(part.saved for part in parts) == pytest.approx(sum(saved.values()), rel=0.05)
