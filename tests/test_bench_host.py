"""The measure of an engine's host time: the narrow network is the real one but for its width, and a
run of it ends with figures.
"""

import json

import pytest

from tools import bench_host


def test_the_narrow_network_is_as_deep_and_its_elements_are_scaled() -> None:
    sizes, share = bench_host.narrow("vit_large_patch16")
    assert (sizes["depth"], sizes["decoder_depth"], sizes["embed_dim"]) == (24, 8, 16)
    assert 0 < share < 0.01
    zero = bench_host.narrow_json("zero3", share)["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == 2 * round(25_000_000 * share)
    # a bias stays whole, a matrix does not
    assert 4 * bench_host.WIDTH < zero["stage3_param_persistence_threshold"] < bench_host.WIDTH**2


def test_ranks_have_figures_and_what_is_of_one_process_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ["--models", "vit_tiny_patch16", "--steps", "2", "--warmup", "2", "--rounds", "1"]
    engines = ["--engines", "local", "ddp", "--ranks", "2", "--profile", "30"]
    assert bench_host.main([*few, *engines, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["engine"], row["ranks"]) for row in report["cases"]] == [("ddp", 2)]
    for row in report["cases"]:
        assert sum(row["phases_ms"].values()) == pytest.approx(row["step_ms"]["median"], rel=0.3)
        assert all(milliseconds > 0 for milliseconds in row["phases_ms"].values())
        profile = row["profile"]
        assert len(profile) == 30
        own = [each["own_ms"] for each in profile]
        assert own == sorted(own, reverse=True)
        functions = [each["function"] for each in profile]
        assert any("linear" in each for each in functions), functions
        assert sum(own) < 100 * row["step_ms"]["median"], "of a step"
    bench_host.print_report(report)
    said = capsys.readouterr().out
    assert "ddp bf16, 2 ranks: processor-ms of a step under cProfile, rank 0" in said
    assert functions[0] in said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--models", "vit_huge"], "no model 'vit_huge'"),
        (["--engines", "local", "nope"], "no engine 'nope'; there are local, ddp"),
        (["--ranks", "0"], "--ranks=0 must be at least 1"),
        (["--steps", "1"], "has no spread"),
    ],
)
def test_unusable_input_is_refused(
    given: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        bench_host.main(given)
    assert left.value.code == 2
    assert says in capsys.readouterr().err
