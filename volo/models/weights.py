"""Loading of checkpoints: the published ``.pth.tar``, timm's ``volo_*`` weights and our own files, into a model.

Nothing in a file is ever executed, and a file that does not fit leaves the model as it was.
"""

import argparse
import logging
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from volo.models.architecture import ARCHITECTURES
from volo.models.volo import VOLO
from volo.runtime.errors import UnusableFile

logger = logging.getLogger(__name__)

_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every key
_HEADS = ("head.weight", "head.bias", "aux_head.weight", "aux_head.bias")
# How torch's restricted unpickler words a refusal, as opposed to a file that is damaged.
_REFUSALS = ("GLOBAL", "Trying to call reduce", "Can only create new object", "Can only build Tensor")
# Far beyond any checkpoint (volo_d5 with its optimizer: 1 MiB, 5,000 values, 6 levels), and read in seconds.
_LARGEST_LISTING = 16 << 20  # bytes of what describes the tensors and holds the other entries
_MOST_VALUES = 2_000_000
_DEEPEST = 100


class UnreadableCheckpoint(UnusableFile):
    """A file that is empty, truncated, corrupt or refused; it is unusable whatever the options are."""


@dataclass(frozen=True)
class LoadReport:
    """What ``load_checkpoint`` took from a file.

    Args:
        path: The file.
        used: Which weights: "state_dict", "state_dict_ema", or "raw" for a file that is nothing but weights.
        resized_pos_embed: (rows, cols) of the position embedding before and after; None if they agreed.
        dropped_heads: The file's heads have another number of classes; the model's keep their initial values.
        num_classes: Number of classes of the file.
        metadata: The file's other plain entries (epoch, metric, class names ...), without tensors.
    """

    path: Path
    used: str
    resized_pos_embed: tuple[tuple[int, int], tuple[int, int]] | None
    dropped_heads: bool
    num_classes: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        epoch = f", epoch {_shown(self.metadata['epoch'])}" if "epoch" in self.metadata else ""
        parts = [f"weights from {self.path} ({self.used}{epoch})"]
        if self.resized_pos_embed:
            (rows, cols), (new_rows, new_cols) = self.resized_pos_embed
            parts.append(f"position embedding resized from {rows}x{cols} to {new_rows}x{new_cols}")
        if self.dropped_heads:
            parts.append(f"heads dropped: theirs have {self.num_classes} classes, the model's stay as they were")
        return "; ".join(parts)


def load_checkpoint(model: VOLO, path: str | Path, use_ema: bool = False) -> LoadReport:
    """Load the weights of a file into ``model``: all of them, or none and an error.

    The position embedding is resized if the file was made for another image size. If the number of classes
    differs, both heads of the file are left out; the report and the log say so.

    Args:
        model: The model, changed in place.
        path: A ``.pth.tar``, ``.pth``, ``.bin`` or ``.pt`` of torch, or ``.safetensors``: weights, or a dict
            with "state_dict" and perhaps "state_dict_ema".
        use_ema: Take "state_dict_ema".

    Raises:
        UnreadableCheckpoint: As :func:`read_checkpoint`; or a weight that is none (a bool, a complex, quantized or
            sparse tensor, one that is NaN or infinite in the model's precision); the message names it.
        ValueError: No such file, one without the weights asked for, or one whose keys or shapes do not fit. The
            model is unchanged.
    """
    return load_content(model, read_checkpoint(path), path, use_ema)


