"""The masked autoencoder: a Vision Transformer that sees some patches and a small decoder that
predicts the others.

Everything happens in shuffled order: `ids_shuffle` [B, L] is a permutation of the patches whose
first `num_visible` the encoder sees. Only those are embedded; the decoder's tokens stand in the
order [cls, visible, hidden] with positions gathered to match, so hidden predictions are the tail
and nothing is ever put back in place for training. The decoder's last block asks queries for hidden
tokens alone, because the loss reads no others.

Parameters carry the published names, so published weights load with
`strict=True`. Positions are fixed sin-cos tables (MAE, appendix A.1), float32 buffers at any
compute type, or learned (Pixio). Tokens go [class tokens, registers, patches]; registers have no
position, and neither a feature nor the decoder sees them. Not done: rotary positions.

A network gives what an objective asks for in one forward: pixels, classes, features (`Outputs`).
`Encoder` is what all networks share, and all that is left of a teacher which gives features alone;
published names forbid a child of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.models.blocks import (
    Block,
    LastBlock,
    PatchProjection,
    QKVBias,
    class_head,
    drop_path_draws,
    drop_path_rates,
    put_drop_path,
    sent,
)
from rcmae.models.flops import block_flops, flops_per_image
from rcmae.models.patches import Positions, patch_grid, patches_at, sincos_positions
from rcmae.models.protocol import (
    OF_WHOLE_IMAGES,
    OUTPUTS,
    TABLES,
    Output,
    Outputs,
    Place,
    layer_of,
    part_of,
)
from rcmae.models.sizes import NetworkSizes, size_problems

PixelOrder = Literal["hwc", "chw"]
PositionTable = Positions | Literal["learned"]
TOKENS = ("cls_token", "reg_token", "mask_token", *TABLES)  # learned ones are drawn alike


class StochasticDepth(NamedTuple):
    """Drop path of a pretraining's encoder."""

    rate: float = 0.0  # at the last block; grows from 0 at the first
    seed: int = 0  # draws are a function of it and of a sample's position


