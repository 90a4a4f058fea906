"""Figures across arms: every condition, the bottleneck's width, two labels, the gradients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from arms import ARMS, MAIN_ARMS
from drawing import (
    BAND,
    PALETTE,
    PLAIN,
    PREDICTED,
    TRAINED,
    count_of_seeds,
    headline,
    style,
)
from values import PLACES, in_order, interval, subject, title_of

_TRAINED, _UNTRAINED, _RANDOM = ("A4", "engram"), ("A6", "engram"), ("A1", "engram")


def _score(results: Mapping, arm: str, control: tuple[str, str]) -> Mapping:
    """{mean, low, high} ARI of an arm's control, empty where there is none."""
    for row in (results.get("analysis") or {}).get("controls") or []:
        if (row["control"], row["representation"]) == control and row["arm"] == arm:
            return row.get("ari") or {}
    return {}


def has_arms(results: Mapping) -> bool:
    """Whether a folder holds more conditions than the three models."""
    return len(set(results["rows"]) - set(MAIN_ARMS)) > 1


def widths_of(results: Mapping) -> dict[int, str]:
    """Arms with an engram by its width, ascending; the unnamed one has the run's width."""
    known = [ARMS[name] for name in results["rows"] if name in ARMS]
    found = {arm.engram_dim: arm.name for arm in known if arm.engram_dim}
    if found and "dual_engram" in results["rows"]:
        found.setdefault(results["config"]["engram_dim"], "dual_engram")
    return {width: arm for width, arm in sorted(found.items()) if _score(results, arm, _TRAINED)}


