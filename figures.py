"""The figures of one results folder, as matplotlib Figures.

Each figure is readable alone: its title names the data set, the backbone, the number of items and
seeds, and what the interval is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from arm_figures import arms as all_arms
from arm_figures import audited_arm, gradients, has_arms, two_labels, width, widths_of
from arms import MAIN_ARMS
from drawing import PALETTE, count_of_seeds, headline, style
from values import PLACES, in_order, interval, is_comparable, subject, title_of

DIRECTIONS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
SHOWN = 2000  # items in t-SNE and spectra; as published for AG News, and done in a minute


def shown_arms(arms: Mapping | set) -> list[str]:
    """The three models in their order or, in a folder without them, whatever arms it holds."""
    return [arm for arm in MAIN_ARMS if arm in arms] or in_order(arms)


def engram_run(results: Mapping, features: Mapping) -> tuple[str, str] | None:
    """(arm, seed) the cluster figure shows: Model 3's first seed, else the first with engrams."""
    runs = [
        (arm, seed)
        for arm in sorted(results["rows"], key=lambda arm: (arm != "dual_engram", arm))
        for seed in sorted(results["rows"][arm], key=int)
        if results["rows"][arm][seed]["engram"] and f"{arm}/{seed}/engram" in features
    ]
    return runs[0] if runs else None


def expected(results: Mapping, features: Mapping) -> list[str]:
    """Names of the figures a folder with these results and features must hold, in both formats."""
    if "two-labels" in results["analysis"]:
        return ["learning_curves.png", "two_labels.png"]
    return [
        name
        for name, wanted in {
            "learning_curves.png": bool(_curve_arms(results)),
            "spectrum.png": bool(_feature_runs(results, features)),
            "controls.png": bool(_control_arms(results)),
            "engram_clusters.png": engram_run(results, features) is not None,
            "arms.png": has_arms(results),
            "width.png": len(widths_of(results)) > 1,
            "gradients.png": audited_arm(results) is not None,
        }.items()
        if wanted
    ]


def draw(results: Mapping, features: Mapping, published: Mapping | None) -> Iterator:
    """Yield (name, Figure) of every expected figure.

    Args:
        results: results.json. features: arrays of features.npz by key, or empty.
        published: published.json, or None.
    """
    drawers = {
        "learning_curves.png": lambda: learning_curves(results, published),
        "spectrum.png": lambda: spectrum(results, features),
        "controls.png": lambda: controls(results),
        "engram_clusters.png": lambda: engram_clusters(results, features),
        "arms.png": lambda: all_arms(results),
        "width.png": lambda: width(results),
        "gradients.png": lambda: gradients(results),
        "two_labels.png": lambda: two_labels(results),
    }
    for name in expected(results, features):
        yield name, drawers[name]()


def _colours(arms: list[str]) -> dict[str, str]:
    """A model keeps its colour in every folder, also where another model is missing."""
    order = MAIN_ARMS if arms[0] in MAIN_ARMS else arms
    return {arm: PALETTE[order.index(arm) % len(PALETTE)] for arm in arms}


def _curve_arms(results: Mapping) -> list[str]:
    return shown_arms(
        {
            arm
            for arm, runs in results["rows"].items()
            if any(run["epochs"] for run in runs.values())
        }
    )