def load_content(model: VOLO, content: dict[str, Any], path: str | Path, use_ema: bool = False) -> LoadReport:
    """Load the weights of a file that was read before, as :func:`load_checkpoint` does; ``path`` is for messages."""
    path = Path(path)
    used, weights = _select(content, path, use_ema)
    weights = {_unwrapped(key): tensor for key, tensor in weights.items()}
    own = model.state_dict()

    head = weights.get("head.weight")
    num_classes = head.shape[0] if head is not None and head.ndim == 2 else model.num_classes
    dropped = num_classes != model.num_classes
    if dropped:
        weights = {key: tensor for key, tensor in weights.items() if key not in _HEADS}
    resized = None
    old = weights.get("pos_embed")
    if old is not None and old.ndim == 4 and old.is_floating_point() and old.shape[1:3] != own["pos_embed"].shape[1:3]:
        (rows, cols), (new_rows, new_cols) = old.shape[1:3], own["pos_embed"].shape[1:3]
        resized = (rows, cols), (new_rows, new_cols)
        weights["pos_embed"] = resize_pos_embed(old, (new_rows, new_cols))

    problems = _differences(weights, own, ignore=_HEADS if dropped else ())
    if problems:
        problems.append(_looks_like(weights, model))
        raise ValueError(f"{path} does not fit the model; nothing was loaded. {' '.join(problems).strip()}")
    for key, tensor in weights.items():
        _check_finite(key, tensor.to(own[key].dtype), path)
    model.load_state_dict({**own, **weights})

    metadata = {} if used == "raw" else {k: v for k, v in content.items() if v is not None and _is_plain(v)}
    report = LoadReport(path, used, resized, dropped, num_classes, metadata)
    logger.log(logging.WARNING if dropped else logging.INFO, "%s", report)
    return report


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file into CPU memory without executing anything in it.

    Raises:
        UnreadableCheckpoint: An empty, truncated or foreign file, one whose top level is no dict, one that needs
            code to be run, or one that is small and unpacks to far more.
        ValueError: No such file, or a directory.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder; give a file in it")
    if path.stat().st_size == 0:
        raise UnreadableCheckpoint(f"checkpoint {path} is empty (0 bytes); its copy or download did not finish")
    try:
        if path.suffix == ".safetensors":
            _check_safetensors_header(path)
            content = load_file(path)
        else:
            _check_archive(path)
            # timm's training loop stores its options as a Namespace, which is data: it has no code to run.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes trip the parsers in arbitrary ways
        raise UnreadableCheckpoint(_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"checkpoint {path} holds a {type(content).__name__}; a dict of weights is needed")
    _check_nesting(content, path)
    return content


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embedding [1, h, w, D] for another grid, [1, *grid, D]: bicubic, as the published code does it."""
    x = pos_embed.float().permute(0, 3, 1, 2)  # [1, D, h, w]
    x = F.interpolate(x, size=grid, mode="bicubic", align_corners=False)  # [1, D, *grid]
    return x.permute(0, 2, 3, 1)


def _select(file: dict[str, Any], path: Path, use_ema: bool) -> tuple[str, dict[str, Tensor]]:
    """Name and content of the weights asked for."""
    used = "state_dict_ema" if use_ema else "state_dict"
    if file.get(used) is not None:
        weights = file[used]
    elif use_ema:
        raise ValueError(f"checkpoint {path} has no EMA weights (state_dict_ema); load it without use_ema")
    elif file.get("state_dict_ema") is not None:
        raise ValueError(f"checkpoint {path} has EMA weights only; load it with use_ema=True")
    else:
        used, weights = "raw", file
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        shown = ", ".join(map(_shown, list(file)[:10]))
        raise ValueError(f"checkpoint {path} has no weights under state_dict or at its top level. Entries: {shown}")
    for key, tensor in weights.items():
        if problem := _no_weight(key, tensor):
            raise UnreadableCheckpoint(
                f"checkpoint {path}: {_shown(key)} in {'its weights' if used == 'raw' else used} {problem}, so it is "
                "no weight of a network; nothing was loaded. Copy the file again, or get one with plain weights"
            )
    return used, weights


def _no_weight(key: Any, value: Any) -> str:
    """Why an entry of a state dict is no weight; empty if it is one."""
    if not isinstance(key, str):
        return f"is named by a {type(key).__name__} instead of a string"
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__} instead of a tensor"
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        kind = "a quantized" if value.is_quantized else "an empty (meta)" if value.is_meta else "a sparse"
        return f"is {kind} tensor"
    if value.dtype is torch.bool or value.is_complex():
        return f"is a tensor of {value.dtype}"
    if value.numel() == 0:
        return f"is a tensor without values, {list(value.shape)}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"is a tensor of {list(value.shape)}, of which the file has {value.untyped_storage().nbytes()} bytes"
    return ""


def _check_finite(key: str, tensor: Tensor, path: Path) -> None:
    """Raise UnreadableCheckpoint if values of a weight, in the model's precision, are NaN or infinite."""
    wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
    if wrong:
        raise UnreadableCheckpoint(
            f"checkpoint {path}: {wrong:,} of {tensor.numel():,} values of {key} are NaN or infinite in "
            f"{tensor.dtype}; nothing was loaded. Copy the file again, or take an earlier checkpoint of that run"
        )


def _shown(key: Any) -> str:
    """A key for a message of one line: as it is if it is a plain name."""
    return key if isinstance(key, str) and key.isprintable() and len(key) <= 100 else ascii(key)[:100]


def _unwrapped(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float)


