"""The training loop: steps, epochs, and all of a run's state that a checkpoint must hold."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resnest_fused.training import checkpoints, parallel, randomness
from resnest_fused.training.augmentation import (
    evaluation_transform,
    make_loss,
    make_mixing,
    mix_seeds,
    training_transform,
)
from resnest_fused.training.config import Config, ConfigError
from resnest_fused.training.datasets import Data, describe, find_difference
from resnest_fused.training.distributed import World
from resnest_fused.training.errors import NotFinite
from resnest_fused.training.evaluation import evaluate
from resnest_fused.training.groups import parameter_groups
from resnest_fused.training.loading import evaluation_batches, training_batches
from resnest_fused.training.network import build_network, evaluation_size
from resnest_fused.training.reporting import Reporter
from resnest_fused.training.schedule import lr_factor, make_scheduler, peak_lr
from resnest_fused.training.stopping import StopRequest, held_back

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """All that a run consists of, between two steps.

    Args:
        config: the options.
        data: what to learn from.
        world: this process among all.

    Attributes:
        step, epoch: optimiser's steps that are done, and epochs with their evaluation.
        best: the best top1 of these epochs, in percent; -1 before the first.
        total: steps of the whole run.

    Raises:
        ConfigError: an option, or the weights to start from, do not fit.
    """

    def __init__(self, config: Config, data: Data, world: World) -> None:
        self.config = config
        self.world = world
        self.data = describe(data)
        self.count = config.classes or len(data.classes)
        if self.count < len(data.classes):
            raise ConfigError(f"classes: the data have {len(data.classes)}, got {self.count}")
        if self.count < 2:
            raise ConfigError("classes: expected 2 or more, got 1")
        self.folder = Path(config.out) / "checkpoints"
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format

        parallel.check(config, world)
        self._make_batches(data)
        self.network = build_network(config, self.count, world.device)
        self.ema: AveragedModel | None = None
        if config.ema:
            average = parallel.averaging(config.ema)
            self.ema = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        # Keeps signals from what torch.compile starts, whenever it meets a new shape or mode.
        self._compiling = held_back if config.compile else contextlib.nullcontext
        self.wrapped = self._wrap()  # which may exchange the parameters for shares of them
        samples = config.batch * config.accumulate * world.size
        self.peak = peak_lr(config.lr, samples)
        groups = parameter_groups(self.network, self.peak, config.weight_decay, config.lr_of)
        self.optimizer = torch.optim.SGD(
            groups, momentum=config.momentum, nesterov=config.momentum > 0
        )
        self.warmup = config.warmup * self.steps_per_epoch
        self.scheduler = make_scheduler(self.optimizer, self.warmup, self.total)
        self.amp = AMP[config.amp]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
        self.mixing = make_mixing(config, self.count)
        self.loss = make_loss(config.smoothing)

        self.step = self.epoch = 0
        self.best = -1.0
        self._new_losses: list[Tensor] = []
        self._row_losses: list[float] = []
        self._epoch_losses: list[float] = []
        self._complaints: dict[str, None] = {}
        self._clock = _Clock()
        randomness.seed_all(mix_seeds(config.seed, world.rank))

    def _make_batches(self, data: Data) -> None:
        config, world = self.config, self.world
        self.batches = training_batches(data.train, training_transform(config), config, world)
        self.steps_per_epoch = len(self.batches) // config.accumulate
        if not self.steps_per_epoch:
            samples = config.batch * config.accumulate * world.size
            raise ConfigError(f"batch: a step takes {samples} samples, more than an epoch has")
        self.total = config.epochs * self.steps_per_epoch
        seen = evaluation_transform(evaluation_size(config), config.eval_ratio)
        self.val_batches = evaluation_batches(data.val, seen, config, world)

    def _wrap(self) -> nn.Module:
        """The network as it is called in training."""
        if self.config.fsdp:
            for network in (self.network, *(() if self.ema is None else (self.ema.module,))):
                parallel.shard(network)
            wrapped: nn.Module = self.network
        else:
            wrapped = parallel.replicate(self.network, self.world)
        if self.config.compile:
            wrapped.compile()
        return wrapped

    # --- state

    def state(self) -> dict[str, Any]:
        """All of the run; in the first process of every process, so all must call it.

        The place in the data follows from ``step``, as the sampler's order from the seed and epoch.
        """
        own = {"random": randomness.get_states(), "complaints": list(self._complaints)}
        return {
            "step": self.step,
            "epoch": self.epoch,
            "best": self.best,
            "model": parallel.whole(self.network.state_dict()),
            "ema": None if self.ema is None else parallel.whole(self.ema.state_dict()),
            "optimizer": parallel.whole(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": {"row": list(self._row_losses), "epoch": list(self._epoch_losses)},
            "ranks": self.world.gather(own),
            "config": dataclasses.asdict(self.config),
            "data": self.data,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Become what the run was when :meth:`state` was called.

        Raises:
            ConfigError: the run had another number of processes, or other data.
        """
        if len(state["ranks"]) != self.world.size:
            raise ConfigError(
                f"out: the run has {len(state['ranks'])} processes, and cannot go on with "
                f"{self.world.size}"
            )
        if difference := find_difference(state["data"], self.data):
            raise ConfigError(f"data: {difference}")
        self.step, self.epoch, self.best = state["step"], state["epoch"], state["best"]
        for module, saved in ((self.network, state["model"]), (self.ema, state["ema"])):
            if module is not None:
                module.load_state_dict(parallel.shares(saved, module.state_dict()))
        self.optimizer.load_state_dict(
            parallel.shares_of_optimizer(state["optimizer"], self.optimizer)
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self._row_losses, self._epoch_losses = state["losses"]["row"], state["losses"]["epoch"]
        own = state["ranks"][self.world.rank]
        self._complaints = dict.fromkeys(own["complaints"])
        randomness.set_states(own["random"])

    def save(self) -> None:
        """Write a checkpoint, once it is known that no loss so far was NaN, and no weight is.

        Raises:
            NotFinite: one was, or is.
            CheckpointError: the file cannot be written.
        """
        self._fetch_losses()
        state = self.state()
        # A gradient may be NaN where the loss was not; the next loss would tell it too late.
        if self.world.any(not all(value.isfinite().all() for value in state["model"].values())):
            raise NotFinite(f"weights are NaN or infinite after step {self.step}")
        if self.world.first:
            checkpoints.write(state, checkpoints.path_of(self.folder, self.step))
            checkpoints.prune(self.folder, self.config.keep)

    # --- time

    def run(self, reporter: Reporter, stop: StopRequest) -> bool:
        """Train to the end, or until a process was asked to stop; then a checkpoint is written.

        Returns:
            Whether the end was reached.

        Raises:
            NotFinite: the loss is NaN or infinite.
            CheckpointError: a checkpoint cannot be written.
        """
        self._clock = _Clock()
        for epoch in range(self.epoch, self.config.epochs):
            began = time.perf_counter()
            done = self.step - epoch * self.steps_per_epoch
            batches: Iterator[Any] = iter(())
            if done < self.steps_per_epoch:
                batches = self.batches.begin(epoch, done * self.config.accumulate)
            for number in range(done, self.steps_per_epoch):
                if self.world.any(stop.made):
                    self.save()
                    return False
                self._take_step(batches)
                self._report_step(reporter, epoch)
                if number + 1 == self.steps_per_epoch or (
                    self.config.save_every and self.step % self.config.save_every == 0
                ):
                    self.save()
            self._finish_epoch(reporter, epoch, began)
        return True

    def _take_step(self, batches: Iterator[Any]) -> None:
        """One step of the optimizer, for one batch or for several whose gradients are averaged."""
        self._set_drop_block()
        count = self.config.accumulate
        losses = []
        for number in range(count):
            pictures, labels = self._next_batch(batches)
            with self._compiling(), parallel.exchanging(self.wrapped, number + 1 == count):
                with torch.autocast(self.world.device.type, self.amp, enabled=self.amp is not None):
                    loss = self.loss(self.wrapped(pictures), labels)
                self.scaler.scale(loss / count).backward()
            losses.append(loss.detach())
        if self.config.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        self._new_losses.append(torch.stack(losses).mean())
        self.step += 1

    def _next_batch(self, batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
        """Pictures and labels, or shares of classes, where the network is."""
        with self._clock.waiting():
            pictures, labels, complaints = next(batches)
        self._note_complaints(complaints)
        if labels.max() >= self.count:
            raise ConfigError(
                f"classes: expected labels below {self.count}, got {int(labels.max())}"
            )
        self._clock.images += len(labels) * self.world.size
        device = self.world.device
        pictures = pictures.to(device, memory_format=self.format, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        return (pictures, labels) if self.mixing is None else self.mixing(pictures, labels)

    def _note_complaints(self, complaints: Iterable[str]) -> None:
        """Keep what is said of pictures that cannot be decoded, and say it once."""
        for complaint in "\n".join(complaints).split("\n"):
            if complaint and complaint not in self._complaints:
                message = f"{complaint}; another picture takes its place"
                print(f"resnest-fused: {message}", file=sys.stderr, flush=True)
                self._complaints[complaint] = None

    def _set_drop_block(self) -> None:
        """DropBlock's rate, from 0 at the first step to the full one at the last."""
        if self.config.drop_block:
            self.network.set_drop_block(self.step / max(self.total - 1, 1))

    def _fetch_losses(self) -> None:
        """Wait for the losses of the last steps, in the mean over the processes.

        Raises:
            NotFinite: one is NaN or infinite.
        """
        if not self._new_losses:
            return
        losses = self.world.mean(torch.stack(self._new_losses)).tolist()
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                epoch = (step - 1) // self.steps_per_epoch + 1
                raise NotFinite(f"the loss is {loss} in step {step}, epoch {epoch}")
        self._row_losses += losses
        self._epoch_losses += losses
        self._new_losses = []

    def _lr(self) -> float:
        """The learning rate of the last step, of parts without a factor of their own."""
        return self.peak * lr_factor(self.step - 1, self.warmup, self.total)

    def _report_step(self, reporter: Reporter, epoch: int) -> None:
        reporter.advance(self.step)
        if self.step % self.config.log_every:
            return
        self._fetch_losses()
        row = {
            "kind": "train",
            "step": self.step,
            "epoch": epoch + 1,
            "loss": sum(self._row_losses) / len(self._row_losses),
            "lr": self._lr(),
            **self._clock.read(),
        }
        self._row_losses = []
        reporter.add(row)

    def _finish_epoch(self, reporter: Reporter, epoch: int, began: float) -> None:
        """Evaluate, unless that was done and told before the run went on from this place."""
        top1 = self.world.of_first(reporter.top1_of(epoch + 1))
        if top1 is None:
            top1 = self._evaluate(reporter, epoch, began)
        self.best = max(self.best, top1)
        self.epoch = epoch + 1
        self._epoch_losses = []
        self._clock = _Clock()

    def _evaluate(self, reporter: Reporter, epoch: int, began: float) -> float:
        """Evaluate, keep the checkpoint if it is the best, report; the top1 in percent."""
        reporter.begin_evaluation()
        network = self.network if self.ema is None else self.ema.module
        self.world.share_buffers(network)
        trained = time.perf_counter() - began
        self._clock.close_row()
        with self._compiling(), parallel.gathered(network):
            scores = evaluate(
                network, self.val_batches, self.count, self.world.device, self.format, self.amp
            )
        self._note_complaints(scores.complaints)
        known = self.world.gather(list(self._complaints))
        complaints = list(dict.fromkeys(name for own in known for name in own))
        row = {
            "kind": "epoch",
            "step": self.step,
            "epoch": epoch + 1,
            "train_loss": sum(self._epoch_losses) / len(self._epoch_losses),
            "val_loss": scores.loss,
            "top1": scores.top1,
            "top5": scores.top5,
            "calibration_error": scores.calibration_error,
            "lr": self._lr(),
            "bad_pictures": len(complaints),
            "seconds": time.perf_counter() - began,
            "images_per_s": self._clock.epoch_images / max(trained, 1e-9),
            "data_wait": self._clock.epoch_waited / max(trained, 1e-9),
        }
        if self.world.first and scores.top1 > self.best:
            checkpoints.keep_best(checkpoints.path_of(self.folder, self.step))
        reporter.note_bad_files(complaints)
        reporter.add(row)  # after all else, as a row says that the epoch is finished
        return scores.top1


class _Clock:
    """Pictures, seconds, and seconds of waiting for data, since a row and since the epoch began."""

    def __init__(self) -> None:
        self.images = self.epoch_images = 0
        self.waited = self.epoch_waited = 0.0
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Images per second and the share of waiting since the last call."""
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        found = {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.close_row()
        self.start = now
        return found

    def close_row(self) -> None:
        """Add what was counted for a row to the epoch."""
        self.epoch_images += self.images
        self.epoch_waited += self.waited
        self.images, self.waited = 0, 0.0
