"""Activation checkpointing: what is cheap to recompute is not kept for the backward pass.

:func:`apply_checkpointing` applies it to the modules of blocks.py, which know nothing of it.

The output of a norm, an activation or the outlook operator costs one pass over memory to compute, and as much memory
to keep as its input. If it is the input of a matrix product, only its own input is kept, and it is recomputed for the
product's weight gradient. A matrix product is recomputed only if it has few input channels on the full grid, where
the memory saved is largest for its arithmetic.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from volo.models.blocks import Block, Outlooker, PatchEmbed, Transformer

# What is recomputed: nothing; what costs a few percent of a step; whole blocks, of which only the inputs are kept.
Recompute = Literal["none", "cheap", "blocks"]

Layer = nn.Linear | nn.Conv2d


def apply_checkpointing(model: nn.Module, recompute: Recompute) -> None:
    """Choose what the blocks and the stem of a model keep for the backward pass; what they compute is the same.

    Each gets the class below that has its forward, as torch's parametrizations do: unlike a wrapper module this leaves
    the names of parameters alone, and unlike a function on the instance it is copied and pickled with the model.

    Args:
        model: Changed in place, at any time between steps.
        recompute: Recompute "none", "cheap" activations, or whole "blocks" (and cheap activations in the stem).

    Raises:
        ValueError: The choice is unknown.
    """
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute is {recompute!r}; it is one of {', '.join(get_args(Recompute))}")
    for module in model.modules():
        for plain, classes in _CLASSES.items():
            if type(module) in classes.values():
                # Dropout can be recomputed only by torch's checkpoint, which restores the random state.
                cheap_would_draw = recompute == "cheap" and issubclass(plain, Block) and _draws(module)
                module.__class__ = plain if cheap_would_draw else classes[recompute]


def _draws(block: Any) -> bool:
    return block.mlp.drop1.p > 0 or block.attn.attn_drop > 0


class CheapPatchEmbed(PatchEmbed):
    """Recomputes norms and activations. Norms may become SyncBatchNorms after this class is set, so forward checks."""

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
        if not self.training or torch.compiler.is_compiling():
            return super().forward(images)
        # Of the first convolution too the input is kept: with 3 channels going in, its output costs the least.
        conv1, norm1, relu1, conv2, norm2, relu2, conv3, norm3, relu3 = self.conv
        x = _conv(conv2, images, lambda x, norm: relu1(norm(conv1(x))), norm1, conv1)  # [B, hidden, H/2, W/2]
        x = _conv(conv3, x, lambda x, norm: relu2(norm(x)), norm2)  # [B, hidden, H/2, W/2]
        x = _conv(self.proj, x, lambda x, norm: relu3(norm(x)), norm3)  # [B, C, H/p, W/p]
        return x.permute(0, 2, 3, 1).contiguous()  # [B, H/p, W/p, C]


def _conv(layer: Any, x: Tensor, before: Callable, norm: Any, *inside: nn.Module) -> Tensor:
    """Return ``layer(before(x, norm))``, and keep ``x`` alone for the backward pass."""
    # A SyncBatchNorm would talk to the other processes once more, in the middle of the backward pass.
    if isinstance(norm, nn.SyncBatchNorm):
        return layer(before(x, norm))
    return recomputed(
        lambda x: before(x, norm),
        layer,
        x,
        inside=(norm, *inside),
        again=lambda x: before(x, partial(batch_norm_again, norm)),
    )


class CheapBlock(Block):
    """A block in its two branches, each of which recomputes what a subclass says."""

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        if torch.compiler.is_compiling():  # compiled graphs choose by themselves what to keep
            return super().forward(x)
        x = x + self.drop_path(self.attend(x))  # [B, H, W, C]
        x = x + self.drop_path(self.feed(x))  # [B, H, W, C]
        return x

    def attend(self, x: Tensor) -> Tensor:
        """Return ``attn(norm1(x))``, [B, H, W, C]."""
        raise NotImplementedError

    def feed(self, x: Tensor) -> Tensor:
        """Return ``mlp(norm2(x))``, [B, H, W, C]."""
        raise NotImplementedError


class CheapOutlooker(CheapBlock, Outlooker):
    """Recomputes the first product of the MLP too, because the grid is at its largest."""

    def attend(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        attn = self.attn

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm1(x)
            return x, attn.centres(x)  # [B, H, W, C], [B, h, w, C]

        value, logits = recomputed(read, (attn.v, attn.attn), x, inside=(self.norm1,))
        return recomputed(attn.mix, attn.proj, value, logits)  # [B, H, W, C]

    def feed(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        fc1, act, fc2 = self.mlp.fc1, self.mlp.act, self.mlp.fc2
        return recomputed(lambda x: act(fc1(self.norm2(x))), fc2, x, inside=(self.norm2, fc1))  # [B, H, W, C]


class CheapTransformer(CheapBlock, Transformer):
    """Recomputes no matrix product."""

    def attend(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        return self.attn.attend(recomputed(self.norm1, self.attn.qkv, x, inside=(self.norm1,)))  # [B, H, W, C]

    def feed(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        hidden = recomputed(self.norm2, self.mlp.fc1, x, inside=(self.norm2,))  # [B, H, W, ratio*C]
        return recomputed(self.mlp.act, self.mlp.fc2, hidden)  # [B, H, W, C]


class WholeBlock(Block):
    """Keeps only its input, and runs again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        if not torch.is_grad_enabled():
            return super().forward(x)
        return checkpoint(super().forward, x, use_reentrant=False)


