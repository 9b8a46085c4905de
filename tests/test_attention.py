"""Attention maps are those that the model computes with, and their rollout is what it says."""

import pytest
import torch
from test_classifier import SIZES

from rcmae.evaluation.attention import attention_maps, class_attention, rollout
from rcmae.models.classifier import Classifier
from rcmae.models.sizes import NetworkSizes


def test_maps_are_distributions_and_the_model_is_left_as_it_was() -> None:
    model = Classifier(NetworkSizes(**SIZES), num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    maps = attention_maps(model, images)
    assert maps.shape == (3, 2, 4, 17, 17)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 4, 17))
    assert torch.equal(model(images), before)
    assert all(not block.attn.attn_drop._forward_hooks for block in model.blocks)


def test_rollout_of_uniform_attention_is_uniform_and_of_one_patch_is_that() -> None:
    uniform = torch.full((3, 2, 5, 5), 0.2)
    assert rollout(uniform).tolist() == pytest.approx([1.0] * 4)
    pointed = torch.zeros(2, 1, 5, 5)
    pointed[..., 3] = 1.0  # everybody reads token 3, which is patch 2
    assert rollout(pointed).tolist() == pytest.approx([0.0, 0.0, 1.0, 0.0])
    kept = rollout(uniform, discard=0.5)
    assert kept.max() == 1.0
    with pytest.raises(ValueError, match="use mean, max or min"):
        rollout(uniform, fusion="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="discard"):
        rollout(uniform, discard=1.0)


def test_without_a_class_token_rollout_is_what_reaches_the_mean_of_the_patches() -> None:
    model = Classifier(NetworkSizes(**SIZES, class_tokens=0), num_classes=3).eval()
    maps = attention_maps(model, torch.randn(1, 3, 32, 32))
    assert maps.shape == (3, 1, 4, 16, 16)
    mixed = [(layer.mean(0) + torch.eye(16)) / 2 for layer in maps[:, 0]]
    reached = (mixed[2] @ mixed[1] @ mixed[0]).mean(0)
    torch.testing.assert_close(rollout(maps[:, 0], class_tokens=0), reached / reached.max())
    swapped = torch.tensor([[0.0, 1.0], [0.0, 1.0]])  # both patches read the second
    assert rollout(swapped[None, None], class_tokens=0).tolist() == pytest.approx([1 / 3, 1.0])
    assert rollout(swapped[None, None], class_tokens=0, discard=0.5).tolist() == pytest.approx(
        [1 / 3, 1.0]
    )


def test_class_attention_differs_by_class_and_is_not_negative() -> None:
    model = Classifier(NetworkSizes(**SIZES), num_classes=3).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(1, 3, 32, 32)
    one, other = (class_attention(model, images, torch.tensor([label])) for label in (0, 2))
    assert one.shape == (3, 1, 4, 17, 17)
    assert (one >= 0).all()
    assert not torch.allclose(one, other)
