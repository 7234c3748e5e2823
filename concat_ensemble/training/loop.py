"""The training loop of all scripts: it goes on where it was killed, saves before it is ended, and stops at a loss that is no number."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path

import schedulefree
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from safetensors import SafetensorError
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import update_bn

from concat_ensemble.errors import first_line
from concat_ensemble.training.images import Batch
from concat_ensemble.training.recipe import SCHEDULE_FREE, Settings

TOLD = "training.json"  # beside each checkpoint and each result: what it is of
CHECK_EVERY = 10  # steps: looking at a loss waits for the device
STATISTICS_BATCHES = 50  # for BatchNorm under weights that were averaged, and never trained with

# (network, images, labels) -> loss of a part of a batch, a scalar
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def create_accelerator(settings: Settings, cpu: bool) -> Accelerator:
    """A new one for each training, so that nothing of the one before is left in it."""
    return Accelerator(
        cpu=cpu,
        mixed_precision=settings.mixed_precision,
        dynamo_backend="inductor" if settings.compile else "no",
        log_with=settings.log_with,
        project_dir=settings.output if settings.log_with else None,
        step_scheduler_with_optimizer=False,
    )


class Loop:
    """The training of some networks in step: on the same images, each with its own view of them and its own optimizer.

    Args:
        accelerator: From `create_accelerator`.
        settings: How they are trained.
        networks: Newly made.
        steps: Updates of each network.
        folder: For checkpoints, gone when `finish` is called.
        identity: What a checkpoint must have been made with to be continued, as plain JSON values.
        name: For messages and trackers.
        cycles: Of the learning rate, the last of which ends with the last step.
        param_groups: Of a network's parameters, for the optimizer; timm's own when left out.

    Raises:
        ValueError: when the folder holds checkpoints of another training.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        networks: Sequence[nn.Module],
        *,
        steps: int,
        folder: Path,
        identity: dict,
        name: str,
        cycles: int = 1,
        param_groups: Callable[[nn.Module], list[dict]] | None = None,
    ):
        self.accelerator, self.settings, self.steps, self.folder, self.name = (
            accelerator,
            settings,
            steps,
            folder,
            name,
        )
        self.identity = identity
        last = self._last_checkpoint()
        length = (steps - round(settings.warmup * steps)) // cycles
        warmup = steps - cycles * length  # with what a division leaves over
        self.cycle_ends = [warmup + (k + 1) * length for k in range(cycles)]
        self.networks, self.optimizers, self._schedules, self._averages = [], [], [], []
        for network in networks:
            if settings.gradient_checkpointing:
                (getattr(network, "gradient_checkpointing_enable", None) or network.set_grad_checkpointing)()
            optimizer = _optimizer(network, settings, warmup, param_groups)
            self._schedules.append(_schedule(optimizer, settings, warmup, length, cycles))
            network = network.to(accelerator.device, memory_format=torch.channels_last)
            if settings.ema_decay:
                self._averages.append(ModelEmaV3(network, decay=settings.ema_decay, use_warmup=True))
            network, optimizer = accelerator.prepare(network, optimizer)
            self.networks.append(network)
            self.optimizers.append(optimizer)
        accelerator.register_for_checkpointing(*self._averages)
        self.step, self.seconds = 0, 0.0
        if last is not None:
            accelerator.load_state(last)
            self.step, self.seconds = (read_training_state(last)[key] for key in ("step", "seconds"))
            for schedule in filter(None, self._schedules):
                schedule.step_update(self.step)

    def run(
        self,
        batches: Callable[[int], Iterator[Batch]],
        loss: Loss,
        *,
        stops: Sequence[int] = (),
        evaluate: Callable[[nn.Module], float] | None = None,
    ) -> Iterator[int]:
        """Train to the end, and yield each step of `stops` and the last one as it is reached.

        Args:
            batches: From a step on, parts of batches without end.
            loss: Of a network on a part of a batch.
            evaluate: A network's top-1, asked for every `evaluate_every` steps.

        Raises:
            ValueError: naming the step and the images, when a loss is not finite.
            OSError: when a checkpoint cannot be written; the last one is intact.
            SystemExit: after SIGTERM or SIGINT, when the state is saved.
        """
        self._batches = batches
        parts, started = batches(self.step), time.perf_counter() - self.seconds
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            desc=f"{self.name} ({self.steps} steps)",
            disable=not sys.stderr.isatty(),
        )
        unchecked: list[tuple[int, list[int], torch.Tensor]] = []
        if self.settings.log_with:
            self.accelerator.init_trackers(self.name.replace("/", "-"))
        with _signals() as ended_by, bar:
            self._mode(training=True)
            while self.step < self.steps:
                self.step += 1
                unchecked.append(
                    self._update(list(itertools.islice(parts, self.settings.gradient_accumulation)), loss)
                )
                for schedule in filter(None, self._schedules):
                    schedule.step_update(self.step)
                for average, network in zip(self._averages, self.networks, strict=bool(self._averages)):
                    average.update(self.accelerator.unwrap_model(network), step=self.step)
                bar.update()
                self.seconds = time.perf_counter() - started
                last = self.step == self.steps
                saving = self.step % self.settings.checkpoint_every == 0 and not last
                asked = self._anyone(bool(ended_by))
                if saving or asked or last or self.step % CHECK_EVERY == 0:
                    values = self._finite(unchecked)
                    bar.set_postfix(loss=f"{values.mean():.3f}")
                    self.accelerator.log({"loss": values.mean().item(), "learning_rate": self._rate()}, step=self.step)
                    unchecked = []
                if (
                    evaluate
                    and self.settings.evaluate_every
                    and (last or self.step % self.settings.evaluate_every == 0)
                ):
                    top1 = [evaluate(network) for network in self.kept()]
                    self.accelerator.log({f"top1/{k}": value for k, value in enumerate(top1)}, step=self.step)
                    told = ", ".join(f"{100 * value:.1f}" for value in top1)
                    self.accelerator.print(f"{self.name}, step {self.step:,}: held-out top-1 {told}", flush=True)
                    self._mode(training=True)
                if (saving or asked) and not last:
                    self._save()
                if asked and not last:
                    what = signal.Signals(ended_by[0]).name if ended_by else "another process"
                    self.accelerator.print(
                        f"{self.name}: ended by {what} after step {self.step:,}, which is saved; the same command goes on.",
                        flush=True,
                    )
                    raise SystemExit(128 + (ended_by[0] if ended_by else signal.SIGTERM))
                if last or self.step in stops:
                    yield self.step
                    if not last:  # at the end they stay as they were kept
                        self._mode(training=True)

    def kept(self) -> list[nn.Module]:
        """The networks as they would be kept now, in evaluation mode: their averages where there are any, and for a schedule-free optimizer
        with BatchNorm's statistics under the weights that it averages (Defazio et al. 2024, section on BatchNorm).
        """
        self._mode(training=False)
        plain = [self.accelerator.unwrap_model(network, keep_torch_compile=False) for network in self.networks]
        if self._averages:
            return [average.module for average in self._averages]
        if self.settings.optimizer == SCHEDULE_FREE:
            for number, network in enumerate(plain):
                seen = itertools.islice(self._batches(self.step), STATISTICS_BATCHES)
                update_bn((self._placed(batch.views[number])[0] for batch in seen), network)
                network.eval()
        return plain

    def finish(self) -> None:
        """What was kept is saved elsewhere: the checkpoints go."""
        self.accelerator.wait_for_everyone()
        if self.settings.log_with:
            self.accelerator.end_training()
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _update(self, parts: list[Batch], loss: Loss) -> tuple[int, list[int], torch.Tensor]:
        """One step of each network, and what its losses were."""
        total = torch.zeros(len(self.networks), device=self.accelerator.device)
        for number, part in enumerate(parts):
            apart = number < len(parts) - 1  # gradients are averaged over processes with the last part only
            for k, network in enumerate(self.networks):
                images, labels = self._placed(part.views[k])
                with self.accelerator.no_sync(network) if apart else nullcontext():
                    value = loss(network, images, labels) / len(parts)
                    self.accelerator.backward(value)
                total[k] += value.detach()
        for network, optimizer in zip(self.networks, self.optimizers, strict=True):
            if self.settings.clip_norm is not None:
                self.accelerator.clip_grad_norm_(network.parameters(), self.settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        return self.step, [number for part in parts for number in part.numbers], total

    def _placed(self, view: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in view)
        return images.contiguous(memory_format=torch.channels_last), labels

    def _mode(self, training: bool) -> None:
        for network, optimizer in zip(self.networks, self.optimizers, strict=True):
            network.train(training)
            optimizer.train() if training else optimizer.eval()  # schedule-free ones have other weights then

    def _rate(self) -> float:
        return self.optimizers[0].param_groups[0]["lr"]

    def _anyone(self, asked: bool) -> bool:
        """Whether any process was told to end; with several, they ask each other every `CHECK_EVERY` steps."""
        if self.accelerator.num_processes == 1:
            return asked
        if self.step % CHECK_EVERY:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device)) > 0)

    def _finite(self, unchecked: list[tuple[int, list[int], torch.Tensor]]) -> torch.Tensor:
        """The last losses, once all are looked at."""
        values = torch.stack([losses for *_, losses in unchecked]).cpu()
        bad = torch.nonzero(~torch.isfinite(values)).tolist()
        if bad:
            row, network = bad[0]
            step, numbers, _ = unchecked[row]
            raise ValueError(
                f"{self.name}: the loss of network {network} is {values[row, network]:g} at step {step}, images {', '.join(map(str, numbers))}; "
                f"lower learning_rate={self.settings.learning_rate:g}, or set clip_norm. The checkpoints before it are kept."
            )
        return values[-1]

    def _save(self) -> None:
        """The state, written aside and renamed; older ones go."""
        self._mode(training=True)
        place, aside = self.folder / f"step-{self.step:08d}", self.folder / ".aside"
        main, wait = self.accelerator.is_main_process, self.accelerator.wait_for_everyone
        if place.is_dir():
            return
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        wait()
        try:
            self.accelerator.save_state(str(aside))
            if main:
                state = {"step": self.step, "seconds": self.seconds, "identity": self.identity}
                (aside / TOLD).write_text(json.dumps(state, indent=1) + "\n")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError when a disk is full
            if main:
                shutil.rmtree(aside, ignore_errors=True)
            last = self._last_checkpoint()
            raise OSError(
                f"cannot write a checkpoint into {self.folder}: {first_line(error)}; "
                + (f"{last.name} is there and intact." if last else "none was written before it.")
            ) from error
        wait()
        if main:
            aside.rename(place)
            for older in self._checkpoints()[: -self.settings.keep_checkpoints]:
                shutil.rmtree(older)
        wait()

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _last_checkpoint(self) -> Path | None:
        found = self._checkpoints()
        return found[-1] if found and matches_identity(found[-1], self.identity) else None


