"""Every option of a run: typed dataclasses, filled from defaults, then YAML, then the command line.

There is one dataclass per component, and defaults stand here and nowhere else. They are the published recipe
wherever the paper states one, so a recipe file holds only what differs.
Nothing heavy is imported here, so ``--help`` and every check that needs no data answer at once.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal

Pair = int | list[int]
# Values that earlier versions named differently, by section and field, and fields that were removed.
RENAMED_VALUES = {
    ("augment", "order"): {"reference": "published"},
    ("token_label", "geometry"): {"reference": "published", "reference_sparse": "published"},
    ("train", "kernel"): {"reference": "eager"},
}
REMOVED_FIELDS = {("data", "relist"): "to list the images again, delete the folder data.cache, or set it to none"}
# The fields of ModelConfig that are not fields of the architecture.
_NOT_ARCHITECTURE = ("name", "img_size", "num_classes", "drop_path_rate", "checkpoint", "checkpoint_ema")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _require_share(name: str, value: float) -> None:
    percent = f". {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
    _require(0 <= value <= 1, f"{name} is {value}; it is in [0, 1]{percent}")


@dataclass(frozen=True)
class ModelConfig:
    """The network. Fields below ``checkpoint`` override the named architecture if they are set.

    Args:
        name: Registered architecture: volo_d1 ... volo_d5, volo_tiny, volo_nano.
        img_size: Training resolution in pixels, one number or [height, width]; divisible by 16 for D1-D5.
        num_classes: Number of classes.
        drop_path_rate: Stochastic depth of the last Transformer block; grows linearly with depth.
        checkpoint: Weights to start from (fine-tuning): published, timm's or our own file.
        checkpoint_ema: Start from the EMA weights in that file.
        layers: Blocks per stage.
        embed_dims: Channels per stage.
        num_heads: Attention heads per stage.
        mlp_ratios: MLP hidden width over channels, per stage.
        patch_size: Stride of the patch embedding in pixels.
        stem_hidden_dim: Channels of the convolutional stem.
        outlook_stages: Which stages use outlook attention (true) rather than self-attention.
        downsample_after: After which stages the grid is halved.
        outlook_kernel: Side of the outlook window.
        outlook_stride: Stride between outlook windows.
        outlook_padding: Zero padding of the outlook values.
        post_layers: Number of class-attention blocks.
        qkv_bias: Use biases in the query, key and value projections.
        drop_rate: Dropout after the position embedding and in the MLPs and projections.
        attn_drop_rate: Dropout of attention weights.
        return_mean: Classify the mean of the tokens; the network then has no class token.
        return_dense: Add the auxiliary head over tokens.
        drop_path_outlookers: Apply stochastic depth to the Outlookers too (the published code skips them).
    """

    name: str = "volo_d1"
    img_size: Pair = 224
    num_classes: int = 1000
    drop_path_rate: float = 0.0
    checkpoint: str | None = None
    checkpoint_ema: bool = False
    layers: list[int] | None = None
    embed_dims: list[int] | None = None
    num_heads: list[int] | None = None
    mlp_ratios: list[float] | None = None
    patch_size: int | None = None
    stem_hidden_dim: int | None = None
    outlook_stages: list[bool] | None = None
    downsample_after: list[bool] | None = None
    outlook_kernel: int | None = None
    outlook_stride: int | None = None
    outlook_padding: int | None = None
    post_layers: int | None = None
    qkv_bias: bool | None = None
    drop_rate: float | None = None
    attn_drop_rate: float | None = None
    return_mean: bool | None = None
    return_dense: bool | None = None
    drop_path_outlookers: bool | None = None

    def __post_init__(self):
        _require(self.num_classes >= 2, f"model.num_classes is {self.num_classes}; at least 2 are needed")
        _require(0 <= self.drop_path_rate < 1, f"model.drop_path_rate is {self.drop_path_rate}; it is in [0, 1)")
        size = self.img_size
        _require(
            isinstance(size, int) or len(size) == 2, f"model.img_size is {size}; give one number or [height, width]"
        )

    @property
    def architecture(self) -> dict:
        """The architecture fields the user set, as ``create_model`` takes them."""
        fields = {k: v for k, v in asdict(self).items() if k not in _NOT_ARCHITECTURE and v is not None}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}

    @property
    def image_hw(self) -> tuple[int, int]:
        size = self.img_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are read.

    Args:
        root: Folder that holds the images: train and val folders, the unmodified tar files of ILSVRC2012, tar archives
            (WebDataset shards; root may then be a URL), or Parquet files of Hugging Face.
        train_split: The training images under root: a folder of class folders; a tar archive, a folder of them, or
            several with "train-{000..146}.tar" or "train-*.tar"; the name of a split of Parquet files.
        val_split: The validation images, given in the same ways; "none" turns evaluation off.
        train_labels: Labels of training images that are not sorted into class folders: a text file with one
            "name label" or one label per line, or a .csv file whose first two columns are name and label.
            Labels are class names or indices.
        val_labels: The same for the validation images, or the development kit ILSVRC2012_devkit_t12.tar.gz (found
            automatically if it is in root).
        format: Storage format, "folder", "tar" or "parquet"; "auto" detects it.
        class_list: Class names in index order: "folders" (sorted names of the training folders, or sorted labels of
            train_labels), "imagenet" (the 1,000 ILSVRC2012 synsets) or a text file with one class folder name per line.
        workers: Data workers per training process; by default one per core, up to 16.
        on_error: What to do about an unreadable image: "fail" names it and stops; "skip" counts and reports it, and in
            training replaces it by an image drawn from seed, epoch and index. The same goes for a worker that dies:
            with "skip" new workers resume at the batch that is due, which changes nothing in the run.
        timeout_seconds: Longest wait for a batch from the workers (a network file system may hang); 0 for no limit.
        exif: Whether to "ignore" orientation tags, as the published code does, or "apply" them.
        cache: Folder for listings of folders and indices of archives, so that a million files are listed only once;
            "auto" is $XDG_CACHE_HOME/volo or ~/.cache/volo, "none" turns the cache off. If a folder has changed, it
            is listed again.
    """

    root: str = "data/imagenet"
    train_split: str = "train"
    val_split: str = "val"
    train_labels: str | None = None
    val_labels: str | None = None
    format: Literal["auto", "folder", "tar", "parquet"] = "auto"
    class_list: str = "folders"
    workers: int | None = None
    on_error: Literal["fail", "skip"] = "fail"
    timeout_seconds: float = 600.0
    exif: Literal["ignore", "apply"] = "ignore"
    cache: str = "auto"

    def __post_init__(self):
        _require(self.workers is None or self.workers >= 0, f"data.workers is {self.workers}; 0 or more")
        _require(self.timeout_seconds >= 0, f"data.timeout_seconds is {self.timeout_seconds}; 0 or more")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images.

    Args:
        order: "timm" crops, then flips, then applies RandAugment; "published" flips, applies RandAugment to the
            whole image and crops last, as the published token-labeling loader does.
        crop: "random_resized", or "shift": resize to the input size, pad with black, crop at a random offset.
        scale: Area of the random resized crop as a share of the image's area, [smallest, largest].
        ratio: Aspect ratio (width / height) of the crop, [smallest, largest], drawn log-uniformly.
        shift_pixels: Largest offset of crop "shift", in pixels of the input size.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        rand_augment: RandAugment in timm's notation, or "none".
        interpolation: Resampling of the crop; "random" draws bilinear or bicubic per image.
        erase_prob: Probability of random erasing (one box of normal noise, after normalisation).
        mean: Per-channel mean of the input, in [0, 1].
        std: Per-channel standard deviation of the input, in [0, 1].
        backend: Implementation of the pixel operations, in training and evaluation: "native" (C++, compiled on first
            use), "pillow" (Pillow and timm, half as fast or slower), or "auto": native if it can be built. All give the
            same bytes.
    """

    order: Literal["timm", "published"] = "timm"
    crop: Literal["random_resized", "shift"] = "random_resized"
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    shift_pixels: int = 4
    hflip: float = 0.5
    vflip: float = 0.0
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    erase_prob: float = 0.25
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    backend: Literal["auto", "native", "pillow"] = "auto"

    def __post_init__(self):
        for name in ("hflip", "vflip", "erase_prob"):
            _require_share(f"augment.{name}", getattr(self, name))
        for name, top in (("scale", 1.0), ("ratio", float("inf"))):
            pair = getattr(self, name)
            _require(
                len(pair) == 2 and 0 < pair[0] <= pair[1] <= top,
                f"augment.{name} is {pair}; give [smallest, largest], both above 0 and at most {top}",
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            _require(len(values) == 3, f"augment.{name} needs three numbers, one per channel")
            _require(
                all(0 <= value <= 1 for value in values),
                f"augment.{name} is {values}; it is of pixels in [0, 1]. If yours is of 0 to 255, it is "
                f"{[round(value / 255, 4) for value in values]}",
            )
        _require(min(self.std) > 0, f"augment.std is {self.std}; every entry is above 0")
        _require(self.shift_pixels >= 0, f"augment.shift_pixels is {self.shift_pixels}; 0 or more")


@dataclass(frozen=True)
class MixConfig:
    """Mixing of images within a batch. Boxes and ratios are drawn on the host from (seed, epoch, step).

    Args:
        mix_token: Use MixToken after the patch embedding, with lambda drawn from Beta(1, 1).
        mixup: Alpha of MixUp; 0 is off.
        cutmix: Alpha of CutMix; 0 is off.
        prob: Probability of mixing a batch (or pair, or element).
        switch_prob: Probability of CutMix rather than MixUp if both are on.
        mode: Whether ratio and box are drawn per "batch", per "pair" or per image ("elem").
        off_epoch: First epoch without MixUp and CutMix; 0 never turns them off.
    """

    mix_token: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"
    off_epoch: int = 0

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            _require(getattr(self, name) >= 0, f"mix.{name} is {getattr(self, name)}; 0 (off) or more")
        for name in ("prob", "switch_prob"):
            _require_share(f"mix.{name}", getattr(self, name))

    @property
    def mixes_images(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class LossConfig:
    """Classification loss on the class token and on the tokens.

    Args:
        cls_weight: Weight of the class-token term.
        dense_weight: Weight of the token term; 0 turns it off.
        smoothing: Label smoothing.
    """

    cls_weight: float = 1.0
    dense_weight: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self):
        _require(0 <= self.smoothing < 1, f"loss.smoothing is {self.smoothing}; it is in [0, 1)")
        for name in ("cls_weight", "dense_weight"):
            _require(getattr(self, name) >= 0, f"loss.{name} is {getattr(self, name)}; 0 or more")


@dataclass(frozen=True)
class TokenLabelConfig:
    """Token labeling: dense label maps of a teacher (arXiv 2104.10858) as targets of the tokens.

    Args:
        root: Packed store (made by scripts/generate_token_labels.py or scripts/pack_token_labels.py) or folder in the
            published layout. Without one, the image's own label is the target of every token.
        geometry: How label maps follow the pixels: "aligned" follows them exactly; "published" does what the published
            code does, bit for bit, including its errors and dense targets, for the paper's recipes.
        smoothing: Label smoothing of the maps: with "exact" the rows sum to 1; with "published" they sum to
            1 + smoothing / classes, as in the published code.
        ground_truth: Blend the image's own label into the class target, for fine-tuning. The teacher's share is 0.5 if
            it predicts that label; if not, "published" gives it 0.9, and "corrected" gives it 0.1.
        verify_checksums: Verify the checksums of the whole store at start-up.
    """

    root: str | None = None
    geometry: Literal["aligned", "published"] = "aligned"
    smoothing: Literal["exact", "published"] = "exact"
    ground_truth: Literal["off", "published", "corrected"] = "off"
    verify_checksums: bool = False


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and gradients.

    Args:
        name: Any optimizer of timm's create_optimizer_v2.
        implementation: "torch" (fused on CUDA if possible), or "apex": NVIDIA Apex's FusedAdam in AdamW mode.
        lr: Peak of the cosine and target of the warmup; with a warmup it is never quite reached, because the cosine
            starts at epoch 0. It is not scaled by the batch size.
        weight_decay: Decoupled weight decay; not applied to biases, 1-D tensors, class token and position embedding.
        betas: Adam's two decay rates (some optimizers of timm take three).
        eps: Adam's epsilon.
        clip_grad: Gradient clipping threshold; 0 is off.
        clip_mode: How gradients are clipped: total "norm", "value", or adaptive ("agc").
    """

    name: str = "adamw"
    implementation: Literal["torch", "apex"] = "torch"
    lr: float = 1.6e-3
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    clip_grad: float = 0.0
    clip_mode: Literal["norm", "value", "agc"] = "norm"

    def __post_init__(self):
        _require(self.lr > 0, f"optim.lr is {self.lr}; it is above 0")
        _require(0 <= self.weight_decay <= 1, f"optim.weight_decay is {self.weight_decay}; it is in [0, 1]")
        _require(
            len(self.betas) in (2, 3) and all(0 <= b < 1 for b in self.betas),
            f"optim.betas is {self.betas}; two numbers in [0, 1), or three for an optimizer that takes them",
        )
        _require(self.clip_grad >= 0, f"optim.clip_grad is {self.clip_grad}; 0 (off) or more")


