"""What is cheap to compute again is not kept for the backward pass.

The output of a norm, an activation or the outlook operator costs one pass over memory to make, and as much memory to
keep as its input. Where it goes straight into a matrix product, the input alone is kept, and the output is made again
when the product's weight gradient asks for it. A matrix product is made again only where few channels go into it, at
the full grid: bytes spared for its arithmetic, that is where it is cheapest.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# none: autograd keeps what it likes; cheap: what costs a few percent of a step; blocks: the inputs of blocks alone.
Recompute = Literal["none", "cheap", "blocks"]

Layer = nn.Linear | nn.Conv2d


def recomputed(
    cheap: Callable[..., Tensor | tuple[Tensor, ...]],
    layers: Layer | tuple[Layer, ...],
    *inputs: Tensor,
    inside: Sequence[nn.Module] = (),
    again: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
) -> Tensor | tuple[Tensor, ...]:
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
    else:  # others took their place, such as adapters for fine-tuning: these are autograd's own affair
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
                "the parameters of the network are others than in the forward pass (torch.func.functional_call?): go "
                "backward where they are the same, or call set_recompute('none')"
            )
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in saved[: len(saved) - len(parameters)]]
        of_layers = {id(p) for layer in ctx.layers for p in layer.parameters()}
        sources = [x for x in (*inputs, *(p for p in parameters if id(p) not in of_layers)) if x.requires_grad]
        with torch.enable_grad(), ctx.autocast:
            # No leaves: where modules are hooked on, as FlopCounterMode does, the engine refuses these.
            between = _tuple(ctx.again(*(x.view_as(x) for x in inputs)))

        found: dict[int, Tensor] = {}
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
    weight, bias = layer.weight, layer.bias
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
        None if bias_grad is None else bias_grad.to(bias.dtype),
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