def matches_identity(folder: Path, identity: dict) -> bool:
    """Whether a checkpoint, or what a training left, is there and is of this very training.

    Raises:
        ValueError: when it is of another one, or of none.
    """
    if not folder.exists():
        return False
    there, here = read_training_state(folder).get("identity", {}), json.loads(json.dumps(identity))
    for key in here.keys() | there.keys():
        if there.get(key) != here.get(key):
            raise ValueError(
                f"{folder} is of another training: its {key} is {_brief(there.get(key))}, here {_brief(here.get(key))}. Go on with that one, name "
                "another output=, or delete it."
            )
    return True


def read_training_state(folder: Path) -> dict:
    """What was written beside a checkpoint, or beside what a training left."""
    try:
        return json.loads((folder / TOLD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} was not left by a training of ours ({first_line(error)}); name another output=, or delete it."
        ) from error


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked this process to end, instead of its end. A second Ctrl-C is heeded at once."""
    told: list[int] = []

    def note(number, _frame):
        if told and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _optimizer(network: nn.Module, settings: Settings, warmup: int, param_groups) -> torch.optim.Optimizer:
    betas = {} if settings.betas is None else {"betas": tuple(settings.betas)}
    if settings.optimizer == SCHEDULE_FREE:
        groups = (param_groups or partial(param_groups_weight_decay, weight_decay=settings.weight_decay))(network)
        groups = [{"lr": settings.learning_rate * group.pop("lr_scale", 1.0)} | group for group in groups]
        return schedulefree.AdamWScheduleFree(groups, lr=settings.learning_rate, warmup_steps=warmup, **betas)
    # One call for all tensors, where torch has it: of a small network's step on a CPU it saves a tenth.
    kind = get_optimizer_class(settings.optimizer, bind_defaults=False)
    fused = {"fused": True} if "fused" in signature(kind).parameters else {}
    return create_optimizer_v2(
        network,
        settings.optimizer,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        param_group_fn=param_groups,
        **betas,
        **fused,
    )


def _schedule(optimizer, settings: Settings, warmup: int, length: int, cycles: int):
    """timm's, by steps: `warmup` of them, then `cycles` of `length`; None for a schedule-free optimizer."""
    if settings.optimizer == SCHEDULE_FREE:
        return None
    schedule, _ = create_scheduler_v2(
        optimizer,
        settings.schedule,
        num_epochs=length,
        warmup_epochs=warmup,
        warmup_lr=settings.learning_rate / max(warmup, 1),
        warmup_prefix=True,
        cycle_limit=cycles,
        cycle_decay=1.0,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return schedule


def _brief(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
