"""What happens when numbers go bad: a loss or gradient that is not finite, or a loss that jumps.

All ranks come to the same verdict before the update, so nothing is ever updated with them. What is
known of the step is put into a bundle that `rcmae replay` runs again on one process. A jump is
judged robustly: by the median of the last losses and their median absolute deviation, which an
outlier does not move.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rcmae import dist
from rcmae.data.batch import Batch
from rcmae.data.sources import holds_secret
from rcmae.files import write_aside

Action = Literal["stop", "skip", "rewind"]
ENOUGH = 16  # losses before which none is called a jump
FLOOR = 0.01  # of the median: a smaller deviation is not a scale to judge by


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is not finite, or the loss jumped; nothing was updated."""


@dataclass
class Guard:
    """Judges each step's loss and counts what was done about bad ones."""

    action: Action
    max_skips: int
    max_rewinds: int
    weights: dict[str, float]  # of the objective's terms
    spike_factor: float | None = None
    spike_window: int = 64
    skips: int = 0
    rewinds: int = 0
    history: list[float] = field(default_factory=list)  # the last losses that were not bad

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"skips": self.skips, "rewinds": self.rewinds, "history": list(self.history)}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what `state()` gave a checkpoint."""
        self.skips = state["skips"]
        self.rewinds = state["rewinds"]
        self.history = list(state["history"])

    def jumped(self, seen: Sequence[dict[str, Tensor]]) -> str | None:
        """Why this step's loss is an outlier, None if it is not or jumps are not looked for.

        Collective where `spike_factor` is set: every rank calls, with its shares of the step's
        loss."""
        if self.spike_factor is None:
            return None
        shares = []
        for part in seen:
            shares += [weight * part[term] for term, weight in self.weights.items()]
        share = torch.stack(shares).sum()
        loss = float(dist.all_sum(share.double()))  # waits for the device
        if not math.isfinite(loss):
            return None  # the gradient's check says that better
        if len(self.history) >= ENOUGH:
            middle = median(self.history)
            # a normal distribution's standard deviation, from the MAD
            deviation = 1.4826 * median(abs(value - middle) for value in self.history)
            limit = middle + self.spike_factor * max(deviation, FLOOR * abs(middle))
            if loss > limit:
                return (
                    f"the loss jumped to {loss:.4g}, above {limit:.4g} (the recent median is "
                    f"{middle:.4g})"
                )
        self.history.append(loss)
        del self.history[: -self.spike_window]
        return None

    def decide(self, *, can_rewind: bool) -> Action:
        """What to do about a bad step, within the limits; counts it."""
        if self.action == "skip" and self.skips < self.max_skips:
            self.skips += 1
            return "skip"
        if self.action == "rewind" and self.rewinds < self.max_rewinds and can_rewind:
            self.rewinds += 1
            return "rewind"
        return "stop"


class Report(NamedTuple):
    """A bundle as it was written."""

    path: Path
    samples: dict[int, list[str]]  # rank -> samples of the micro-batches whose loss is not finite
    what: str  # what is not finite
    shown: str  # the first of the samples, for a message; empty without any


def bundle(
    run_dir: Path, about: dict[str, Any], micros: Sequence[Batch], seen: Sequence[dict[str, Tensor]]
) -> Report:
    """Write what is known of a bad step: recipe, checkpoint, and every sample with its position and
    mask.

    Positions and the recipe's seeds are the random keys: crop, flip and mask are functions of them.
    Collective: every rank calls.
    """
    mine = []
    for batch, losses in zip(micros, seen, strict=True):
        values = {term: loss.item() for term, loss in losses.items()}
        mine.append({**batch.record(), "losses": values})
    ranks = dist.gather(mine)
    path = run_dir / "replay" / f"step-{about['step']:08d}.json"
    if dist.rank() == 0:
        with suppress(OSError):  # a full disk: what is told of the step has to do
            path.parent.mkdir(parents=True, exist_ok=True)
            # Python's JSON, which has NaN
            text = json.dumps({**about, "ranks": ranks})
            write_aside(path, text, durable=False, private=holds_secret(about))
    bad = _not_finite(ranks)
    terms = {
        term
        for micros_of_rank in ranks
        for micro in micros_of_rank
        for term, value in micro["losses"].items()
        if not math.isfinite(value)
    }
    what = f"the loss {' and '.join(sorted(terms))}" if bad else "the gradient, but no loss,"
    return Report(
        path=path,
        samples=bad,
        what=f"{what} is not finite (gradient norm {about['grad_norm']})",
        shown=_shown(bad),
    )


def _not_finite(ranks: Sequence[Sequence[dict[str, Any]]]) -> dict[int, list[str]]:
    """Rank -> keys of the samples in its micro-batches that have a loss which is not finite."""
    found: dict[int, list[str]] = {}
    for rank, micros in enumerate(ranks):
        for micro in micros:
            if not all(map(math.isfinite, micro["losses"].values())):
                found.setdefault(rank, []).extend(micro["keys"])
    return found


def _shown(samples: dict[int, list[str]]) -> str:
    """Those samples for a message; empty without any."""
    named = []
    for rank, keys in samples.items():
        more = " ..." if len(keys) > 4 else ""
        named.append(f"rank {rank}: {', '.join(keys[:4])}{more}")
    return f"Samples of the micro-batches with such a loss: {'; '.join(named)}. " if named else ""
