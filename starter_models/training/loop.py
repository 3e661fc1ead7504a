"""What every training run shares: seeds, a wall-clock learning-rate schedule, a log line."""

from __future__ import annotations

import argparse
import inspect
import math
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def seed_everything(seed: int, threads: int) -> None:
    """Seed Python, NumPy and torch; give torch `threads` cores."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)


class Clock:
    """Runs a loop for a wall-clock time: warm-up, constant, then a cosine fall to zero.

    Args:
        minutes: how long to train.
        peak_lr: learning rate between warm-up (2 % of the time) and the fall (last 70 %).
        every_s: seconds between reports.
    """

    def __init__(self, minutes: float, *, peak_lr: float, every_s: float = 60) -> None:
        self.total_s = minutes * 60
        self.peak_lr = peak_lr
        self.every_s = every_s
        self.start_s = time.monotonic()
        self.step = 0
        self._reported_s = self.start_s

    @property
    def progress(self) -> float:
        return (time.monotonic() - self.start_s) / self.total_s

    def running(self, optimiser: torch.optim.Optimizer) -> bool:
        """Set this step's learning rate, a group's `share` of it if it names one; False once the
        time is up.
        """
        done = self.progress
        if done >= 1:
            return False
        self.step += 1
        for group in optimiser.param_groups:
            group["lr"] = self.peak_lr * self._factor(done) * group.get("share", 1.0)
        return True

    @staticmethod
    def _factor(done: float) -> float:
        if done < 0.02:
            return done / 0.02
        if done < 0.3:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7))

    def should_report(self) -> bool:
        now = time.monotonic()
        if now - self._reported_s < self.every_s:
            return False
        self._reported_s = now
        return True


def log(clock: Clock, **values: float) -> None:
    """One line: percent of the time, step, values."""
    body = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
    print(f"{clock.progress:6.1%}  step {clock.step:6d}  {body}", flush=True)


def psnr(a: torch.Tensor, b: torch.Tensor, *, span: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB; `span` is the distance from black to white."""
    mse = float((a - b).double().square().mean())
    return 10 * math.log10(span**2 / max(mse, 1e-12))


def options(main: Callable[..., None]) -> dict[str, Any]:
    """`main`'s arguments from the command line, `--name value`, read as its defaults' types.

    The trainers for a GPU use this rather than typer, so that they run wherever torch does.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, parameter in inspect.signature(main).parameters.items():
        kind = type(parameter.default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=parameter.default)
    return vars(parser.parse_args())


def minutes_left(minutes: float, until: float) -> float:
    """`minutes`, or what is left until a Unix time, if one is given."""
    return max((until - time.time()) / 60, 0.01) if until else minutes
