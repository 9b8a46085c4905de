"""The classifier is timm's, takes weights of another grid and class count, and drops paths by
sample.
"""

import pytest
import torch

from rcmae.data.batch import Batch
from rcmae.models.blocks import drop_path_draws
from rcmae.models.classifier import Classifier
from rcmae.models.fitting import fit_weights, resample_positions
from rcmae.models.flops import classifier_flops
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives.classification import ClassifierLoss

import timm

SIZES = {
    "image_size": (32, 32),
    "patch_size": 8,
    "in_channels": 3,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
}


def pretrained(**other: object) -> MaskedAutoencoder:
    sizes = {**SIZES, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, **other}
    model = MaskedAutoencoder(NetworkSizes(**sizes))  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(5))
    return model


def batch_of(images: torch.Tensor, labels: torch.Tensor, first: int = 0) -> Batch:
    ids = torch.zeros(len(images), 0, dtype=torch.int64)
    return Batch(
        images,
        ids,
        0,
        labels,
        (),
        torch.arange(first, first + len(images)),
        torch.zeros(len(images), 5),
    )


def test_an_encoder_gives_its_own_features_in_the_classifier() -> None:
    encoder, images = pretrained().eval(), torch.randn(2, 3, 32, 32)
    model = Classifier(NetworkSizes(**SIZES), num_classes=5, pool="cls").eval()
    fit = fit_weights(model, encoder.state_dict())
    assert fit.fresh == ("head.weight", "head.bias")
    assert all(name.startswith(("decoder", "mask_token")) for name in fit.unused)
    assert fit.resampled is None
    torch.testing.assert_close(model.encoded(images), encoder.encoded(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("cls", "token")])
def test_timm_has_the_same_scores(pool: str, theirs: str) -> None:
    model = Classifier(NetworkSizes(**SIZES), num_classes=5, pool=pool).eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight)
    other = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=4,
        num_classes=5,
        global_pool=theirs,
    ).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), other(images), rtol=1e-5, atol=1e-5)


def test_positions_of_another_grid_keep_what_varies_along_one_axis() -> None:
    rows = torch.linspace(0, 1, 4).view(4, 1, 1).expand(4, 6, 2)
    table = torch.cat([torch.full((1, 1, 2), 9.0), rows.reshape(1, 24, 2)], dim=1)
    found = resample_positions(table, (4, 6), (7, 3))
    assert found.shape == (1, 22, 2)
    assert found[0, 0].tolist() == [9.0, 9.0]
    grid = found[0, 1:].view(7, 3, 2)
    torch.testing.assert_close(grid[:, :1].expand_as(grid), grid)  # equal along a row
    assert (grid[1:, 0, 0] > grid[:-1, 0, 0]).all()  # and growing down


def test_weights_of_an_oblong_grid_are_fitted_by_it() -> None:
    model = Classifier(NetworkSizes(**{**SIZES, "image_size": (16, 48)}), num_classes=2)
    fit = fit_weights(model, pretrained(image_size=(32, 24)).state_dict(), grid=(4, 3))
    assert fit.resampled == ((4, 3), (2, 6))
    with pytest.raises(ValueError, match="no 3x3 grid"):
        fit_weights(model, pretrained(image_size=(32, 24)).state_dict())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"patch_size": 16}, "it has patches of 16 pixels, the model 8"),
        ({"embed_dim": 32}, "cls_token 1x1x32 instead of 1x1x48"),
        ({"depth": 4}, "has unknown blocks.3.norm1.weight"),
        ({"depth": 2}, "lacks blocks.2.norm1.weight"),
    ],
)
def test_weights_of_another_architecture_are_refused_and_nothing_is_touched(
    other: dict, message: str
) -> None:
    model = Classifier(NetworkSizes(**SIZES), num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit_weights(model, pretrained(**other).state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_head_of_other_classes_is_left_out_and_one_of_as_many_taken() -> None:
    weights = Classifier(NetworkSizes(**SIZES), num_classes=7).state_dict()
    assert (
        "head.weight"
        in fit_weights(Classifier(NetworkSizes(**SIZES), num_classes=2), weights).unused
    )
    assert fit_weights(Classifier(NetworkSizes(**SIZES), num_classes=7), weights).fresh == ()


def test_drop_path_hangs_on_positions_alone_and_has_the_right_mean() -> None:
    draws = drop_path_draws(3, range(4000), [0.0, 0.2, 0.4])
    assert draws.shape == (4000, 3, 2)
    assert draws[:, 0].all()
    assert draws.double().mean((0, 2)).tolist() == pytest.approx([1.0, 0.8, 0.6], abs=0.02)
    assert torch.equal(draws[100:110], drop_path_draws(3, range(100, 110), [0.0, 0.2, 0.4]))
    assert not torch.equal(draws[:10], drop_path_draws(4, range(10), [0.0, 0.2, 0.4]))


def test_loss_of_a_batch_is_that_of_its_parts_with_paths_dropped() -> None:
    model = Classifier(NetworkSizes(**SIZES), num_classes=5, drop_path=0.5).train()
    torch.nn.init.normal_(model.head.weight)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    task = ClassifierLoss(smoothing=0.1, seed=2)
    whole = task(model, None, batch_of(images, labels), 0.0)["classification"]
    parts = [
        task(model, None, batch_of(images[i : i + 2], labels[i : i + 2], i), 0.0) for i in (0, 2, 4)
    ]
    torch.testing.assert_close(whole, torch.stack([part["classification"] for part in parts]).sum())
    other = ClassifierLoss(smoothing=0.1, seed=3)(model, None, batch_of(images, labels), 0.0)[
        "classification"
    ]
    assert abs((whole - other).item()) > 1e-3  # something was dropped
    model.eval()
    a, b = (
        t(model, None, batch_of(images, labels), 0.0)["classification"]
        for t in (task, ClassifierLoss(0.1, 9))
    )
    assert torch.equal(a, b)


def test_flops_of_vit_b_are_the_known_ones() -> None:
    sizes = {
        "image_size": (224, 224),
        "patch_size": 16,
        "in_channels": 3,
        "embed_dim": 768,
        "depth": 12,
    }
    # 17.56 G multiply-adds
    assert classifier_flops(NetworkSizes(**sizes, num_heads=12)) / 1e9 == pytest.approx(
        35.1, abs=0.2
    )
