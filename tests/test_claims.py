"""Each rule comes out each way on made-up evidence; what is missing decides nothing."""

import pytest

from claims import CLAIMS, verdicts
from rules import OPEN, REFUTED, SUPPORTED, Evidence, decide, decide_equal


def contrast(id="P1", estimate=0.2, half=0.05, p=0.001, seeds=5, equivalent=False):
    return {
        "id": id,
        "estimate": estimate,
        "low": estimate - half,
        "high": estimate + half,
        "p_adjusted": p,
        "n_seeds": seeds,
        "equivalence": {"equivalent": equivalent},
    }


MISSING = {"id": "P2", "estimate": None, "p_adjusted": None, "n_seeds": 0, "equivalence": None}
UP, DOWN = contrast(), contrast(estimate=-0.2)
SAME, UNSURE = contrast(estimate=0, p=1, equivalent=True), contrast(estimate=0.01, p=0.6)


@pytest.mark.parametrize(
    ("row", "up", "down", "equal"),
    [
        (UP, SUPPORTED, REFUTED, REFUTED),
        (DOWN, REFUTED, SUPPORTED, REFUTED),
        (SAME, REFUTED, REFUTED, SUPPORTED),
        (UNSURE, OPEN, OPEN, OPEN),
        (contrast(half=0.3), OPEN, OPEN, OPEN),  # significant, but its interval holds 0
        (contrast(p=0.05), OPEN, OPEN, OPEN),
        (contrast(seeds=2), OPEN, OPEN, OPEN),
        (contrast(estimate=0, p=1, equivalent=True, seeds=2), OPEN, OPEN, OPEN),
        # a difference that is there but too small to matter
        (contrast(estimate=0.01, half=0.005, equivalent=True), SUPPORTED, REFUTED, SUPPORTED),
        (MISSING, OPEN, OPEN, OPEN),
        (None, OPEN, OPEN, OPEN),
    ],
)
def test_decide_follows_its_table(row, up, down, equal):
    found = decide(row).verdict, decide(row, -1).verdict, decide_equal(row).verdict
    assert found == (up, down, equal)


def interval(mean, half=0.02, seeds=5):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n_seeds": seeds}


def evidence(
    ari=0.8,
    gap=0.5,
    best=(2, 2),
    floor=None,
    without_labels=None,
    measured=None,
    slug="sst2",
    **contrasts,
):
    engram = {"control": "A4", "name": "trained", "arm": "dual_engram", "representation": "engram"}
    counts = {"best_silhouette": best[0], "best_bic": best[1]}
    controls = [
        engram | {"ari": interval(ari), "centred_cosine_gap": interval(gap)},
        engram
        | {"control": "A7", "name": "best number of clusters"}
        | {"seeds": dict.fromkeys("012", counts)},
        engram | {"control": "A1", "name": "random compressor", "ari": {"low": 0.3, "high": 0.4}},
    ]
    if floor is not None:
        controls.append(
            engram
            | {"control": "A6", "name": "untrained", "arm": "untrained", "ari": interval(floor)}
        )
    if without_labels is not None:
        controls.append(engram | {"arm": "lm_only_engram", "ari": interval(without_labels)})
    rows = {id: row | {"id": id} for id, row in contrasts.items()}
    published = {
        "arms": {
            "classification": {"val_accuracy": [0.5, 0.9]},
            "dual": {"val_accuracy": [0.6, 0.95]},
            "dual_engram": {"ari": 0.83, "cosine_within": 0.9, "cosine_between": 0.8},
        },
        "effective_rank": {"classification": 5.0},
    }
    return Evidence(rows, controls, 2, slug, "made up", "from scratch", measured or {}, published)


def verdict(claim, **known):
    return next(row for row in verdicts(evidence(**known)) if row["id"] == claim)["verdict"]


