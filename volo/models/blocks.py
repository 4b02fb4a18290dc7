"""The parts of a VOLO: stem, downsample, three kinds of attention and the residual blocks around them.

B images, H x W grid of tokens, h x w outlook windows, C channels, N tokens, d channels of one head.
Between blocks tokens are [B, H, W, C], contiguous, because every linear layer and LayerNorm wants C last.
Attribute names are those of the published code: they are the keys of its state_dict. The small parts that timm has too
are written out here, because importing timm imports all of its models, which takes as long as importing PyTorch.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.models.outlook_attention import Kernel, outlook_attention, unavailable_reason


class PatchEmbed(nn.Module):
    """Convolutional stem at half resolution, then one projection per patch: [B, 3, H, W] -> [B, H/p, W/p, C]."""

    def __init__(self, patch_size: int, in_chans: int, hidden_dim: int, embed_dim: int):
        super().__init__()
        layers = []
        for index, width in enumerate((in_chans, hidden_dim, hidden_dim)):
            kernel, stride = (7, 2) if index == 0 else (3, 1)
            layers += [
                nn.Conv2d(width, hidden_dim, kernel, stride, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(hidden_dim),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden_dim, embed_dim, kernel_size=patch_size // 2, stride=patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
        x = self.conv(images) if self.training else _folded(self.conv, images)  # [B, hidden, H/2, W/2]
        x = self.proj(x)  # [B, C, H/p, W/p]
        # One copy here (none for channels_last images) spares one in every LayerNorm of the first stage.
        return x.permute(0, 2, 3, 1).contiguous()  # [B, H/p, W/p, C]


def _folded(stem: Iterable[Any], images: Tensor) -> Tensor:  # [B, 3, H, W]
    """Run the stem for evaluation: its BatchNorms are constants, and go into the convolutions' weights and biases."""
    # On the CPU channels last is the faster memory format; on CUDA train.channels_last chooses.
    x = images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images
    conv1, norm1, _, conv2, norm2, _, conv3, norm3, _ = stem
    for conv, norm in ((conv1, norm1), (conv2, norm2), (conv3, norm3)):
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # [hidden]
        weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        x = F.relu(F.conv2d(x, weight, bias, conv.stride, conv.padding), inplace=True)
    return x  # [B, hidden, H/2, W/2]


class Downsample(nn.Module):
    """Halve the grid and widen the channels: [B, H, W, C] -> [B, H/2, W/2, C']."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        x = self.proj(x.permute(0, 3, 1, 2))  # [B, C', H/2, W/2]
        return x.permute(0, 2, 3, 1).contiguous()  # [B, H/2, W/2, C']


class OutlookAttention(nn.Module):
    """Projections around the outlook operator: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int,
        stride: int,
        padding: int,
        qkv_bias: bool,
        attn_drop: float,
        drop: float,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.attn_drop = attn_drop
        self.kernel: Kernel = "auto"
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn = nn.Linear(dim, num_heads * kernel_size**4)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        logits = self.attn(self.centres(x))  # [B, h, w, heads*K^4]
        x = self.mix(self.v(x), logits)  # [B, H, W, C]
        return self.proj_drop(self.proj(x))  # [B, H, W, C]

    def centres(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        """Return the mean of the cells around each window's centre, the input of its weights: [B, h, w, C]."""
        x = x.permute(0, 3, 1, 2)  # [B, C, H, W]
        # ceil_mode: on an odd side the last pool holds fewer cells and is their mean.
        x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True)  # [B, C, h, w]
        return x.permute(0, 2, 3, 1)  # [B, h, w, C]

    def unavailable_reason(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Return None if the native kernel can run this layer on such values, in training too, else why it cannot."""
        window = (self.kernel_size, self.stride, self.padding)
        return unavailable_reason(device_type, window, self.head_dim, dtype, self.attn_drop)

    def mix(self, value: Tensor, logits: Tensor) -> Tensor:  # [B, H, W, C], [B, h, w, heads*K^4]
        return outlook_attention(
            value,
            logits,
            num_heads=self.num_heads,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dropout_p=self.attn_drop if self.training else 0.0,
            kernel=self.kernel,
        )  # [B, H, W, C]


class SelfAttention(nn.Module):
    """Multi-head self-attention over the whole grid: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, attn_drop: float, drop: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        return self.attend(self.qkv(x))  # [B, H, W, C]

    def attend(self, qkv: Tensor) -> Tensor:  # [B, H, W, 3*C]
        B, H, W, C = qkv.shape[0], qkv.shape[1], qkv.shape[2], qkv.shape[3] // 3
        qkv = qkv.view(B, H * W, 3, self.num_heads, C // self.num_heads)  # [B, N, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        x = x.transpose(1, 2).reshape(B, H, W, C)  # [B, H, W, C]
        return self.proj_drop(self.proj(x))  # [B, H, W, C]


class ClassAttention(nn.Module):
    """The class token attends to itself and to all tokens: [B, 1 + N, C] -> [B, 1, C]."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, attn_drop: float, drop: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1 + N, C]
        B, N, C = x.shape  # this N counts the class token
        kv = self.kv(x).view(B, N, 2, self.num_heads, C // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, heads, 1 + N, d] each
        q = self.q(x[:, :1]).view(B, 1, self.num_heads, C // self.num_heads).transpose(1, 2)  # [B, heads, 1, d]
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        x = x.transpose(1, 2).reshape(B, 1, C)  # [B, 1, C]
        return self.proj_drop(self.proj(x))  # [B, 1, C]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, over the last axis: [..., C] -> [..., C]."""

    def __init__(self, dim: int, hidden_dim: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        x = self.drop1(self.act(self.fc1(x)))  # [..., hidden]
        return self.drop2(self.fc2(x))  # [..., C]


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a branch for whole images, and scale it up for the others."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:  # [B, ...]
        if self.drop_prob == 0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        keep = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)  # [B, 1, ...]
        return x * keep.div_(keep_prob)


class Block(nn.Module):
    """Pre-norm residual block on the grid: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        # Both branches share the rate and draw independently.
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        x = x + self.drop_path(self.attn(self.norm1(x)))  # [B, H, W, C]
        x = x + self.drop_path(self.mlp(self.norm2(x)))  # [B, H, W, C]
        return x


class Outlooker(Block):
    """Block with outlook attention, on the fine grid."""

    attn: OutlookAttention


class Transformer(Block):
    """Block with self-attention, on the coarse grid."""

    attn: SelfAttention


class ClassBlock(nn.Module):
    """Block that changes only the class token; the other tokens pass through. It has no stochastic depth."""

    def __init__(self, dim: int, attn: ClassAttention, mlp_ratio: float, drop: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1 + N, C]
        cls = x[:, :1] + self.attn(self.norm1(x))  # [B, 1, C]
        cls = cls + self.mlp(self.norm2(cls))  # [B, 1, C]
        return torch.cat([cls, x[:, 1:]], dim=1)  # [B, 1 + N, C]
