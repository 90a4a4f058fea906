"""The training conditions, as data; needs no torch, so that tables and figures can read it."""

from __future__ import annotations

from dataclasses import dataclass

FEEDBACKS = ("next", "self", "same_class", "off", "detached", "unused")
TAPS = ("classifier", "pooled")


@dataclass(frozen=True)
class Arm:
    """One training condition; loss = cls_weight * classification + lm_weight * next token.

    `feedback` says what becomes of the engram: None, the arm has no compressor; "unused", it has
    one whose code goes nowhere; else one of FEEDBACKS, and every text carries a prefix position.

    Args:
        tap: what the compressor reads, one of TAPS. engram_dim: its width; None: the run's.
        causal: False for the published small protocol alone.
        train: False leaves the initial weights.
        shuffled_labels: training labels are permuted once, by the seed; evaluation's are true.
        shuffled_targets: in training, the target words of a batch change places: their frequencies
            stay, context says nothing about them.
        lm_stopped: the LM loss is measured, and its gradient stops at the hidden states; as the
            output matrix is tied (or frozen), none of the backbone's weights feels it.
        longer: epochs, as a multiple of the run's; the schedule is stretched over them.
        tuned: trained at the rate that is best on a dev split, instead of the run's.
    """

    name: str
    title: str
    cls_weight: float = 1.0
    lm_weight: float = 0.0
    feedback: str | None = None
    tap: str = "classifier"
    causal: bool = True
    train: bool = True
    engram_dim: int | None = None
    shuffled_labels: bool = False
    shuffled_targets: bool = False
    lm_stopped: bool = False
    longer: int = 1
    tuned: bool = False

    @property
    def reads(self) -> str:
        """The output that the compressor reads, by its name in features and outputs."""
        return "intermediate" if self.tap == "classifier" else "pooled"

    @property
    def has_prefix(self) -> bool:
        return self.feedback not in (None, "unused")


_THIRD = (0.5, 0.5, "next")  # Model 3's losses and feedback
_LM_WEIGHTS = (0.25, 0.75)  # beside the 0.5 of Models 2 and 3; 0 and 1 are arms of their own
ARMS = {
    arm.name: arm
    for arm in (
        Arm("classification", "Model 1: classification"),
        Arm("dual", "Model 2: + next token", 0.5, 0.5),
        Arm("dual_engram", "Model 3: + engram", *_THIRD),
        Arm("classification_engram", "Model 1 + engram, no LM", 1.0, 0.0, "next"),
        Arm("dual_engram_self", "Model 3, own engram fed back", 0.5, 0.5, "self"),
        Arm("dual_engram_same_class", "Model 3, same-class engram", 0.5, 0.5, "same_class"),
        Arm("dual_engram_off", "Model 3, zero engram", 0.5, 0.5, "off"),
        Arm("dual_engram_detached", "Model 3, detached engram", 0.5, 0.5, "detached"),
        Arm("lm_only_engram", "LM + engram, no labels", 0.0, 1.0, "next", tap="pooled"),
        Arm(
            "dual_engram_shuffled_labels",
            "Model 3, shuffled labels",
            *_THIRD,
            shuffled_labels=True,
        ),
        Arm(
            "dual_engram_shuffled_targets",
            "Model 3, shuffled LM targets",
            *_THIRD,
            shuffled_targets=True,
        ),
        # classification at full weight: its gradients, and their clipping, are then Model 1's
        Arm("dual_stopped", "Model 2, LM gradient stopped", 1.0, 1.0, lm_stopped=True),
        Arm("classification_tuned", "Model 1, its best rate", tuned=True),
        Arm("dual_tuned", "Model 2, its best rate", 0.5, 0.5, tuned=True),
        Arm("classification_longer", "Model 1, twice the epochs", longer=2),
        *(Arm(f"dual_lm_{w:.0%}"[:-1], f"Model 2, LM weight {w}", 1 - w, w) for w in _LM_WEIGHTS),
        *(
            Arm(f"dual_engram_lm_{w:.0%}"[:-1], f"Model 3, LM weight {w}", 1 - w, w, "next")
            for w in _LM_WEIGHTS
        ),
        *(
            Arm(f"dual_engram_w{dim}", f"Model 3, engram of {dim}", *_THIRD, engram_dim=dim)
            for dim in (2, 8, 32, 128, 256)
        ),
        Arm("published_small", "Published protocol", 1.0, 0.3, "unused", "pooled", causal=False),
        Arm("untrained", "Untrained", 0.5, 0.5, "next", train=False),
    )
}
MAIN_ARMS = ("classification", "dual", "dual_engram")
# what --arms takes beside names; the published protocol is another backbone's
ARM_GROUPS = {
    "main": MAIN_ARMS,
    "controls": tuple(n for n in ARMS if n not in (*MAIN_ARMS, "published_small")),
    "widths": tuple(n for n, arm in ARMS.items() if arm.engram_dim),
    "tuned": tuple(n for n, arm in ARMS.items() if arm.tuned),
    "weights": tuple(n for n, arm in ARMS.items() if arm.lm_weight in _LM_WEIGHTS),
}
