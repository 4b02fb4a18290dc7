"""VOLO, the Vision Outlooker (arXiv 2106.13112): the whole network and its initialisation.

B images, H x W grid, C channels of a stage, N final tokens, D channels of the last stage, K classes.

    image -> stem and patch embedding -> Outlookers on the fine grid -> downsample -> + position embedding
          -> Transformers -> class blocks -> norm -> head (class token) and aux_head (every other token)
"""

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from volo.models.architecture import Architecture, ImageSize, image_hw
from volo.models.blocks import (
    Block,
    ClassAttention,
    ClassBlock,
    Downsample,
    OutlookAttention,
    Outlooker,
    PatchEmbed,
    SelfAttention,
    Transformer,
)
from volo.models.checkpointing import Recompute, apply_checkpointing
from volo.models.outlook_attention import Kernel


class TokenLogits(NamedTuple):
    """Output of the network in training: class logits [B, K] and token logits [B, N, K].

    ``tokens`` is None for a network without token head. Row n of image i belongs to image i even under
    MixToken: the tokens are un-mixed. ``cls`` is not: compare it with the mixed target.
    """

    cls: Tensor
    tokens: Tensor | None


class VOLO(nn.Module):
    """The network.

    Args:
        architecture: The fields of the architecture; ``volo.models.create_model`` has the named ones.
        img_size: Image side in pixels, or (height, width).
        num_classes: Number of classes.
        in_chans: Channels of an image.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 with the block's index.

    Raises:
        ValueError: The image size does not divide into tokens, or a number is out of its range.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        img_size: ImageSize = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if num_classes < 1 or in_chans < 1:
            raise ValueError(f"num_classes is {num_classes} and in_chans is {in_chans}; both are at least 1")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"model.drop_path_rate is {drop_path_rate}; it is in [0, 1)")
        arch = architecture
        grids = arch.stage_grids(img_size)
        dim = arch.embed_dims[-1]
        self.architecture = arch
        self.img_size = image_hw(img_size)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dim
        self.grid_size = grids[-1]  # (rows, cols) of the final tokens

        # The order of registration is the order of the published state_dict.
        self.pos_embed = nn.Parameter(torch.empty(1, *grids[1], arch.embed_dims[1]))
        self.cls_token = None if arch.return_mean else nn.Parameter(torch.empty(1, 1, dim))
        self.patch_embed = PatchEmbed(arch.patch_size, in_chans, arch.stem_hidden_dim, arch.embed_dims[0])
        self.pos_drop = nn.Dropout(arch.drop_rate)
        self.network = nn.ModuleList()
        rates = _drop_path_rates(arch, drop_path_rate)
        for stage, downsample in enumerate(arch.downsample_after):
            self.network.append(nn.Sequential(*(_block(arch, stage, rate) for rate in rates[stage])))
            if downsample:
                self.network.append(Downsample(*arch.embed_dims[stage : stage + 2]))
        if not arch.return_mean:
            self.post_network = nn.ModuleList(_class_block(arch) for _ in range(arch.post_layers))
        self.aux_head = nn.Linear(dim, num_classes) if arch.has_token_head else None
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        init_weights(self)
        self.set_recompute("cheap")

    def forward(self, images: Tensor, mix_box: Tensor | None = None) -> Tensor | TokenLogits:
        """Classify images.

        Args:
            images: [B, in_chans, H, W], normalised, of the size the model was made for.
            mix_box: MixToken, in training only: integer tensor [4] = top, left, bottom, right on the final token
                grid (``grid_size``). Inside it the patch embeddings of image i are those of image B-1-i. All
                zero mixes nothing. The box stays on its device, and a new one causes no recompilation.

        Returns:
            In training ``TokenLogits``. In evaluation logits [B, K]: the class token's, plus half of the largest
            over the tokens for each class if there is a token head.

        Raises:
            ValueError: Images of another shape than the model's, or a mix_box in evaluation or not of shape [4].
        """
        if mix_box is not None and not self.training:
            raise ValueError("mix_box is for training: MixToken would change what an evaluated image shows")
        x = self._encode(images, mix_box)  # [B, 1 + N, D], or [B, N, D] without class token
        if self.cls_token is None:
            pooled, tokens = x.mean(dim=1), x  # [B, D], [B, N, D]
        else:
            pooled, tokens = x[:, 0], x[:, 1:]  # [B, D], [B, N, D]
        cls_logits = self.head(pooled)  # [B, K]
        if self.aux_head is None:
            return TokenLogits(cls_logits, None) if self.training else cls_logits
        if mix_box is not None:
            # aux_head sees one token at a time, so features are un-mixed instead of the (wider) logits.
            tokens = _swap_inside(tokens.unflatten(1, self.grid_size), mix_box).flatten(1, 2)  # [B, N, D]
        token_logits = self.aux_head(tokens)  # [B, N, K]
        if self.training:
            return TokenLogits(cls_logits, token_logits)
        return cls_logits + 0.5 * token_logits.amax(dim=1)  # [B, K]

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normalised class token and tokens (row-major), [B, 1 + N, D]; [B, N, D] without class token.

        Args:
            images: As for :meth:`forward`.

        Raises:
            ValueError: The images have another shape than the model's.
        """
        return self._encode(images, None)

    def forward_intermediates(self, images: Tensor) -> list[Tensor]:
        """Return feature maps [B, C, H, W], fine to coarse: the last of every grid, before the class blocks and norm.

        For D1 ... D5 these are the Outlookers' map at stride 8 and the Transformers' at stride 16.

        Args:
            images: As for :meth:`forward`.

        Raises:
            ValueError: The images have another shape than the model's.
        """
        self._check(images)
        return [x.permute(0, 3, 1, 2) for x in self._grid_maps(self.patch_embed(images))]

    def set_recompute(self, what: Recompute) -> None:
        """Choose the activation checkpointing: recompute "none", "cheap" activations, or whole "blocks".

        Raises:
            ValueError: The choice is unknown.
        """
        apply_checkpointing(self, what)

    def set_kernel(self, kernel: Kernel, dtype: torch.dtype | None = None) -> str:
        """Choose the kernel of outlook attention, once: what is returned is what runs.

        Args:
            kernel: "auto" is the native kernel if it can run in every layer (it is built now, if need be), else the
                eager operator in plain PyTorch.
            dtype: What values and logits will have, which is autocast's type under autocast; by default the
                parameters' dtype.

        Returns:
            A sentence that says what was chosen and why.

        Raises:
            ValueError: "native" cannot run on this device, or the kernel is unknown.
        """
        if kernel not in get_args(Kernel):
            raise ValueError(f"kernel is {kernel!r}; it is one of {', '.join(get_args(Kernel))}")
        layers = [module for module in self.modules() if isinstance(module, OutlookAttention)]
        device, dtype = self.pos_embed.device.type, dtype or self.pos_embed.dtype
        reason = None
        if kernel != "eager":
            reasons = (layer.unavailable_reason(device, dtype) for layer in layers)
            reason = next((reason for reason in reasons if reason is not None), None)
        if kernel == "native" and reason is not None:
            raise ValueError(f"the native kernel of outlook attention cannot be used: {reason}")
        chosen: Kernel = "eager" if kernel == "eager" or reason is not None else "native"
        for layer in layers:
            layer.kernel = chosen
        if kernel == "eager":
            return "eager, as requested"
        return f"native, for {device}" if reason is None else f"eager. {reason}"

    def no_weight_decay(self) -> set[str]:
        """Parameters exempt from weight decay beside the 1-D ones; timm's optimizer factory asks for them."""
        return {"pos_embed", "cls_token"} & {name for name, _ in self.named_parameters()}

    def reset_classifier(self, num_classes: int) -> None:
        """Replace head and token head by fresh ones for ``num_classes`` classes."""
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; at least 1")
        like = {"device": self.head.weight.device, "dtype": self.head.weight.dtype}
        self.num_classes = num_classes
        self.head = init_weights(nn.Linear(self.num_features, num_classes, **like))
        if self.aux_head is not None:
            self.aux_head = init_weights(nn.Linear(self.num_features, num_classes, **like))

    def _encode(self, images: Tensor, mix_box: Tensor | None) -> Tensor:
        self._check(images)
        x = self.patch_embed(images)  # [B, H/p, W/p, C]
        if mix_box is not None:
            if mix_box.shape != (4,):
                raise ValueError(f"mix_box is {list(mix_box.shape)}; it holds top, left, bottom and right: [4]")
            x = _swap_inside(x, mix_box * self.architecture.mix_ratio)  # [B, H/p, W/p, C]
        x = self._grid_maps(x)[-1].flatten(1, 2)  # [B, N, D]
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # [B, 1 + N, D]
            for block in self.post_network:
                x = block(x)  # [B, 1 + N, D]
        return self.norm(x)  # [B, 1 + N, D]

    def _grid_maps(self, x: Tensor) -> list[Tensor]:
        """Run the stages on the patch embeddings; the last map [B, H, W, C] of each grid, final tokens last."""
        maps = []
        after_first_stage = 1 + self.architecture.downsample_after[0]
        for index, module in enumerate(self.network):
            if index == after_first_stage:
                x = self.pos_drop(x + self.pos_embed)  # [B, H, W, C]
            if isinstance(module, Downsample):
                maps.append(x)
            x = module(x)  # [B, H, W, C], or [B, H/2, W/2, C'] after a Downsample
        return [*maps, x]

    def _check(self, images: Tensor) -> None:
        expected = (self.in_chans, *self.img_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images are {list(images.shape)}, but the model takes [B, {', '.join(map(str, expected))}]; for "
                "another size create the model with img_size=(height, width), and in_chans for other channels"
            )


