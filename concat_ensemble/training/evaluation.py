"""Evaluation on held-out images, the same for all scripts. Several processes share the images."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from concat_ensemble.training.batches import keep_random_states
from concat_ensemble.training.images import Images
from concat_ensemble.training.objective import read_logits

TOP = 5  # the second accuracy, as usual; with as many classes or fewer it would always be 1


@dataclass(frozen=True)
class Evaluation:
    """A network on held-out images: mean loss (without label smoothing), and shares of correct predictions."""

    loss: float
    top1: float | None = None  # without labels there is none
    top5: float | None = None  # and none with five classes or fewer

    def __str__(self) -> str:
        accuracies = {"top-1": self.top1, "top-5": self.top5}
        shares = [f"{name} {100 * value:.2f}%" for name, value in accuracies.items() if value is not None]
        return ", ".join([*shares, f"loss {self.loss:.4f}"])

    def improves_on(self, other: "Evaluation | None", metric: str) -> bool:
        """Whether it is better in the metric "top1" or "loss". An equal one is not, so the first of them counts."""
        if other is None:
            return True
        value, earlier = getattr(self, metric), getattr(other, metric)
        return value < earlier if metric == "loss" else value > earlier

    def to_dict(self) -> dict[str, float]:
        """The values that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


# (network, images, labels) -> (B, 1 to 3): loss of each image, and whether its label is in the top 1, and the top 5
Measure = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def measure_classification(network: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image, and whether its label is first, and among the first five."""
    logits = compute_logits(network, pixels)
    columns = [nn.functional.cross_entropy(logits, labels, reduction="none")]
    for count in (1, TOP) if logits.shape[1] > TOP else (1,):
        columns.append((logits.topk(count).indices == labels[:, None]).any(1).float())
    return torch.stack(columns, 1)


@torch.no_grad()
def evaluate(
    network: nn.Module, images: Images, accelerator: Accelerator, measure: Measure = measure_classification
) -> Evaluation:
    """Evaluate a network on the validation images. The generators of random numbers stay where they are, so training
    goes on as without it."""
    network.eval()
    rows = []
    with keep_random_states():
        for pixels, labels in _read(images, "validation", accelerator):
            with accelerator.autocast():
                values = measure(network, pixels, labels)
            rows.append(accelerator.gather_for_metrics(values))
    return Evaluation(*torch.cat(rows).double().mean(0).tolist())


@torch.no_grad()
def predict_logits(network: nn.Module, images: Images, split: str, accelerator: Accelerator) -> np.ndarray:
    """(N, classes) logits of a split's images."""
    network.eval()
    logits = []
    for pixels, _ in _read(images, split, accelerator):
        logits.append(accelerator.gather_for_metrics(compute_logits(network, pixels)))
    return torch.cat(logits).cpu().numpy()


def compute_logits(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """(B, classes) float32 logits of a network of timm or transformers."""
    return read_logits(network(pixels)).float()


def _read(images: Images, split: str, accelerator: Accelerator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images as the network sees them, with their labels: this process's part of the split."""
    for (view,), labels in accelerator.prepare_data_loader(images.held_out(images.settings.batch_size, split)):
        yield images.pixels.normalize(view), labels
