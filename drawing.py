"""What all figures share: colours, axes, titles, and how they are written."""

from __future__ import annotations

import io
import textwrap

from matplotlib import rc_context
from matplotlib.figure import Figure

# Okabe and Ito's, safe for colour-blind readers
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
TRAINED, BAND, PREDICTED, PLAIN = PALETTE[3], PALETTE[4], PALETTE[5], "#222222"


def style(axes) -> None:
    """No box, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def headline(figure: Figure, *lines: str) -> None:
    """Set the figure's title; a line too long for the figure breaks at its semicolons."""
    width = int(10.5 * figure.get_figwidth())  # characters of 11 points that fit
    broken = []
    for line in lines:
        filled = ""
        for part in line.split("; "):
            if filled and len(f"{filled}; {part}") > width:
                broken.append(filled)
                filled = part
            else:
                filled = f"{filled}; {part}" if filled else part
        broken.append(filled)
    figure.suptitle("\n".join(textwrap.fill(part, width) for part in broken), fontsize=11)


def count_of_seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def written(figure: Figure, kind: str, digest: str) -> bytes:
    """The file of a figure: the same bytes for the same figure; digest says what it shows.

    Args:
        kind: "png" or "svg".
    """
    buffer = io.BytesIO()
    if kind == "png":
        metadata = {"Results": digest, "Software": None}
    else:
        metadata = {"Description": digest, "Date": None, "Creator": None}
    with rc_context({"svg.hashsalt": "fixed", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()