class WholeOutlooker(WholeBlock, Outlooker):
    """See WholeBlock."""


class WholeTransformer(WholeBlock, Transformer):
    """See WholeBlock."""


_CLASSES: dict[type[nn.Module], dict[Recompute, type[nn.Module]]] = {
    PatchEmbed: {"none": PatchEmbed, "cheap": CheapPatchEmbed, "blocks": CheapPatchEmbed},
    Outlooker: {"none": Outlooker, "cheap": CheapOutlooker, "blocks": WholeOutlooker},
    Transformer: {"none": Transformer, "cheap": CheapTransformer, "blocks": WholeTransformer},
}


def recomputed(
    cheap: Callable[..., Tensor | tuple[Tensor, ...]],
    layers: Layer | tuple[Layer, ...],
    *inputs: Tensor,
    inside: Sequence[nn.Module] = (),
    again: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
) -> Any:
    """Return ``layer(cheap(*inputs))``, keeping for the backward pass the inputs alone.

    torch.utils.checkpoint does it for any function, through hooks on each tensor that is kept; here it is known that
    the backward pass asks for the input of a linear layer or convolution, which spares 0.3 ms of Python each time, and
    what several layers read is made again once.

    Args:
        cheap: Draws nothing at random. It returns the input of each layer.
        layers: One layer, or one for each tensor that ``cheap`` returns.
        inputs: Tensors it is differentiated by.
        inside: Modules with parameters that ``cheap`` uses.
        again: Computes what ``cheap`` does, to the bit, but without its side effects, in the backward pass.
    """
    layers = _tuple(layers)
    if all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers):
        modules = (*inside, *layers)
        outputs = _Recomputed.apply(cheap, again or cheap, layers, modules, *inputs, *_parameters(modules))
    else:  # replaced, by adapters for fine-tuning for instance: left to autograd
        outputs = tuple(layer(x) for layer, x in zip(layers, _tuple(cheap(*inputs)), strict=True))
    return outputs if len(layers) > 1 else outputs[0]


class _Recomputed(torch.autograd.Function):
    """Layers behind a function that is computed again; keeps the inputs of the function, and the parameters."""

    @staticmethod
    def forward(ctx, cheap, again, layers, modules, *tensors):
        num_inputs = len(tensors) - len(_parameters(modules))
        ctx.again, ctx.layers, ctx.modules, ctx.parameters = again, layers, modules, tensors[num_inputs:]
        ctx.autocast = _autocast_of(tensors[0].device.type)
        ctx.save_for_backward(*tensors)
        return tuple(layer(x) for layer, x in zip(layers, _tuple(cheap(*tensors[:num_inputs])), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        # The parameters were saved so that a change in place is found; hooks may make copies of what was saved.
        saved, parameters = ctx.saved_tensors, ctx.parameters
        if any(now is not then for now, then in zip(_parameters(ctx.modules), parameters, strict=True)):
            raise RuntimeError(
                "the network's parameters are not those of the forward pass (torch.func.functional_call?). Run the "
                "backward pass while they are the same, or call set_recompute('none')"
            )
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in saved[: len(saved) - len(parameters)]]
        of_layers = {id(p) for layer in ctx.layers for p in layer.parameters()}
        sources = [x for x in (*inputs, *(p for p in parameters if id(p) not in of_layers)) if x.requires_grad]
        with torch.enable_grad(), ctx.autocast:
            # Views, not leaves: autograd refuses leaves if modules have hooks, as under FlopCounterMode.
            between = _tuple(ctx.again(*(x.view_as(x) for x in inputs)))

        found: dict[int, Tensor | None] = {}
        grads_between = []
        for layer, x, grad in zip(ctx.layers, between, grads, strict=True):
            x_grad, weight_grad, bias_grad = _layer_backward(layer, x.detach(), grad, bool(sources))
            grads_between.append(x_grad)
            found[id(layer.weight)], found[id(layer.bias)] = weight_grad, bias_grad
        if sources:
            for source, grad in zip(sources, torch.autograd.grad(between, sources, grads_between), strict=True):
                found[id(source)] = grad
        return None, None, None, None, *(found.get(id(tensor)) for tensor in (*inputs, *parameters))


def _layer_backward(
    layer: Layer, x: Tensor, grad: Tensor, wants_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the layer's input, weight and bias, as autograd finds them, also under autocast."""
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    wants_weight, wants_bias = weight.requires_grad, bias is not None and bias.requires_grad
    read, used = x.to(grad.dtype), weight.detach().to(grad.dtype)
    if isinstance(layer, nn.Linear):
        flat = grad.reshape(-1, grad.shape[-1])  # [N, out]
        x_grad = (flat @ used).view(x.shape) if wants_x else None
        weight_grad = flat.t() @ read.reshape(-1, read.shape[-1]) if wants_weight else None
        bias_grad = flat.sum(0) if wants_bias else None
    else:
        x_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
            *(grad, read, used, None if bias is None else list(bias.shape)),
            *(layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups),
            [wants_x, wants_weight, wants_bias],
        )
    return (
        None if x_grad is None else x_grad.to(x.dtype),
        None if weight_grad is None else weight_grad.to(weight.dtype),
        None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
    )


def _autocast_of(device: str) -> contextlib.AbstractContextManager:
    """Return what puts autocast on a device, another time, into the state that it is in now."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def batch_norm_again(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return what ``norm`` returned, and leave its running statistics alone."""
    if not norm.training:  # frozen, in a network that is trained
        return norm(x)
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters()]


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)
