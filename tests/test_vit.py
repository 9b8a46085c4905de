"""The model computes what the papers say, touches only what it must, and carries the published
names.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import reference
import relatives
from rcmae.models.blocks import Block, LastBlock
from rcmae.models.flops import flops_per_image
from rcmae.models.patches import patches_at, patchify, sincos_positions, unpatchify
from rcmae.models.sizes import ARCHITECTURES, NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.process import extensions  # noqa: F401, it makes timm importable beside a CPU torch
from reference import Sizes

import timm

SHAPES = {
    "tall": Sizes(image=(24, 16)),
    "grey": Sizes(image=(16, 16), patch=8, channels=1, decoder_depth=1),
    "five channels": Sizes(image=(12, 30), patch=6, channels=5, width=32, heads=4),
}


def small(sizes: Sizes = SHAPES["tall"], seed: int = 3) -> MaskedAutoencoder:
    model = MaskedAutoencoder(NetworkSizes(**sizes.model()))
    model.load_state_dict(reference.weights(sizes, seed), strict=True)
    return model


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_the_published_mathematics(sizes: Sizes) -> None:
    kept = max(1, sizes.patches // 4)
    images, noise = reference.inputs(sizes, 3, seed=5)
    want = reference.forward(
        reference.double(reference.weights(sizes, 3)), sizes, images.double(), noise, kept
    )
    for model, tolerance in ((small(sizes).double(), 1e-12), (small(sizes), 1e-5)):
        given, ids = images.to(model.norm.weight.dtype), noise.argsort(dim=1)
        everything = model(given, ids, kept, ("all_pixels",))["all_pixels"]
        torch.testing.assert_close(
            everything.double(), want["pred"], atol=tolerance, rtol=tolerance
        )
        latent = model.encode(given, ids[:, :kept])
        torch.testing.assert_close(latent.double(), want["latent"], atol=tolerance, rtol=tolerance)
        hidden = model(given, ids, kept)["pixels"]
        picked = want["pred"].take_along_dim(ids[:, kept:, None], dim=1)
        torch.testing.assert_close(hidden.double(), picked, atol=tolerance, rtol=tolerance)


def test_hidden_pixels_never_reach_the_prediction() -> None:
    model = small()
    images, noise = reference.inputs(SHAPES["tall"], 2, seed=1)
    ids, kept = noise.argsort(dim=1), 6
    grid = patchify(images, 4)
    grid.scatter_(1, ids[:, kept:, None].expand(-1, -1, grid.shape[2]), torch.nan)
    spoilt = unpatchify(grid, 4, (24, 16), 3)
    assert spoilt.isnan().float().mean() == pytest.approx(18 / 24)
    assert torch.equal(model(spoilt, ids, kept)["pixels"], model(images, ids, kept)["pixels"])


def test_each_block_is_called_once_and_the_last_one_for_hidden_tokens_alone() -> None:
    model, calls = small(), []
    for block in [*model.blocks, *model.decoder_blocks]:  # what an engine wraps must see every call
        block.register_forward_hook(
            lambda module, args, out: calls.append((type(module).__name__, out.shape[1]))
        )
    images, noise = reference.inputs(SHAPES["tall"], 2, seed=1)
    model(images, noise.argsort(dim=1), 6)
    assert calls == [("Block", 7), ("Block", 7), ("Block", 25), ("LastBlock", 18)]


def test_last_block_is_a_block_for_the_tail() -> None:
    last = LastBlock(16, 2, mlp_ratio=4, norm=nn.LayerNorm).double()
    plain = Block(16, 2, mlp_ratio=4, norm=nn.LayerNorm).double()
    plain.load_state_dict(last.state_dict())
    tokens = torch.randn(2, 9, 16, dtype=torch.float64)
    for first in (0, 4, 8):
        torch.testing.assert_close(
            last(tokens, first), plain(tokens)[:, first:], atol=1e-13, rtol=0
        )


@pytest.mark.parametrize("fused", [True, False])
def test_a_block_is_timms_to_the_last_bit(fused: bool) -> None:
    torch.manual_seed(0)
    theirs = timm.models.vision_transformer.Block(24, 3, qkv_bias=True, norm_layer=nn.LayerNorm)
    theirs.attn.fused_attn = fused
    tokens = torch.randn(2, 9, 24)
    for kind in (Block, LastBlock):
        ours = kind(24, 3, mlp_ratio=4.0, norm=nn.LayerNorm)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        ours.attn.fused_attn = fused
        found = []
        for block in (theirs, ours):
            x = tokens.clone().requires_grad_()
            out = block(x)
            grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
            found.append([out, *grads])
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_features_are_those_of_the_whole_image_in_raster_order() -> None:
    model = small()
    images, _ = reference.inputs(SHAPES["tall"], 2, seed=1)
    features = model(images, outputs=("encoded",))["encoded"]
    assert features.shape == (2, 25, 24)
    torch.testing.assert_close(
        features, model.encode(images, torch.arange(24).expand(2, -1)), atol=1e-5, rtol=1e-5
    )


def test_patchify_goes_row_by_row_channels_last_and_back() -> None:
    images = torch.arange(2 * 3 * 24 * 16, dtype=torch.float32).view(2, 3, 24, 16)
    patches = patchify(images, 4)
    assert torch.equal(patches, reference.patchify(images, 4))
    assert torch.equal(unpatchify(patches, 4, (24, 16), 3), images)
    ids = torch.tensor([[5, 0], [23, 7]])
    picked = patches_at(images, 4, ids).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(picked, torch.stack([patches[0, ids[0]], patches[1, ids[1]]]))


def test_position_table_encodes_column_then_row() -> None:
    assert torch.equal(
        sincos_positions(24, (3, 5), prefix=1).float()[None], reference.positions(24, (3, 5))
    )
    without = sincos_positions(64, (5, 5), prefix=0)
    assert without.shape == (25, 64)
    recorded = {  # row 1, column 2 of the released code's table
        0: 0.9092974268256817,
        1: 0.9021307149638974,
        15: 0.00035565587450990023,
        16: -0.4161468365471424,
        17: 0.4314628293592941,
        32: 0.8414709848078965,
        33: 0.5331684399140229,
        49: 0.8460091102817079,
    }
    assert without[7, list(recorded)].tolist() == pytest.approx(list(recorded.values()), abs=1e-12)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize(("dim", "grid"), [(24, (3, 5)), (36, (8, 8)), (192, (14, 14))])
def test_row_first_tables_are_those_of_float32(
    dim: int, grid: tuple[int, int], cls_token: bool
) -> None:
    table = sincos_positions(dim, grid, prefix=int(cls_token), order="row_first")
    assert torch.equal(table, relatives.row_first(dim, grid, cls_token=cls_token)[0].double())


def test_names_and_shapes_are_the_published_ones() -> None:
    sizes = SHAPES["tall"]
    state = MaskedAutoencoder(NetworkSizes(**sizes.model())).state_dict()
    tables = {"pos_embed": (1, 25, 24), "decoder_pos_embed": (1, 25, 16)}
    assert {name: tuple(array.shape) for name, array in state.items()} == reference.shapes(
        sizes
    ) | tables
    assert list(reference.shapes(sizes)) == [
        name for name, _ in MaskedAutoencoder(NetworkSizes(**sizes.model())).named_parameters()
    ]


# counted from the released architectures: (trainable, with position tables)
PUBLISHED = {
    "vit_tiny_patch16": (6_007_296, 6_070_336),
    "vit_base_patch16": (111_655_680, 111_907_840),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_build_and_count_as_published(name: str) -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder(
            NetworkSizes(image_size=(224, 224), in_channels=3, **ARCHITECTURES[name])
        )
    trainable = sum(param.numel() for param in model.parameters())
    everything = trainable + sum(buffer.numel() for buffer in model.buffers())
    assert (trainable, everything) == PUBLISHED.get(name, (trainable, everything))


# forward, 224 px, 75 % hidden, in G: with every patch embedded and predicted, as the published code
# does
FIGURES = {
    "vit_small_patch16": 3.8,
    "vit_base_patch16": 19.6,
    "vit_large_patch16": 41.5,
    "vit_huge_patch14": 97.1,
}


@pytest.mark.parametrize("name", FIGURES)
def test_flops_agree_with_the_known_figures(name: str) -> None:
    sizes = NetworkSizes(image_size=(224, 224), in_channels=3, **ARCHITECTURES[name])
    visible = sizes.num_patches // 4
    published = flops_per_image(sizes, num_visible=visible, hidden_only=False)
    assert round(published / 1e9, 1) == FIGURES[name]
    assert 0.95 < flops_per_image(sizes, num_visible=visible) / published < 1


def test_flops_are_those_that_the_model_runs() -> None:
    model = small()
    images, noise = reference.inputs(SHAPES["tall"], 3, seed=1)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        # it does not know the fused kernel of CPUs
        model(images, noise.argsort(dim=1), 6)
    assert counter.get_total_flops() == 3 * flops_per_image(model.sizes, num_visible=6)


def test_position_tables_stay_float32_whatever_the_weights_are() -> None:
    images, noise = reference.inputs(SHAPES["tall"], 2, seed=1)
    model = small()
    exact = model(images, noise.argsort(dim=1), 6)["pixels"]
    for lowered in (copy.deepcopy(model).bfloat16(), copy.deepcopy(model).to(torch.bfloat16)):
        assert {buffer.dtype for buffer in lowered.buffers()} == {torch.float32}
        pred = lowered(images, noise.argsort(dim=1), 6)["pixels"]
        assert pred.dtype == torch.bfloat16
        assert ((pred - exact).norm() / exact.norm()).item() < 0.03
    assert {buffer.dtype for buffer in model.double().buffers()} == {torch.float64}


def test_initial_weights_depend_on_the_generator_alone() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed)  # the global generator plays no part
        model = MaskedAutoencoder(NetworkSizes(**SHAPES["tall"].model()))
        model.init_weights(torch.Generator().manual_seed(seed))
        return model.state_dict()

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    torch.rand(3)
    first, second = (
        MaskedAutoencoder(NetworkSizes(**SHAPES["tall"].model())).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_initial_weights_are_distributed_as_published() -> None:
    sizes = Sizes(image=(32, 32), patch=8, width=192, heads=3, decoder_width=128, decoder_heads=4)
    state = dict(MaskedAutoencoder(NetworkSizes(**sizes.model())).named_parameters())
    for name, (made, given) in {
        "blocks.0.attn.qkv.weight": (576, 192),
        "patch_embed.proj.weight": (192, 192),  # as a linear layer
        "decoder_pred.weight": (192, 128),
    }.items():
        bound = (6 / (made + given)) ** 0.5
        assert state[name].abs().max().item() == pytest.approx(bound, rel=0.01), name
        assert state[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.02), name
    for name, param in state.items():
        if name in ("cls_token", "mask_token"):
            assert param.std().item() == pytest.approx(0.02, rel=0.2)
        elif param.ndim == 1:
            assert torch.all(
                param == (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            ), name


def test_every_problem_of_sizes_is_named_at_once() -> None:
    wrong = Sizes(image=(30, 16), patch=4, width=26, heads=4, decoder_width=18).model()
    with pytest.raises(ValueError, match="image height 30") as caught:
        MaskedAutoencoder(NetworkSizes(**wrong))
    message = str(caught.value)
    for part in (
        "use 28 or 32",
        "embed_dim=26 is not divisible by num_heads=4",
        "decoder_dim=18 must be a multiple of 4",
    ):
        assert part in message
    with pytest.raises(ValueError, match="decoder_depth=0 must be at least 1"):
        MaskedAutoencoder(NetworkSizes(**SHAPES["tall"].model() | {"decoder_depth": 0}))


def test_a_call_without_a_mask_is_refused() -> None:
    model = small()
    images, noise = reference.inputs(SHAPES["tall"], 2, seed=1)
    with pytest.raises(ValueError, match="num_visible from 1 to 23, got None"):
        model(images)
    with pytest.raises(ValueError, match="got 24"):
        model(images, noise.argsort(dim=1), 24)
    with pytest.raises(LookupError, match="no output called 'pixel'; there are pixels, all_pixels"):
        model(images, noise.argsort(dim=1), 6, ("pixel",))