class Encoder(nn.Module):
    """A Vision Transformer without a head: what networks that pretrain share, and all that some
    teachers are.

    Parameters may be cast to a lower type: images are cast to theirs, and position tables stay
    float32.

    Args:
        sizes: those of the decoder play no part here.
        norm_layer: makes a layer norm of a given width; see `kernels.layer_norm`.
        qkv_bias: of the attention.
        positions: order of the sin-cos table's halves, or "learned".
        drop_path: of the blocks.
    """

    pos_embed: Tensor  # [1, c + L, D]; c: class tokens
    undecayed: ClassVar[tuple[str, ...]] = ()  # by the weight decay, beside biases and norms

    def __init__(
        self,
        sizes: NetworkSizes,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
        qkv_bias: QKVBias = "qkv",
        positions: PositionTable = "column_first",
        drop_path: StochasticDepth | None = None,
    ) -> None:
        super().__init__()
        width = sizes.embed_dim
        self.sizes = sizes
        self.image_size = sizes.image_size
        self.patch_size = sizes.patch_size
        self.in_channels = sizes.in_channels
        self.embed_dim = width
        self.grid = sizes.grid
        self.num_patches = sizes.num_patches
        self.class_tokens = sizes.class_tokens
        self.num_prefix = sizes.num_prefix  # tokens before the patches
        self.mlp_ratio = sizes.mlp_ratio
        norm = norm_layer or kernels.layer_norm()
        if sizes.class_tokens:
            self.cls_token = nn.Parameter(torch.empty(1, sizes.class_tokens, width))
        if sizes.registers:
            self.reg_token = nn.Parameter(torch.empty(1, sizes.registers, width))
        self._add_positions("pos_embed", width, sizes.class_tokens, positions)
        # one child, so that its parameters are called patch_embed.proj.*
        patch = sizes.patch_size
        projection = PatchProjection(sizes.in_channels, width, patch, stride=patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.blocks = nn.ModuleList(
            Block(width, sizes.num_heads, mlp_ratio=sizes.mlp_ratio, norm=norm, qkv_bias=qkv_bias)
            for _ in range(sizes.depth)
        )
        self.norm = norm(width)
        depth = drop_path or StochasticDepth()
        self.drop_path_rates = drop_path_rates(depth.rate, sizes.depth)
        self._drop_path_seed = depth.seed
        self._draws = put_drop_path(self.blocks, self.drop_path_rates) if depth.rate else None

    def _add_positions(self, name: str, width: int, prefix: int, kind: PositionTable) -> None:
        """A table [1, prefix + L, width]: a buffer of sines, or a parameter."""
        if kind == "learned":
            shape = (1, prefix + self.num_patches, width)
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        else:
            table = sincos_positions(width, self.grid, prefix=prefix, order=kind)
            self.register_buffer(name, table.float()[None])

    def branches(self, positions: Tensor) -> Tensor | None:
        """Which residual branches of samples at these positions of the run stay, for `forward`'s
        `keep`: [B, depth, 2] bool; None: nothing is dropped.
        """
        if self._draws is None or not self.training:
            return None
        draws = drop_path_draws(self._drop_path_seed, positions.tolist(), self.drop_path_rates)
        return sent(draws, self.pos_embed.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """Casts and moves of the module (`.to`, `.bfloat16`), except that position tables never
        lose precision.
        """
        own = dict(self.named_buffers(recurse=False))
        tables = {name: own[name] for name in TABLES if name in own}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if getattr(self, name).dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, table.to(getattr(self, name).device))
        return self

    def embed(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens [B, c + r + n, D] of the patches `ids` [B, n], positions added.

        Of all in raster order without.
        """
        first = self.class_tokens
        if ids is None:
            x = self.patch_embed(patch_grid(images, self.patch_size).flatten(1, 2))
            positions = self.pos_embed[:, first:]
        else:
            x = self.patch_embed(patches_at(images, self.patch_size, ids))  # [B, n, D]
            positions = F.embedding(ids + first, self.pos_embed[0])
        x = (x + positions).to(x.dtype)
        tokens = []
        if self.class_tokens:
            cls_token = (self.cls_token + self.pos_embed[:, :first]).to(x.dtype)
            tokens.append(cls_token.expand(len(x), -1, -1))
        if self.num_prefix > self.class_tokens:
            tokens.append(self.reg_token.to(x.dtype).expand(len(x), -1, -1))
        return torch.cat([*tokens, x], dim=1) if tokens else x

    def encode(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, c + r + n, D], class tokens first, of the patches `ids` [B, n].

        Of all in raster order without.
        """
        x = self.embed(images, ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def whole(self, images: Tensor) -> Tensor:
        """All tokens [B, c + r + L, D] of whole images, patches in raster order, out of the last
        block, before the norm.
        """
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return x

    def encoder_flops(self, num_patches: int) -> float:
        """Floating-point operations of one image's way through the encoder.

        Counted as in `flops_per_image`.
        """
        tokens = self.num_prefix + num_patches
        pixels = self.patch_size**2 * self.in_channels
        return 2 * pixels * self.embed_dim * num_patches + len(self.blocks) * block_flops(
            self.embed_dim, tokens, tokens, self.mlp_ratio
        )

    def encoded(self, images: Tensor) -> Tensor:
        """What evaluations read: normalised tokens [B, 1 + L, D] of the whole image, cls first.

        The mean of several class tokens stands for one, that of the patches where there is none.
        """
        x = self.encode(images)
        if self.num_prefix == self.class_tokens == 1:
            return x
        patches = x[:, self.num_prefix :]
        first = x[:, : self.class_tokens] if self.class_tokens else patches
        return torch.cat([first.mean(dim=1, keepdim=True), patches], dim=1)

    def outputs_without_mask(self, images: Tensor, outputs: Sequence[str]) -> Outputs:
        """The requested outputs that are computed from the whole image.

        Raises:
            LookupError: an output that no network has.
        """
        found: Outputs = {}
        for name in outputs:
            if name not in OUTPUTS:
                raise LookupError(f"no output called {name!r}; there are {', '.join(OUTPUTS)}")
        if not {"tokens", "class_tokens"}.isdisjoint(outputs):
            whole = self.whole(images)
            if "tokens" in outputs:
                found["tokens"] = whole[:, self.num_prefix :]
            if "class_tokens" in outputs:
                found["class_tokens"] = whole[:, : self.class_tokens]
        if "encoded" in outputs:
            found["encoded"] = self.encoded(images)
        return found

    def check_mask(self, ids_shuffle: Tensor | None, num_visible: int | None) -> tuple[Tensor, int]:
        """The mask, checked against this network. Raises Refused."""
        if ids_shuffle is None or num_visible is None or not 0 < num_visible < self.num_patches:
            raise Refused(
                f"predictions need ids_shuffle and num_visible from 1 to {self.num_patches - 1}, "
                f"got {num_visible}"
            )
        return ids_shuffle, num_visible

    @property
    def num_layers(self) -> int:
        """The embedding, a layer a block, and what follows."""
        return len(self.blocks) + 2

    def place_of(self, name: str) -> Place:
        """Where a parameter is. Biases and 1-D parameters do not decay, as published: so the
        tokens, which are 3-D, do, but for those that are `undecayed`.
        """
        part = part_of(name)
        decays = self.get_parameter(name).ndim > 1 and name not in self.undecayed
        return Place(part, layer_of(name, len(self.blocks)), decays)

    def all_blocks(self) -> list[nn.Module]:
        """The encoder's."""
        return list(self.blocks)

    def drop(self, *parts: str) -> None:
        """Remove parts of the network, for good."""
        children = [f"{name}." for name, _ in self.named_children()]
        own = [name for name, _ in self.named_parameters(recurse=False)]
        tables = [name for name, _ in self.named_buffers(recurse=False)]
        for name in (*children, *own, *tables):
            if part_of(name) in parts:
                delattr(self, name.removesuffix("."))


@dataclass(frozen=True)
class Heads:
    """What a masked autoencoder predicts besides pixels."""

    num_classes: int = 0  # from the visible tokens (SupMAE, section 3); 0: none
    class_hidden: int = 0  # width of the hidden layer, with a batch norm; 0: one linear layer
    class_pool: Literal["mean", "cls"] = "mean"  # what it reads: mean of the patches, or cls token
    predicts_features: bool = False  # a linear head of the decoder for an encoder's tokens


class MaskedAutoencoder(Encoder):
    """Encoder and decoder of MAE and RC-MAE, with the options of MAE-priv and heads for more
    targets.

    Weights are drawn at construction from a fixed seed.

    Args:
        sizes: of encoder and decoder, which has at least one block.
        norm_layer: as `qkv_bias`, `positions` and `drop_path` that of `Encoder`.
        decoder_cls: whether the class tokens go through the decoder, too (MAE; MAE-priv leaves it
            out).
        pixel_order: how the weights of the prediction count a patch's pixels: channels last (MAE)
            or first. What comes out is always in the order of `patchify`.
        heads: for more targets.

    Raises:
        Refused: sizes that do not fit, all of them at once.
    """

    decoder_pos_embed: Tensor  # [1, c + L, decoder_dim]

    def __init__(
        self,
        sizes: NetworkSizes,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
        qkv_bias: QKVBias = "qkv",
        positions: PositionTable = "column_first",
        drop_path: StochasticDepth | None = None,
        decoder_cls: bool = True,
        pixel_order: PixelOrder = "hwc",
        heads: Heads | None = None,
    ) -> None:
        if problems := size_problems(sizes):
            raise Refused("\n".join(problems))
        super().__init__(
            sizes,
            norm_layer=norm_layer,
            qkv_bias=qkv_bias,
            positions=positions,
            drop_path=drop_path,
        )
        heads = heads or Heads()
        self.pixel_order = pixel_order
        self.class_pool = heads.class_pool
        width = sizes.decoder_dim
        norm = norm_layer or kernels.layer_norm()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        # class tokens that the decoder gets
        self.decoder_prefix = self.class_tokens if decoder_cls else 0
        self._add_positions("decoder_pos_embed", width, self.decoder_prefix, positions)
        self.decoder_embed = nn.Linear(sizes.embed_dim, width)
        self.decoder_blocks = nn.ModuleList(
            kind(
                width,
                sizes.decoder_heads,
                mlp_ratio=sizes.mlp_ratio,
                norm=norm,
                qkv_bias=qkv_bias,
            )
            for kind in [Block] * (sizes.decoder_depth - 1) + [LastBlock]
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, sizes.patch_pixels)
        if heads.num_classes:
            self.cls_head = class_head(sizes.embed_dim, heads.class_hidden, heads.num_classes)
        if heads.predicts_features:
            self.feature_head = nn.Linear(width, sizes.embed_dim)
        self.init_weights(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights (MAE, appendix A.1): Xavier uniform matrices, the patch embedding as
        one; biases 0, norms 1; tokens and learned positions normal with deviation 0.02. A function
        of the generator's state and the sizes alone."""
        for name, param in self.named_parameters():
            if param.is_meta:
                continue  # sizes alone; torch would import its compiler for the draws
            if name in TOKENS:
                param.normal_(std=0.02, generator=generator)
            elif param.ndim > 1:
                nn.init.xavier_uniform_(param.flatten(1), generator=generator)
            else:
                param.fill_(0.0 if name.endswith("bias") else 1.0)

    def keep(self, outputs: Sequence[str]) -> None:
        """Drop, for good, all parts but those that these of a teacher's outputs need."""
        pixels = {"pixels", "all_pixels"} & set(outputs)
        self.drop("head") if pixels else self.drop("head", "decoder")

    def all_blocks(self) -> list[nn.Module]:
        """The encoder's, then the decoder's."""
        return [*self.blocks, *getattr(self, "decoder_blocks", ())]

    def forward(
        self,
        images: Tensor,
        ids_shuffle: Tensor | None = None,
        num_visible: int | None = None,
        outputs: tuple[Output, ...] = ("pixels",),
        keep: Tensor | None = None,
    ) -> Outputs:
        """The outputs that are asked for, by name.

        Args:
            images: [B, C, H, W] normalised.
            ids_shuffle: [B, L] int64 permutations of the patches; the first `num_visible` are seen.
                Not for outputs of the whole image.
            num_visible: between 1 and L - 1.
            outputs: any of `protocol.Output`. "pixels" is the training path: the decoder's last
                block answers for hidden patches alone, unless "all_pixels" are asked for, too.
            keep: of `branches`; None: nothing is dropped.

        Raises:
            Refused: no valid mask where one is needed.
        """
        if self._draws is not None:
            self._draws.keep = keep
        found = self.outputs_without_mask(images, outputs)
        if OF_WHOLE_IMAGES.issuperset(outputs):
            return found
        ids_shuffle, num_visible = self.check_mask(ids_shuffle, num_visible)
        latent = self.encode(images, ids_shuffle[:, :num_visible])
        if "all_pixels" in outputs:
            x = self.decode(latent, ids_shuffle, first=0)
            pred = self.pixels(x)  # [B, L, p*p*C] in shuffled order
            found["all_pixels"] = pred.take_along_dim(ids_shuffle.argsort(dim=1)[:, :, None], dim=1)
            found["pixels"] = pred[:, num_visible:]
            x = x[:, num_visible:]
        elif "pixels" in outputs or "features" in outputs:
            x = self.decode(latent, ids_shuffle, first=num_visible)
            found["pixels"] = self.pixels(x)
        if "features" in outputs:
            found["features"] = self.feature_head(x)
        if "classes" in outputs:
            found["classes"] = self.cls_head(self.pool(latent))
        return found

    def pool(self, latent: Tensor) -> Tensor:
        """What the class is read from: [B, D] of the visible tokens [B, c + r + num_visible, D]."""
        if self.class_pool == "cls":
            return latent[:, : self.class_tokens].mean(dim=1)
        return latent[:, self.num_prefix :].mean(dim=1)

    def flops(self, num_visible: int) -> float:
        """Floating-point operations of one image's training forward.

        Counted as in `flops_per_image`.
        """
        return flops_per_image(
            self.sizes, num_visible=num_visible, decoder_prefix=self.decoder_prefix
        )

    def decode(self, latent: Tensor, ids_shuffle: Tensor, *, first: int) -> Tensor:
        """Normalised tokens [B, L - first, decoder_dim] of the patches from `first` on, in the
        order of `ids_shuffle`.

        Args:
            latent: [B, c + r + num_visible, D] of `encode`.
            ids_shuffle: [B, L].
            first: 0 for all patches, num_visible for the hidden ones.
        """
        prefix = self.decoder_prefix
        if prefix < self.num_prefix:
            latent = torch.cat([latent[:, :prefix], latent[:, self.num_prefix :]], dim=1)
        x = self.decoder_embed(latent)
        num_hidden = prefix + self.num_patches - x.shape[1]
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), num_hidden, -1)], dim=1)
        class_rows = torch.arange(prefix, device=ids_shuffle.device).expand(len(x), -1)
        rows = torch.cat([class_rows, ids_shuffle + prefix], dim=1)  # of the table
        # [B, c + L, decoder_dim]
        x = (x + F.embedding(rows, self.decoder_pos_embed[0])).to(x.dtype)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return self.decoder_norm(self.decoder_blocks[-1](x, prefix + first))

    def pixels(self, x: Tensor) -> Tensor:
        """Predictions [B, n, p*p*C], in the order of `patchify`, of the decoder's normalised
        tokens [B, n, d].
        """
        pred = self.decoder_pred(x)
        if self.pixel_order == "hwc":
            return pred
        return pred.unflatten(2, (self.in_channels, -1)).transpose(2, 3).flatten(2)
