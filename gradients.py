"""Where the gradients of the two losses go, measured while an arm trains (control B14).

The published mechanism calls the bottleneck a gradient-weighted projection: training is said to
turn it towards what separates the classes. Measured here, before chosen steps: the norm of each
loss's gradient and their cosine at the backbone's weights, at what the compressor reads (the tap)
and at the compressor's weights; and how much of the compressor's gradient lies along the class
means of the tap, beside directions of the same features that know no class, and beside the same
gradient with every text's error given to another text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common import Batch
from memory import generator_state, restore_generator
from parts import batch_losses, parts_of, run_part, weighted_loss

if TYPE_CHECKING:
    from training import Fit

SAMPLE = 2048  # training texts whose taps give the class means
DRAWS = 50  # permutations of their labels, and of a batch's errors
LOSSES = {"cls": {"lm_weight": 0.0}, "lm": {"cls_weight": 0.0}}  # what leaves one loss of an arm


def class_directions(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """An orthonormal basis (D, C - 1) of the span of the centred class means of (N, D) features."""
    means = np.stack([features[labels == c].mean(0) for c in np.unique(labels)])
    return np.linalg.svd(means - features.mean(0), full_matrices=False)[2][: len(means) - 1].T


def share(gradient: np.ndarray, basis: np.ndarray) -> float | None:
    """How much of a gradient (E, D) lies in the span of a basis (D, k): 0..1, None if it is 0.

    |G Q|^2 / |G|^2; a gradient of no preferred direction gives k / D.
    """
    whole = float((gradient**2).sum())
    return float(((gradient @ basis) ** 2).sum()) / whole if whole else None


@dataclass(frozen=True)
class Gradients:
    """Of one loss of a step.

    The compressor's gradient is a sum over texts, errors' read: a text's error times what was read
    of it.

    Args:
        sites: backbone (all its trained weights, flat), tap (texts of all passes, D or H) and,
            where the arm has one, compressor (E, D or H); float32.
        errors: (texts of all passes, E) gradient before the compressor's tanh, 0 where no loss
            depends on a text's code; None without a compressor.
        read: (texts of all passes, D or H) that the compressor read.
    """

    sites: dict[str, Tensor]
    errors: Tensor | None
    read: Tensor


def exchanged(errors: np.ndarray, read: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The compressor's gradient (E, D) with the texts' errors (N, E) given to one another.

    Features and errors stay, which belongs to which does not: what such a gradient shares with the
    class means it owes to the features alone. Texts without an error stay without one.
    """
    rows = np.flatnonzero(errors.any(1))
    return errors[rng.permutation(rows)].T @ read[rows]


def loss_gradients(fit: Fit, batch: Batch, loss: str) -> Gradients:
    """The gradients of one weighted loss ("cls" or "lm") of a step."""
    model, device = fit.model, fit.device
    weights = [p for p in model.backbone.parameters() if p.requires_grad]
    if model.compressor is not None:
        weights.append(model.compressor.linear.weight)
    totals = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    outputs, taps, errors = [], [], []
    for part in parts_of(model.arm, batch, fit.recipe.micro_batch_tokens):
        passes = run_part(model, part.to(device))
        dtype = getattr(torch, fit.recipe.lm_dtype)
        losses = replace(batch_losses(model, passes, fit.recipe, dtype), **fit.divisors(batch))
        value = weighted_loss(replace(model.arm, **LOSSES[loss]), losses)
        read = [getattr(out, model.arm.reads) for _, out in passes]
        codes = [out.engram for _, out in passes if out.engram is not None]
        wanted = [*weights, *read, *codes]
        found = torch.autograd.grad(value, wanted, allow_unused=True)  # None: unused
        found = [
            torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)
        ]
        for total, gradient in zip(totals, found, strict=False):
            total += gradient
        outputs += [x.detach() for x in read]
        taps += found[len(weights) : len(weights) + len(read)]
        each = zip(codes, found[len(weights) + len(read) :], strict=True)
        errors += [g * (1 - code.detach() ** 2) for code, g in each]
    sites = {"tap": torch.cat(taps)}
    if model.compressor is not None:
        sites["compressor"] = totals.pop()
    sites = {"backbone": torch.cat([t.flatten() for t in totals]), **sites}
    return Gradients(sites, torch.cat(errors) if errors else None, torch.cat(outputs))


