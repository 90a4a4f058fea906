"""The rules by which each claim of the study is answered: written, as data, before any number.

CLAIMS are the rows of the verdict table. A rule sees an `Evidence` and answers with a word
of rules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from contrasts import B2, GAINS, M1, M2, M3, published_figure
from inference import ARI_MARGIN
from rules import (
    MIN_SEEDS,
    OPEN,
    REFUTED,
    SUPPORTED,
    Evidence,
    Verdict,
    decide,
    decide_equal,
    decide_interval,
    every,
    some,
)

SHARE_MARGIN = 0.05  # of a gradient: less along the class means than that is no mechanism


def _published_gain(first: str, second: str) -> Callable[[Mapping], float | None]:
    def gain(published):
        a, b = (published_figure(published, arm, "val_accuracy") for arm in (first, second))
        return None if a is None or b is None else round(a - b, 6)

    return gain


def _published_ranks(published: Mapping) -> dict | None:
    return published.get("effective_rank")


def _clusters_at_all(e: Evidence) -> Verdict:
    # the margin on both sides: an ARI of 0.03 whose interval excludes 0 is chance told apart from
    # nothing by many items, not a clustering; the small study's first run was called one
    floor = (e.control("A6", "untrained", "untrained").get("ari") or {}).get("high") or 0.0
    return decide_interval(e.engram.get("ari"), "ARI", max(ARI_MARGIN, floor), ARI_MARGIN)


def _because_of_objective(e: Evidence) -> Verdict:
    # the trained code above random, no-LM, the predictions and PCA; above its own initial weights
    # by the margin; and used by something. E11 to E14 are about the features it reads: shown only
    above = (decide(e.contrasts.get(i)) for i in ("P1", "P2", "E3", "E5", "E6"))
    moved = decide_interval(e.contrasts.get("E4"), "E4", ARI_MARGIN, ARI_MARGIN)
    used = some(decide(e.contrasts.get("E15")), decide(e.contrasts.get("E16"), direction=-1))
    return every(*above, moved, used)


def _zero_supervision(e: Evidence) -> Verdict:
    if (row := e.contrasts.get("E8")) and row["estimate"] is not None:
        ari = e.control("A4", "trained", B2).get("ari")
        return every(decide(row), decide_interval(ari, "ARI", ARI_MARGIN, ARI_MARGIN))
    excess = decide(e.contrasts.get("E3"))
    if excess.verdict == REFUTED:
        return Verdict(REFUTED, "E3: the clusters hold no more than the supervised predictions")
    return Verdict(OPEN, "E8 not measured; the labels reach the layer that is compressed")


def _most_salient(e: Evidence) -> Verdict:
    counts = e.control("A7", "best number of clusters", M3).get("seeds", {})
    if len(counts) < MIN_SEEDS:
        return Verdict(OPEN, f"A7: {len(counts)} of {MIN_SEEDS} seeds")
    ari = decide_interval(e.engram.get("ari"), "ARI", ARI_MARGIN, ARI_MARGIN)
    if ari.verdict == REFUTED:
        return Verdict(REFUTED, "the engram's clusters are not the classes")
    right = [
        sum(count[f"best_{by}"] == e.classes for count in counts.values())
        for by in ("silhouette", "bic")
    ]
    if max(right) * 2 < len(counts):
        return Verdict(REFUTED, "A7: neither criterion finds as many clusters as classes")
    found = f"A7: k = C in {right[0]} (silhouette), {right[1]} (BIC) of {len(counts)} seeds"
    if e.measured.get("most_salient"):
        # AMI(task) - AMI(rival label): within the margin the two are followed alike
        test = e.measured["most_salient"]
        rival = decide_interval(test, "two-label test", ARI_MARGIN, ARI_MARGIN)
        return every(rival, ari)
    return Verdict(OPEN, f"{found}; no rival label")


def _cosine_gap(e: Evidence) -> Verdict:
    gap = decide_interval(e.engram.get("centred_cosine_gap"), "gap")
    return every(gap, decide(e.contrasts.get("E7")))


def _same_on_both(e: Evidence) -> Verdict:
    here = decide_equal(e.contrasts.get("E17"))
    if here.verdict != SUPPORTED:
        return here
    return Verdict(OPEN, f"{here.because}; one data set cannot show it for both")


def _rank_collapse(e: Evidence) -> Verdict:
    # below Model 2 is not enough: both ranks may have risen
    fallen = decide(e.contrasts.get("E26"), direction=-1)
    return every(decide(e.contrasts.get("P6")), fallen)


def _grows(e: Evidence) -> Verdict:
    small, large = e.contrasts.get("P3"), e.contrasts.get("P4")
    for row in (small, large):
        if not row or row["estimate"] is None or row["n_seeds"] < MIN_SEEDS:
            return Verdict(OPEN, "P3 and P4 not both measured at this scale")
    if large["low"] > small["high"]:
        return Verdict(SUPPORTED, "P4's interval lies above P3's")
    if large["high"] < small["low"]:
        return Verdict(REFUTED, "P4's interval lies below P3's")
    return Verdict(OPEN, "the intervals of P3 and P4 overlap")


def _small_hurts(e: Evidence) -> Verdict:
    if "from scratch" not in e.backbone:
        return Verdict(OPEN, "not the small scale")
    return decide(e.contrasts.get("P5"), direction=-1)


def _own_gain(e: Evidence) -> str | None:
    return {slug: id for id, slug in GAINS.items()}.get(e.slug)


def _any_task(e: Evidence) -> Verdict:
    here = _because_of_objective(e)
    if here.verdict == REFUTED:
        return Verdict(REFUTED, f"does not hold here ({here.because})")
    return Verdict(OPEN, "one data set cannot show it")


def _keep_lm_head(e: Evidence) -> Verdict:
    return some(decide(e.contrasts.get("P2")), decide(e.contrasts.get(_own_gain(e))))


@dataclass(frozen=True)
class Claim:
    """A row of the verdict table.

    Args:
        published: figure of the study's block, or None.
        contrast: id of the contrast it turns on; ours: an interval to show beside `published`
            instead of the contrast's. level: whether it turns on `ours` all the same.
        band: metric whose random compressors are the control band.
        further: what would decide it once there are seeds, where that is something else.
    """

    id: str
    claim: str
    rule: Callable[[Evidence], Verdict]
    would_decide: str
    published: Callable[[Mapping], object] = lambda published: None
    contrast: str | None = None
    ours: Callable[[Evidence], Mapping | None] | None = None
    band: str | None = None
    further: str | None = None
    level: bool = False


def _of(arm: str, *fields: str) -> Callable[[Mapping], object]:
    def read(published):
        found = {field: published_figure(published, arm, field) for field in fields}
        if None in found.values():
            return None
        return found if len(fields) > 1 else found[fields[0]]

    return read


def _on(id: str, rule: Callable = decide) -> Callable[[Evidence], Verdict]:
    return lambda e: rule(e.contrasts.get(id))


def _mechanism(e: Evidence) -> Verdict:
    # share of the compressor's gradient along the class means, less the same with errors exchanged
    measured = e.measured.get("gradient_mechanism")
    return decide_interval(measured, "gradient audit", SHARE_MARGIN, SHARE_MARGIN)


_TUNE = "arms classification_tuned and dual_tuned, 3 seeds or more"
_MORE = "more seeds, or more evaluation texts"
CLAIMS = (
    Claim(
        "clusters_at_all",
        "the engram clusters at all",
        _clusters_at_all,
        "more seeds, or an engram whose ARI lies further from the margin",
        _of(M3, "ari"),
        "E10",
        lambda e: e.engram.get("ari"),
        "ari",
        level=True,
    ),
    Claim(
        "because_of_objective",
        "it clusters because of the dual objective",
        _because_of_objective,
        "arm classification_engram (P2), more seeds",
        _of(M3, "ari"),
        "P1",
        band="ari",
    ),
    Claim(
        "zero_supervision",
        "it clusters with zero supervision",
        _zero_supervision,
        "arm lm_only_engram (B2), 3 seeds or more",
        _of(M3, "ari"),
        "E8",
        lambda e: e.control("A4", "trained", B2).get("ari"),
    ),
    Claim(
        "most_salient",
        "it finds the most salient dimension",
        _most_salient,
        "the two-label test (C)",
        ours=lambda e: e.measured.get("most_salient"),
        further=_MORE,
    ),
    Claim(
        "same_on_both",
        "cluster accuracy is the published figure on both data sets",
        _same_on_both,
        "both data sets at the published scale, 3 seeds or more",
        _of(M3, "cluster_accuracy"),
        "E17",
        lambda e: e.engram.get("cluster_accuracy"),
        "cluster_accuracy",
    ),
    Claim(
        "cosine_gap",
        "cosines are higher within classes than between",
        _cosine_gap,
        "more seeds",
        _of(M3, "cosine_within", "cosine_between"),
        "E7",
        lambda e: e.engram.get("centred_cosine_gap"),
        "centred_cosine_gap",
    ),
    Claim(
        "dual_gain_sst2",
        "the dual objective gains accuracy on SST-2",
        _on("P3"),
        _TUNE,
        _published_gain(M2, M1),
        "P3",
        further=_MORE,
    ),
    Claim(
        "dual_gain_agnews",
        "the dual objective gains accuracy on AG News",
        _on("P4"),
        _TUNE,
        _published_gain(M2, M1),
        "P4",
        further=_MORE,
    ),
    Claim(
        "gain_grows",
        "the gain grows with the task",
        _grows,
        "P3 and P4 at one scale, in narrower intervals",
        ours=lambda e: None,
    ),
    Claim(
        "engram_delta",
        "the engram adds accuracy",
        _on("P5"),
        "more seeds and items: the published difference is a few items",
        _published_gain(M3, M2),
        "P5",
    ),
    Claim(
        "rank_collapse",
        "classification alone collapses the rank",
        _rank_collapse,
        "more seeds",
        _published_ranks,
        "P6",
    ),
    Claim(
        "engram_leaves_rank",
        "the engram leaves the rank alone",
        _on("E9", decide_equal),
        "more seeds",
        _published_ranks,
        "E9",
    ),
    Claim(
        "small_engram_hurts",
        "at small scale the engram hurts",
        _small_hurts,
        "the small study, more seeds",
        _published_gain(M3, M2),
        "P5",
    ),
    Claim(
        "gradient_mechanism",
        "the bottleneck is a gradient-weighted projection",
        _mechanism,
        "the gradient audit (B14)",
        ours=lambda e: e.measured.get("gradient_mechanism"),
    ),
    Claim(
        "any_task",
        "it holds on any classification task",
        _any_task,
        "more data sets; one counterexample is enough",
        contrast="P1",
    ),
    Claim(
        "keep_lm_head",
        "keep the LM head",
        _keep_lm_head,
        "arm classification_engram (P2) and tuned rates (P3, P4)",
        contrast="P2",
        further=_MORE,
    ),
)


def _shown(found: Mapping) -> dict:
    """Of an interval or a contrast's row: mean, low, high, n."""
    ends = {part: found.get(part) for part in ("low", "high")}
    mean = found.get("mean", found.get("estimate"))
    return {"mean": mean, **ends, "n": found.get("n_seeds", 0)}