def _differences(weights: dict[str, Tensor], own: dict[str, Tensor], ignore: tuple[str, ...]) -> list[str]:
    """One sentence for each way in which keys and shapes disagree; empty if the weights fit."""
    missing = [key for key in own if key not in weights and key not in ignore]
    unexpected = [key for key in weights if key not in own]
    reshaped = [
        f"{key} (file {list(weights[key].shape)}, model {list(own[key].shape)})"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    integers = [
        f"{key} ({weights[key].dtype})"
        for key in own
        if key in weights and own[key].is_floating_point() and not weights[key].is_floating_point()
    ]
    named = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", reshaped),
        ("not of floats", integers),
    )
    return [
        f"{len(keys)} {what}: {', '.join(map(_shown, keys[:10]))}{' ...' if len(keys) > 10 else ''}."
        for what, keys in named
        if keys
    ]


def _looks_like(weights: dict[str, Tensor], model: VOLO) -> str:
    """Which other named architecture the file seems to be of, as a sentence; empty if none fits."""
    num_blocks = sum(key.endswith(".norm1.weight") for key in weights)
    patches = list(weights["patch_embed.proj.weight"].shape) if "patch_embed.proj.weight" in weights else None
    for name, arch in ARCHITECTURES.items():
        side = arch.patch_size // 2
        if (
            arch != model.architecture
            and num_blocks == sum(arch.layers) + arch.post_layers
            and patches == [arch.embed_dims[0], arch.stem_hidden_dim, side, side]
        ):
            return f"The file looks like {name}."
    return ""


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive of torch.save that is damaged or unpacks to far more than it is.

    The checksums are those that torch.save wrote and torch.load does not look at.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > 10 * path.stat().st_size:  # torch.save does not compress, and weights hardly can be
            raise ValueError(f"it unpacks to {size:,} bytes, more than ten times its own size")
        for entry in archive.infolist():
            if entry.filename.endswith("data.pkl"):
                _check_listing(entry.file_size)
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum of {damaged} is wrong")


def _check_safetensors_header(path: Path) -> None:
    with open(path, "rb") as file:
        _check_listing(int.from_bytes(file.read(8), "little"))


def _check_listing(size: int) -> None:
    if size > _LARGEST_LISTING:
        raise ValueError(f"what describes its tensors has {size:,} bytes, allowed are {_LARGEST_LISTING:,}")


def _check_nesting(content: dict, path: Path) -> None:
    """Raise UnreadableCheckpoint if what follows references would take ages or exhaust the stack.

    A list that holds another twice, which holds another twice, ... is of a few bytes and has 2 ** n values.
    """
    level: list[Any] = [content]
    values = 0
    for _ in range(_DEEPEST):
        nested = [vars(x) if isinstance(x, argparse.Namespace) else x for x in level]
        nested = [x for x in nested if isinstance(x, dict | list | tuple | set | frozenset)]
        values += sum(map(len, nested))
        if not nested or values > _MOST_VALUES:
            break
        level = [value for x in nested for value in (x.values() if isinstance(x, dict) else x)]
    else:
        values = _MOST_VALUES + 1
    if values > _MOST_VALUES:
        raise UnreadableCheckpoint(
            f"checkpoint {path} was refused: its entries are nested more than {_DEEPEST} deep or have more than "
            f"{_MOST_VALUES:,} values. Read it where it was made and save its state_dict alone"
        )


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file could not be read, for the user: it was refused, or it is damaged."""
    reason = str(error).split("WeightsUnpickler error: ")[-1].split(" Please use")[0].strip()
    lines = [line for line in reason.splitlines() if any(words in line for words in _REFUSALS)]
    with open(path, "rb") as file:
        head = file.read(2)
    # Pickles newer than the protocol of torch.save are not parsed at all, so torch names no object of theirs.
    foreign_pickle = head[:1] == pickle.PROTO and head[1:] > b"\x02"
    if isinstance(error, pickle.UnpicklingError) and (lines or foreign_pickle):
        return (
            f"checkpoint {path} holds Python objects that may run code when they are read, so it was refused and "
            "nothing was executed. Get a file of plain tensors, or, if you trust this one, read it where it was "
            f"made and save its state_dict alone. Found: {lines[0] if lines else 'a bare Python pickle'}"
        )
    reason = f"{type(error).__name__}: {reason.splitlines()[0]}" if reason else type(error).__name__
    return (
        f"checkpoint {path} cannot be read: it is truncated, corrupt or no checkpoint; nothing was executed. "
        f"Cause: {reason[:200]}"
    )
