"""Numeric precision of a run: autocast, gradient scaling, and Apex's O1 if the installed Apex has it."""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A resolved choice of ``train.precision`` on one device."""

    name: str
    device_type: str

    @classmethod
    def resolve(cls, choice: str, device: torch.device) -> "Precision":
        """Resolve "auto"; raise ValueError if the device does not support the choice.

        "auto" is fp32 on the CPU and bf16 on CUDA, or fp16 on cards before Ampere, which would emulate bf16 slowly.
        """
        cuda = device.type == "cuda"
        if choice == "auto" and cuda:
            choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif choice == "auto":
            choice = "fp32"
        if choice == "apex_o1":
            require_apex_amp()
        if choice == "bf16" and cuda and not torch.cuda.is_bf16_supported():
            raise ValueError("train.precision is 'bf16', which this GPU does not support. Use fp16 or fp32")
        if choice == "tf32" and not cuda:
            raise ValueError("train.precision is 'tf32', which only CUDA devices have. Use fp32")
        return cls(choice, device.type)

    def set_up(self) -> None:
        """Set PyTorch's process-wide choice of TF32: on for "tf32", else off.

        PyTorch's own default has it on for convolutions and off for matrix products.
        """
        tf32 = self.name == "tf32"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32

    @property
    def dtype(self) -> torch.dtype:
        """Type that matrix products give; fp32 under Apex, which decides per operator."""
        return DTYPES.get(self.name, torch.float32)

    def autocast(self):
        """Return the context of a forward."""
        if self.dtype == torch.float32:  # Apex patches the operators itself
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=DTYPES[self.name])

    def scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler, which does nothing except in fp16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def require_apex_amp():
    """Return ``apex.amp``; raise ValueError if NVIDIA's Apex is absent or too new to have it."""
    try:
        from apex import amp  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"train.precision is 'apex_o1', but apex.amp cannot be imported ({error}): NVIDIA Apex is absent, or "
            "too new (its amp was removed in favour of torch's). train.precision fp16 does the same with torch's own "
            "autocast and gradient scaler; bf16 needs no scaler at all"
        ) from error
    if not hasattr(amp, "initialize"):
        raise ValueError(
            "train.precision is 'apex_o1', but the installed package 'apex' has no amp.initialize: it is not "
            "NVIDIA's, or too new. train.precision fp16 does the same with torch's own autocast and scaler"
        )
    return amp


def apex_initialise(model: nn.Module, optimizer: torch.optim.Optimizer):
    """Return model and optimizer patched by ``apex.amp`` at level O1 (the published runs' precision)."""
    return require_apex_amp().initialize(model, optimizer, opt_level="O1")
