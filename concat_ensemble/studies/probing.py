"""Probing an ensemble on a dataset: itself, its prefixes, its members, what it is compared with, and the controls."""

import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np
import torch
from datasets import DatasetDict
from rich.progress import track
from torch import nn

from concat_ensemble.features.extraction import extract_features
from concat_ensemble.features.projection import principal_projection, random_projection
from concat_ensemble.features.table import FeatureTable, TableSplit
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import ConcatEnsembleForImageClassification
from concat_ensemble.probes.intervals import bootstrap_intervals
from concat_ensemble.probes.linear import LinearProbe
from concat_ensemble.probes.metrics import ProbeMetrics
from concat_ensemble.studies.controls import pixel_table, untrained_like
from concat_ensemble.studies.cost import describe_hardware, member_costs
from concat_ensemble.studies.results import Cost, Results, Row, Run, pack_bits

NOTHING = Cost(0.0, 0.0)
NEVER = -1e4  # the logit of a class without training images: it is not chosen


def probe_ensemble(
    model: nn.Module,
    dataset: DatasetDict,
    *,
    name: str = "ensemble",
    described: dict | None = None,
    baselines: dict[str, nn.Module] | None = None,
    num_resamples: int = 5,
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
        num_resamples: Bootstrap resamples of the training images, for how much the result depends on them.
        seed: Of the untrained members, the random projection and the draws; recorded with every run.
        extraction: Further arguments of `extract_features`.

    Returns:
        The results, and the probe of the whole ensemble.
    """
    started = time.perf_counter()
    table = extract_features(model, dataset, quiet=quiet, **extraction)
    extracted = time.perf_counter()
    device = extraction.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    costs = member_costs(model, device)
    candidates = list(_candidates(model, table, name, seed, costs))
    if model.config.projection_dim is not None:
        baselines = {f"{name}, not projected": model.export_active(model.config.built_members)} | (baselines or {})
    for other, baseline in (baselines or {}).items():
        features = extract_features(baseline, dataset, quiet=quiet, **extraction)
        row = Row(other, "baseline", sum(features.feature_dims), len(baseline.members), *training_cost(baseline))
        row.cost = sum(member_costs(baseline, device), NOTHING)
        candidates.append((row, features))
    untrained = extract_features(untrained_like(model, seed), dataset, quiet=quiet, **extraction)
    row = Row(
        "untrained members",
        "control",
        sum(untrained.feature_dims),
        len(model.members),
        0,
        0.0,
        cost=sum(costs, NOTHING),
    )
    candidates.append((row, untrained))
    modes = {model.config.members[k]["preprocessing"]["image_mode"] for k in model.config.built_members}
    pixels = pixel_table(dataset, "L" if modes == {"L"} else "RGB")
    candidates.append((Row("raw pixels", "control", pixels.feature_dims[0], 0, 0, 0.0), pixels))

    probes = {}
    for row, features in track(candidates, "probes", disable=quiet or not sys.stderr.isatty()):
        probes[row.name] = _fitted(row, features, seed)
        row.runs.append(_measured(probes[row.name], features, num_resamples, seed))
    results = Results(
        ensemble=name,
        dataset=described or {},
        probe={
            "kind": "linear",
            "l2_strengths": list(probes[name].l2_strengths),
            "selection": "validation top-1, then fitted on train + validation",
            "num_resamples": num_resamples,
        },
        rows=[row for row, _ in candidates],
        members_sha256=members_sha256(model.config),
        versions=versions(),
        seconds={"extraction": extracted - started, "total": time.perf_counter() - started},
        hardware=describe_hardware(device),
    )
    return results, probes[name]


def probe_again(model: nn.Module, dataset: DatasetDict, name: str, seed: int, **extraction) -> dict[str, float]:
    """Top-1 of the ensemble, its prefixes, its members and itself narrowed, by the names that they have in `Results`."""
    table = extract_features(model, dataset, **extraction)
    costs = [NOTHING] * len(model.members)
    return {
        row.name: _fitted(row, features, seed).score(features["test"])
        for row, features in _candidates(model, table, name, seed, costs)
    }


def _fitted(row: Row, features: FeatureTable, seed: int) -> LinearProbe:
    probe = LinearProbe(standardize=row.kind != "projected", seed=seed)
    return probe.fit(features["train"], validation=features["validation"])


def _candidates(
    model: nn.Module, table: FeatureTable, name: str, seed: int, costs: list[Cost]
) -> Iterator[tuple[Row, FeatureTable]]:
    """The ensemble, its prefixes, each member, and itself at one member's width."""
    widths, count = table.feature_dims, len(table.feature_dims)

    def row(name: str, kind: str, width: int, part: Sequence[int]) -> Row:
        cost = sum((costs[k] for k in part), NOTHING)
        return Row(name, kind, width, len(part), *training_cost(model, part), cost=cost)

    everyone = range(len(costs))
    yield row(name, "ensemble", sum(widths), everyone), table
    for k in range(count - 1, 1, -1):
        yield row(f"{name}, first {k} members", "first_members", sum(widths[:k]), range(k)), table.members(range(k))
    if count == 1:
        return
    for k in range(count):
        yield row(f"{name}, member {k} alone", "member", widths[k], [k]), table.members([k])
    width = max(widths)
    for how, projection in (
        ("PCA", principal_projection(table, width)),
        ("random projection", random_projection(table, width, seed)),
    ):
        yield row(f"{name}, {how} to {width}", "projected", width, everyone), projection(table)


def with_head(model: nn.Module, probe: LinearProbe, names: list[str]) -> ConcatEnsembleForImageClassification:
    """The ensemble with the head that `probe` found on all its features; it shares the members' weights."""
    config = ConcatEnsembleConfig(
        members=model.config.members,
        standardize=True,
        projection_dim=model.config.projection_dim,
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
    )
    with torch.device("meta"):
        classifier = ConcatEnsembleForImageClassification(config)
    classifier.members, classifier.projection = model.members, model.projection
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


def _measured(probe: LinearProbe, table: FeatureTable, num_resamples: int, seed: int) -> Run:
    """The one look at the test split, with the probe and with others like it on training images drawn anew."""
    test, known = table["test"], TableSplit.concatenate([table["train"], table["validation"]])
    scores = np.full((len(test), len(table.class_names)), NEVER)
    scores[:, probe.classes_] = probe.logits(test)
    chosen = scores.argmax(axis=1)
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(num_resamples):
        numbers = np.sort(rng.integers(0, len(known), len(known)))
        again = LinearProbe([probe.l2_strength_], probe.standardize, tol=1e-4)
        drawn.append(again.fit(known.select(numbers)).score(test))
    return Run(
        seed=seed,
        metrics=ProbeMetrics().compute(predictions=scores, references=test.labels),
        l2_strength=probe.l2_strength_,
        n_train=len(known),
        n_test=len(test),
        intervals={metric: list(bounds) for metric, bounds in bootstrap_intervals(chosen, test.labels, seed).items()},
        resamples=drawn,
        correct=pack_bits(chosen == test.labels),
    )


def training_cost(model: nn.Module, numbers=None) -> tuple[int | None, float | None]:
    """Steps and GFLOP that the training of these members took, each where all of them say."""
    built = model.config.built_members
    chosen = built if numbers is None else [built[k] for k in numbers]
    provenances = [model.config.members[k]["provenance"] for k in chosen]
    steps = [provenance.get("steps") for provenance in provenances]
    gflops = [(provenance.get("compute") or {}).get("gflops") for provenance in provenances]
    return None if None in steps else sum(steps), None if None in gflops else sum(gflops)
