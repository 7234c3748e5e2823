"""The training loop of all scripts. It continues a run that was killed, saves before it is terminated, and stops at a
loss that is not finite.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import update_bn

from concat_ensemble.training.batches import Batch, Position
from concat_ensemble.training.best import BestWeights
from concat_ensemble.training.checkpoints import Checkpoints
from concat_ensemble.training.evaluation import Evaluation
from concat_ensemble.training.exchange import Exchange
from concat_ensemble.training.launcher import check_launcher
from concat_ensemble.training.logbook import Logbook
from concat_ensemble.training.optimizers import ParameterGroups, count_warmup_steps, create_optimizer, create_schedule
from concat_ensemble.training.recipe import SCHEDULE_FREE, Settings
from concat_ensemble.training.signals import Signals

CHECK_EVERY = 10  # steps; reading a loss waits for the device
STATISTICS_BATCHES = 50  # for BatchNorm under averaged weights

Network = TypeVar("Network", bound=nn.Module)
# (first step, device, position of a stream) -> parts of batches without end
Batches = Callable[[int, torch.device, "Position | None"], Iterator[Batch]]
# (network, images, labels) -> scalar loss of a part of a batch
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def create_accelerator(settings: Settings, cpu: bool) -> Accelerator:
    """Create a new accelerator; each training gets its own, so that it keeps no state of the one before.

    Raises:
        ValueError: if the launcher was asked for something else than the settings, or if the device lacks what a
            setting needs.
    """
    check_launcher(settings)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=settings.mixed_precision,
        dynamo_backend="inductor" if settings.compile else "no",
        log_with=settings.log_with,
        project_dir=settings.output if settings.log_with else None,
        step_scheduler_with_optimizer=False,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop weights and adds up the parts
    )
    device = accelerator.device.type
    if device == "cpu" and settings.mixed_precision == "fp16":  # accelerate would train in float32
        raise ValueError("mixed_precision=fp16 needs a GPU; use bf16 or no.")
    if device == "cpu" and settings.sync_bn:
        raise ValueError("sync_bn=True needs GPUs; use dist_bn=reduce, which averages the statistics for evaluation.")
    return accelerator


class Loop(Generic[Network]):
    """Training of several networks in step: on the same images, each with its own augmentation and optimizer.

    Args:
        steps: Updates of each network.
        folder: Where to keep checkpoints; `finish` deletes it.
        identity: Plain JSON values that a checkpoint must have been saved with to be continued.
        logs: The CSV file in which each network's training is logged, named like the network; none when left out.
        cycles: Number of learning-rate cycles. The last one ends with the last step.
        param_groups: Makes the optimizer's parameter groups of a network; timm's own when left out.

    Raises:
        ValueError: if the folder holds checkpoints of another training.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        networks: Sequence[Network],
        *,
        steps: int,
        folder: Path,
        identity: dict,
        name: str,
        logs: Sequence[Path] = (),
        cycles: int = 1,
        param_groups: ParameterGroups | None = None,
    ):
        self.accelerator, self.settings, self.steps = accelerator, settings, steps
        self.identity, self.name = identity, name
        self.logbook = Logbook(accelerator, settings, files=logs, name=name, steps=steps, count=len(networks))
        self.best = BestWeights(accelerator, folder / "best", settings.save_best, len(networks))
        self._checkpoints = Checkpoints(folder, accelerator, settings, identity)
        length = (steps - count_warmup_steps(settings, steps)) // cycles
        warmup = steps - cycles * length  # with the remainder of the division
        self.cycle_ends = [warmup + (k + 1) * length for k in range(cycles)]
        self.networks: list[Any] = []  # as accelerate wraps them
        self.optimizers: list[Any] = []
        self._schedules: list[Any] = []
        self._averages: list[ModelEmaV3] = []
        for network in networks:
            if settings.gradient_checkpointing:
                _checkpoint_gradients(network)
            optimizer = create_optimizer(network, settings, warmup, param_groups)
            if settings.optimizer != SCHEDULE_FREE:
                self._schedules.append(create_schedule(optimizer, settings, warmup, length, cycles))
            if settings.sync_bn and accelerator.num_processes > 1:
                network = convert_sync_batchnorm(network)
            network = network.to(accelerator.device).to(memory_format=torch.channels_last)
            if settings.ema_decay:
                self._averages.append(ModelEmaV3(network, decay=settings.ema_decay, use_warmup=True))
            wrapped, optimizer = accelerator.prepare(network, optimizer)
            self.networks.append(wrapped)
            self.optimizers.append(optimizer)
        accelerator.register_for_checkpointing(*self._averages)
        self._exchange = Exchange(accelerator, self._plain(), averages_statistics=settings.dist_bn == "reduce")
        self._signals = Signals()
        self.step, self.seconds = 0, 0.0
        self._position: Position | None = None
        # Step, indices of its images, losses of this process and their means over all.
        self._unchecked: list[tuple[int, list[int], torch.Tensor, torch.Tensor]] = []
        if loaded := self._checkpoints.load():
            state, self._position = loaded
            self.step, self.seconds = state.step, state.seconds
            self.logbook.load_state_dict({"since": state.seconds} | state.log)
            self.best.load_state_dict(state.best)
            for schedule in self._schedules:
                schedule.step_update(self.step)

    def run(
        self,
        batches: Batches,
        loss: Loss,
        *,
        stops: Sequence[int] = (),
        evaluate: Callable[[nn.Module], Evaluation] | None = None,
    ) -> Iterator[int]:
        """Train to the end. Yield each step in `stops` and the last step, when it is reached. `batches` gives parts of
        batches without end from a step on; `evaluate`, every `evaluate_every` steps, the evaluation of a network.

        Raises:
            ValueError: naming the step and the images, if a loss is not finite.
            OSError: if a checkpoint cannot be written; the one before it is intact.
            SystemExit: after SIGTERM or SIGINT, when the state is saved.
        """
        self._batches = batches
        parts, started = self._read(), time.perf_counter() - self.seconds
        interval = self.settings.evaluate_every
        bar = self.logbook.open(self.step)
        self._signals.start()
        try:
            self._train_mode(True)
            while self.step < self.steps:
                rate = max(group["lr"] for group in self.optimizers[0].param_groups)  # layers may have lower ones
                ends = self._update(list(itertools.islice(parts, self.settings.gradient_accumulation)), loss)
                bar.update()
                self.seconds = time.perf_counter() - started
                is_last = self.step == self.steps
                terminates = ends and not is_last
                saves = terminates or (self._is_due(self.settings.checkpoint_every) and not is_last)
                evaluates = bool(evaluate and interval) and (is_last or self._is_due(interval))
                logs = evaluates or self.logbook.is_due(self.step)
                if saves or is_last or logs or self._is_due(CHECK_EVERY):
                    self._check_losses()
                if logs:
                    self.logbook.record(self.step, self.seconds, rate)
                    evaluations, pause = self._evaluate(evaluate) if evaluate and evaluates else ([], 0.0)
                    self.logbook.write(self.step, evaluations, pause)
                if saves:
                    self._train_mode(True)
                    state = {"seconds": self.seconds, "log": self.logbook.state_dict(), "best": self.best.state_dict()}
                    self._checkpoints.save(self.step, self._position, state)
                    self.best.delete_others()
                if terminates:
                    self._terminate(f"step {self.step:,}, which is saved")
                if is_last or self.step in stops:
                    yield self.step
                    if not is_last:  # at the end the networks stay as they were saved
                        self._train_mode(True)
        except BaseException:
            self._signals.stop()
            raise
        finally:
            bar.close()

    def networks_to_save(self) -> list[Network]:
        """The networks in evaluation mode, as they are to be saved: at the end with `save_best`, those of their best
        evaluation, else those of now.
        """
        networks = self._current_networks()
        if self.step == self.steps:
            self.best.load_into(networks)
        return networks

    def _current_networks(self) -> list[Network]:
        """The networks in evaluation mode as they are now: the moving averages of their weights if there are any, and
        with a schedule-free optimizer its averaged weights, under which BatchNorm's statistics are computed again
        (Defazio et al. 2024, section on BatchNorm).
        """
        self._train_mode(False)
        plain = self._plain()
        if self._averages:
            return [average.module for average in self._averages]
        if self.settings.optimizer == SCHEDULE_FREE:
            for k, network in enumerate(plain):
                update_bn((part.views[k][0] for part in itertools.islice(self._read(), STATISTICS_BATCHES)), network)
                network.eval()
            self._exchange.average_statistics()
        return plain

    def finish(self) -> None:
        """Delete the checkpoints. Call it when the networks are saved.

        Raises:
            SystemExit: if a signal came after the last step.
        """
        if self.accelerator.log_with:
            self.accelerator.end_training()
        self._checkpoints.delete(self.best.folder)
        self._signals.stop()
        if self._exchange.ends(bool(self._signals)):
            self._terminate("the last step; the networks are saved")

    def _update(self, parts: list[Batch], loss: Loss) -> bool:
        """One step of each network, its schedule and its moving average. Return whether the training is to end."""
        self.step += 1
        total = torch.zeros(len(self.networks), device=self.accelerator.device)
        for number, part in enumerate(parts):
            synchronizes = number == len(parts) - 1  # processes average their gradients with the last part only
            for k, network in enumerate(self.networks):
                images, labels = part.views[k]
                with nullcontext() if synchronizes else self.accelerator.no_sync(network):
                    value = loss(network, images, labels) * part.share
                    self.accelerator.backward(value)
                total[k] += value.detach()
        self._step_optimizers()
        for schedule in self._schedules:
            schedule.step_update(self.step)
        means, ends = self._exchange(total, bool(self._signals))
        for average, network in zip(self._averages, self._plain() if self._averages else [], strict=True):
            average.update(network, step=self.step)
        self._position = parts[-1].position
        self._unchecked.append((self.step, [index for part in parts for index in part.indices], total, means))
        return ends

    def _step_optimizers(self) -> None:
        """Step all optimizers. In fp16 they share one scale, which changes only when all have stepped; accelerate's
        optimizers would each change it, and its clipping unscale the gradients of all for each."""
        scaler, clip = self.accelerator.scaler, self.accelerator.clip_grad_norm_
        if scaler is not None:
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer.optimizer)
            clip = nn.utils.clip_grad_norm_
        if self.settings.clip_norm is not None:
            for network in self.networks:
                clip(network.parameters(), self.settings.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer.optimizer)
            optimizer.zero_grad()
        if scaler is not None:
            scaler.update()

    def _plain(self) -> list[Any]:
        """The networks as they were before accelerate wrapped them."""
        return [self.accelerator.unwrap_model(network, keep_torch_compile=False) for network in self.networks]

    def _read(self) -> Iterator[Batch]:
        """Parts of batches from the present step on."""
        return self._batches(self.step, self.accelerator.device, self._position)

    def _train_mode(self, training: bool) -> None:
        for network, optimizer in zip(self.networks, self.optimizers, strict=True):
            network.train(training)
            optimizer.train() if training else optimizer.eval()  # a schedule-free optimizer swaps the weights

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0

    def _check_losses(self) -> None:
        """Check the losses since the last call, and give the logbook their means over the processes.

        Raises:
            ValueError: naming the step and the images of a loss that is not finite.
        """
        if not self._unchecked:
            return
        values, means = (torch.stack(each).cpu() for each in list(zip(*self._unchecked, strict=True))[2:])
        bad = torch.nonzero(~torch.isfinite(values)).tolist()
        if bad:
            row, k = bad[0]
            step, indices, *_ = self._unchecked[row]
            raise ValueError(
                f"{self.name}: the loss of network {k} is {values[row, k]:g} at step {step}, images "
                f"{', '.join(map(str, indices))}; lower learning_rate={self.settings.learning_rate:g}, or set "
                "clip_norm. The checkpoints before it are intact."
            )
        images = sum(len(indices) for _, indices, *_ in self._unchecked)
        self.logbook.add(means.tolist(), images * self.accelerator.num_processes)
        self._unchecked = []

    def _evaluate(self, evaluate: Callable[[nn.Module], Evaluation]) -> tuple[list[Evaluation], float]:
        """Evaluations of the networks, and how many seconds they took."""
        started, networks = time.perf_counter(), self._current_networks()
        evaluations = [evaluate(network) for network in networks]
        self.best.update(self.step, networks, evaluations)
        self._train_mode(True)
        return evaluations, time.perf_counter() - started

    def _terminate(self, when: str) -> None:
        received = self._signals.received
        sender = signal.Signals(received[0]).name if received else "another process"
        self.logbook.print(f"{self.name}: ended by {sender} after {when}; the same command continues.")
        raise SystemExit(128 + (received[0] if received else signal.SIGTERM))


def _checkpoint_gradients(network: Any) -> None:
    """The method has one name in transformers and another in timm."""
    (getattr(network, "gradient_checkpointing_enable", None) or network.set_grad_checkpointing)()
