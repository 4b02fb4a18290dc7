"""Counts the operators of a training step, with their floating-point operations and bytes, for a card's peaks."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import torch
from cards import CARDS, Card
from kinds_of_work import KINDS, OF_RANGES, RANGE, REST, kind_of, ranges_of
from networks import Network, networks_of, variants_of
from output import print_table, save_json
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from volo.build import build_model
from volo.config import Config, EmaConfig, ModelConfig, TrainConfig
from volo.engine.batch_layout import BatchLayout
from volo.engine.learner import Inputs, Learner
from volo.models.blocks import OutlookAttention
from volo.models.checkpointing import Recompute
from volo.models.outlook_attention import outlook_attention
from volo.models.volo import VOLO
from volo.runtime.distributed import World
from volo.runtime.program import DONE, checking_usage
from volo.token_labels.targets import ClassTargets

if TYPE_CHECKING:
    from roofline import RooflineOptions

aten = torch.ops.aten
ALL = "all"  # kinds of work together
# Their outputs are views, or memory that nobody has written yet.
_FREE = {aten._unsafe_view, aten.detach, aten.alias, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
_FREE |= {aten.new_empty_strided, aten._local_scalar_dense, aten.lift_fresh}
_FILLS = {"copy_", "fill_", "zero_", "bernoulli_"}  # write their first tensor without reading it


class Variant(NamedTuple):
    """A way to run a step: train.recompute, train.kernel, and the type of the tokens between the Transformers."""

    recompute: Recompute
    kernel: str
    residual: torch.dtype = torch.float32


VARIANTS = {
    "none": Variant("none", "native"),
    "cheap": Variant("cheap", "native"),
    "blocks": Variant("blocks", "native"),
    "none, eager kernel": Variant("none", "eager"),
    "none, bf16 tokens": Variant("none", "native", torch.bfloat16),  # trains otherwise: not an option of train.py
}


@dataclass(frozen=True)
class Operator:
    """An operator that ran: its name, kind of work, floating-point operations, and bytes read and written."""

    name: str
    kind: str
    flops: int
    bytes: int

    def seconds(self, peaks: Card) -> float:
        """The least time it takes a card with these peaks."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bytes)


class OperatorCounter(TorchDispatchMode):
    """Lists the operators that run while it is active, in ``operators``."""

    def __init__(self):
        super().__init__()
        self.operators: list[Operator] = []
        self._ranges: list[str] = []
        self._range_of: dict[int, str | None] = {}  # of autograd's nodes, by their sequence number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if name == "_record_function_enter_new":
            self._ranges.append(args[0])
        elif name == "_record_function_exit":
            self._ranges.pop()
        kind = kind_of(name, self._enclosing())
        out = func(*args, **kwargs)
        if func.namespace in ("aten", "volo") and not func.is_view and func._overloadpacket not in _FREE:
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else attention_flops(name, args)
            self.operators.append(Operator(name, kind, flops, moved_bytes(func, args, kwargs, out)))
        return out

    def _enclosing(self) -> list[str]:
        """The ranges around the operator; in the backward pass those around the operator that it is the gradient of."""
        own = [name for name in self._ranges if name.startswith(RANGE)]
        if torch.is_grad_enabled():  # not within an autograd.Function, whose backward pass is more than this operator's
            made = torch._C._autograd._get_sequence_nr() - 1  # the node made last: for this operator, if it has one
            self._range_of.setdefault(made, own[-1] if own else None)
        node = torch._C._current_autograd_node()
        if not own and node is not None and (forward := self._range_of.get(node._sequence_nr())):
            return [forward]
        return own


def moved_bytes(func, args: tuple, kwargs: dict, out) -> int:
    """Return the bytes that an operator reads and writes: each tensor once, one changed in place twice."""
    moved, written = 0, set()
    fills = func._overloadpacket.__name__ in _FILLS
    for position, spec in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) and not spec.kwarg_only else kwargs.get(spec.name)
        changed = spec.alias_info is not None and spec.alias_info.is_write
        for x in (x for x in tree_leaves(value) if isinstance(x, Tensor)):
            if changed:
                written.add(id(x))
            # Fused optimizers may unscale gradients in place, and do not without a loss scaler.
            times = 1 if not changed or fills or spec.name == "grads" else 2
            moved += times * tensor_bytes(x)
    return moved + sum(tensor_bytes(x) for x in tree_leaves(out) if isinstance(x, Tensor) and id(x) not in written)


def tensor_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor's elements; what is expanded is there once."""
    return x.element_size() * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step != 0)


def attention_flops(name: str, args: tuple) -> int:
    """Return the operations of fused self-attention on the CPU, which torch has no formula for; 0 for the rest.

    Two products forward; backward five, of which one is the forward pass's again.
    """
    if "scaled_dot_product" not in name:
        return 0
    query, key = args[1:3] if "backward" in name else args[:2]  # [B, heads, N, d], [B, heads, M, d]
    return (10 if "backward" in name else 4) * query.numel() * key.shape[2]