def arms(results: Mapping) -> Figure:
    """Accuracy, and ARI of engram, random compressors and predictions, of every condition."""
    names = in_order(results["rows"])
    figure = Figure(figsize=(11, 2.6 + 0.36 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    accuracies, bands, trained = [], 0, 0
    for y, arm in enumerate(names):
        finals = [run["final"] for run in results["rows"][arm].values()]
        accuracy = interval([final["accuracy"] for final in finals])
        predicted = interval([final["predictions_ari"] for final in finals])
        _bar(left, accuracy.mean, accuracy.low, accuracy.high, y, PLAIN, 5)
        accuracies.append(accuracy)
        right.plot(predicted.mean, y, "|", color=PREDICTED, ms=13, mew=2)
        if band := _score(results, arm, _RANDOM):
            bands += 1
            right.plot([band["low"], band["high"]], [y, y], color=BAND, linewidth=7, alpha=0.5)
        if score := _score(results, arm, _TRAINED) or _score(results, arm, _UNTRAINED):
            trained += 1
            _bar(right, score["mean"], score.get("low"), score.get("high"), y, TRAINED, 7)
    # a classifier that was never trained has an interval from wall to wall: cut, with an arrow
    means = [found.mean for found in accuracies]
    low, high = max(0.0, min(means) - 0.05), min(1.0, max(means) + 0.1)
    cut = [
        (edge, y, mark)
        for y, found in enumerate(accuracies)
        for edge, mark, end in ((low, "<", found.low), (high, ">", found.high))
        if end is not None and not low <= end <= high
    ]
    for edge, y, mark in cut:
        left.plot(edge, y, mark, color=PLAIN, ms=7, clip_on=False)
    left.set_xlim(low, high)
    counts = [len(results["rows"][arm]) for arm in names]
    labels = [f"{title_of(a)} ({count_of_seeds(n)})" for a, n in zip(names, counts, strict=True)]
    left.set_yticks(range(len(names)), labels)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set(xlabel=f"{results['dataset']['eval_split']} accuracy, last epoch", title="accuracy")
    right.set(xlabel="ARI against the classes", title="clusters")
    for axes in (left, right):
        style(axes)
    handles = {
        "the arm's own engram": Line2D([], [], color=TRAINED, marker="o", ms=7),
        "random compressors on the same features, middle 95 %": Line2D(
            [], [], color=BAND, linewidth=7, alpha=0.5
        ),
        "predictions": Line2D([], [], color=PREDICTED, marker="|", ms=13, mew=2, linewidth=0),
    }
    if not trained:
        del handles["the arm's own engram"]
    if not bands:
        del handles["random compressors on the same features, middle 95 %"]
    legend = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(handles.values(), handles.keys(), **legend)
    headline(
        figure,
        "Every condition: accuracy, and what k-means finds",
        subject(results),
        "lines: 95 % intervals, over seeds (accuracy), over seeds and items (engram)"
        + ("; arrow: cut at the axis" if cut else ""),
    )
    return figure


def _bar(axes, mean: float, low: float | None, high: float | None, y: int, colour, size) -> None:
    if low is not None:
        axes.plot([low, high], [y, y], color=colour, linewidth=size / 3)
    axes.plot(mean, y, "o", color=colour, ms=size)


def width(results: Mapping) -> Figure:
    """ARI of trained engrams and of random compressors against the engram's width."""
    found = widths_of(results)
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots()
    x = list(found)
    trained = [_score(results, arm, _TRAINED) for arm in found.values()]
    bands = [(w, _score(results, arm, _RANDOM)) for w, arm in found.items()]
    bands = [(w, band) for w, band in bands if band]
    places = [w for w, _ in bands]
    low, high = ([band[end] for _, band in bands] for end in ("low", "high"))
    axes.fill_between(places, low, high, color=BAND, alpha=0.3, linewidth=0)
    axes.plot(places, [band["mean"] for _, band in bands], color=BAND, linewidth=1.5)
    means = [score["mean"] for score in trained]
    ends = [
        [abs(score[end] - score["mean"]) if score.get(end) is not None else 0 for score in trained]
        for end in ("low", "high")
    ]
    axes.errorbar(x, means, ends, color=TRAINED, marker="o", ms=7, capsize=3)
    predicted = [
        interval([run["final"]["predictions_ari"] for run in results["rows"][arm].values()]).mean
        for arm in found.values()
    ]
    axes.plot(x, predicted, color=PREDICTED, linestyle="--", marker="|", ms=10)
    axes.set(xlabel="width of the engram", ylabel="ARI against the classes", xscale="log")
    axes.set_xticks(x, [str(value) for value in x])
    axes.minorticks_off()
    style(axes)
    handles = [
        Line2D([], [], color=TRAINED, marker="o", ms=7),
        Patch(color=BAND, alpha=0.3),
        Line2D([], [], color=PREDICTED, linestyle="--", marker="|", ms=10),
    ]
    texts = ["trained engram", "random compressors of that width", "the arm's predictions"]
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False)
    seeds = min(len(results["rows"][arm]) for arm in found.values())
    headline(
        figure,
        "Does the width of the bottleneck matter?",
        subject(results),
        f"{count_of_seeds(seeds)}; bars: 95 % over seeds and items; band: middle 95 % of draws",
    )
    return figure


def two_labels(results: Mapping) -> Figure:
    """AMI of each representation's clusters with both labels, and a linear probe of both."""
    rows, tasks = results["analysis"]["two-labels"], results["dataset"]["tasks"]
    conditions = list(dict.fromkeys(row["arm"] for row in rows))
    conditions.sort(key=lambda name: [*tasks, "neither"].index(name.split("-")[0]), reverse=True)
    places = ["engram", "random compressor", "intermediate", "pooled"]
    colours, marks = dict(zip(tasks, PALETTE, strict=False)), dict(zip(tasks, "os", strict=False))
    figure = Figure(figsize=(10.5, 2.6 + 1.05 * len(conditions)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    what = ("adjusted mutual information of the clusters", "accuracy of a linear probe")
    heights = {}
    for number, condition in enumerate(conditions):
        for place, name in enumerate(places):
            heights[condition, name] = number * (len(places) + 2) + len(places) - 1 - place
    for axes, prefix, label in zip(panels, ("ami", "probe"), what, strict=True):
        for row in rows:
            band = row["representation"] == "random compressor"
            for shift, task in zip((0.14, -0.14), tasks, strict=True):
                score, colour = row[f"{prefix}_{task}"], colours[task]
                y = heights[row["arm"], row["representation"]] + shift
                ends = [score["mean"] if score[e] is None else score[e] for e in ("low", "high")]
                axes.plot(
                    ends, [y, y], color=colour, alpha=0.35 if band else 1, lw=6 if band else 2
                )
                hollow = {"mfc": "white"} if band else {}
                axes.plot(score["mean"], y, marks[task], color=colour, ms=5, **hollow)
        if prefix == "probe":
            for task, classes in tasks.items():
                axes.axvline(1 / len(classes), color=colours[task], ls=":", lw=1.2)
        axes.set(xlabel=label)
        style(axes)
        for number in range(1, len(conditions)):
            axes.axhline(number * (len(places) + 2) - 1, color="#999999", lw=0.6)
    words = {name: PLACES.get(name, name) for name in places}
    ticks = [(y, words[name]) for (_, name), y in heights.items()]
    panels[0].set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
    for number, condition in enumerate(conditions):
        x, y = panels[0].get_xlim()[1], number * (len(places) + 2) + len(places)
        text = f"trained on: {title_of(condition)}"
        panels[0].text(x, y, text, ha="right", va="center_baseline", fontsize=9, weight="bold")
    handles = [
        *(Line2D([], [], color=colours[t], marker=marks[t], ms=5, lw=2) for t in tasks),
        Line2D([], [], color="#777777", marker="o", mfc="white", ms=5, lw=6, alpha=0.5),
        Line2D([], [], color="#444444", ls=":", lw=1.2),
    ]
    names = [f"{task} (k = {len(classes)})" for task, classes in tasks.items()]
    names += ["random compressors: mean, middle 95 %", "chance, in the label's colour"]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    seeds = max(row["probe_" + next(iter(tasks))]["n_seeds"] for row in rows)
    headline(
        figure,
        "Two independent labels in one text: which one is kept, and what becomes of the other?",
        subject(results),
        f"{count_of_seeds(seeds)}; lines: 95 %, items and seeds resampled; "
        "wide pale lines: 95 % of the draws",
    )
    return figure


def gradients(results: Mapping) -> Figure:
    """Norms of both losses' gradients while Model 3 trains, and where the compressor's points."""
    rows = {row["id"]: row for row in results["analysis"]["gradients"]}
    arm = audited_arm(results)
    runs = [run["audits"] for run in results["rows"][arm].values() if run.get("audits")]
    steps = [record["step"] for record in runs[0]]
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2)

    def line(axes, what: str, where: str, loss: str, **look) -> None:
        values = np.array([[r[what][where][loss] or np.nan for r in audits] for audits in runs])
        axes.plot(steps, np.mean(values, 0), **look)
        axes.fill_between(steps, *np.quantile(values, [0, 1], 0), color=look["color"], alpha=0.15)

    sites = {"backbone": PALETTE[0], "tap": PALETTE[2], "compressor": TRAINED}
    for site, colour in sites.items():
        for loss, dash in (("cls", "-"), ("lm", "--")):
            if all(loss in r["norm"][site] for audits in runs for r in audits):
                line(left, "norm", site, loss, color=colour, ls=dash)
    left.set(yscale="log", xlabel="optimizer step", ylabel="norm of the gradient")
    handles = [Line2D([], [], color=colour) for colour in sites.values()]
    handles += [Line2D([], [], color=PLAIN, ls=dash) for dash in ("-", "--")]
    words = ["backbone's weights", "what the compressor reads", "compressor's weights"]
    words += ["classification", "next token"]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "fontsize": 8, "frameon": False}
    left.legend(handles, words, ncols=3, **below)
    shares = {
        "the class means": ("classes", TRAINED, "-"),
        "the same, errors exchanged": ("exchanged", PLAIN, "-."),
        "permuted labels' means": ("spread", BAND, "-"),
        "the features' mean": ("mean", PREDICTED, "--"),
    }
    for words, (kind, colour, dash) in shares.items():
        line(right, "share", kind, "both", color=colour, ls=dash, label=words)
    uniform = rows[f"{arm}/compressor"]["share_uniform"]["mean"]
    right.axhline(uniform, color="#777777", ls=":", label="a direction at random")
    right.set(
        ylim=(0, 1), xlabel="optimizer step", ylabel="share of the compressor's gradient along"
    )
    right.legend(ncols=2, **below)
    for axes in (left, right):
        style(axes)
    headline(
        figure,
        f"Where the gradients go: {title_of(arm)}",
        subject(results),
        f"{count_of_seeds(len(runs))}; lines: means, bands: range over seeds",
    )
    return figure


def audited_arm(results: Mapping) -> str | None:
    """The arm whose compressor's gradient the figure shows: Model 3's, else the first."""
    audited = [
        row["arm"]
        for row in results["analysis"].get("gradients", [])
        if row["site"] == "compressor"
    ]
    return "dual_engram" if "dual_engram" in audited else next(iter(audited), None)