def measure(fit: Fit, batch: Batch) -> dict:
    """One record of `Progress.audits`: JSON values; None where a gradient is 0 or no loss there.

    norm and cosine by site; share of the compressor's gradient, by loss and of "both", along the
    class means, along those of permuted labels (their mean: directions of the features' own
    spread), along the features' mean, along the class means once errors are exchanged (mean of
    DRAWS), and of a direction drawn at random.
    """
    arm = fit.model.arm
    start = generator_state(fit.device)
    found = {}
    for loss in LOSSES:
        if getattr(arm, f"{loss}_weight"):
            restore_generator(start, fit.device)  # the same dropout for both
            found[loss] = loss_gradients(fit, batch, loss)
    restore_generator(start, fit.device)
    sites = next(iter(found.values())).sites.keys()
    record = {"step": fit.step_number, "norm": {}, "cosine": {}, "share": {}}
    for site in sites:
        norms = {loss: float(gradients.sites[site].norm()) for loss, gradients in found.items()}
        record["norm"][site] = norms
        product = None
        if len(norms) == 2 and all(norms.values()):
            product = float((found["cls"].sites[site] * found["lm"].sites[site]).sum())
            product /= norms["cls"] * norms["lm"]
        record["cosine"][site] = product
    if "compressor" in sites:
        record["share"] = _shares(fit, found)
    return record


def _shares(fit: Fit, found: Mapping[str, Gradients]) -> dict:
    name = fit.model.arm.reads
    order = np.random.default_rng(fit.seed).permutation(len(fit.train_data))
    sample = fit.train_data.select(np.sort(order[:SAMPLE]))
    features = fit.evaluate(sample, collect=(name,)).features[name]
    fit.model.train()
    labels = sample.labels.numpy()
    rng = np.random.default_rng([fit.seed, fit.step_number])
    mean = features.mean(0)[:, None]
    bases = {
        "classes": [class_directions(features, labels)],
        "spread": [class_directions(features, rng.permutation(labels)) for _ in range(DRAWS)],
        "mean": [mean / max(np.linalg.norm(mean), np.finfo(np.float32).tiny)],
    }
    read = next(iter(found.values())).read.cpu().numpy()  # the same for both: one dropout
    errors = {loss: g.errors.cpu().numpy() for loss, g in found.items()}
    whole = {loss: g.sites["compressor"].cpu().numpy() for loss, g in found.items()}
    errors["both"], whole["both"] = sum(errors.values()), sum(whole.values())
    out = {"uniform": bases["classes"][0].shape[1] / features.shape[1]}
    for what, directions in bases.items():
        out[what] = {
            loss: _mean_share([(g, basis) for basis in directions]) for loss, g in whole.items()
        }
    out["exchanged"] = {
        loss: _mean_share([(exchanged(e, read, rng), bases["classes"][0]) for _ in range(DRAWS)])
        for loss, e in errors.items()
    }
    return out


def _mean_share(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Mean share of gradients in the span of a basis each; None where one is 0."""
    each = [share(gradient, basis) for gradient, basis in pairs]
    return None if None in each else float(np.mean(each))


class Audit:
    """Called before every step of a fit; measures at `times` steps spaced evenly.

    It draws nothing and changes nothing: an audited run's weights are an unaudited one's.
    """

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, fit: Fit, batch: Batch) -> None:
        seen, step = fit.progress.audits, fit.step_number
        known = bool(seen) and seen[-1]["step"] == step  # a step that is run again
        if not known and step % max(1, fit.total_steps // self.times) == 0:
            seen.append(measure(fit, batch))