@dataclass(frozen=True)
class ScheduleConfig:
    """Cosine learning-rate schedule. A run lasts epochs + cooldown_epochs.

    Args:
        epochs: Length of the cosine, warmup included.
        warmup_epochs: Linear warmup at the start of the cosine (the cosine is not shifted by it).
        cooldown_epochs: Epochs at min_lr after the cosine.
        warmup_lr: Learning rate of the first epoch.
        min_lr: Learning rate at the end of the cosine and in the cooldown.
        per_step: Change the learning rate every step rather than every epoch.
    """

    epochs: int = 300
    warmup_epochs: int = 20
    cooldown_epochs: int = 10
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    per_step: bool = False

    def __post_init__(self):
        _require(self.epochs >= 1, f"schedule.epochs is {self.epochs}; at least 1")
        for name in ("warmup_lr", "min_lr"):
            _require(getattr(self, name) >= 0, f"schedule.{name} is {getattr(self, name)}; 0 or more")
        _require(self.cooldown_epochs >= 0, f"schedule.cooldown_epochs is {self.cooldown_epochs}; 0 or more")
        _require(
            0 <= self.warmup_epochs <= self.epochs,
            f"schedule.warmup_epochs is {self.warmup_epochs}; it is between 0 and schedule.epochs ({self.epochs})",
        )

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.cooldown_epochs


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of parameters and buffers.

    Args:
        enabled: Maintain the average.
        decay: Decay per step.
        warmup: Let the decay grow from 0 with the steps (from 0), as 1 - step^(-2/3), up to ``decay``.
    """

    enabled: bool = False
    decay: float = 0.99992
    warmup: bool = False

    def __post_init__(self):
        _require(0 < self.decay < 1, f"ema.decay is {self.decay}; it is in (0, 1)")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation, in training and by validate.py.

    Args:
        crop_pct: The shorter side is resized to input size / crop_pct, then the centre is cropped; above 1 the
            image is padded with black.
        interpolation: Resampling of the resize.
        batch_size: Batch size per process.
        every_epochs: Epochs between evaluations; the last epoch is always evaluated.
        before_training: Evaluate once before the first step (fine-tuning).
        weights: Weights whose accuracy selects the best checkpoint; "auto" is the EMA if it is on, else raw.
    """

    crop_pct: float = 0.96
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    batch_size: int = 128
    every_epochs: int = 1
    before_training: bool = False
    weights: Literal["auto", "raw", "ema"] = "auto"

    def __post_init__(self):
        _require(
            0.1 <= self.crop_pct <= 4,
            f"eval.crop_pct is {self.crop_pct}; it is a ratio such as 0.96 or 1.15, in [0.1, 4]",
        )
        _require(self.batch_size >= 1, f"eval.batch_size is {self.batch_size}; at least 1")
        _require(self.every_epochs >= 1, f"eval.every_epochs is {self.every_epochs}; at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """The run: batch size, precision, device, folder, resuming.

    Args:
        batch_size: Images per optimizer step, over all processes and accumulation steps.
        device_batch_size: Largest batch that a process passes through the network at once; a larger share of the batch
            is accumulated over several passes.
        seed: Seed of every random draw.
        precision: "auto" is fp32 on the CPU and for validate.py, bf16 for training on CUDA (fp16 before Ampere); "tf32"
            is fp32 with products and convolutions in TF32; "apex_o1" is apex.amp, if the installed Apex has it.
        device: "auto" (CUDA if available, else CPU), "cuda" or "cpu".
        compile: Compile network and loss with torch.compile, if it works here.
        kernel: Kernel of outlook attention: "auto" is the native one (C++ on the CPU, Triton on CUDA) if it can
            run, else "eager", the operator in plain PyTorch; "native" fails if it cannot run.
        recompute: Activation checkpointing: recompute "none", "cheap" activations (halves the memory), or whole
            "blocks" from their inputs. "auto" is "cheap" on the CPU; on CUDA the first of them that fits the card.
        channels_last: Keep images and the weights of convolutions in channels-last memory order; "auto" does so
            on CUDA.
        sync_bn: Synchronise BatchNorm statistics over all processes in every step.
        output: Folder that holds run folders.
        name: Name of the run folder; empty takes the model and resolution.
        resume: "auto" resumes from the newest valid checkpoint in the run folder; "never" refuses a folder that has
            one; or the path of a checkpoint to resume from.
        keep_checkpoints: Number of epoch checkpoints to keep besides last.pt and best.pt.
        checkpoint_every_epochs: Epochs between checkpoints; the last epoch is always saved.
        log_every_steps: Steps between log lines and TensorBoard points.
        stop_after_minutes: Stop as after a signal, with a checkpoint saved and exit code 75, this long after the start.
        stop_timeout_seconds: How long the step under way may take after a signal to stop; then the process ends without
            saving.
        collective_timeout_minutes: How long a process waits for the others, over gloo and NCCL, before it fails.
    """

    batch_size: int = 1024
    device_batch_size: int = 128
    seed: int = 42
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "apex_o1"] = "auto"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    compile: bool = False
    kernel: Literal["auto", "eager", "native"] = "auto"
    recompute: Literal["auto", "none", "cheap", "blocks"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    sync_bn: bool = False
    output: str = "runs"
    name: str = ""
    resume: str = "auto"
    keep_checkpoints: int = 3
    checkpoint_every_epochs: int = 1
    log_every_steps: int = 50
    stop_after_minutes: float | None = None
    stop_timeout_seconds: float = 120.0
    collective_timeout_minutes: float = 30.0

    def __post_init__(self):
        for name in ("batch_size", "device_batch_size", "checkpoint_every_epochs", "log_every_steps"):
            _require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; at least 1")
        for name in ("stop_timeout_seconds", "collective_timeout_minutes"):
            _require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; more than 0")
        minutes = self.stop_after_minutes
        _require(minutes is None or minutes > 0, f"train.stop_after_minutes is {minutes}; more than 0")
        _require(self.keep_checkpoints >= 1, f"train.keep_checkpoints is {self.keep_checkpoints}; at least 1")
        _require(self.seed >= 0, f"train.seed is {self.seed}; 0 or more")


@dataclass(frozen=True)
class Config:
    """All options of a run.

    Args:
        model: The network.
        data: The images.
        augment: Augmentation of the training images.
        mix: Mixing of images within a batch.
        loss: The loss.
        token_label: Dense label maps.
        optim: The optimizer.
        schedule: The learning rate.
        ema: The weight average.
        eval: Evaluation.
        train: The run itself.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    token_label: TokenLabelConfig = field(default_factory=TokenLabelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        _require(
            self.eval.weights != "ema" or self.ema.enabled,
            "eval.weights is 'ema', but ema.enabled is false. Set ema.enabled to true or eval.weights to raw",
        )
        if self.token_label.root is not None and self.token_label.geometry != "aligned":
            _require(
                self.augment.order == "published" and self.augment.crop == "random_resized",
                f"token_label.geometry {self.token_label.geometry!r} applies flip, RandAugment and random resized "
                "crop to label maps in that order. Set augment.order to published and augment.crop to random_resized, "
                "or token_label.geometry to aligned",
            )
        _require(
            self.schedule.min_lr <= self.optim.lr,
            f"schedule.min_lr ({self.schedule.min_lr:g}) is above optim.lr ({self.optim.lr:g}), so the learning rate "
            "would rise. Lower schedule.min_lr",
        )
        dense = self.model.return_dense is not False and self.model.return_mean is not True
        _require(
            dense or self.loss.dense_weight == 0,
            "the network has no token head (model.return_dense or model.return_mean), so there is no token "
            "loss. Set loss.dense_weight to 0",
        )
        _require(
            dense or not self.mix.mix_token,
            "MixToken needs the token head, which model.return_dense or model.return_mean removes. Set mix.mix_token "
            "to false",
        )


@dataclass(frozen=True)
class ValidationOptions:
    """What validate.py evaluates, beside the options of the recipe.

    Args:
        checkpoint: Weights to evaluate: published, timm's or our own file.
        weights: Which weights of the file; auto: those that chose the best checkpoint in our files, raw in others.
        real: Count ImageNet-ReaL labels in the same pass; the files need their official names.
        v2: Folders of ImageNet-V2 variants, evaluated as well.
        random_weights: Evaluate an untrained network instead (to try out the data).
        output: Folder for results.json and results.csv; by default that of the checkpoint.
    """

    checkpoint: str | None = None
    weights: Literal["auto", "raw", "ema"] = "auto"
    real: bool = False
    v2: tuple[str, ...] = ()
    random_weights: bool = False
    output: str | None = None
