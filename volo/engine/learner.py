"""One optimizer step: the network with everything that changes its weights.

B images of one pass, C classes. Every pass of a step is a chunk of the global batch; chunk k = pass * processes +
rank, and everything drawn for it is keyed by (seed, epoch, step, k), so that one process with two passes draws what
two processes with one pass draw.
"""

import logging
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from volo.config import Config
from volo.data.dataset import Batch
from volo.data.mixing import apply_mix, draw_mix, draw_mix_token_box, soft_targets
from volo.data.normalise import normalise_and_erase
from volo.engine.batch_layout import BatchLayout
from volo.engine.optim import create_ema, create_optimizer, load_optimizer_state, set_learning_rate
from volo.losses import LossTerms, TokenLabelLoss
from volo.models.memory import choose_recompute
from volo.models.volo import VOLO
from volo.runtime import distributed
from volo.runtime.compiling import compile_in_place, compile_problem
from volo.runtime.distributed import World
from volo.runtime.memory_format import wants_channels_last
from volo.runtime.precision import Precision, apex_initialise, require_apex_amp
from volo.runtime.rng import generator, torch_seed
from volo.token_labels.aligned import AlignedMaps
from volo.token_labels.published import PublishedMaps
from volo.token_labels.targets import ClassTargets, Targets

_logger = logging.getLogger("volo")


class Inputs(NamedTuple):
    """What one pass feeds to network and loss, on the device.

    Args:
        images: [B, 3, H, W], normalised, erased and mixed.
        targets: The targets of the loss.
        mix_box: MixToken's box on the final token grid (top, left, bottom, right), int [4], or None.
    """

    images: Tensor
    targets: Targets
    mix_box: Tensor | None


