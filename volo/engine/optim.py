"""Optimizer, learning rate and weight average."""

import difflib
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,  # pyright: ignore[reportPrivateImportUsage]
    get_optimizer_info,  # pyright: ignore[reportPrivateImportUsage]
    list_optimizers,  # pyright: ignore[reportPrivateImportUsage]
    param_groups_weight_decay,  # pyright: ignore[reportPrivateImportUsage]
)
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from volo.config import EmaConfig, OptimConfig, ScheduleConfig
from volo.models.volo import VOLO

_logger = logging.getLogger("volo")

# Names of create_optimizer_v2 that give torch.optim classes with a fused implementation.
_FUSED_IN_TORCH = ("adamw", "adam", "sgd")


def create_optimizer(model: VOLO, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of ``model``; weight decay leaves out biases, 1-D tensors and ``no_weight_decay()``.

    Raises ValueError for an unknown name, or if Apex is asked for and NVIDIA's is not installed.
    """
    check_optimizer(config)
    optimizer = _fused_adam(model, config) if config.implementation == "apex" else _of_timm(model, config)
    _logger.info(describe_groups(optimizer))
    return optimizer


def _of_timm(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    fused: dict[str, Any] = {"fused": True} if config.name in _FUSED_IN_TORCH else {}
    try:  # the factory leaves betas and eps out for an optimizer that has none
        optimizer = create_optimizer_v2(
            model,
            config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=tuple(config.betas),
            eps=config.eps,
            **fused,
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"optim.name '{config.name}': {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"optim.name '{config.name}' needs second derivatives, which this training loop does not take")
    return optimizer


def check_optimizer(config: OptimConfig) -> None:
    """Raise ValueError if the optimizer is unknown, takes another number of betas, or needs Apex, which is missing."""
    if config.implementation == "apex":
        _require_fused_adam(config)
    name = config.name.removeprefix("lookahead_")
    known: list[str] = [*map(str, list_optimizers())]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["adamw", "lamb", "sgd"]
        raise ValueError(
            f"optim.name '{config.name}' is not one of timm's {len(known)} optimizers. Similar names: {', '.join(near)}"
        )
    info = get_optimizer_info(name)
    if info.has_betas and info.num_betas != len(config.betas):
        raise ValueError(
            f"optim.name '{config.name}' takes {info.num_betas} betas, but optim.betas is {config.betas}. Give "
            f"{info.num_betas} numbers"
        )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load ``state``, but keep the weight decay, betas and eps that the optimizer was made with.

    torch takes them from the checkpoint, which would override what the user changed for the resumed run. It also takes
    the memory order of every tensor from there, and a fused step reads all tensors of a parameter in the parameter's
    order: a checkpoint of a run with another train.channels_last would pair weights with averages of other weights.
    """
    kept = [{k: g[k] for k in ("weight_decay", "betas", "eps") if k in g} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group.update(options)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _fused_adam(model: VOLO, config: OptimConfig) -> torch.optim.Optimizer:
    """Return NVIDIA Apex's FusedAdam in AdamW mode."""
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=model.no_weight_decay())
    make = _require_fused_adam(config)
    return make(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, adam_w_mode=True)


def _require_fused_adam(config: OptimConfig) -> Callable[..., torch.optim.Optimizer]:
    """Return NVIDIA Apex's FusedAdam; ValueError if it is not installed or another optimizer is named."""
    if config.name != "adamw":
        raise ValueError(
            f"optim.implementation 'apex' is FusedAdam in AdamW mode; optim.name is '{config.name}'. Use optim.name "
            "adamw, or optim.implementation torch"
        )
    try:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"optim.implementation is 'apex', but NVIDIA Apex's FusedAdam cannot be imported ({error}). Build "
            "Apex from NVIDIA's source (docs/apex.md; the PyPI package of that name is something else), or use "
            "optim.implementation torch: torch's fused AdamW does the same arithmetic"
        ) from error
    return FusedAdam


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """Return one line that counts the tensors and parameters with and without weight decay."""
    parts = []
    for decayed in (True, False):
        tensors = [p for g in optimizer.param_groups if bool(g["weight_decay"]) == decayed for p in g["params"]]
        word = "with" if decayed else "without"
        parts.append(f"{len(tensors)} tensors ({sum(p.numel() for p in tensors):,} parameters) {word} weight decay")
    return "optimizer: " + ", ".join(parts)


def learning_rate(config: ScheduleConfig, lr: float, epoch: float) -> float:
    """Return the learning rate at ``epoch`` (from 0; fractional in per-step mode), the cosine peaking at ``lr``.

    Linear warmup from ``warmup_lr``; then the cosine as if it had run from epoch 0, so nothing is shifted by the
    warmup; ``min_lr`` from ``epochs`` on. A pure function: resuming needs no scheduler state.
    """
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (lr - config.warmup_lr) * epoch / config.warmup_epochs
    if epoch >= config.epochs:
        return config.min_lr
    return config.min_lr + 0.5 * (lr - config.min_lr) * (1 + math.cos(math.pi * epoch / config.epochs))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def create_ema(model: nn.Module, config: EmaConfig) -> ModelEmaV3 | None:
    """Return the average of ``model``, or None if it is off.

    Call it once all ranks hold the same weights; earlier, ranks would average different ones.
    """
    if not config.enabled:
        return None
    return ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup)
