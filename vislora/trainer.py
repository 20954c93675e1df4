"""The one training loop, for every objective, on accelerate.

Which samples a step sees, and how they are augmented, is a function of (seed, step) alone (`vislora.data.order`); all
other random numbers come from torch's generators, which a checkpoint holds. So a run that was stopped anywhere and
resumed takes the same path as one that wasn't, and the number of loader workers changes nothing. The path is the same
to the bit where the same step gives the same bits, as on a CPU; a GPU's attention adds its gradients in no fixed order
unless torch.use_deterministic_algorithms tells it to.

A step's gradient is that of the mean loss over its global batch, whatever the number of processes and accumulated
passes it is divided into.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from vislora.checkpoint import (
    Checkpoint,
    Progress,
    load_checkpoint,
    load_trainable_state,
    read_tensors,
    save_checkpoint,
    trainable_state,
)
from vislora.config.training import Keep, OptimConfig, TrainerConfig
from vislora.data.order import Order
from vislora.ema import Ema, averaged, running_statistics
from vislora.errors import ConfigError, TrainingError
from vislora.files import write_tensors
from vislora.logs import MetricLog
from vislora.models.batchnorm import by_the_batch
from vislora.precision import training_attention

_FLUSH_EVERY = 10  # steps between reads of the loss: each read waits for the GPU


class Objective(Protocol):
    """What the trainer optimises; see `vislora.objectives`."""

    monitor: str  # the validation figure to watch
    higher_is_better: bool  # of that figure
    on_cpu: tuple[str, ...]  # names in a batch whose tensors stay on the CPU, where they are read

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of each sample of a batch on the device, [B]."""

    def validate(self, model: nn.Module, batches: Iterable, accelerator: Accelerator) -> dict[str, float]:
        """Figures over all processes' batches."""


