"""From numbers to the words supported, not supported and not decided.

What was not measured decides nothing, nor do fewer than MIN_SEEDS seeds: one pair of networks says
nothing about arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contrasts import M3
from inference import ALPHA

MIN_SEEDS = 3
SUPPORTED, REFUTED, OPEN = "supported", "not supported", "not decided"


@dataclass(frozen=True)
class Evidence:
    """What the rules see.

    Args:
        contrasts: rows by id, adjusted; controls: rows.
        classes: C. slug, dataset, backbone: as in results.json.
        measured: {claim id: {mean, low, high, n_seeds}} from other scripts, above 0 is in favour;
            `where` says on what.
        published: that study's block of the published figures.
    """

    contrasts: Mapping[str, Mapping]
    controls: Sequence[Mapping]
    classes: int
    slug: str | None
    dataset: str
    backbone: str
    measured: Mapping[str, Mapping]
    published: Mapping

    def control(self, control: str, name: str, arm: str, representation: str = "engram") -> Mapping:
        """The control's row, empty if there is none."""
        wanted = (control, name, arm, representation)
        for row in self.controls:
            if (row["control"], row["name"], row["arm"], row["representation"]) == wanted:
                return row
        return {}

    @property
    def engram(self) -> Mapping:
        return self.control("A4", "trained", M3)


@dataclass(frozen=True)
class Verdict:
    """One of SUPPORTED, REFUTED, OPEN, and why in a few words."""

    verdict: str
    because: str


def decide(row: Mapping | None, direction: int = 1) -> Verdict:
    """Whether a contrast supports a difference in a direction (1 or -1).

    Supported: adjusted p below ALPHA, the interval on that side of 0. Not supported: the same on
    the other side, or equivalence shown. A missing effect alone decides nothing.
    """
    if not row or row["estimate"] is None:
        return Verdict(OPEN, f"{row['id']} not measured" if row else "not measured")
    name, seeds = row["id"], row["n_seeds"]
    if row.get("where"):  # measured in another folder
        name += f" (on {row['where']})"
    if seeds < MIN_SEEDS:
        return Verdict(OPEN, f"{name}: {seeds} of {MIN_SEEDS} seeds")
    low, high = row["low"], row["high"]
    if row["p_adjusted"] < ALPHA and (low > 0 or high < 0):
        if low * direction > 0:
            return Verdict(SUPPORTED, f"{name} is significant")
        return Verdict(REFUTED, f"{name} is significant the other way")
    if row["equivalence"] and row["equivalence"]["equivalent"]:
        return Verdict(REFUTED, f"{name}: equivalent within the margin")
    return Verdict(OPEN, f"{name}: neither a difference nor equivalence shown")


def decide_equal(row: Mapping | None) -> Verdict:
    """Whether a contrast shows that there is no difference: equivalence supports it."""
    found = decide(row)
    if not row or row["estimate"] is None or row["n_seeds"] < MIN_SEEDS:
        return found
    if row["equivalence"]["equivalent"]:
        return Verdict(SUPPORTED, f"{row['id']}: equivalent within the margin")
    if found.verdict == OPEN:
        return found
    return Verdict(REFUTED, f"{row['id']}: there is a difference")


def decide_interval(
    interval: Mapping | None, name: str, floor: float = 0.0, none: float = 0.0
) -> Verdict:
    """Supported: the interval lies above `floor`; not supported: it lies below `none`.

    Args:
        interval: mean (or a contrast's estimate), low, high, n_seeds. name: what it is of.
    """
    mean = interval and interval.get("mean", interval.get("estimate"))
    if mean is None:
        return Verdict(OPEN, f"{name} not measured")
    if interval["n_seeds"] < MIN_SEEDS:
        return Verdict(OPEN, f"{name}: {interval['n_seeds']} of {MIN_SEEDS} seeds")
    if interval.get("low") is None:
        return Verdict(OPEN, f"{name}: its interval is not known")
    if interval["low"] > floor:
        return Verdict(SUPPORTED, f"{name} lies above {floor:.3g}")
    if interval["high"] < none:
        return Verdict(REFUTED, f"{name} lies below {none:.3g}")
    between = f"{floor:.3g}" if floor == none else f"{none:.3g} or {floor:.3g}"
    return Verdict(OPEN, f"{name}: the interval includes {between}")


def _first(parts: tuple[Verdict, ...], order: tuple[str, str, str]) -> Verdict:
    """The first of three words that any part says, with those parts' reasons."""
    for word in order:
        because = [part.because for part in parts if part.verdict == word]
        if because:
            return Verdict(word, "; ".join(because))
    raise ValueError("no part to combine")


def every(*parts: Verdict) -> Verdict:
    """Supported when each part is; not supported as soon as one is not."""
    return _first(parts, (REFUTED, OPEN, SUPPORTED))


def some(*parts: Verdict) -> Verdict:
    """Supported as soon as one part is; not supported when none is and none is open."""
    return _first(parts, (SUPPORTED, OPEN, REFUTED))
