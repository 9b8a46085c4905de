"""DeepSpeed's JSON is the user's: what is wrong with it is said before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rcmae.engines.deepspeed_config import handed_over, read_config
from rcmae.engines.protocol import EngineSettings
from runs import start

STAGE2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
REFUSED = {
    "a list for a section": ({"zero_optimization": []}, "zero_optimization=[]; give an object"),
    "text for a section": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
        'zero_optimization.offload_optimizer="cpu"; give an object',
    ),
    "a section and a value": (
        {"fp16": True, "optimizer": "AdamW"},
        'optimizer="AdamW", fp16=true; give an object',
    ),
    "a key that DeepSpeed has not": (
        {"zero_optimization": {"stage": 2, "reduce_bucket": 5, "reduce_bucket_size": "abc"}},
        "reduce_bucket: extra inputs are not permitted, got 5",
    ),
    "what DeepSpeed no longer does": ({**STAGE2, "amp": {"enabled": True}}, "AMP integration"),
    "bf16 by its former name": (
        {**STAGE2, "bfloat16": {"enabled": True}},
        "bfloat16.enabled=true, the recipe says engine.precision: fp32",
    ),
    "two numbers of the recipe": (
        {**STAGE2, "fp16": {"enabled": True}, "gradient_clipping": 0.5},
        "gradient_clipping=0.5, the recipe says schedule.clip_grad: null; delete it there\n"
        "DeepSpeed's JSON says fp16.enabled=true, the recipe says engine.precision: fp32",
    ),
    "another Adam": (
        {**STAGE2, "optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
        "optimizer.params.adam_w_mode=false, the recipe says the optimizer: AdamW",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_json_is_the_users_and_nothing_is_written(
    name: str, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document, text = REFUSED[name]
    path = tmp_path / "my own.json"
    path.write_text(json.dumps(document))
    run = tmp_path / "run"
    assert start(tiny, run, "engine.name=deepspeed", f"engine.config={path}") == 2
    said = capfd.readouterr().err
    assert text in said
    assert "Traceback" not in said
    assert not run.exists()


def test_a_key_that_is_null_or_auto_is_left_to_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": null, "bf16": {"enabled": "auto"}, "fp16": null}')
    assert read_config(str(path)) == {"bf16": {"enabled": "auto"}}
    settings = EngineSettings(per_device=8, accumulation=2, precision="bf16", clip_grad=None)
    given = handed_over(read_config(str(path)), settings)
    assert given["bf16"] == {"enabled": True}
    assert given["gradient_accumulation_steps"] == 2
