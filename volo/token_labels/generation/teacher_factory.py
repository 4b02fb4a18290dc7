"""Making a teacher: a model of timm or of this package, with its weights and the size of its input.

C classes, [H, W] the size of the input.
"""

import difflib
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.config import resolve_model_data_config
from timm.models import clean_state_dict
from torch import Tensor

from volo.models import create_model, get_architecture, list_models, load_checkpoint
from volo.token_labels.generation.teacher import Teacher, first_line, timm_logits, volo_logits
from volo.token_labels.generation.teacher_input import TeacherInput


class WeightsNotFetched(ValueError):
    """Weights cannot be downloaded, which is not an error in the options."""


def make_teacher(
    name: str,
    classes: tuple[str, ...],
    *,
    file: dict | None = None,
    path: str | None = None,
    use_ema: bool = False,
    random_weights: bool = False,
    image_hw: tuple[int, int] | None = None,
) -> Teacher:
    """Return the teacher in evaluation mode, on the CPU.

    Args:
        name: "timm:NAME", or the name of a model of this package.
        classes: The C class names in index order.
        file, path: The content of a checkpoint, and its path; None takes timm's pretrained weights.
        use_ema: Take the file's EMA weights.
        random_weights: Leave the network untrained, with the same weights each time.
        image_hw: (H, W) of its input; None takes that of the model or the file.

    Raises:
        ValueError: Unknown name, weights that do not exist or do not fit, another number or order of classes, or an
            invalid size.
        WeightsNotFetched: The pretrained weights exist, but cannot be downloaded.
    """
    own_classes = tuple((file or {}).get("classes") or ())
    if own_classes and own_classes != classes:
        raise ValueError(_other_classes(path, own_classes, classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name.startswith("timm:"):
            pretrained = file is None and not random_weights
            teacher = _timm_teacher(name.removeprefix("timm:"), len(classes), pretrained, image_hw)
            if file is not None:
                _load_timm(teacher.model, file, path, use_ema)
        else:
            teacher = _volo_teacher(name, len(classes), file, path, use_ema, image_hw)
    if teacher.num_classes != len(classes):
        raise ValueError(_other_count(f"--teacher {name}", teacher.num_classes, len(classes)))
    teacher.model.eval()
    return teacher


def _timm_teacher(name: str, num_classes: int, pretrained: bool, image_hw: tuple[int, int] | None) -> Teacher:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"--teacher timm:{name}: timm {timm.__version__} has no such model; {hint}timm.list_models()")
    options: dict[str, Any] = {} if pretrained else {"num_classes": num_classes}
    try:
        config = timm.get_pretrained_cfg(name)
        is_fixed = bool(config and config.fixed_input_size)
        if is_fixed and image_hw is not None:
            options["img_size"] = image_hw
        model: Any = timm.create_model(name, pretrained=pretrained, **options)
    except OSError as error:
        raise WeightsNotFetched(
            f"the weights of timm:{name} cannot be downloaded: {first_line(error).rstrip('.;')}. Without a network, "
            "give them as --teacher_checkpoint FILE"
        ) from error
    except Exception as error:  # timm raises all kinds of exceptions for an unknown tag or an invalid size
        raise ValueError(f"--teacher timm:{name} cannot be made: {first_line(error)}") from error
    data = resolve_model_data_config(model, use_test_size=not is_fixed)
    teacher_input = TeacherInput(
        image_hw or tuple(data["input_size"][1:]),
        keeps_aspect=not is_fixed,
        stride=model.feature_info[-1]["reduction"] if hasattr(model, "feature_info") else 32,
        interpolation=data["interpolation"],
    )
    mean, std = tuple(data["mean"]), tuple(data["std"])
    return Teacher(f"timm:{name}", model, timm_logits, model.num_classes, teacher_input, mean, std)


def _load_timm(model: Any, file: dict, path: str | None, use_ema: bool) -> None:
    """Load all weights from a file of timm, or one that holds only weights; ValueError if they do not fit."""
    names = ("state_dict_ema", "model_ema") if use_ema else ("state_dict", "model")
    weights = next((file[name] for name in names if isinstance(file.get(name), dict)), None)
    if weights is None:
        if use_ema:
            raise ValueError(f"{path} has no EMA weights; give --weights raw")
        weights = file
    weights = clean_state_dict(weights)
    layer = model.pretrained_cfg.get("classifier")
    layer = layer if isinstance(layer, str) else (layer or [""])[0]
    given, own = weights.get(f"{layer}.weight"), model.state_dict().get(f"{layer}.weight")
    if isinstance(given, Tensor) and own is not None and len(given) != len(own):
        raise ValueError(_other_count(path, len(given), len(own)))
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)
        raise ValueError(f"{path} does not fit the teacher: {reason[:300]}") from error


def _volo_teacher(
    name: str, num_classes: int, file: dict | None, path: str | None, use_ema: bool, image_hw: tuple[int, int] | None
) -> Teacher:
    if name not in list_models():
        raise ValueError(
            f"--teacher {name!r} is unknown; give timm:NAME for a model of timm, or one of {', '.join(list_models())}"
        )
    config = (file or {}).get("config") or {}  # of the run, in checkpoints of train.py
    model_config = {key: value for key, value in config.get("model", {}).items() if value is not None}
    if model_config.get("name", name) != name:
        raise ValueError(f"{path} is a {model_config['name']}; give --teacher {model_config['name']}")
    known = get_architecture(name).__dataclass_fields__
    changes = {field: value for field, value in model_config.items() if field in known}
    size = image_hw or model_config.get("img_size") or _size_of(name, file) or 224
    model = create_model(name, img_size=size, num_classes=num_classes, **changes)
    if file is not None:
        assert path is not None
        report = load_checkpoint(model, path, use_ema=use_ema)
        if report.dropped_heads:
            raise ValueError(_other_count(path, report.num_classes, num_classes))
    mean, std = (config.get("augment", {}).get(key) for key in ("mean", "std"))
    teacher_input = TeacherInput(
        model.img_size,
        keeps_aspect=False,
        stride=model.img_size[0] // model.grid_size[0],
        interpolation=config.get("eval", {}).get("interpolation", "bicubic"),
    )
    mean, std = tuple(mean or IMAGENET_DEFAULT_MEAN), tuple(std or IMAGENET_DEFAULT_STD)
    return Teacher(name, model, volo_logits, num_classes, teacher_input, mean, std)


def _size_of(name: str, file: dict | None) -> tuple[int, int] | None:
    """Return the input size that a file's position embedding is for; None if the file has none."""
    content = file or {}
    weights = next((content[key] for key in ("state_dict", "state_dict_ema") if content.get(key)), content)
    pos_embed = next((value for key, value in weights.items() if key.split(".")[-1] == "pos_embed"), None)
    if pos_embed is None or pos_embed.ndim != 4:
        return None
    arch = get_architecture(name)
    unit = arch.patch_size * (2 if arch.downsample_after[0] else 1)
    return pos_embed.shape[1] * unit, pos_embed.shape[2] * unit


def _other_count(what: str | None, has: int, wanted: int) -> str:
    return (
        f"{what} has {has} classes, but the class list has {wanted}. Take a teacher of these classes, or give the "
        "teacher's classes with --class_list"
    )


def _other_classes(path: str | None, own: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    if len(own) != len(wanted):
        return _other_count(str(path), len(own), len(wanted))
    index = next(i for i, (a, b) in enumerate(zip(own, wanted, strict=True)) if a != b)
    return (
        f"class {index} is {own[index]!r} in {path} but {wanted[index]!r} in the class list, so the labels would name "
        "other classes. Give the teacher's classes with --class_list"
    )
