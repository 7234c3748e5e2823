"""The weights of the best evaluation of a training, with `save_best`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from concat_ensemble.files import replace_file
from concat_ensemble.training.evaluation import Evaluation


@dataclass(frozen=True)
class Selected:
    """The evaluation whose weights are saved."""

    step: int
    evaluation: Evaluation


class BestWeights:
    """Each network's weights at its best evaluation by a metric, the first one of equals, as files in `folder`.

    Files that a checkpoint may need stay until the next checkpoint, so a training that continues at a checkpoint finds
    what was best by then.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, metric: str | None, count: int):
        self.accelerator, self.folder, self.metric = accelerator, folder, metric
        self.selected: list[Selected | None] = [None] * count

    def state_dict(self) -> list[dict[str, Any] | None]:
        """What a checkpoint must hold, as JSON."""
        return [each and {"step": each.step, **each.evaluation.to_dict()} for each in self.selected]

    def load_state_dict(self, state: Sequence[dict[str, Any] | None]) -> None:
        """Continue at a checkpoint. Raises ValueError if the weights of the best evaluation until then are missing."""
        for k, each in enumerate(state):
            if each is None:
                continue
            values = dict(each)
            self.selected[k] = Selected(values.pop("step"), Evaluation(**values))
            if not self._file(k).is_file():
                problem = f"the weights of the best evaluation, {self._file(k)}, are missing"
                raise ValueError(f"{problem}; delete {self.folder.parent} to train again from the start.")

    def update(self, step: int, networks: Sequence[nn.Module], evaluations: Sequence[Evaluation]) -> None:
        """Keep the weights of the networks that are better than before. Without a metric, none are kept."""
        if self.metric is None:
            return
        for k, (network, evaluation) in enumerate(zip(networks, evaluations, strict=True)):
            before = self.selected[k]
            if not evaluation.improves_on(before and before.evaluation, self.metric):
                continue
            self.selected[k] = Selected(step, evaluation)
            if self.accelerator.is_main_process:
                weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
                with replace_file(self._file(k)) as aside:
                    save_file(weights, aside)

    def load_into(self, networks: Sequence[nn.Module]) -> None:
        """Give the networks their best weights, if there are any."""
        self.accelerator.wait_for_everyone()
        for k, network in enumerate(networks):
            if self.selected[k]:
                network.load_state_dict(load_file(self._file(k)))

    def describe(self, k: int) -> dict[str, Any]:
        """Provenance of network `k`; empty if its last weights are saved."""
        selected = self.selected[k]
        if selected is None:
            return {}
        return {
            "selected": {"step": selected.step, "by": f"validation {self.metric}", **selected.evaluation.to_dict()}
        }

    def delete_others(self) -> None:
        """Delete the weights that were better before those of now. Call it when a checkpoint is written."""
        if not self.accelerator.is_main_process:
            return
        current = {self._file(k) for k, each in enumerate(self.selected) if each}
        for file in set(self.folder.glob("*.safetensors")) - current:
            file.unlink()

    def _file(self, k: int) -> Path:
        selected = self.selected[k]
        return self.folder / f"{k}-step-{selected.step if selected else 0:08d}.safetensors"