@dataclass
class Trainer:
    """A run: what is trained on what, how, and where it writes.

    Attributes:
        model: with everything that is to be trained requiring a gradient; wrapped and moved to the device by `fit`.
        objective: gives losses and validation figures.
        order: which samples each step sees.
        batches: micro-batches of this process from a step on, as `order.micro_batches` has them.
        validation: batches of this process to validate on, or None.
        head: prefixes of the names of parameters that learn at `optim.head_lr`.
        preview: draws into a file what the model can do so far, each `config.preview_every` steps.
        run: settings that a resumed run must share, as JSON values.
    """

    model: nn.Module
    objective: Objective
    order: Order
    batches: Callable[[int], Iterable]
    validation: Iterable | None
    head: tuple[str, ...]
    optim: OptimConfig
    config: TrainerConfig
    accelerator: Accelerator
    log: MetricLog
    out: Path
    run: dict[str, Any]
    preview: Callable[[Path], None] | None = None

    def fit(self) -> Progress:
        """Train to the end, to `config.stop_at`, or until validation stops improving; leave the parameters to export in
        the model.

        Raises:
            ConfigError: `config.resume` holds no checkpoint, one of another run, or not the parameters that were best.
            TrainingError: the loss, its gradient, or the validation figure is no longer a number.
        """
        began = time.perf_counter()
        epoch, previews = self.order.steps_per_epoch, self.config.preview_every
        steps = self.config.epochs * epoch
        wrapped, optimizer = self.accelerator.prepare(self.model, make_optimizer(self.model, self.head, self.optim))
        base_rates = [group["lr"] for group in optimizer.param_groups]
        ema = Ema(self.model, self.config.ema) if self.config.ema is not None else None
        progress = self._start(optimizer.optimizer, ema)
        end = max(progress.step, min(steps, self.config.stop_at or steps))
        began -= progress.seconds
        batches = iter(self.batches(progress.step))
        bar = tqdm(
            total=end,
            initial=progress.step,
            unit="step",
            disable=not (self.config.progress and self.accelerator.is_main_process),
            dynamic_ncols=True,
        )
        pending = _Pending(self.accelerator)

        def due(every: int) -> bool:
            return progress.step % every == 0 or progress.step == end

        def is_to_validate() -> bool:  # wherever it is to stop
            return progress.step % (self.config.validate_every * epoch) == 0 or progress.step == steps

        self._train_mode(wrapped)
        while progress.step < end and not self._exhausted(progress):
            factor = rate_factor(progress.step, steps, self.optim.warmup)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            size = len(self.order.global_batch(progress.step))
            passes = len(self.order.micro_batches(progress.step))
            loss, norm = self._step(wrapped, optimizer, batches, size, passes)
            progress.step += 1
            if ema is not None:
                ema.update(progress.step)
            pending.add(progress.step, loss, norm, base_rates[0] * factor, size)
            bar.update()
            validation_due = self.validation is not None and is_to_validate()
            checkpoint_due = validation_due or due(self.config.checkpoint_every or epoch)
            preview_due = self.preview is not None and previews is not None and due(previews)
            if len(pending) >= _FLUSH_EVERY or checkpoint_due or preview_due:  # neither is timed
                bar.set_postfix(self._flush(pending), refresh=False)
            if validation_due:
                with averaged(ema):
                    figures = self._validate(wrapped, progress.step)
                    self._keep_if_best(progress, figures[self.objective.monitor])
                bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
                pending.restart_clock()
            if preview_due:
                with averaged(ema):
                    self._draw_preview(wrapped, progress.step)
                pending.restart_clock()
            if checkpoint_due:
                progress.seconds, progress.rows = time.perf_counter() - began, self.log.rows
                save_checkpoint(
                    self.out / "checkpoints", self.model, optimizer.optimizer, ema, progress, self.accelerator, self.run
                )
                pending.restart_clock()
        bar.close()
        if self.validation is not None and not is_to_validate():
            # for what is exported here alone: the checkpoint is that of a run that goes on, and had not looked
            with averaged(ema):
                score = self._validate(wrapped, progress.step)[self.objective.monitor]
            if self._is_better(score, progress.best):
                progress.best, progress.best_step = score, progress.step
        self.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        if ema is not None:
            load_trainable_state(self.model, trainable_state(self.model) | ema.averages)
        self._share_statistics()
        self._restore_best(progress)
        progress.seconds = time.perf_counter() - began
        return progress

    def _start(self, optimizer: torch.optim.Optimizer, ema: Ema | None) -> Progress:
        if self.config.resume is None:
            return Progress()
        checkpoint = Checkpoint.open(Path(self.config.resume))
        checkpoint.check(self.run)
        progress = load_checkpoint(checkpoint, self.model, optimizer, ema, self.accelerator)
        earlier = checkpoint.run_folder
        best = earlier / "checkpoints" / "best.safetensors"
        if self.config.keep is Keep.best and progress.best is not None:
            if not best.is_file():
                raise ConfigError(
                    f"trainer.resume={self.config.resume}: {best} is not there, and trainer.keep=best exports it "
                    "unless better parameters come; resume a whole run folder, or give trainer.keep=last"
                )
            read_tensors(best)  # a damaged one would be found after the last epoch only
        self.log.continue_from(earlier, progress.step, progress.rows)
        if earlier != self.out.resolve():  # whose folder may be deleted
            folder = self.out / "checkpoints"
            save_checkpoint(folder, self.model, optimizer, ema, progress, self.accelerator, self.run)
            if self.accelerator.is_main_process and best.is_file():
                shutil.copyfile(best, folder / best.name)
        return progress

    def _train_mode(self, wrapped: nn.Module) -> None:
        """Train mode, but for BatchNorm layers of a frozen base."""
        wrapped.train()
        learning = {*by_the_batch(self.model).values()}
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in learning:
                module.eval()

    def _step(
        self, wrapped: nn.Module, optimizer: Any, batches: Iterator, size: int, passes: int
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step; this process's share of the mean loss [], and the gradient's norm []."""
        loss_sum = torch.zeros((), device=self.accelerator.device)
        for micro in range(passes):
            last = micro == passes - 1
            device = self.accelerator.device
            batch = send_to_device(next(batches), device, non_blocking=True, skip_keys=self.objective.on_cpu)
            with training_attention(self.accelerator), nullcontext() if last else self.accelerator.no_sync(wrapped):
                # the sum over the micro-batch, over the size of the global batch; processes are averaged, hence `world`
                losses = self.objective.losses(wrapped, batch)
                self.accelerator.backward(losses.sum() * (self.order.world / size))
            loss_sum += losses.detach().sum() / size
        limit = self.optim.clip_norm if self.optim.clip_norm is not None else math.inf
        norm = self.accelerator.clip_grad_norm_([p for p in wrapped.parameters() if p.requires_grad], limit)
        optimizer.step()
        optimizer.zero_grad()
        return loss_sum, norm

    def _flush(self, pending: "_Pending") -> dict[str, Any]:
        rows = pending.take()
        for row in rows:
            _check_number("the loss", row["loss"], row["step"])
            if self.accelerator.scaler is None:  # which leaves such a step out
                _check_number("the gradient's norm", row["grad_norm"], row["step"])
            self.log.write(row["step"], {"epoch": row["step"] / self.order.steps_per_epoch} | row)
        return {"loss": f"{rows[-1]['loss']:.3f}", "images/s": f"{rows[-1]['images_per_s']:.0f}"}

    def _validate(self, wrapped: nn.Module, step: int) -> dict[str, float]:
        wrapped.eval()
        self._share_statistics()
        with training_attention(self.accelerator):
            # not `wrapped`: it would exchange buffers once more, and wait for processes that have no batch to validate
            figures = self.objective.validate(self.model, self.validation, self.accelerator)
        self._train_mode(wrapped)
        self.log.write(step, figures)
        for name, value in figures.items():  # of logits that are NaN a loss tells, and no share of right answers
            _check_number(name, value, step)
        return figures

    def _is_better(self, score: float, best: float | None) -> bool:
        return best is None or (score > best if self.objective.higher_is_better else score < best)

    def _keep_if_best(self, progress: Progress, score: float) -> None:
        if not self._is_better(score, progress.best):
            progress.stale += 1
            return
        progress.best, progress.best_step, progress.stale = score, progress.step, 0
        if self.accelerator.is_main_process:  # with keep=last too: a run that goes on from here may want it
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_tensors(trainable_state(self.model), self.out / "checkpoints" / "best.safetensors")

    def _share_statistics(self) -> None:
        """Give all processes the first one's BatchNorm statistics, which are exported; each has gathered its own."""
        for statistic in running_statistics(self.model).values():
            broadcast(statistic)

    def _draw_preview(self, wrapped: nn.Module, step: int) -> None:
        """By the main process alone, the random numbers of training left as they were."""
        if self.accelerator.is_main_process:
            wrapped.eval()
            device = self.accelerator.device
            forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with forked, torch.no_grad():  # no autocast, in which an autoencoder that overflows in fp16 would
                self.preview(self.out / "previews" / f"step_{step:08d}.png")
            self._train_mode(wrapped)

    def _exhausted(self, progress: Progress) -> bool:
        return self.config.patience is not None and progress.stale >= self.config.patience

    def _restore_best(self, progress: Progress) -> None:
        self.accelerator.wait_for_everyone()
        if self.config.keep is Keep.best and progress.best is not None and progress.best_step != progress.step:
            load_trainable_state(self.model, read_tensors(self.out / "checkpoints" / "best.safetensors"))


def make_optimizer(model: nn.Module, head: tuple[str, ...], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what requires a gradient, in groups by learning rate (head, lora_B, the rest) and weight decay.

    lora_B may learn faster than lora_A: LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354). Decay is for
    matrices; biases, norms, LayerScale and what the model names in `no_weight_decay()` (positional embeddings, tokens)
    have none.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    head_rate = config.lr if config.head_lr is None else config.head_lr
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = head_rate if name.startswith(head) else config.lr
            if name.endswith(".lora_B"):
                rate *= config.b_lr_ratio
            decay = 0.0 if _is_scale(name, p) or name in exempt else config.weight_decay
            groups.setdefault((rate, decay), []).append(p)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
        betas=tuple(config.betas),
        fused=True,  # a hundred small matrices take a fifth of the time of a loop over them
    )


