"""A run of a thousand ranks over a billion samples starts in seconds and little memory."""

import json
from pathlib import Path

import pytest

from tools import bench_start


def test_a_rank_of_a_thousand_starts_within_seconds(tmp_path: Path) -> None:
    """Processor seconds of one rank: about 1 to load the index, 0.3 to plan an epoch, 0.02 to find
    a step in its middle; its manifest 0.1 to write. Loading peaks at 280 MB above the imports, most
    of it while the JSON is parsed.
    """
    out = tmp_path / "start.json"
    assert bench_start.main(["--rounds", "1", "--json", str(out)]) == 0
    told = json.loads(out.read_text())["figures"]
    assert told["plan_s"] < 2
    assert told["resume_s"] < 1
    assert told["load_s"] < 10
    assert told["peak_mb"] - told["imports_mb"] < 400
    assert told["json_mb"] < 45
    assert told["manifest_mb"] < 5
    assert told["manifest_write_s"] + told["manifest_read_s"] < 5  # 18 with an object a run


@pytest.mark.parametrize("words", [["--shards", "10"], ["--rounds", "0"], ["--ranks", "99999999"]])
def test_sizes_that_show_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench_start.main(words)
    assert left.value.code == 2
