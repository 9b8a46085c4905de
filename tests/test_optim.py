"""Groups decay what the published code decays, and the optimizer moves weights as the paper
says.
"""

import copy

import pytest
import torch
from torch import nn

import reference
from rcmae.engines.optim import GROUPS, LARS, param_groups, set_rates
from rcmae.models import kernels
from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.classifier import Classifier
from rcmae.models.protocol import Place
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import Encoder, Heads, MaskedAutoencoder
from reference import Sizes

SIZES = Sizes()


def test_every_trainable_parameter_is_in_one_group_by_the_published_rule() -> None:
    model = MaskedAutoencoder(NetworkSizes(**SIZES.model()))
    groups = param_groups(model, 0.05)
    assert tuple(group["name"] for group in groups) == GROUPS[:4]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0, 0.05, 0.0]
    named = dict(model.named_parameters())
    for group in groups:
        assert all(
            named[name] is param
            for name, param in zip(group["param_names"], group["params"], strict=True)
        )
        for name in group["param_names"]:
            assert reference.decays(name, named[name]) == group["name"].endswith("_decay") ^ (
                "_no_" in group["name"]
            )
            decoder = name.startswith(("mask_token", "decoder_"))
            assert group["name"].startswith("decoder" if decoder else "encoder"), name
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(named)
    assert {"cls_token", "mask_token"} <= set(groups[0]["param_names"]) | set(
        groups[2]["param_names"]
    )


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = MaskedAutoencoder(NetworkSizes(**SIZES.model()))
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("blocks.0."))
    assert [group["name"] for group in param_groups(model, 0.05)] == [
        "encoder_decay",
        "encoder_no_decay",
    ]


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_optimizer_moves_weights_as_decoupled_adam_with_the_papers_betas(decay: float) -> None:
    model = MaskedAutoencoder(NetworkSizes(**SIZES.model())).double()
    state = {name: param.detach().clone() for name, param in model.named_parameters()}
    plain = reference.AdamW(decay)
    optimizer = kernels.adamw(param_groups(model, decay), betas=(0.9, 0.95))
    before = copy.deepcopy(state)
    generator = torch.Generator().manual_seed(0)
    for lr in (0.0, 1e-3, 2e-3):  # the first step of a warm-up: moments move, weights do not
        grads = {
            name: torch.randn(param.shape, generator=generator).double()
            for name, param in state.items()
        }
        for name, param in model.named_parameters():
            param.grad = grads[name]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        plain.step(state, grads, lr)
        for name, param in model.named_parameters():
            torch.testing.assert_close(
                param.detach(), state[name], atol=1e-14, rtol=1e-12, msg=name
            )
            assert torch.equal(state[name], before[name]) == (lr == 0.0)


def test_heads_and_regressors_are_no_part_of_what_teachers_share() -> None:
    model = MaskedAutoencoder(
        NetworkSizes(**SIZES.model()),
        heads=Heads(num_classes=3, class_hidden=8, predicts_features=True),
    )
    groups = {group["name"]: group["param_names"] for group in param_groups(model, 0.05)}
    assert tuple(groups) == GROUPS
    assert all(name.startswith(("cls_head.", "feature_head.")) for name in groups["head_decay"])
    assert "cls_head.1.weight" in groups["head_no_decay"]

    regressors = BootstrappedAutoencoder(NetworkSizes(**SIZES.model()))
    boot = {group["name"]: group["param_names"] for group in param_groups(regressors, 0.05)}
    assert tuple(boot) == GROUPS[:4]
    assert "cls_token" in boot["encoder_no_decay"]  # as published, of this network alone
    assert {"mask_token", "lm_head.proj.weight"} <= set(boot["decoder_decay"])


