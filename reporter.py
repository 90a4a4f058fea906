"""What a run says while it trains."""

from __future__ import annotations

import time

from tqdm import tqdm

from results import ResultsFolder
from training import Fit

HEARTBEAT = 30.0  # seconds between lines that tell where training is


class Reporter:
    """A line every half minute in log.txt, and on screen where no progress bar is."""

    def __init__(self, folder: ResultsFolder, fit: Fit, plain: bool) -> None:
        self.folder, self.said = folder, time.monotonic()
        self.name = f"{fit.model.arm.name}, seed {fit.seed}"
        self.first, self.started = fit.step_number, time.monotonic()
        self.lowered = len(fit.progress.memory)
        self.bar = tqdm(
            total=fit.total_steps,
            initial=fit.step_number,
            desc=self.name,
            disable=plain or None,  # None: off unless stderr is a terminal
            unit="step",
            dynamic_ncols=True,
        )

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __call__(self, fit: Fit, event: str) -> None:
        if event == "step":
            self.bar.update()
            now = time.monotonic()
            for lowered in fit.progress.memory[self.lowered :]:
                self.folder.log(
                    f"{self.name}: out of memory at step {lowered['step']}; "
                    f"{lowered['limit']} is {lowered['tokens']} from here on"
                )
            self.lowered = len(fit.progress.memory)
            if now - self.said > HEARTBEAT:
                self.said = now
                done = fit.step_number - self.first
                left = (fit.total_steps - fit.step_number) * (now - self.started) / done
                loss = fit.progress.totals.cls / max(1, fit.progress.totals.texts)
                self.folder.log(
                    f"{self.name}: step {fit.step_number} of {fit.total_steps}, "
                    f"classification loss {loss:.4f}, rate "
                    f"{fit.optimizer.param_groups[0]['lr']:.3g}, "
                    f"about {left / 60:.1f} min left in this arm",
                    show=self.bar.disable,
                )
            return
        last = fit.progress.epochs[-1]
        lm = "" if last["eval_lm_loss"] is None else f", LM loss {last['eval_lm_loss']:.3f}"
        self.folder.log(
            f"{self.name}: epoch {last['epoch']} of {fit.epochs}, "
            f"train {last['train_accuracy']:.4f}, "
            f"eval {last['eval_accuracy']:.4f}{lm}, {last['train_seconds']:.1f} s"
        )
