"""Probing an ensemble on a dataset: itself, its prefixes, its members, what it is compared with, and the controls."""

import time
from importlib.metadata import version

import numpy as np
import torch
from datasets import DatasetDict
from torch import nn

from concat_ensemble.controls import narrowed, pixel_table, untrained_like
from concat_ensemble.feature_table import FeatureTable
from concat_ensemble.features import extract_features
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleForImageClassification
from concat_ensemble.probes import LinearProbe
from concat_ensemble.probes.metrics import ProbeMetrics
from concat_ensemble.results import Results, Row, Run

NEVER = -1e4  # the logit of a class that had no training images


def probe_ensemble(
    model: nn.Module,
    dataset: DatasetDict,
    *,
    name: str = "ensemble",
    described: dict | None = None,
    baselines: dict[str, nn.Module] | None = None,
    seed: int = 0,
    quiet: bool = False,
    **extraction,
) -> tuple[Results, LinearProbe]:
    """Linear probes of everything that a reader of the number would ask for.

    Args:
        model: The ensemble. Its members run once; prefixes and single members are columns of the same table.
        dataset: From `load_data`.
        name: Of the ensemble, in the table.
        described: How the dataset was named, for the record.
        baselines: Other ensembles on the same images, such as the longer or wider single network.
        seed: Of the untrained members; recorded with every run.
        extraction: Further arguments of `extract_features`.

    Returns:
        The results, and the probe of the whole ensemble.
    """
    started = time.perf_counter()
    table = extract_features(model, dataset, quiet=quiet, **extraction)
    extracted = time.perf_counter()
    config = model.config
    count = len(table.widths)
    candidates = [(Row(name, "ensemble", sum(table.widths), count, _steps(model)), table, True)]
    candidates += [
        (
            Row(f"{name}, first {k}", "prefix", sum(table.widths[:k]), k, _steps(model, range(k))),
            table.members(range(k)),
            True,
        )
        for k in range(count - 1, 1, -1)
    ]
    if count > 1:
        candidates += [
            (
                Row(f"{name}, member {k} alone", "member", table.widths[k], 1, _steps(model, [k])),
                table.members([k]),
                True,
            )
            for k in range(count)
        ]
        width = max(table.widths)
        candidates.append(
            (Row(f"{name}, PCA to {width}", "control", width, count, _steps(model)), narrowed(table, width), False)
        )
    for other, baseline in (baselines or {}).items():
        features = extract_features(baseline, dataset, quiet=quiet, **extraction)
        candidates.append(
            (Row(other, "baseline", sum(features.widths), len(features.widths), _steps(baseline)), features, True)
        )
    untrained = extract_features(untrained_like(model, seed), dataset, quiet=quiet, **extraction)
    candidates.append((Row("untrained members", "control", sum(untrained.widths), count, 0), untrained, True))
    modes = {config.members[k]["preprocessing"]["image_mode"] for k in config.built_members}
    pixels = pixel_table(dataset, "L" if modes == {"L"} else "RGB")
    candidates.append((Row("raw pixels", "control", pixels.widths[0], 0, 0), pixels, True))

    metrics = ProbeMetrics()
    probes = {}
    for row, features, standardize in candidates:
        probes[row.name] = LinearProbe(standardize=standardize, seed=seed).fit(
            features["train"], validation=features["validation"]
        )
        row.runs.append(_measured(probes[row.name], features, metrics, seed))
    results = Results(
        ensemble=name,
        dataset=described or {},
        probe={
            "kind": "linear",
            "strengths": list(probes[name].strengths),
            "selection": "validation top-1, then fitted on train + validation",
        },
        rows=[row for row, _, _ in candidates],
        members_sha256=members_sha256(model.config),
        versions=versions(),
        seconds={"extraction": extracted - started, "total": time.perf_counter() - started},
    )
    return results, probes[name]


def with_head(model: nn.Module, probe: LinearProbe, names: list[str]) -> ConcatEnsembleForImageClassification:
    """The ensemble with the head that `probe` found on all its features; it shares the members' weights."""
    config = ConcatEnsembleConfig(
        members=model.config.members,
        standardize=True,
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
    )
    with torch.device("meta"):
        classifier = ConcatEnsembleForImageClassification(config)
    classifier.members = model.members
    classifier.classifier = nn.Linear(config.num_features, len(names))
    weight, bias = torch.zeros(len(names), config.num_features), torch.full((len(names),), NEVER)
    weight[probe.classes_], bias[probe.classes_] = (
        torch.tensor(probe.coef_).float(),
        torch.tensor(probe.intercept_).float(),
    )
    head = {"classifier.weight": weight, "classifier.bias": bias}
    head |= {"feature_mean": torch.tensor(probe.mean_).float(), "feature_scale": torch.tensor(probe.scale_).float()}
    classifier.load_state_dict(head, strict=False, assign=True)
    return classifier.eval()


def members_sha256(config: ConcatEnsembleConfig) -> list[str]:
    """Digests of the built members' weights, by which results are known to be theirs."""
    return [config.members[k]["provenance"].get("weights_sha256", "") for k in config.built_members]


def versions() -> dict[str, str]:
    return {
        package: version(package) for package in ("concat-ensemble", "torch", "timm", "transformers", "scikit-learn")
    }


def _measured(probe: LinearProbe, table: FeatureTable, metrics: ProbeMetrics, seed: int) -> Run:
    """The one look at the test split."""
    features, labels = table["test"]
    scores = np.full((len(labels), len(table.class_names)), -np.inf)  # a class without training images is never chosen
    scores[:, probe.classes_] = probe.logits(features)
    measured = metrics.compute(predictions=scores, references=labels)
    return Run(
        seed, measured, probe.strength_, len(table.labels["train"]) + len(table.labels["validation"]), len(labels)
    )


def _steps(model: nn.Module, numbers=None) -> int | None:
    """Training steps spent on these members, where all of them say."""
    built = model.config.built_members
    steps = [
        model.config.members[built[k]]["provenance"].get("steps")
        for k in (range(len(built)) if numbers is None else numbers)
    ]
    return None if None in steps else sum(steps)