ALL = dict.fromkeys(("P1", "P2", "E3", "E4", "E5", "E6", "E15"), UP)
CASES = [
    ("clusters_at_all", SUPPORTED, {}),
    ("clusters_at_all", SUPPORTED, {"floor": 0.1}),
    ("clusters_at_all", OPEN, {"floor": 0.9}),
    ("clusters_at_all", REFUTED, {"ari": 0.0}),
    ("clusters_at_all", REFUTED, {"ari": 0.029}),  # 0.009 to 0.049: above 0, below the margin
    ("clusters_at_all", OPEN, {"ari": 0.06}),  # 0.04 to 0.08: the margin lies inside
    ("clusters_at_all", SUPPORTED, {"ari": 0.08}),
    ("because_of_objective", SUPPORTED, ALL),
    ("because_of_objective", REFUTED, ALL | {"P1": SAME}),
    ("because_of_objective", REFUTED, ALL | {"E5": DOWN}),
    ("because_of_objective", REFUTED, ALL | {"E3": DOWN}),
    ("because_of_objective", REFUTED, ALL | {"E4": contrast(estimate=0.03, half=0.01)}),
    ("because_of_objective", OPEN, ALL | {"E4": contrast(estimate=0.06, half=0.04)}),
    ("because_of_objective", SUPPORTED, ALL | {"E15": UNSURE, "E16": DOWN}),  # a lower LM loss
    ("because_of_objective", REFUTED, ALL | {"E15": SAME, "E16": UP}),
    ("because_of_objective", OPEN, ALL | {"E15": SAME, "E16": UNSURE}),
    ("because_of_objective", OPEN, ALL | {"P2": MISSING}),
    ("because_of_objective", OPEN, ALL | {"E4": MISSING}),
    ("zero_supervision", SUPPORTED, {"E8": UP, "E3": DOWN, "without_labels": 0.3}),
    ("zero_supervision", REFUTED, {"E8": UP, "without_labels": 0.013}),  # chance, told apart
    ("zero_supervision", REFUTED, {"E8": SAME, "without_labels": 0.5}),
    ("zero_supervision", OPEN, {"E8": UP}),
    ("zero_supervision", REFUTED, {"E8": MISSING, "E3": DOWN}),
    ("zero_supervision", OPEN, {"E8": MISSING, "E3": UP}),
    ("most_salient", SUPPORTED, {"measured": {"most_salient": interval(0.3)}}),
    ("most_salient", REFUTED, {"measured": {"most_salient": interval(-0.3)}}),
    ("most_salient", REFUTED, {"best": (3, 5)}),
    ("most_salient", REFUTED, {"ari": 0.0}),
    ("most_salient", OPEN, {}),
    ("same_on_both", OPEN, {"E17": SAME}),
    ("same_on_both", REFUTED, {"E17": DOWN}),
    ("cosine_gap", SUPPORTED, {"E7": UP}),
    ("cosine_gap", REFUTED, {"E7": SAME}),
    ("cosine_gap", REFUTED, {"E7": UP, "gap": -0.1}),
    ("dual_gain_sst2", SUPPORTED, {"P3": UP}),
    ("dual_gain_sst2", REFUTED, {"P3": SAME}),
    ("dual_gain_sst2", OPEN, {"E1": UP}),  # the recipe's rate is not admissible
    ("dual_gain_agnews", SUPPORTED, {"P4": UP}),
    ("dual_gain_agnews", REFUTED, {"P4": SAME}),
    ("gain_grows", SUPPORTED, {"P3": SAME, "P4": UP}),
    ("gain_grows", REFUTED, {"P3": UP, "P4": SAME}),
    ("gain_grows", OPEN, {"P3": UP, "P4": UP}),
    ("gain_grows", OPEN, {"P4": UP}),
    ("engram_delta", SUPPORTED, {"P5": UP}),
    ("engram_delta", REFUTED, {"P5": SAME}),
    ("rank_collapse", SUPPORTED, {"P6": UP, "E26": DOWN}),
    ("rank_collapse", REFUTED, {"P6": DOWN, "E26": DOWN}),
    ("rank_collapse", REFUTED, {"P6": UP, "E26": UP}),  # both have risen
    ("rank_collapse", OPEN, {"P6": UP}),
    ("engram_leaves_rank", SUPPORTED, {"E9": SAME}),
    ("engram_leaves_rank", REFUTED, {"E9": UP}),
    ("small_engram_hurts", SUPPORTED, {"P5": DOWN}),
    ("small_engram_hurts", REFUTED, {"P5": UP}),
    ("gradient_mechanism", SUPPORTED, {"measured": {"gradient_mechanism": interval(0.3)}}),
    ("gradient_mechanism", REFUTED, {"measured": {"gradient_mechanism": interval(-0.3)}}),
    ("gradient_mechanism", OPEN, {"measured": {"gradient_mechanism": interval(0.3, seeds=2)}}),
    ("any_task", REFUTED, {"P1": SAME}),
    ("any_task", OPEN, ALL),
    ("keep_lm_head", SUPPORTED, {"P2": UP}),
    ("keep_lm_head", SUPPORTED, {"P2": SAME, "P3": UP}),
    ("keep_lm_head", REFUTED, {"P2": SAME, "P3": DOWN}),
    ("keep_lm_head", OPEN, {"P2": SAME, "P3": UNSURE}),
]


@pytest.mark.parametrize(("claim", "wanted", "known"), CASES)
def test_each_rule_comes_out_as_its_evidence(claim, wanted, known):
    assert verdict(claim, **known) == wanted


def test_every_claim_is_tested_both_ways_and_open_without_evidence():
    both = {(claim, wanted) for claim, wanted, _ in CASES}
    one_run_cannot = {("any_task", SUPPORTED), ("same_on_both", SUPPORTED)}
    for claim in CLAIMS:
        assert {(claim.id, SUPPORTED), (claim.id, REFUTED)} <= both | one_run_cannot
    nothing = Evidence({}, [], 0, None, "", "", {}, {})
    rows = verdicts(nothing)
    assert {row["verdict"] for row in rows} == {OPEN}
    assert all(row["would_decide"] and row["ours"]["mean"] is None for row in rows)


def test_what_would_decide_a_claim_is_not_what_was_just_run():
    rows = {row["id"]: row for row in verdicts(evidence(P3=UNSURE))}
    assert rows["dual_gain_sst2"]["would_decide"] == "more seeds, or more evaluation texts"
    assert rows["dual_gain_agnews"]["would_decide"].startswith("arms classification_tuned")


def test_a_row_shows_published_ours_and_band():
    rows = {row["id"]: row for row in verdicts(evidence(P1=UP, P3=UP, P6=UP))}
    first = rows["because_of_objective"]
    assert first["published"] == 0.83 and first["control_band"] == {"low": 0.3, "high": 0.4}
    assert first["ours"] == {"mean": 0.2, "low": pytest.approx(0.15), "high": 0.25, "n": 5}
    assert rows["dual_gain_sst2"]["published"] == pytest.approx(0.05)
    assert rows["dual_gain_agnews"]["published"] is None  # that block is of the other data set
    cosine = next(row for row in verdicts(evidence(E7=DOWN)) if row["id"] == "cosine_gap")
    assert cosine["ours"]["mean"] == 0.5 and cosine["turns_on"]["mean"] == -0.2
    at_all = rows["clusters_at_all"]
    assert at_all["turns_on"]["mean"] == at_all["ours"]["mean"] == 0.8
    assert rows["cosine_gap"]["published"] == {"cosine_within": 0.9, "cosine_between": 0.8}
