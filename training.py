"""The step and the fit; knows no backbone by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from batches import Encoded, batch_order
from common import Batch, StudyModel
from evaluation import Evaluation, evaluate
from memory import (
    ADVICE,
    OutOfMemory,
    generator_state,
    is_out_of_memory,
    release,
    restore_generator,
)
from parts import Losses, Totals, batch_losses, parts_of, run_part, weighted_loss
from recipe import Recipe, derive_seed, require_texts, seed_everything

UNREAD_STEPS = 20  # steps whose figures may wait on a GPU


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the step was not taken."""


class Interrupted(Exception):
    """Training was asked to stop; `saved` names the step that a rerun continues from."""

    def __init__(self, reason: str, saved: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.saved = reason, saved


@dataclass
class Progress:
    """Where a fit stands; with the weights, optimizer and generator state it is all of it."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches of the current epoch done
    totals: Totals = field(default_factory=Totals)
    epochs: list[dict] = field(default_factory=list)  # finished epochs' records
    memory: list[dict] = field(default_factory=list)  # limits that had to be lowered: Recipe's
    audits: list[dict] = field(default_factory=list)  # what gradients.Audit measured

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> Progress:
        return cls(**{**saved, "totals": Totals(**saved["totals"])})


@dataclass(frozen=True)
class _Step:
    """Figures of one step, maybe still on the GPU."""

    number: int
    losses: Losses
    loss: Tensor
    norm: Tensor
    rate: float
    items: list[int]
    tokens: int


class Fit:
    """One (arm, seed) being trained; `state()` and `restore()` make it resumable at any step.

    The data order is a pure function of (seed, epoch) and the rate one of the step, so weights,
    optimizer, generator state and Progress are all there is to save.
    """

    def __init__(
        self, model: StudyModel, recipe: Recipe, train: Encoded, evaluation: Encoded, seed: int
    ) -> None:
        require_texts(len(train), recipe.batch_size)
        recipe = replace(recipe, epochs=recipe.epochs * model.arm.longer)
        if model.arm.shuffled_labels:
            shuffled = np.random.default_rng(derive_seed(seed, "labels")).permutation(len(train))
            train = replace(train, labels=train.labels[torch.from_numpy(shuffled)])
        self.model, self.recipe, self.seed = model, recipe, seed
        self.train_data, self.eval_data = train, evaluation
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.progress = Progress()
        self.steps_per_epoch = -(-len(train) // recipe.batch_size)
        self.device = next(model.parameters()).device
        self.unread: list[_Step] = []
        self.audit: Callable[[Fit, Batch], None] | None = None  # called before every step
        if self.device.type == "cuda":
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = torch.zeros((), device=self.device)
        seed_everything(seed, "dropout")

    @property
    def step_number(self) -> int:
        return self.progress.epoch * self.steps_per_epoch + self.progress.batch

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def epochs(self) -> int:
        return self.recipe.epochs if self.model.arm.train else 0

    def state(self) -> tuple[dict[str, Tensor], dict, dict]:
        """Weights by name; optimizer and generator state; Progress as JSON."""
        self.settle()
        weights = {name: p.detach().cpu() for name, p in self.parameters.items()}
        rest = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            rest["cuda_rng"] = torch.cuda.get_rng_state_all()
        return weights, rest, self.progress.to_json()

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], rest: dict, progress: dict) -> None:
        """Go on from what `state` returned; ValueError if the weights are another model's."""
        shapes = {name: p.shape for name, p in self.parameters.items()}
        if {name: w.shape for name, w in weights.items()} != shapes:
            raise ValueError("the checkpoint's weights do not fit this model")
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        self.optimizer.load_state_dict(rest["optimizer"])
        torch.set_rng_state(rest["rng"])
        if "cuda_rng" in rest and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(rest["cuda_rng"])
        self.progress = Progress.from_json(progress)
        for lowered in self.progress.memory:
            self.recipe = replace(self.recipe, **{lowered["limit"]: lowered["tokens"]})

    @property
    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: the weights and AdamW's two moments of them."""
        return 3 * sum(p.numel() * p.element_size() for p in self.parameters.values())

    def lower(self, limit: str, tokens: int) -> None:
        """Lower a limit of the recipe from here on; checkpoint and results say when."""
        self.recipe = replace(self.recipe, **{limit: tokens})
        self.progress.memory.append({"step": self.step_number, "limit": limit, "tokens": tokens})
        release()

    def evaluate(self, data: Encoded, **options) -> Evaluation:
        """`evaluate` under the limit that memory allows; a lowered one stays.

        Raises:
            NonFiniteError: a loss is not finite.
        """
        result = evaluate(self.model, data, self.recipe, **options)
        if not all(math.isfinite(x or 0.0) for x in result.scores().values()):
            raise NonFiniteError(
                f"{self.model.arm.name}, seed {self.seed}, evaluation at step {self.step_number}: "
                f"classification loss {result.cls_loss:.4g}, next-token loss {result.lm_loss}. "
                "The last checkpoint is kept."
            )
        if result.eval_tokens < self.recipe.eval_tokens:
            self.lower("eval_tokens", result.eval_tokens)
        return result

    def _smaller(self, batch: Batch) -> int:
        """A half of what a part of this step holds at most, halved on until it cuts further.

        Raises:
            OutOfMemory: every part is a single text, or a single pair.
        """
        arm, limit = self.model.arm, self.recipe.micro_batch_tokens
        parts = parts_of(arm, batch, limit)
        tokens = len(batch.tokens) // 2 if len(parts) == 1 else limit // 2
        while tokens and len(parts_of(arm, batch, tokens)) == len(parts):
            tokens //= 2
        if not tokens:
            raise OutOfMemory(
                f"{arm.name}, seed {self.seed}, step {self.step_number}: parts of one text or pair "
                f"(the longest text has {batch.longest} tokens) do not fit: {ADVICE}"
            )
        return tokens

    def step(self, batch: Batch) -> None:
        """One optimizer step; raises NonFiniteError before the weights can take a bad one.

        Out of memory, the same texts are run again in smaller parts, under the same divisors and
        from the same generator state.

        Raises:
            OutOfMemory: the smallest parts do not fit.
        """
        rate = self.recipe.learning_rate(self.step_number, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        start, done = generator_state(self.device), None
        while done is None:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                done = self.gradients(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if done is None:  # no longer in `except`, which holds on to the step's tensors
                self.optimizer.zero_grad(set_to_none=True)
                restore_generator(start, self.device)
                self.lower("micro_batch_tokens", self._smaller(batch))
        seen, loss, norm = done
        self.unread.append(
            _Step(self.step_number, seen, loss, norm, rate, batch.items.tolist(), len(batch.tokens))
        )
        if self.device.type == "cuda":
            # no waiting for the GPU: it skips this and every later update once one is not finite
            bad = ~(loss.isfinite() & norm.isfinite())
            self.optimizer.found_inf = torch.maximum(self.optimizer.found_inf, bad.float())
        if self.device.type != "cuda" or len(self.unread) >= UNREAD_STEPS:
            self.settle()
        self.optimizer.step()

    def divisors(self, batch: Batch) -> dict[str, int]:
        """Texts and targets of the whole step, by which every part's sums are divided.

        A mean of the parts' means would be another loss.
        """
        arm = self.model.arm
        times = 2 if arm.has_prefix and arm.feedback == "self" else 1
        targets = times * (len(batch.tokens) - len(batch)) if arm.lm_weight else 0
        return {"texts": times * len(batch), "targets": targets}

    def gradients(self, batch: Batch) -> tuple[Losses, Tensor, Tensor]:
        """Fill the gradients, clipped: the step's sums, its loss and the norm before clipping."""
        arm, recipe = self.model.arm, self.recipe
        parts = parts_of(arm, batch, recipe.micro_batch_tokens)
        counts = self.divisors(batch)
        seen, loss = None, 0.0
        for part in parts:
            passes = run_part(self.model, part.to(self.device))
            losses = batch_losses(self.model, passes, recipe, getattr(torch, recipe.lm_dtype))
            share = weighted_loss(arm, replace(losses, **counts))
            share.backward()
            losses = losses.detach()
            seen, loss = losses if seen is None else seen + losses, loss + share.detach()
        return seen, loss, torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip)

    def settle(self) -> None:
        """Read the figures of the steps since the last time; raises NonFiniteError."""
        for step in self.unread:
            losses = step.losses
            if not (torch.isfinite(step.loss) and torch.isfinite(step.norm)):
                raise NonFiniteError(
                    f"{self.model.arm.name}, seed {self.seed}, step {step.number}: loss "
                    f"{step.loss:.4g} (classification {losses.cls:.4g} / {losses.texts} texts, "
                    f"next token {losses.lm:.4g} / {losses.targets} targets), gradient norm "
                    f"{step.norm:.4g}, rate {step.rate:.3g}, {self.recipe.lm_dtype}, "
                    f"training rows {step.items}. "
                    "The weights before it are kept."
                )
            self.progress.totals.add(losses, step.tokens)
        self.unread.clear()

    def run(
        self,
        save: Callable[[Fit], object],
        report: Callable[[Fit, str], None],
        check_stop: Callable[[], None],
        save_every: float = 120.0,
    ) -> None:
        """Train what is left, evaluating and saving at every epoch's end.

        Args:
            save: called every `save_every` seconds, at every epoch's end and before stopping.
            report: called after every step ("step") and epoch ("epoch").
            check_stop: raises Interrupted when asked to stop; called at every step.
        """
        saved_at = time.monotonic()
        progress = self.progress
        while progress.epoch < self.epochs:
            self.model.train()
            order = batch_order(
                self.train_data.lengths,
                self.recipe.batch_size,
                derive_seed(self.seed, "order"),
                progress.epoch,
                self.recipe.window,
            )
            try:
                while progress.batch < len(order):
                    check_stop()
                    batch = self.train_data.batch(order[progress.batch])
                    if self.audit is not None:
                        self.audit(self, batch)
                    started = time.perf_counter()
                    self.step(batch)
                    progress.batch += 1
                    progress.totals.seconds += time.perf_counter() - started
                    report(self, "step")
                    if time.monotonic() - saved_at > save_every:
                        save(self)
                        saved_at = time.monotonic()
                self.settle()
                result = self.evaluate(self.eval_data, check_stop=check_stop)
            except (Interrupted, OutOfMemory):
                save(self)
                raise
            totals = progress.totals
            progress.epochs.append(
                {
                    "epoch": progress.epoch + 1,
                    "train_accuracy": totals.correct / totals.texts,
                    "train_cls_loss": totals.cls / totals.texts,
                    "train_lm_loss": totals.lm / totals.targets if totals.targets else None,
                    "eval_accuracy": result.accuracy,
                    "eval_cls_loss": result.cls_loss,
                    "eval_lm_loss": result.lm_loss,
                    "train_seconds": totals.seconds,
                    "train_tokens": totals.tokens,
                }
            )
            progress.epoch, progress.batch, progress.totals = progress.epoch + 1, 0, Totals()
            save(self)
            saved_at = time.monotonic()
            report(self, "epoch")