def test_layers_move_the_slower_the_lower_and_tokens_do_not_decay() -> None:
    model = Classifier(
        NetworkSizes(
            image_size=(16, 16), patch_size=8, in_channels=3, embed_dim=16, depth=2, num_heads=2
        ),
        num_classes=3,
    )
    groups = {group["name"]: group for group in param_groups(model, 0.05, 0.5)}
    scales = {name: group["lr_scale"] for name, group in groups.items()}
    assert scales == {
        "layer_0_no_decay": 0.125,
        "layer_0_decay": 0.125,
        "layer_1_no_decay": 0.25,
        "layer_1_decay": 0.25,
        "layer_2_no_decay": 0.5,
        "layer_2_decay": 0.5,
        "layer_3_no_decay": 1.0,
        "layer_3_decay": 1.0,
    }
    assert groups["layer_0_no_decay"]["param_names"] == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.bias",
    ]
    assert "head.weight" in groups["layer_3_decay"]["param_names"]
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


class Around(nn.Module):
    """A network around a ViT, as dense tasks have them: it asks its child."""

    def __init__(self) -> None:
        super().__init__()
        sizes = SIZES.model()
        self.backbone = Encoder(
            NetworkSizes(**{key: sizes[key] for key in sizes if "decoder" not in key})
        )
        self.neck = nn.Linear(4, 4)

    num_layers = SIZES.depth + 2

    def place_of(self, name: str) -> Place:
        """Where a parameter is; only the neck's weight is the network's own."""
        if name == "neck.weight":
            return Place("head", self.num_layers - 1, decays=True)
        return self.backbone.place_of(name.removeprefix("backbone."))

    def all_blocks(self) -> list[nn.Module]:
        return self.backbone.all_blocks()


def test_a_network_around_another_has_its_childs_groups_and_layers() -> None:
    model = Around()
    model.neck.bias = None  # type: ignore[assignment]
    groups = {group["name"]: group["param_names"] for group in param_groups(model, 0.05)}
    assert tuple(groups) == ("encoder_decay", "encoder_no_decay", "head_decay")
    assert "backbone.blocks.0.mlp.fc1.weight" in groups["encoder_decay"]
    scales = {group["name"]: group["lr_scale"] for group in param_groups(model, 0.05, 0.5)}
    assert scales["layer_0_decay"] == 0.5 ** (SIZES.depth + 1)
    assert scales[f"layer_{SIZES.depth + 1}_decay"] == 1.0
    kernels.checkpoint_blocks(model, "torch")
    assert all("forward" in vars(block) for block in model.backbone.blocks)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_a_parameter_that_no_group_claims_is_an_error(layer_decay: float | None) -> None:
    with pytest.raises(LookupError, match=r"no part of a network has a parameter called neck.bias"):
        param_groups(Around(), 0.05, layer_decay)


def test_lars_of_shards_is_lars_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, grad = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    halves, total = [whole[:2].clone(), whole[2:].clone()], torch.zeros(2)
    for part, part_grad in zip(halves, (grad[:2], grad[2:]), strict=True):
        step = part_grad + 0.1 * part
        total += torch.stack([part.square().sum(), step.square().sum()])
    one = torch.nn.Parameter(whole.clone())
    params = [one, *(torch.nn.Parameter(half) for half in halves)]
    for param, each in zip(params, (grad, grad[:2], grad[2:]), strict=True):
        param.grad = each
        shards = param is not one
        optimizer = LARS(
            [{"name": "decay", "params": [param]}], all_sum=lambda x, s=shards: total if s else x
        )
        set_rates(optimizer.param_groups, lr=0.5, weight_decay=0.1)
        optimizer.step()
    torch.testing.assert_close(torch.cat([param.data for param in params[1:]]), one.data)
    sgd = LARS([{"name": "decay", "params": [torch.nn.Parameter(whole.clone())]}], trust=None)
    sgd.param_groups[0]["params"][0].grad = grad
    set_rates(sgd.param_groups, lr=0.5, weight_decay=0.0)
    sgd.step()
    torch.testing.assert_close(sgd.param_groups[0]["params"][0].data, whole - 0.5 * grad)