@contextmanager
def autocast_of_cuda() -> Iterator[None]:
    """Give autocast on the CPU the rules that CUDA has: norms and softmax compute in fp32."""

    def in_fp32(function: Callable) -> Callable:
        return lambda x, *args, **kwargs: function(
            x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs
        )

    with (
        patch.object(F, "layer_norm", in_fp32(F.layer_norm)),
        patch.object(Tensor, "softmax", in_fp32(Tensor.softmax)),
    ):
        yield


def counted_step(network: Network, variant: Variant, **architecture) -> list[Operator]:
    """Return the operators of one training step.

    Args:
        network: The network, and the size of its images and batch.
        variant: How the step runs.
        architecture: Options of the network, which override the named one's.
    """
    config = Config(
        model=ModelConfig(name=network.name, img_size=network.side, drop_path_rate=0.1, **architecture),
        ema=EmaConfig(enabled=True),
        train=TrainConfig(
            device="cpu", batch_size=network.batch, precision="bf16", recompute=variant.recompute, channels_last=True,
            kernel="eager",
        ),
    )  # fmt: skip

    def build() -> VOLO:
        model = build_model(config.model)
        for parameter in (model.pos_embed, model.cls_token):
            if parameter is not None:
                parameter.data = parameter.data.to(variant.residual)
        return model

    # On tensors of the CPU: those of a device that is not there have no backward pass.
    world = World(0, 1, 0, torch.device("cpu"))
    # The native kernel cannot run on such tensors, but only its shapes are asked for.
    native_kernel = patch.dict(outlook_attention.__globals__, unavailable_reason=lambda *_: None)
    # The average is a copy of the network, and tensors without values cannot be copied so.
    second_network = patch("timm.utils.model_ema.deepcopy", lambda _: build())
    with FakeTensorMode(), autocast_of_cuda(), native_kernel, second_network:
        learner = Learner(config, world, BatchLayout.of(config, 1), build())
        for module in learner.model.modules():
            if isinstance(module, OutlookAttention):
                module.kernel = variant.kernel
        for parameter in learner.model.parameters():
            parameter.grad = torch.empty_like(parameter)
        learner.optimizer_step(1e-4, 0)  # the first makes the optimizer's averages
        images = torch.empty(network.batch, 3, network.side, network.side).contiguous(memory_format=torch.channels_last)
        targets = ClassTargets(torch.empty(network.batch, config.model.num_classes))
        learner.inputs = lambda *_: Inputs(images, targets, torch.empty(4, dtype=torch.int64))
        learner.wrapped.train()
        with ranges_of(learner), OperatorCounter() as counter:
            learner.forward_backward(None, 0, 1, 0)
            learner.optimizer_step(1e-4, 1)
    return counter.operators


def run_benchmark(options: "RooflineOptions") -> int:
    """Count what the options ask for, print and save it; return the exit code."""
    peaks, rows, times = peaks_of(options), [], []
    with checking_usage():
        names, networks = variants_of(options.variants, VARIANTS), networks_of(options.networks)
    for network in networks:
        word = str(network)
        counted = {name: counted_step(network, VARIANTS[name]) for name in names}
        for name, operators in counted.items():
            row = {"network": word, "variant": name, "kind": ALL} | summed(operators, peaks)
            rows.append(row | {"images/s": round(1000 * network.batch / row["ms"])})
        found = {operator.kind for operators in counted.values() for operator in operators}
        for kind in (kind for kind in (*KINDS, *OF_RANGES, REST) if kind in found):
            of_kind = {name: [o for o in operators if o.kind == kind] for name, operators in counted.items()}
            parts = {name: summed(operators, peaks) for name, operators in of_kind.items()}
            rows += [{"network": word, "variant": name, "kind": kind} | part for name, part in parts.items()]
            times.append({"network": word, "kind": kind} | {f"{name}, ms": part["ms"] for name, part in parts.items()})
    title = f"ESTIMATE of a training step: {peaks.flops / 1e12:g} TFLOP/s, {peaks.bytes / 1e12:g} TB/s, bf16 autocast"
    notes = ["a lower bound for one kernel per operator: no launches, no host, no loader, every kernel at its peak"]
    print(title)
    print_table([row for row in rows if row["kind"] == ALL])
    print()
    print_table(times)
    print(*notes)
    save_json(options.json, title, rows, notes)
    return DONE


def peaks_of(options: "RooflineOptions") -> Card:
    card, tflops, terabytes = CARDS[options.card], options.tflops, options.terabytes_per_second
    return Card(card.flops if tflops is None else tflops * 1e12, card.bytes if terabytes is None else terabytes * 1e12)


def summed(operators: list[Operator], peaks: Card) -> dict:
    """Return the columns of a row: how many operators, TFLOP, GB, and ms at least."""
    return {
        "operators": len(operators),
        "TFLOP": round(sum(o.flops for o in operators) / 1e12, 3),
        "GB": round(sum(o.bytes for o in operators) / 1e9, 2),
        "ms": round(1000 * sum(o.seconds(peaks) for o in operators), 2),
    }
