"""`engine.precision=auto`: bf16 where every rank's device has units for it, else fp32; and said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from rcmae import config
from rcmae.models import kernels, precision
from rcmae.models.precision import Bf16, bf16_of
from rcmae.run.command import Command
from rcmae.run.judge import Verdict, judge
from rcmae.run.look import look
from rcmae.tasks.pretrain import Pretraining
from runs import Folder, start

WITH = Bf16(True, "the CPU has AVX512-BF16")
WITHOUT = Bf16(False, "the CPU has neither AVX512-BF16 nor AMX")


def judged(tiny: Path, folder: Path, asked: str, *ranks: Bf16) -> Verdict:
    """The verdict on a recipe of these ranks' devices."""
    name = "local" if len(ranks) == 1 else "fsdp2"
    overrides = [f"run.dir={folder}", f"engine.precision={asked}", f"engine.name={name}"]
    recipe = config.load(str(tiny), overrides)
    sight = look(recipe, Command("tiny"), Pretraining())
    views = tuple(
        sight.views[0]._replace(bf16=each, local_world=len(ranks), command=Command("tiny"))
        for each in ranks
    )
    return judge(replace(sight, views=views), Pretraining())


@pytest.mark.parametrize(
    ("asked", "ranks", "used", "why"),
    [
        ("auto", (WITH,), "bf16", "the CPU has AVX512-BF16"),
        ("auto", (WITHOUT,), "fp32", "neither AVX512-BF16 nor AMX"),
        ("auto", (WITH, WITH), "bf16", "the CPU has AVX512-BF16"),
        ("auto", (WITH, WITHOUT), "fp32", "neither AVX512-BF16 nor AMX on rank 1"),
        ("fp32", (WITH,), "fp32", "as requested"),
        ("bf16", (WITHOUT,), "bf16", "as requested"),
    ],
)
def test_one_precision_for_all_ranks(
    asked: str, ranks: tuple[Bf16, ...], used: str, why: str, tiny: Path, tmp_path: Path
) -> None:
    verdict = judged(tiny, tmp_path / "run", asked, *ranks)
    assert verdict.recipe.engine.precision == used
    assert verdict.precision.used == used
    assert why in verdict.precision.why
    assert why in verdict.shown()


def test_bf16_where_it_is_emulated_is_done_and_warned_of(tiny: Path, tmp_path: Path) -> None:
    verdict = judged(tiny, tmp_path / "run", "bf16", WITH, WITHOUT)
    assert verdict.precision.used == "bf16"
    (warning,) = verdict.warnings
    assert "emulated here: the CPU has neither AVX512-BF16 nor AMX on rank 1" in warning
    assert judged(tiny, tmp_path / "run", "bf16", WITH).warnings == ()
    assert judged(tiny, tmp_path / "run", "auto", WITHOUT).warnings == ()


def test_a_teacher_rounded_to_bf16_is_refused_where_auto_means_fp32(
    tiny: Path, tmp_path: Path
) -> None:
    recipe = config.load(str(tiny), ["teacher.accumulate=stochastic", "engine.precision=auto"])
    assert config.rounding_problems(recipe) == []
    assert config.rounding_problems(config.with_precision(recipe, True)) == []
    assert "rounds to bf16" in config.rounding_problems(config.with_precision(recipe, False))[0]


def test_what_was_chosen_is_said_and_a_resume_may_change_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Folder(tmp_path / "run")
    auto = ("engine.precision=auto", "schedule.steps=4", "schedule.warmup_steps=1")
    monkeypatch.setattr(precision, "cpu_instructions", lambda: frozenset())
    assert start(tiny, run.path, *auto, "run.stop_after_steps=2") == 75
    assert "precision    fp32  (auto: the CPU has neither AVX512-BF16 nor AMX)" in (
        capsys.readouterr().out
    )
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["engine"]["precision"] == "fp32"
    monkeypatch.setattr(precision, "cpu_instructions", lambda: frozenset({"avx512_bf16"}))
    assert start(tiny, run.path, *auto) == 0
    assert "precision    bf16  (auto: the CPU has AVX512-BF16)" in capsys.readouterr().out
    (first,), (second,) = run.events("start"), run.events("resume")
    assert first["precision"]["used"] == "fp32"
    assert second["precision"] == {
        "asked": "auto",
        "used": "bf16",
        "why": "the CPU has AVX512-BF16",
    }
    assert run.steps() == [1, 2, 3, 4]


def test_the_warning_is_printed_once_and_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Folder(tmp_path / "run")
    monkeypatch.setattr(precision, "cpu_instructions", lambda: frozenset())
    overrides = ("engine.precision=bf16", "schedule.steps=2", "schedule.warmup_steps=1")
    assert start(tiny, run.path, *overrides) == 0
    assert capsys.readouterr().out.count("engine.precision=bf16 is emulated here") == 1
    assert "emulated" in run.events("warning")[0]["told"]


@pytest.mark.parametrize(
    ("instructions", "units"),
    [({"avx512_bf16"}, True), ({"amx_bf16", "amx_tile"}, True), (set(), False)],
)
def test_attention_on_a_cpu_follows_what_it_has(
    instructions: set[str], units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_instructions", lambda: frozenset(instructions))
    cpu = torch.device("cpu")
    assert bf16_of(cpu).units == units
    assert kernels.attention_is_fused(cpu, "bf16") is not units
    assert kernels.attention_is_fused(cpu, "fp32")


def test_what_this_cpu_has_is_what_the_kernel_says() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file() or "avx" not in (text := cpuinfo.read_text()):
        pytest.skip("no x86 Linux")
    words = set(text.split())
    assert bf16_of(torch.device("cpu")).units == bool({"avx512_bf16", "amx_bf16"} & words)


def test_every_shipped_recipe_leaves_the_precision_to_the_device() -> None:
    for path in sorted(config.RECIPES.glob("*.yaml")):
        tree = yaml.safe_load(path.read_text())
        assert tree.get("engine", {}).get("precision", "auto") == "auto", path.name
