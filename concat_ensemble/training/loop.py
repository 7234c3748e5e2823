"""The training loop of all scripts. It continues a run that was killed, saves before it is terminated, and stops at a
loss that is not finite.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Generic, TypeVar

import schedulefree
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from concat_ensemble.errors import first_line
from concat_ensemble.files import give_usual_access, write_json
from concat_ensemble.training.batches import Batch, Position
from concat_ensemble.training.best import BestWeights
from concat_ensemble.training.evaluation import Evaluation
from concat_ensemble.training.logbook import Logbook
from concat_ensemble.training.recipe import SCHEDULE_FREE, Settings
from concat_ensemble.training.saving import STATE_FILE, matches_identity, read_state

CHECK_EVERY = 10  # steps; reading a loss waits for the device
STATISTICS_BATCHES = 50  # for BatchNorm under averaged weights

Network = TypeVar("Network", bound=nn.Module)
# (first step, device, position of a stream) -> parts of batches without end
Batches = Callable[[int, torch.device, "Position | None"], Iterator[Batch]]
# (network, images, labels) -> scalar loss of a part of a batch
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def create_accelerator(settings: Settings, cpu: bool) -> Accelerator:
    """Create a new accelerator; each training gets its own, so that it keeps no state of the one before."""
    return Accelerator(
        cpu=cpu,
        mixed_precision=settings.mixed_precision,
        dynamo_backend="inductor" if settings.compile else "no",
        log_with=settings.log_with,
        project_dir=settings.output if settings.log_with else None,
        step_scheduler_with_optimizer=False,
    )


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
        param_groups: Callable[[Network], list[dict]] | None = None,
    ):
        self.accelerator, self.settings, self.steps = accelerator, settings, steps
        self.folder, self.identity, self.name = folder, identity, name
        self.logbook = Logbook(accelerator, settings, files=logs, name=name, steps=steps, count=len(networks))
        self.best = BestWeights(accelerator, folder / "best", settings.save_best, len(networks))
        checkpoint = self._last_checkpoint()
        length = (steps - round(settings.warmup * steps)) // cycles
        warmup = steps - cycles * length  # with the remainder of the division
        self.cycle_ends = [warmup + (k + 1) * length for k in range(cycles)]
        self.networks: list[Any] = []  # as accelerate wraps them
        self.optimizers: list[Any] = []
        self._schedules: list[Any] = []
        self._averages: list[ModelEmaV3] = []
        for network in networks:
            if settings.gradient_checkpointing:
                _checkpoint_gradients(network)
            optimizer = _create_optimizer(network, settings, warmup, param_groups)
            if settings.optimizer != SCHEDULE_FREE:
                self._schedules.append(_create_schedule(optimizer, settings, warmup, length, cycles))
            network = network.to(accelerator.device).to(memory_format=torch.channels_last)
            if settings.ema_decay:
                self._averages.append(ModelEmaV3(network, decay=settings.ema_decay, use_warmup=True))
            wrapped, optimizer = accelerator.prepare(network, optimizer)
            self.networks.append(wrapped)
            self.optimizers.append(optimizer)
        accelerator.register_for_checkpointing(*self._averages)
        self.step, self.seconds = 0, 0.0
        self._position: Position | None = None
        self._unchecked: list[tuple[int, list[int], torch.Tensor]] = []  # step, indices of its images, losses
        if checkpoint is not None:
            accelerator.load_state(str(checkpoint))
            state = read_state(checkpoint)
            self.step, self.seconds = state.step, state.seconds
            self.logbook.load_state_dict({"since": state.seconds} | state.log)
            self.best.load_state_dict(state.best)
            position = self._position_file(checkpoint)
            self._position = json.loads(position.read_text()) if position.is_file() else None
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
        with _record_signals() as signals, self.logbook.open(self.step) as bar:
            self._train_mode(True)
            while self.step < self.steps:
                rate = max(group["lr"] for group in self.optimizers[0].param_groups)  # layers may have lower ones
                self._update(list(itertools.islice(parts, self.settings.gradient_accumulation)), loss)
                bar.update()
                self.seconds = time.perf_counter() - started
                is_last = self.step == self.steps
                terminates = self._any_process(bool(signals)) and not is_last
                saves = terminates or (self._is_due(self.settings.checkpoint_every) and not is_last)
                evaluates = bool(evaluate and interval) and (is_last or self._is_due(interval))
                logs = evaluates or self.logbook.is_due(self.step)
                if saves or is_last or logs or self._is_due(CHECK_EVERY):
                    self._check_losses()
                if logs:
                    self.logbook.record(self.step, self.seconds, rate)
                    self.logbook.write(self.step, *(self._evaluate(evaluate) if evaluate and evaluates else ()))
                if saves:
                    self._save()
                if terminates:
                    self._terminate(signals)
                if is_last or self.step in stops:
                    yield self.step
                    if not is_last:  # at the end the networks stay as they were saved
                        self._train_mode(True)

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
        plain = [self.accelerator.unwrap_model(network, keep_torch_compile=False) for network in self.networks]
        if self._averages:
            return [average.module for average in self._averages]
        if self.settings.optimizer == SCHEDULE_FREE:
            for k, network in enumerate(plain):
                update_bn((part.views[k][0] for part in itertools.islice(self._read(), STATISTICS_BATCHES)), network)
                network.eval()
        return plain

    def finish(self) -> None:
        """Delete the checkpoints. Call it when the networks are saved."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.log_with:
            self.accelerator.end_training()
        if self.accelerator.is_main_process:
            for folder in (*self._checkpoints(), self.folder / ".aside", self.best.folder):
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it is not there, or holds something of a user
                self.folder.rmdir()

    def _update(self, parts: list[Batch], loss: Loss) -> None:
        """One step of each network, its schedule and its moving average."""
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
        for network, optimizer in zip(self.networks, self.optimizers, strict=True):
            if self.settings.clip_norm is not None:
                self.accelerator.clip_grad_norm_(network.parameters(), self.settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        for schedule in self._schedules:
            schedule.step_update(self.step)
        for average, network in zip(self._averages, self.networks, strict=bool(self._averages)):
            average.update(self.accelerator.unwrap_model(network), step=self.step)
        self._position = parts[-1].position
        self._unchecked.append((self.step, [index for part in parts for index in part.indices], total))

    def _read(self) -> Iterator[Batch]:
        """Parts of batches from the present step on."""
        return self._batches(self.step, self.accelerator.device, self._position)

    def _train_mode(self, training: bool) -> None:
        for network, optimizer in zip(self.networks, self.optimizers, strict=True):
            network.train(training)
            optimizer.train() if training else optimizer.eval()  # a schedule-free optimizer swaps the weights

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0

    def _any_process(self, signaled: bool) -> bool:
        """Whether any process got a signal. Several processes compare every `CHECK_EVERY` steps."""
        if self.accelerator.num_processes == 1:
            return signaled
        if not self._is_due(CHECK_EVERY):
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(signaled), device=self.accelerator.device)))

    def _check_losses(self) -> None:
        """Check the losses since the last call, and give the logbook their means over the processes.

        Raises:
            ValueError: naming the step and the images of a loss that is not finite.
        """
        if not self._unchecked:
            return
        losses = torch.stack([losses for *_, losses in self._unchecked])
        values = losses.cpu()
        bad = torch.nonzero(~torch.isfinite(values)).tolist()
        if bad:
            row, k = bad[0]
            step, indices, _ = self._unchecked[row]
            raise ValueError(
                f"{self.name}: the loss of network {k} is {values[row, k]:g} at step {step}, images "
                f"{', '.join(map(str, indices))}; lower learning_rate={self.settings.learning_rate:g}, or set "
                "clip_norm. The checkpoints before it are intact."
            )
        images = losses.new_tensor(float(sum(len(indices) for _, indices, _ in self._unchecked)))
        means, images = self.accelerator.reduce((losses, images), "mean")  # pyright: ignore
        self.logbook.add(means.tolist(), images.item() * self.accelerator.num_processes)
        self._unchecked = []

    def _evaluate(self, evaluate: Callable[[nn.Module], Evaluation]) -> tuple[list[Evaluation], float]:
        """Evaluations of the networks, and how many seconds they took."""
        started, networks = time.perf_counter(), self._current_networks()
        evaluations = [evaluate(network) for network in networks]
        self.best.update(self.step, networks, evaluations)
        self._train_mode(True)
        return evaluations, time.perf_counter() - started

    def _terminate(self, signals: list[int]) -> None:
        sender = signal.Signals(signals[0]).name if signals else "another process"
        reason = f"ended by {sender} after step {self.step:,}, which is saved; the same command continues"
        self.logbook.print(f"{self.name}: {reason}.")
        raise SystemExit(128 + (signals[0] if signals else signal.SIGTERM))

    def _save(self) -> None:
        """Write a checkpoint aside and rename it, then delete old ones."""
        self._train_mode(True)
        folder, aside = self.folder / f"step-{self.step:08d}", self.folder / ".aside"
        is_main, wait = self.accelerator.is_main_process, self.accelerator.wait_for_everyone
        if folder.is_dir():
            return
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
        wait()
        try:
            self.accelerator.save_state(str(aside))
            if self._position is not None:
                write_json(self._position_file(aside), self._position)
            if is_main:
                state = {"step": self.step, "seconds": self.seconds, "identity": self.identity}
                state |= {"log": self.logbook.state_dict(), "best": self.best.state_dict()}
                write_json(aside / STATE_FILE, state)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError when a disk is full
            if is_main:
                shutil.rmtree(aside, ignore_errors=True)
            last = self._last_checkpoint()
            rest = f"{last.name} is there and intact." if last else "none was written before it."
            raise OSError(f"cannot write a checkpoint into {self.folder}: {first_line(error)}; {rest}") from error
        wait()
        if is_main:
            give_usual_access(aside)
            aside.rename(folder)
            for older in self._checkpoints()[: -self.settings.keep_checkpoints]:
                shutil.rmtree(older)
            self.best.delete_others()
        wait()

    def _position_file(self, checkpoint: Path) -> Path:
        """Where this process keeps the position of its stream."""
        return checkpoint / f"stream-{self.accelerator.process_index}.json"

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _last_checkpoint(self) -> Path | None:
        checkpoints = self._checkpoints()
        return checkpoints[-1] if checkpoints and matches_identity(checkpoints[-1], self.identity) else None


@contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Record SIGTERM and SIGINT in the list instead of exiting at once. A second Ctrl-C exits at once."""
    signals: list[int] = []

    def record(number, _frame):
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(number)

    handlers = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _checkpoint_gradients(network: Any) -> None:
    """The method has one name in transformers and another in timm."""
    (getattr(network, "gradient_checkpointing_enable", None) or network.set_grad_checkpointing)()


def _create_optimizer(
    network: nn.Module, settings: Settings, warmup: int, param_groups: Callable[..., list[dict]] | None
) -> Optimizer:
    betas: dict[str, Any] = {} if settings.betas is None else {"betas": tuple(settings.betas)}
    if settings.optimizer == SCHEDULE_FREE:
        groups = (param_groups or partial(param_groups_weight_decay, weight_decay=settings.weight_decay))(network)
        groups = [{"lr": settings.learning_rate * group.pop("lr_scale", 1.0)} | group for group in groups]
        return schedulefree.AdamWScheduleFree(groups, lr=settings.learning_rate, warmup_steps=warmup, **betas)
    # One fused call for all tensors, if torch has it, saves a tenth of a small network's step on a CPU.
    kind = get_optimizer_class(settings.optimizer, bind_defaults=False)
    fused: dict[str, Any] = {"fused": True} if "fused" in signature(kind).parameters else {}
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    return create_optimizer_v2(network, settings.optimizer, param_group_fn=param_groups, **rates, **betas, **fused)


def _create_schedule(optimizer: Optimizer, settings: Settings, warmup: int, length: int, cycles: int) -> Any:
    """timm's schedule, by steps: `warmup` steps, then `cycles` of `length` steps each."""
    steps = {"num_epochs": length, "warmup_epochs": warmup, "step_on_epochs": False, "updates_per_epoch": 1}
    steps |= {"warmup_lr": settings.learning_rate / max(warmup, 1), "warmup_prefix": True}
    return create_scheduler_v2(optimizer, settings.schedule, cycle_limit=cycles, cycle_decay=1.0, **steps)[0]
