"""Checkpoints of a training, each written whole or not at all."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from concat_ensemble.errors import first_line
from concat_ensemble.files import give_usual_access, write_json
from concat_ensemble.training.batches import Position
from concat_ensemble.training.recipe import Settings
from concat_ensemble.training.saving import STATE_FILE, TrainingState, check_processes, matches_identity, read_state


class Checkpoints:
    """The last checkpoints of the training with an identity, in a folder.

    Raises:
        ValueError: if the folder holds checkpoints of another training.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, settings: Settings, identity: dict):
        self.folder, self.accelerator, self.settings, self.identity = folder, accelerator, settings, identity
        self.last()

    def last(self) -> Path | None:
        *_, last = [None, *self._all()]
        return last if last and matches_identity(last, self.identity, self.settings) else None

    def load(self) -> tuple[TrainingState, Position | None] | None:
        """Load all that was prepared and registered from the last checkpoint, if there is one. Return its state, and
        the position of this process's stream."""
        checkpoint = self.last()
        if checkpoint is None:
            return None
        check_processes(checkpoint, self.accelerator.num_processes)
        self.accelerator.load_state(str(checkpoint))
        position = self._position_file(checkpoint)
        return read_state(checkpoint), json.loads(position.read_text()) if position.is_file() else None

    def save(self, step: int, position: Position | None, state: dict[str, Any]) -> None:
        """Write a checkpoint aside and rename it, then delete old ones. `state` is JSON for the state file.

        Raises:
            OSError: if it cannot be written; the one before it is intact.
        """
        folder, aside = self.folder / f"step-{step:08d}", self.folder / ".aside"
        is_main, wait = self.accelerator.is_main_process, self.accelerator.wait_for_everyone
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
        wait()
        try:
            self.accelerator.save_state(str(aside))
            if position is not None:
                write_json(self._position_file(aside), position)
            if is_main:
                write_json(aside / STATE_FILE, {"step": step, "identity": self.identity} | state)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError when a disk is full
            if is_main:
                shutil.rmtree(aside, ignore_errors=True)
            last = self.last()
            rest = f"{last.name} is there and intact." if last else "none was written before it."
            raise OSError(f"cannot write a checkpoint into {self.folder}: {first_line(error)}; {rest}") from error
        wait()
        if is_main:
            give_usual_access(aside)
            aside.rename(folder)
            for older in self._all()[: -self.settings.keep_checkpoints]:
                shutil.rmtree(older)
        wait()

    def delete(self, *others: Path) -> None:
        """Delete all checkpoints, and other folders beside them."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for folder in (*self._all(), self.folder / ".aside", *others):
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it is not there, or holds something of a user
                self.folder.rmdir()

    def _position_file(self, checkpoint: Path) -> Path:
        """Where this process keeps the position of its stream."""
        return checkpoint / f"stream-{self.accelerator.process_index}.json"

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))