def _is_scale(name: str, p: nn.Parameter) -> bool:
    """Whether a parameter is one number, or one for each channel, also as [C, 1, 1] beside a feature map."""
    if p.dim() < 2:
        return True
    # an adapter of rank 1 in a convolution has a matrix of that shape
    return p.dim() > 2 and p.numel() == max(p.shape) and not name.endswith((".lora_A", ".lora_B"))


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of all steps, then half a cosine to zero
    (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983)."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _check_number(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(f"{name} is {value} at step {step}; lower optim.lr, or use trainer.precision=fp32")


class _Pending:
    """Figures of the steps since the last flush, kept on the device so that no step waits for the one before."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._rows: list[tuple[int, Tensor, Tensor, float, int]] = []
        self.restart_clock()

    def __len__(self) -> int:
        return len(self._rows)

    def restart_clock(self) -> None:
        self._since = time.perf_counter()

    def add(self, step: int, loss: Tensor, norm: Tensor, rate: float, size: int) -> None:
        self._rows.append((step, loss, norm, rate, size))

    def take(self) -> list[dict[str, float]]:
        losses = self._accelerator.reduce(torch.stack([row[1] for row in self._rows]), "sum").tolist()
        speed = sum(row[4] for row in self._rows) / (time.perf_counter() - self._since)
        rows = [
            {"step": step, "loss": loss, "grad_norm": float(norm), "lr": rate, "images_per_s": round(speed, 1)}
            for (step, _, norm, rate, _), loss in zip(self._rows, losses, strict=True)
        ]
        self._rows.clear()
        self.restart_clock()
        return rows
