"""An ensemble beside its members: what each of them says of one image, and the training images that are nearest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict

from concat_ensemble.console import show_progress
from concat_ensemble.data.bad_images import without_rows
from concat_ensemble.data.naming import describe_dataset
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.errors import argument
from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.standardized import StandardizedFeatures
from concat_ensemble.features.table import FeatureTable
from concat_ensemble.inference.image_sources import ImageSource
from concat_ensemble.inference.prediction import class_names, prepare_classifier, read_classifier, read_pixels
from concat_ensemble.modeling.image_processing_concat_ensemble import ConcatEnsembleImageProcessor
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleForImageClassification
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.neighbors import nearest
from concat_ensemble.reporting.error_page import make_thumbnail
from concat_ensemble.reporting.image_page import Neighbor, Opinion
from concat_ensemble.studies.ensembles import load_ensemble
from concat_ensemble.studies.measuring import ProbeSettings, choose_metric, fit_probe
from concat_ensemble.studies.probing import with_head

NUM_NEIGHBORS = 5
CACHED_THUMBNAILS = 1_000


@dataclass(frozen=True)
class Reference:
    """Labelled images that an ensemble is shown beside: probes of its members, and its training images."""

    name: str  # of the dataset
    class_names: list[str]
    probes: list[LinearProbe]  # one a member, fitted on its features alone
    table: FeatureTable  # of the members' own features
    images: Sequence[dict[str, Any]]  # the training images, encoded

    @functools.cached_property
    def banks(self) -> list[StandardizedFeatures]:
        """Training features: of all members together, then of each of them."""
        members = [self.table.members([k]) for k in range(len(self.probes))]
        return [StandardizedFeatures(table["train"]) for table in (self.table, *members)]


class Explorer:
    """An ensemble with a head, and perhaps a `Reference`, to ask about images.

    The probabilities are those of `predict_images`. `model` is prepared for inference: see `prepare_classifier`.
    """

    def __init__(self, model: ConcatEnsembleForImageClassification, reference: Reference | None = None):
        self.model, self.reference = model, reference
        self.class_names = class_names(model)
        self._processor = ConcatEnsembleImageProcessor.from_config(model.config)
        self._thumbnail = functools.lru_cache(CACHED_THUMBNAILS)(self._make_thumbnail)

    @property
    def notes(self) -> list[str]:
        """Sentences on what is shown."""
        members = self.model.config.members
        kinds = f"{len(members)} members: " + ", ".join(member["architecture"] for member in members)
        if self.reference is None:
            remedy = f"{argument('name', 'NAME')} also shows each member alone and the nearest training images"
            return [f"{kinds}.", f"{len(self.class_names):,} classes. {remedy}."]
        images = len(self.reference.table["train"])
        return [
            f"{kinds}.",
            f"Each member alone: a linear probe on {self.reference.name}. Nearest images: by the cosine of the "
            f"features, among {images:,} training images.",
        ]

    @torch.inference_mode()
    def answer(self, path: str | Path) -> list[Opinion]:
        """The opinion of the ensemble on an image, then that of each member if there is a reference and more than one
        member. Raises ValueError naming the image if it cannot be read."""
        source = ImageSource("file", [Path(path).name], [Path(path)])
        pixels = read_pixels(source, 0, self._processor)[None].to(self.model.device, self.model.dtype)
        output = self.model(pixels, output_member_features=True)
        shares = output.logits.float().softmax(dim=1)[0].cpu().numpy()
        if not np.isfinite(shares).all():
            raise ValueError("the model gives NaN; check its weights with concat-ensemble verify.")
        features = [part.float().cpu().numpy() for part in output.member_features]
        count = f"{len(features)} members together" if len(features) > 1 else "one member"
        neighbors = self._find_neighbors(0, np.concatenate(features, axis=1), [part.shape[1] for part in features])
        opinions = [Opinion("Ensemble", count, _rank(self.class_names, shares), neighbors)]
        if self.reference is not None and len(features) > 1:
            opinions += [self._ask_member(k, part) for k, part in enumerate(features)]
        return opinions

    def _ask_member(self, position: int, features: np.ndarray) -> Opinion:
        """The opinion of a member by its features (1, D_k)."""
        assert self.reference is not None
        probe, names = self.reference.probes[position], self.reference.class_names
        shares = probe.predict_proba(features)[0]
        classes = _rank([names[k] for k in probe.classes_], shares)
        detail = f"{self.model.config.members[position]['architecture']}, probed alone"
        neighbors = self._find_neighbors(1 + position, features, [features.shape[1]])
        return Opinion(f"Member {position}", detail, classes, neighbors)

    def _find_neighbors(self, number: int, features: np.ndarray, feature_dims: list[int]) -> list[Neighbor]:
        """The nearest training images in one of the reference's banks, by the features (1, D) of an image."""
        if self.reference is None:
            return []
        bank, labels = self.reference.banks[number], self.reference.table["train"].labels
        queries = torch.from_numpy(features).to(bank.device)
        cosines, rows = (found[0].tolist() for found in nearest(queries, bank, NUM_NEIGHBORS, feature_dims))
        names = self.reference.class_names
        return [
            Neighbor(names[labels[row]], cosine, self._thumbnail(row))
            for cosine, row in zip(cosines, rows, strict=True)
        ]

    def _make_thumbnail(self, row: int) -> str | None:
        assert self.reference is not None
        return make_thumbnail(self.reference.images[row], f"image {row}")


