"""Groups decay what the published code decays, and the optimizer moves weights as the paper says."""

import copy

import pytest
import torch

import reference
from rcmae import kernels
from rcmae.bootmae_vit import BootstrappedAutoencoder
from rcmae.optim import GROUPS, param_groups
from rcmae.vit import MaskedAutoencoder
from reference import Sizes

SIZES = Sizes()


def test_every_trainable_parameter_is_in_one_group_by_the_published_rule() -> None:
    model = MaskedAutoencoder(**SIZES.model())
    groups = param_groups(model, 0.05)
    assert tuple(group["name"] for group in groups) == GROUPS[:4]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.05, 0.0]
    named = dict(model.named_parameters())
    for group in groups:
        assert all(named[name] is param for name, param in zip(group["param_names"], group["params"], strict=True))
        for name in group["param_names"]:
            assert reference.decays(name, named[name]) == group["name"].endswith("_decay") ^ ("_no_" in group["name"])
            decoder = name.startswith(("mask_token", "decoder_"))
            assert group["name"].startswith("decoder" if decoder else "encoder"), name
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(named)
    assert {"cls_token", "mask_token"} <= set(groups[0]["param_names"]) | set(groups[2]["param_names"])


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = MaskedAutoencoder(**SIZES.model())
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("blocks.0."))
    assert [group["name"] for group in param_groups(model, 0.05)] == ["encoder_decay", "encoder_no_decay"]


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_optimizer_moves_weights_as_decoupled_adam_with_the_papers_betas(decay: float) -> None:
    model = MaskedAutoencoder(**SIZES.model()).double()
    state = {name: param.detach().clone() for name, param in model.named_parameters()}
    plain = reference.AdamW(decay)
    optimizer = kernels.adamw(param_groups(model, decay), betas=(0.9, 0.95))
    before = copy.deepcopy(state)
    generator = torch.Generator().manual_seed(0)
    for lr in (0.0, 1e-3, 2e-3):  # the first step of a warm-up: moments move, weights do not
        grads = {name: torch.randn(param.shape, generator=generator).double() for name, param in state.items()}
        for name, param in model.named_parameters():
            param.grad = grads[name]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        plain.step(state, grads, lr)
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.detach(), state[name], atol=1e-14, rtol=1e-12, msg=name)
            assert torch.equal(state[name], before[name]) == (lr == 0.0)


def test_heads_and_regressors_are_no_part_of_what_teachers_share() -> None:
    model = MaskedAutoencoder(**SIZES.model(), num_classes=3, class_hidden=8, predicts_features=True)
    groups = {group["name"]: group["param_names"] for group in param_groups(model, 0.05)}
    assert tuple(groups) == GROUPS
    assert all(name.startswith(("cls_head.", "feature_head.")) for name in groups["head_decay"])
    assert "cls_head.1.weight" in groups["head_no_decay"]

    regressors = BootstrappedAutoencoder(**SIZES.model())
    boot = {group["name"]: group["param_names"] for group in param_groups(regressors, 0.05)}
    assert tuple(boot) == GROUPS[:4]
    assert "cls_token" in boot["encoder_no_decay"]  # as published, of this network alone
    assert {"mask_token", "lm_head.proj.weight"} <= set(boot["decoder_decay"])
