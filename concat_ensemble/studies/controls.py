"""The controls: what could explain a concatenation's gain other than what its members learned."""

import numpy as np
import torch
from datasets import DatasetDict

from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names, read_labels
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.modeling.image_processing_concat_ensemble import convert_image
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleModel, ConcatEnsemblePreTrainedModel

PIXEL_SIDE = 32


def untrained_like(model: ConcatEnsemblePreTrainedModel, seed: int) -> ConcatEnsembleModel:
    """An ensemble with the same architectures and random weights: as many features, none of them learned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConcatEnsembleModel(type(model.config).from_dict(model.config.to_dict())).eval()


def pixel_table(dataset: DatasetDict, mode: str) -> FeatureTable:
    """Raw pixels as features in one block: what a probe achieves without any network.

    Images are converted to the PIL mode `mode`, such as `L`; if larger than 32x32, or of several sizes, also resized.
    """
    images = {
        name: [convert_image(read_image(split, n), mode) for n in range(len(split))] for name, split in dataset.items()
    }
    sizes = {image.size for split in images.values() for image in split}
    if len(sizes) > 1 or max(max(size) for size in sizes) > PIXEL_SIDE:
        images = {name: [image.resize((PIXEL_SIDE, PIXEL_SIDE)) for image in split] for name, split in images.items()}
    blocks, labels = {}, {}
    for name, split in dataset.items():
        rows = [np.asarray(image, dtype=np.float32).ravel() / 255 for image in images[name]]
        blocks[name], labels[name] = [np.stack(rows)], read_labels(split)
    return FeatureTable(blocks, labels, class_names(dataset["train"]))