def load_explorer(
    model: str, dataset: DatasetOptions | None = None, extraction: ExtractionOptions | None = None
) -> Explorer:
    """Load an ensemble by its folder or Hub id, and what it is shown beside.

    Args:
        model: An ensemble with a classification head; without one, a linear probe on `dataset` is its head.
        dataset: Its training images are shown where they are near, and each member gets a linear probe on it.

    Raises:
        ValueError: for something else than an ensemble, and for one without a head if there is no dataset. Others are
            those of `DatasetOptions.load` and `extract_features`.
    """
    classifier = read_classifier(model)
    if dataset is None:
        if classifier is None:
            remedy = f"fit one with concat-ensemble probe {model} --dataset ... --save-head, or name a dataset here"
            raise ValueError(f"{model} has no classification head; {remedy}: {argument('name', '...')}.")
        return Explorer(prepare_classifier(classifier))
    extraction = extraction or ExtractionOptions()
    audited = dataset.load()
    data = DatasetDict({split: audited.data[split] for split in ("train", "validation")})  # nothing is tested here
    described = dataset.describe(audited)
    settings = ProbeSettings(metric=choose_metric(None, described.get("metric"), audited.audit), seed=dataset.seed)
    ensemble = load_ensemble(model, dataset.seed) if classifier is None else classifier
    options = dataclasses.asdict(extraction)
    own = extract_features(ensemble.export_active(ensemble.config.built_members), data, **options)
    stages = len(own.feature_dims) + (classifier is None)
    with show_progress("probes", stages, unit="probes", quiet=extraction.quiet) as advance:
        probes = []
        for k in range(len(own.feature_dims)):
            probes.append(fit_probe(own.members([k]), settings, standardize=True))
            advance()
        if classifier is None:
            table = own if ensemble.projection is None else extract_features(ensemble, data, **options)
            classifier = with_head(ensemble, fit_probe(table, settings, standardize=True), own.class_names)
            advance()
    images = without_rows(data, own.skipped)["train"]["image"]
    name = describe_dataset(described | {"test_images": None})
    reference = Reference(name, own.class_names, probes, own, images)
    return Explorer(prepare_classifier(classifier), reference)


def _rank(names: Sequence[str], shares: np.ndarray) -> list[tuple[str, float]]:
    """Names with their shares, the largest first."""
    return [(names[int(k)], float(shares[k])) for k in np.argsort(-shares, kind="stable")]