def learning_curves(results: Mapping, published: Mapping | None) -> Figure:
    """Accuracy and losses a training epoch: mean and 95 % interval over seeds, published dashed."""
    split = results["dataset"]["eval_split"]
    panels = [
        (f"{split} accuracy", "eval_accuracy", "val_accuracy"),
        ("training accuracy, mean over the epoch", "train_accuracy", "train_accuracy"),
        (f"{split} classification loss (nats per text)", "eval_cls_loss", "val_cls_loss"),
        (f"{split} next-token loss (nats per token)", "eval_lm_loss", "val_lm_loss"),
    ]
    reference = published["arms"] if is_comparable(results, published) else {}
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    arms, dashed = _curve_arms(results), False
    colours = _colours(arms)
    for axes, (label, key, theirs) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        empty = True
        for arm in arms:
            curves = [[e[key] for e in run["epochs"]] for run in results["rows"][arm].values()]
            curves = [curve for curve in curves if curve and None not in curve]
            if curves:
                empty = False
                points = [interval(list(values)) for values in zip(*curves, strict=False)]
                x = np.arange(1, len(points) + 1)
                axes.plot(x, [p.mean for p in points], color=colours[arm], marker="o", ms=4)
                if len(curves) > 1:
                    low, high = [p.low for p in points], [p.high for p in points]
                    axes.fill_between(x, low, high, color=colours[arm], alpha=0.2, linewidth=0)
            if curve := reference.get(arm, {}).get(theirs):
                dashed, x = True, np.arange(1, len(curve) + 1)
                axes.plot(x, curve, color=colours[arm], linestyle="--", linewidth=1.3)
        axes.set(title=label, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        style(axes)
        if empty:
            axes.text(0.5, 0.5, "no arm here has this loss", ha="center", transform=axes.transAxes)
    handles = [Line2D([], [], color=colours[arm], marker="o", ms=4) for arm in arms]
    names = [f"{title_of(arm)} ({count_of_seeds(len(results['rows'][arm]))})" for arm in arms]
    if dashed:
        handles.append(Line2D([], [], color="#444444", linestyle="--"))
        names.append("published: one seed, same colours")
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    several = max(len(results["rows"][arm]) for arm in arms) > 1
    band = "line: mean over seeds; band: 95 % Student t interval over seeds"
    headline(figure, "Learning curves", subject(results), band if several else "one seed: no band")
    return figure


def spectrum(results: Mapping, features: Mapping) -> Figure:
    """Share of variance of each principal direction, mean over seeds, at equal N for all arms."""
    spaces = [
        ("pooled", "pooled state"),
        ("intermediate", "classifier layer"),
        ("engram", "engram"),
    ]
    runs = _feature_runs(results, features)
    arms = shown_arms({arm for arm, _ in runs})
    colours, items = _colours(arms), _sample(len(features["labels"]))
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    for axes, (space, label) in zip(figure.subplots(1, 3, sharey=True), spaces, strict=True):
        for arm in arms:
            keys = [f"{a}/{seed}/{space}" for a, seed in runs if a == arm]
            found = [_variances(features[key][items]) for key in keys if key in features]
            if not found:
                continue
            mean = np.mean([shares for shares, _ in found], axis=0)
            rank = interval([effective for _, effective in found])
            text = f"{title_of(arm)}\neffective rank {rank.mean:.1f}"
            if rank.low is not None:
                text += f" [{rank.low:.1f}, {rank.high:.1f}]"
            axes.plot(np.arange(1, len(mean) + 1), mean, color=colours[arm], label=text)
        if not axes.lines:
            axes.set_axis_off()
            continue
        axes.set(xscale="log", yscale="log", xlabel="principal direction", title=label)
        ticks = [tick for tick in DIRECTIONS if tick <= axes.dataLim.x1]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        style(axes)
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    least = min(line.get_ydata().min() for axes in figure.axes for line in axes.lines)
    figure.axes[0].set(ylabel="share of variance", ylim=(max(1e-7, least / 2), 1.5))
    seeds = max(len({seed for a, seed in runs if a == arm}) for arm in arms)
    over = "mean over " + count_of_seeds(seeds) if seeds > 1 else "one seed"
    brackets = "; brackets: 95 % Student t interval over seeds" if seeds > 1 else ""
    headline(
        figure,
        "How many directions the representations use",
        subject(results),
        f"{over}, the same {len(items):,} items for every arm{brackets}",
    )
    return figure


def _feature_runs(results: Mapping, features: Mapping) -> list[tuple[str, str]]:
    runs = [(arm, seed) for arm, seeds in results["rows"].items() for seed in seeds]
    return [(arm, seed) for arm, seed in runs if f"{arm}/{seed}/pooled" in features]


def _sample(count: int) -> np.ndarray:
    if count <= SHOWN:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, SHOWN, replace=False))