def _row(claim: Claim, e: Evidence) -> dict:
    contrast = e.contrasts.get(claim.contrast) or {}
    ours = claim.ours(e) if claim.ours else contrast
    ours = ours or {}
    band = e.control("A1", "random compressor", M3).get(claim.band) if claim.band else None
    found = claim.rule(e)
    seeds = ours.get("n_seeds", 0)
    lacking = claim.further if seeds >= MIN_SEEDS and claim.further else claim.would_decide
    right_data = not claim.id.startswith("dual_gain") or _own_gain(e) == claim.contrast
    decisive = ours if claim.level or not claim.contrast else contrast
    return {
        "id": claim.id,
        "claim": claim.claim,
        "published": claim.published(e.published) if right_data else None,
        "ours": _shown(ours),
        "turns_on": _shown(decisive) | {"where": decisive.get("where")},
        "control_band": band and {part: band[part] for part in ("low", "high")},
        "contrast": claim.contrast,
        "p_adjusted": contrast.get("p_adjusted"),
        "scale": f"{e.backbone}; {e.dataset}".strip("; ") or None,
        "verdict": found.verdict,
        "because": found.because,
        "would_decide": lacking if found.verdict == OPEN else None,
    }


def verdicts(evidence: Evidence) -> list[dict]:
    """The rows of the verdict table, one a claim, in CLAIMS' order."""
    return [_row(claim, evidence) for claim in CLAIMS]
