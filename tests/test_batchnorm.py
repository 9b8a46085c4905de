"""The batch norm over all ranks is torch's over the whole batch: outputs, gradients and
statistics.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rcmae.models.batchnorm import GlobalBatchNorm
from tests.conftest import Ranks

PROGRAM = Path(__file__).parent / "programs" / "global_batch_norm.py"


def pair(width: int = 6, affine: bool = True) -> tuple[GlobalBatchNorm, nn.BatchNorm1d]:
    ours, theirs = GlobalBatchNorm(width, affine=affine), nn.BatchNorm1d(width, affine=affine)
    for norm in (ours, theirs):
        generator = torch.Generator().manual_seed(0)
        for param in norm.parameters():
            param.data.normal_(generator=generator)
    return ours, theirs


@pytest.mark.parametrize("affine", [True, False])
def test_on_one_process_it_is_torchs(affine: bool) -> None:
    ours, theirs = pair(affine=affine)
    for seed in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(each) for norm, each in zip((ours, theirs), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            (output**3).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        if affine:
            torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_on_two_ranks_it_is_torchs_over_all_rows(ranks: Callable[..., Ranks]) -> None:
    line = next(
        line for line in ranks(str(PROGRAM)).succeed().splitlines() if line.startswith("RESULT ")
    )
    for name, difference in json.loads(line.removeprefix("RESULT ")).items():
        assert difference < 1e-5, name


def test_what_is_not_finite_moves_no_statistics() -> None:
    ours, _ = pair()
    before = {name: value.clone() for name, value in ours.named_buffers()}
    assert ours(torch.full((4, 6), torch.nan)).isnan().all()
    for name, value in ours.named_buffers():
        assert value.equal(before[name]), name


def test_statistics_stay_float32_in_a_bf16_model() -> None:
    ours, _ = pair()
    x = torch.randn(8, 6)
    ours(x)
    mean = ours.running_mean.clone()
    ours.bfloat16()
    assert ours.running_mean.equal(mean)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_one_image_has_no_statistics() -> None:
    with pytest.raises(ValueError, match=r"two images or more.*per_device"):
        GlobalBatchNorm(3)(torch.zeros(1, 3))