def _swap_inside(x: Tensor, box: Tensor) -> Tensor:
    """Exchange the cells inside ``box`` between images i and B-1-i of x [B, H, W, C]; twice is no change.

    The box is compared, never indexed with: no wait for the device, and one compiled graph for all boxes.
    """
    top, left, bottom, right = box.unbind()
    rows = torch.arange(x.shape[1], device=x.device)[:, None]  # [H, 1]
    cols = torch.arange(x.shape[2], device=x.device)  # [W]
    inside = (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)  # [H, W]
    return torch.where(inside[:, :, None], x.flip(0), x)


def _drop_path_rates(arch: Architecture, rate: float) -> list[list[float]]:
    """Stochastic depth of every block, stage by stage: linear in the index over all blocks of the network.

    Outlookers are counted but have rate 0 unless ``drop_path_outlookers``, as in the published code.
    """
    total = sum(arch.layers)
    rates, index = [], 0
    for num_blocks, is_outlook in zip(arch.layers, arch.outlook_stages, strict=True):
        spared = is_outlook and not arch.drop_path_outlookers
        rates.append([0.0 if spared else rate * (index + i) / (total - 1) for i in range(num_blocks)])
        index += num_blocks
    return rates


def _block(arch: Architecture, stage: int, drop_path: float) -> Block:
    dim, num_heads = arch.embed_dims[stage], arch.num_heads[stage]
    common = {"qkv_bias": arch.qkv_bias, "attn_drop": arch.attn_drop_rate, "drop": arch.drop_rate}
    if arch.outlook_stages[stage]:
        window = {
            "kernel_size": arch.outlook_kernel,
            "stride": arch.outlook_stride,
            "padding": arch.outlook_padding,
        }
        kind, attn = Outlooker, OutlookAttention(dim, num_heads, **window, **common)
    else:
        kind, attn = Transformer, SelfAttention(dim, num_heads, **common)
    return kind(dim, attn, arch.mlp_ratios[stage], arch.drop_rate, drop_path)


def _class_block(arch: Architecture) -> ClassBlock:
    dim = arch.embed_dims[-1]
    attn = ClassAttention(
        dim, arch.num_heads[-1], qkv_bias=arch.qkv_bias, attn_drop=arch.attn_drop_rate, drop=arch.drop_rate
    )
    return ClassBlock(dim, attn, arch.mlp_ratios[-1], arch.drop_rate)


@torch.no_grad()
def init_weights(module: nn.Module) -> nn.Module:
    """Initialise a VOLO, or any part of it, in place and return it.

    Convolutions and BatchNorms keep PyTorch's default, as in the published code.
    """
    for part in module.modules():
        if isinstance(part, VOLO):
            _normal_(part.pos_embed)
            if part.cls_token is not None:
                _normal_(part.cls_token)
        elif isinstance(part, nn.Linear):
            _normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
    return module


def _normal_(tensor: Tensor) -> None:
    """Fill ``tensor`` with normal noise of standard deviation 0.02 cut off at 2, as timm's trunc_normal_ draws it.

    torch.nn.init.trunc_normal_ draws other numbers from the same seed.
    """
    tensor.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
