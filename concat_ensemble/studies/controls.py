"""What could explain a concatenation's gain away: width without training, and the pixels themselves."""

import numpy as np
import torch
from datasets import DatasetDict
from torch import nn

from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names, read_labels
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel

PIXEL_SIDE = 32


def untrained_like(model: nn.Module, seed: int) -> ConcatEnsembleModel:
    """The same architectures side by side with random weights: as wide, and nothing learnt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConcatEnsembleModel(type(model.config).from_dict(model.config.to_dict())).eval()


def pixel_table(dataset: DatasetDict, mode: str) -> FeatureTable:
    """Raw pixels in PIL mode `mode`, as one block: what a probe reads without any network. Images larger than 32x32,
    or of several sizes, are brought to 32x32."""
    images = {
        name: [convert_image(read_image(split, n), mode) for n in range(len(split))] for name, split in dataset.items()
    }
    sizes = {image.size for split in images.values() for image in split}
    fits = len(sizes) == 1 and max(max(size) for size in sizes) <= PIXEL_SIDE
    rows = {
        name: np.stack(
            [
                np.asarray(image if fits else image.resize((PIXEL_SIDE, PIXEL_SIDE)), dtype=np.float32).ravel() / 255
                for image in split
            ]
        )
        for name, split in images.items()
    }
    labels = {name: read_labels(split) for name, split in dataset.items()}
    return FeatureTable({name: [block] for name, block in rows.items()}, labels, class_names(dataset["train"]))