class Learner:
    """Network, loss, optimizer, gradient scaler and weight average of one process."""

    def __init__(self, config: Config, world: World, layout: BatchLayout, model: VOLO, state: dict | None = None):
        """Build what trains ``model``.

        Args:
            config: The options.
            world: This process.
            layout: How the batch is spread over processes and passes.
            model: The network on its device, the same on all ranks (volo.build.make_network).
            state: The checkpoint to resume from, whose weights ``model`` already has; or None.
        """
        self.config, self.world, self.layout = config, world, layout
        self.precision = Precision.resolve(config.train.precision, world.device)
        self.precision.set_up()
        self.channels_last = wants_channels_last(config.train.channels_last, world.device)
        self.model = model
        self.kernel = self.model.set_kernel(config.train.kernel, self.precision.dtype)
        self.recompute = self._set_recompute()
        self.grid = self.model.grid_size
        labels = config.token_label
        self.loss = TokenLabelLoss(
            config.loss.dense_weight,
            config.loss.cls_weight,
            # Without label maps the class target is the image's own label already.
            ground_truth=labels.root is not None and labels.ground_truth != "off",
            corrected_ratio=labels.ground_truth == "corrected",
        )
        self.optimizer = create_optimizer(self.model, config.optim)
        self.scaler = self.precision.scaler()
        if self.precision.name == "apex_o1":
            self.model, self.optimizer = apex_initialise(self.model, self.optimizer)
        self.loss_terms = self.loss.terms
        problem = compile_problem(world.device.type) if config.train.compile else None
        self.compiles = config.train.compile and problem is None
        if self.compiles:
            compile_in_place(self.model)
            # dynamic: with pooled label maps, a token lists more or fewer classes from batch to batch.
            self.loss_terms = torch.compile(self.loss.terms, dynamic=True)
        elif config.train.compile:
            _logger.warning("train.compile is true, but nothing is compiled: %s", problem)
        self.wrapped = self._distribute(self.model)
        # Only once every rank has rank 0's weights: earlier, the ranks would average different ones.
        self.ema = create_ema(self.model, config.ema)
        if self.compiles and self.ema is not None:
            compile_in_place(self.ema.module)  # for its evaluation
        if state is not None:
            load_optimizer_state(self.optimizer, state["optimizer"])
            if state["scaler"]:  # empty if the run had none so far
                self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["state_dict_ema"])

    def _set_recompute(self) -> str:
        """Set what the backward pass recomputes; return a sentence that says what was chosen and why."""
        choice, device = self.config.train.recompute, self.world.device
        if choice == "auto" and device.type != "cuda":  # whose memory is shared, and whose recomputing costs little
            choice = "cheap"
        if choice != "auto":
            self.model.set_recompute(choice)
            return choice
        room = torch.cuda.get_device_properties(device).total_memory
        images = (self.layout.micro_size, 3, *self.config.model.image_hw)
        choice, needed = choose_recompute(self.model, images, device, self.precision.autocast, room)
        return f"{choice}: a step needs about {needed / 1e9:.1f} of {room / 1e9:.1f} GB"

    def _distribute(self, model: nn.Module) -> nn.Module:
        if self.world.size == 1:
            return model
        if self.config.train.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
        # Before each step rank 0's BatchNorm statistics go to every rank, so that a run resumed from its checkpoint
        # is the same run.
        on_cpu = self.world.device.type == "cpu"
        devices = None if on_cpu else [self.world.device.index]
        # Every step uses the same parameters; but in a static graph the first pass must exchange gradients.
        static = self.layout.micro_batches == 1 and not self.compiles
        wrapped = DistributedDataParallel(model, devices, gradient_as_bucket_view=True, static_graph=static)
        if on_cpu:
            wrapped.register_comm_hook(None, distributed.average_in_rank_order)
        return wrapped

    def forward_backward(self, batch: Batch, epoch: int, step: int, micro: int) -> LossTerms:
        """Add the gradients of pass ``micro`` (from 0) of a step; return its loss terms, on the device."""
        images, targets, mix_box = self.inputs(batch, epoch, step, micro)
        last = micro == self.layout.micro_batches - 1
        position = (epoch, step, micro * self.world.size + self.world.rank)
        torch.manual_seed(torch_seed(self.config.train.seed, "forward", *position))  # dropout and drop path
        wrapped = self.wrapped
        # Gradients travel between processes once per step, in the last pass.
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
            with self.precision.autocast():
                output = wrapped(images, mix_box)
            terms = self.loss_terms(output, targets, mix_box)
            self._backward(terms.total / self.layout.micro_batches)
        return terms

    def inputs(self, batch: Batch, epoch: int, step: int, micro: int) -> Inputs:
        """Return the inputs of pass ``micro`` of a step; every draw is keyed by its position."""
        config, device = self.config, self.world.device
        images, labels = normalise_and_erase(
            batch, device, config.augment.mean, config.augment.std, channels_last=self.channels_last
        )  # [B, 3, H, W], [B]
        targets = self._targets(batch, labels)
        rng = generator(config.train.seed, "mix", epoch, step, micro * self.world.size + self.world.rank)
        mix = draw_mix(rng, config.mix, len(images), (images.shape[-2], images.shape[-1]), epoch)
        if mix is not None:
            images, targets = apply_mix(images, mix), targets.mixed(mix, self.grid, config.model.image_hw)
        mix_box = None
        if config.mix.mix_token:
            mix_box = torch.tensor(draw_mix_token_box(rng, self.grid)).to(device, non_blocking=True)
        return Inputs(images, targets, mix_box)

    def _targets(self, batch: Batch, labels: Tensor) -> Targets:
        """Return the targets of a batch: of every token if there are label maps, else of the image alone."""
        config = self.config
        truth = soft_targets(labels, config.model.num_classes, config.loss.smoothing)  # [B, C]
        if batch.sidecar is None:
            return ClassTargets(truth)
        maps = batch.sidecar.map(lambda tensor: tensor.to(self.world.device, non_blocking=True))
        maps = cast(AlignedMaps | PublishedMaps, maps)  # the sidecars of token_labels
        return maps.targets(truth, self.grid, config.loss.smoothing, config.token_label.smoothing == "published")

    def _backward(self, loss: Tensor) -> None:
        if self.precision.name == "apex_o1":
            with require_apex_amp().scale_loss(loss, self.optimizer) as scaled:
                scaled.backward()
        else:
            self.scaler.scale(loss).backward()

    def optimizer_step(self, lr: float, global_step: int) -> Tensor:
        """Clip, step the optimizer at ``lr``, then update the average; return the gradient norm before clipping."""
        config = self.config.optim
        set_learning_rate(self.optimizer, lr)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.clip_grad > 0 and config.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, norm)  # the norm is known already
        elif config.clip_grad > 0:
            dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=global_step if self.config.ema.warmup else None)
        return norm

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps of the learner."""
        state = {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        return state