def _variances(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Shares of variance (min(N, width),) and effective rank of x, as clustering's."""
    x = x.astype(np.float64)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    if not values.any():  # every row is the same
        return values, 0.0
    shares = values[values > 0] / values.sum()
    effective = float(np.exp(-(shares * np.log(shares)).sum()))
    return values**2 / (values**2).sum(), effective


def engram_clusters(results: Mapping, features: Mapping) -> Figure:
    """One seed's engrams under t-SNE and PCA, coloured by true class and by k-means cluster."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    from clustering import cluster_accuracy, kmeans

    arm, seed = engram_run(results, features)
    engram = features[f"{arm}/{seed}/engram"].astype(np.float64)
    labels, classes = features["labels"], results["dataset"]["classes"]
    clusters = kmeans(engram, len(np.unique(labels)), int(seed)).clusters
    mapping = cluster_accuracy(labels, clusters).mapping
    items = _sample(len(labels))
    perplexity = min(30.0, (len(items) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
    pca = PCA(2).fit(engram)
    share = pca.explained_variance_ratio_.sum()
    rows = [
        (f"t-SNE, perplexity {perplexity:.0f}", tsne.fit_transform(engram[items])),
        (f"PCA, {100 * share:.0f} % of the variance", pca.transform(engram[items])),
    ]
    matched = np.array([mapping[cluster] for cluster in clusters])
    columns = [("true class", labels), ("k-means cluster", matched)]
    figure = Figure(figsize=(10, 9.6), layout="constrained")
    for line, (method, points) in zip(figure.subplots(2, 2), rows, strict=True):
        for axes, (what, groups) in zip(line, columns, strict=True):
            colours = np.array(PALETTE)[groups[items] % len(PALETTE)]
            axes.scatter(*points.T, c=colours, s=9, alpha=0.6, linewidths=0, rasterized=True)
            axes.set(title=f"{method}: coloured by {what}", xticks=[], yticks=[])
    cluster_of = {label: cluster for cluster, label in mapping.items()}
    handles = [Patch(color=PALETTE[label % len(PALETTE)]) for label in range(len(classes))]
    names = [
        f"{name} (right: cluster {cluster_of.get(label, 'none')})"
        for label, name in enumerate(classes)
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    scores, final = results["rows"][arm][seed]["engram"], results["rows"][arm][seed]["final"]
    drawn = "" if len(items) == len(labels) else f", {len(items):,} of the items drawn"
    headline(
        figure,
        f"Engrams of {title_of(arm)}, one seed ({seed}){drawn}",
        subject(results),
        f"k-means on the engrams: ARI {scores['ari']:.3f}, cluster accuracy "
        f"{scores['cluster_accuracy']:.3f}; the classifier's own predictions: ARI "
        f"{final['predictions_ari']:.3f}",
        "cluster colours: the class that each cluster matches best, one to one",
    )
    return figure


def _control_rows(results: Mapping) -> list[dict]:
    rows = (results.get("analysis") or {}).get("controls") or []
    return [row for row in rows if (row.get("ari") or {}).get("mean") is not None]


def _control_arms(results: Mapping) -> list[str]:
    # predictions alone are a line with nothing to set beside it
    return shown_arms({row["arm"] for row in _control_rows(results) if row["control"] != "A0"})


def controls(results: Mapping) -> Figure:
    """ARI of every representation against random compressors (A1) and the predictions (A0)."""
    rows, arms = _control_rows(results), _control_arms(results)
    # the representation in question on top, its rivals below, then where the features come from
    shown = sorted((r for r in rows if r["control"] != "A0"), key=lambda r: not _is_engram(r))
    labels = list(dict.fromkeys(map(_control_label, shown)))
    figure = Figure(figsize=(3.4 + 3.2 * len(arms), 2.6 + 0.27 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    for axes, arm in zip(panels, arms, strict=True):
        # the untrained network is the floor of every panel
        for row in (r for r in rows if r["arm"] in (arm, "untrained")):
            score = row["ari"]
            low = score["mean"] if score.get("low") is None else score["low"]
            high = score["mean"] if score.get("high") is None else score["high"]
            if row["control"] == "A0":
                axes.axvline(score["mean"], color="#D55E00", linewidth=1.5)
                continue
            if row["control"] == "A1":
                axes.axvspan(low, high, color="#56B4E9", alpha=0.3, linewidth=0)
            y = labels.index(_control_label(row))
            colour = {"A1": "#0072B2"}.get(row["control"], "#222222")
            colour, size = ("#CC79A7", 9) if _is_engram(row) else (colour, 5)
            axes.plot([low, high], [y, y], color=colour, linewidth=size / 3)
            axes.plot(score["mean"], y, "o", color=colour, ms=size)
        axes.set(title=title_of(arm), xlabel="ARI against the classes")
        style(axes)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    handles = {
        "the trained engram": Line2D([], [], color="#CC79A7", marker="o", ms=9, linewidth=3),
        "k-means on that representation": Line2D([], [], color="#222222", marker="o", ms=5),
        "middle 95 % of random compressors (A1)": Patch(color="#56B4E9", alpha=0.3),
        "the classifier's own predictions (A0)": Line2D([], [], color="#D55E00"),
    }
    if not any(map(_is_engram, rows)):
        del handles["the trained engram"]
    if not any(row["control"] == "A1" for row in rows):
        del handles["middle 95 % of random compressors (A1)"]
    columns = min(len(handles), int(figure.get_figwidth() // 3.2))
    legend = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(handles.values(), handles.keys(), **legend)
    seeds = max(row["ari"].get("n_seeds") or 1 for row in rows)
    headline(
        figure,
        "What the clusters are owed to: k-means on each representation",
        subject(results),
        f"{count_of_seeds(seeds)}; lines: 95 % intervals",
    )
    return figure


def _is_engram(row: Mapping) -> bool:
    return (row["control"], row.get("representation")) == ("A4", "engram")


_CODES = {
    "A1": "random compressor",
    "A2": "compressor's initial weights",
    "A3": "{name} of what it reads",
    "A7": "trained engram by {name}",
}


def _control_label(row: Mapping) -> str:
    """What the row's representation is, in words, with the control's id."""
    place = row.get("representation") or ""
    if row["control"] in _CODES:
        words = _CODES[row["control"]].format(name=row["name"])
    else:
        floor = "untrained network: " if row["control"] == "A6" else ""
        words = floor + ("trained engram" if _is_engram(row) else PLACES.get(place, place))
    return f"{words} ({row['control']})"
