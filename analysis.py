"""What are the clusters owed to? Controls A0 to A9 and the contrasts, from saved features alone.

`analyse` clusters every representation of every run, sets a random compressor, the compressor's own
initial weights and PCA beside it, resamples items and seeds, and hands the contrasts to the rules
of claims.py. The same arrays give the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from sklearn import config_context
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

import audits
import measures
import tuning
from claims import verdicts
from clustering import adjusted_rand, cluster_accuracy, cosine_gap, kmeans
from contrasts import CONTRASTS, against_published, evaluate, lent
from controls import BAND_METRICS, FLOOR, control_rows
from files import plain
from inference import (
    adjust,
    ari_statistic,
    cosine_gap_draws,
    item_weights,
    partition_stability,
    resample,
    share_statistic,
)
from rules import Evidence
from scores import Run, Scores, read_runs


@dataclass(frozen=True)
class Settings:
    """Sizes of the analysis; printed with its results.

    Args:
        restarts: of k-means for an engram and what is compared with it; layer_restarts: for the
            states of single layers; band_restarts: for each random compressor, and for the trained
            one where it is compared with them.
        band_draws: random compressors a run. resamples: of seeds and items. cosine_resamples: of
            those, for cosine gaps. band_cosine_draws: random compressors whose gap is resampled.
        stability_refits: resamples on which k-means is refitted.
        silhouette_items, cluster_items, probe_items, rank_items: at most so many items, drawn once,
            for silhouettes, for A7, for linear probes, and for every rank (872: SST-2's validation
            set, so ranks of both data sets are at equal N).
        mixture_dims: principal components that the Gaussian mixtures of A7 see; most_clusters: the
            largest k that A7 tries.
    """

    restarts: int = 50
    layer_restarts: int = 10
    band_restarts: int = 5
    band_draws: int = 50
    resamples: int = 10_000
    cosine_resamples: int = 1000
    band_cosine_draws: int = 10
    stability_refits: int = 20
    silhouette_items: int = 1000
    cluster_items: int = 2000
    probe_items: int = 2000
    rank_items: int = 872
    mixture_dims: int = 10
    most_clusters: int = 10


def analyse(
    features: Mapping[str, np.ndarray],
    results: Mapping,
    seed: int = 0,
    published: Mapping | None = None,
    settings: Settings | None = None,
) -> dict:
    """Controls, contrasts and claims of one results folder.

    Args:
        features: arrays of features.npz by key; any subset of arms, seeds and layers.
        results: results.json as far as there is one: rows (A9), dataset, backbone, and `evidence`,
            what was measured elsewhere: {claim id: {mean, low, high, n_seeds}} and {"P3": row}.
        seed: of resamples and random compressors.
        published: that study's figures; default results["published"].
    Returns:
        {settings, controls, contrasts, claims}, JSON values without NaN.
    Raises:
        ValueError: features without labels, or a run of another length.
    """
    settings = settings or Settings()
    published = published if published is not None else results.get("published") or {}
    labels, runs = read_runs(features)
    scores = Scores(item_weights(len(labels), settings.resamples if runs else 0, seed), seed)
    bands, counts = {}, {}
    engrams = [r.representations["engram"] for r in runs if "engram" in r.representations]
    # one thread: the same bits whatever the number of cores, and no spinning beside a busy one;
    # scikit-learn's checks of its arguments cost more than small fits
    checks = config_context(assume_finite=True, skip_parameter_validation=True)
    with threadpool_limits(1), checks, warnings.catch_warnings():
        # fewer distinct points than clusters: an engram that never moved; its ARI says so
        warnings.simplefilter("ignore", ConvergenceWarning)
        for run in runs:
            _score(run, labels, scores, settings)
            if "lengths" in features:
                for name, x in run.representations.items():
                    found = measures.first_direction_correlation(x, features["lengths"])
                    scores.add(run, f"{name}.length_correlation", found)
            if run.arm == FLOOR:
                continue
            if engrams and run.tap:
                width = run.representations.get("engram", engrams[0]).shape[1]
                bands[run.arm, run.seed] = _band(run, labels, width, scores, settings)
            if "engram" in run.representations and len(labels) > settings.most_clusters:
                counts[run.arm, run.seed] = _clusterings(run, labels, scores, settings)
    for arm, by_seed in results.get("rows", {}).items():
        for run_seed, row in by_seed.items():
            stub = Run(arm, int(run_seed), np.zeros(0), {})
            for mode, figures in ((row.get("final") or {}).get("modes") or {}).items():
                for name in ("accuracy", "lm_loss"):
                    scores.add(stub, f"{mode}.{name}", figures.get(name))
    controls = list(control_rows(runs, scores, bands, counts, settings))
    dataset = results.get("dataset", {})
    asked = (*CONTRASTS, *against_published(published))
    slug = dataset.get("slug")
    here = [evaluate(c, scores, bands, runs, labels, slug) for c in asked]
    elsewhere = results.get("evidence", {})
    # a family is adjusted together, wherever its members were measured
    contrasts = adjust([r if r["n_seeds"] else elsewhere.get(r["id"], r) for r in here])
    audited = audits.summary(results.get("rows", {}))
    measured = audits.evidence(audited, dataset) | lent(here, dataset.get("train_rows"))
    evidence = Evidence(
        contrasts={row["id"]: row for row in contrasts},
        controls=controls,
        classes=len(np.unique(labels)),
        slug=slug,
        dataset=dataset.get("name", ""),
        backbone=results.get("backbone", ""),
        measured=elsewhere | measured,
        published=published,
    )
    out = {
        "settings": asdict(settings) | {"seed": seed, "items": len(labels)},
        "controls": controls,
        "contrasts": contrasts,
        "claims": verdicts(evidence),
    }
    if tuned := results.get("tuning"):
        out["tuning"] = tuning.summary(tuned)
    if audited:
        out["gradients"] = audited
    if measured:
        out["evidence"] = measured
    return plain(out)


def _score(run: Run, labels, scores: Scores, settings: Settings) -> None:
    """A0, A2, A3, A4: cluster every representation of a run and score the clusters."""
    predicted_ari = adjusted_rand(labels, run.predictions)
    predicted = resample(ari_statistic(labels, run.predictions + 1), scores.weights)
    scores.add(run, "predictions.ari", predicted_ari, predicted)
    right = run.predictions == labels
    scores.add(run, "accuracy", right.mean(), share_statistic(right))
    for mode, predictions in run.by_mode.items():
        right = predictions == labels
        scores.add(run, f"{mode}.accuracy", right.mean(), share_statistic(right))
    k = int(labels.max()) + 1

    def fit(x, name, restarts):
        clusters = kmeans(x, k, run.seed, restarts).clusters
        ari = adjusted_rand(labels, clusters)
        drawn = resample(ari_statistic(labels, clusters), scores.weights)
        scores.add(run, f"{name}.ari", ari, drawn)
        scores.add(run, f"{name}.excess_ari", ari - predicted_ari, drawn - predicted)
        match = cluster_accuracy(labels, clusters)
        mapped = np.array([match.mapping.get(c, -1) for c in range(k)])[clusters]
        scores.add(
            run, f"{name}.cluster_accuracy", match.accuracy, share_statistic(mapped == labels)
        )
        return clusters

    for name, x in run.representations.items():
        restarts = settings.layer_restarts if name.startswith("layer") else settings.restarts
        clusters = fit(x, name, restarts)
        found = measures.measure(
            x,
            clusters,
            labels,
            run.predictions,
            settings.silhouette_items,
            settings.probe_items,
            settings.rank_items,
        )
        for metric, value in asdict(found).items():
            if metric not in ("ari", "cluster_accuracy"):
                scores.add(run, f"{name}.{metric}", value)
    if "engram" not in run.representations:
        return
    engram = run.representations["engram"]
    weights = scores.weights[: settings.cosine_resamples]
    for metric, centre in (("cosine_gap", False), ("centred_cosine_gap", True)):
        gaps = cosine_gap_draws(engram, labels, weights, centre)
        if (run.arm, f"engram.{metric}") in scores.values and np.isfinite(gaps).all():
            scores.draws.setdefault((run.arm, f"engram.{metric}"), {})[run.seed] = gaps
    stability = partition_stability(
        engram, k, run.seed, settings.stability_refits, settings.band_restarts
    )
    scores.add(run, "engram.stability", stability)
    if run.initial is not None:
        fit(run.initial, "initial", settings.restarts)
        final, start = (w.astype(np.float64) for w in run.weights)
        scores.add(
            run, "initial.relative_distance", np.linalg.norm(final - start) / np.linalg.norm(start)
        )
        cosine = (final * start).sum() / (np.linalg.norm(final) * np.linalg.norm(start))
        scores.add(run, "initial.cosine", cosine)
    if run.tap:
        tap, width = run.representations[run.tap], engram.shape[1]
        fit(measures.principal_components(tap, width), "pca", settings.restarts)
        fit(measures.principal_components(tap, width, whiten=True), "whitened", settings.restarts)


def _band(run: Run, labels, width: int, scores: Scores, settings: Settings) -> dict:
    """A1: the metrics of random compressors on a run's own tap, (J,) each; the trained one's."""
    tap, k = run.representations[run.tap], int(labels.max()) + 1
    # one stream a seed: arms of a seed are met by the same random compressors
    rng = np.random.default_rng([scores.seed, run.seed])
    weights = scores.weights[: settings.cosine_resamples]
    everything = np.ones((1, len(labels)), np.uint8)

    def measure(x):
        clusters = kmeans(x, k, run.seed, settings.band_restarts).clusters
        partition = ari_statistic(labels, clusters)
        raw, centred = cosine_gap(x, labels), cosine_gap(x, labels, centre=True)
        return clusters, {
            "ari": float(resample(partition, everything)[0]),
            "cluster_accuracy": cluster_accuracy(labels, clusters).accuracy,
            "cosine_gap": raw.within - raw.between,
            "centred_cosine_gap": centred.within - centred.between,
        }

    found, partitions, gaps = [], [], []
    trained = "engram" in run.representations
    for draw in range(settings.band_draws):
        code = measures.random_compressor(tap, width, rng)
        clusters, figures = measure(code)
        found.append(figures)
        partitions.append(clusters)
        if trained and draw < settings.band_cosine_draws:
            gaps.append(cosine_gap_draws(code, labels, weights, centre=True))
    band = {name: np.array([figures[name] for figures in found]) for name in BAND_METRICS}
    out = {"draws": band, "trained": None}
    drawn = {}
    if trained:
        drawn["ari"] = ari_statistic(labels, np.stack(partitions))
        # resampled on some of the random compressors, moved to the mean of all of them
        centred = band["centred_cosine_gap"]
        drawn["centred_cosine_gap"] = (
            np.mean(gaps, 0) + centred.mean() - centred[: len(gaps)].mean()
        )
        clusters, out["trained"] = measure(run.representations["engram"])
        scores.add(run, "trained.ari", out["trained"]["ari"], ari_statistic(labels, clusters))
    for name, values in band.items():
        scores.add(run, f"random.{name}", values.mean(), drawn.get(name))
    return out


def _clusterings(run: Run, labels, scores: Scores, settings: Settings) -> measures.ClusterCounts:
    """A7: the engram's own number of clusters, and other ways to cluster it at k = C."""
    rows = measures.sample_rows(len(labels), settings.cluster_items)
    x, wanted, k = run.representations["engram"][rows], labels[rows], int(labels.max()) + 1
    points = measures.mixture_input(x, settings.mixture_dims)
    partitions = {
        "spherical k-means": measures.spherical_kmeans(x, k, run.seed, settings.layer_restarts),
        "Gaussian mixture": measures.mixture(points, k, run.seed).predict(points),
        "Ward": measures.ward(x, k),
    }
    for name, clusters in partitions.items():
        scores.add(run, f"{name}.ari", adjusted_rand(wanted, clusters))
    return measures.best_cluster_count(
        x,
        run.seed,
        settings.band_restarts,
        settings.mixture_dims,
        settings.silhouette_items,
        settings.most_clusters,
    )
