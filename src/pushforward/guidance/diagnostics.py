"""Whether chains have converged: how well they agree, and how many independent draws they are worth.

References:
    Rank-normalization, folding, and localization: An improved R-hat, Vehtari et al., arXiv 1903.08008.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pushforward.data.files import atomic_path
from pushforward.guidance.chains import Record

__all__ = ["Diagnosis", "diagnose", "plot"]

ARRIVED = 1.01  # R-hat below which chains are trusted
_FEWEST = {"rhat": 4, "ess": 10}  # moves after the warm-up; of fewer, an effective size tells their number, not chains


@dataclass(frozen=True)
class Diagnosis:
    """What the steps after the warm-up say about all chains together.

    Args:
        rhat: rank-normalised split R-hat, near 1 where the chains agree, for the `energy`, the `prior`, and the code's
            projections on fixed directions (`code`, the greatest). `None` if nothing can be said.
        ess: bulk effective sample size for the same (the least for the projections), from ten steps on.
        acceptance: mean probability of accepting a move; 1 if nothing is rejected.
        steps: number of steps after the warm-up.
        swaps: of ladders, mean probabilities that neighbours swap, from weight 1 on.
        round_trips: of ladders, how often a state has come from the prior to weight 1 anew, the mean of all chains.
    """

    rhat: dict[str, float | None]
    ess: dict[str, float | None]
    acceptance: float
    steps: int
    swaps: tuple[float, ...] = ()
    round_trips: float | None = None

    @property
    def worst(self) -> float | None:
        """The greatest R-hat; chains are usually trusted below 1.01 (Vehtari et al.)."""
        known = [value for value in self.rhat.values() if value is not None]
        return max(known) if known else None

    @property
    def verdict(self) -> str:
        """Say in words whether the chains have arrived."""
        worst = self.worst
        if worst is None:
            return "whether the chains have arrived is unknown: take several chains and more moves after the warm-up"
        if worst < ARRIVED:
            return f"the chains have arrived: R-hat {worst:.3f}, below {ARRIVED:g}"
        return f"the chains have not arrived: R-hat {worst:.2f}, where {ARRIVED:g} is trusted; take more moves"


def diagnose(history: Sequence[Record], warmed: int) -> Diagnosis:
    """Diagnose chains by their records.

    Args:
        history: `steps + 1` records, the first of the beginning.
        warmed: steps of the warm-up.
    """
    from arviz_stats.base import array_stats  # type: ignore[attr-defined]

    after = history[warmed + 1 :]
    series = {
        "energy": torch.stack([record.energy for record in after])[None],
        "prior": torch.stack([record.prior for record in after])[None],
        "code": torch.stack([record.projections for record in after], 1),
    }

    def measured(name: str, measure: str, worst: str) -> float | None:
        values = series[name].cpu().numpy()  # (series, steps, chains)
        if len(after) < _FEWEST[measure] or not np.ptp(values, axis=1).any():
            return None
        found = [float(getattr(array_stats, measure)(x, chain_axis=1, draw_axis=0)) for x in values]
        value = max(found) if worst == "max" else min(found)
        return value if math.isfinite(value) else None

    swaps = [record.swaps for record in after if record.swaps is not None]
    arrived = [record.arrived for record in after if record.arrived is not None]
    return Diagnosis(
        {name: measured(name, "rhat", "max") for name in series},
        {name: measured(name, "ess", "min") for name in series},
        float(torch.stack([record.acceptance for record in after]).mean()),
        len(after),
        tuple(torch.stack(swaps).mean((0, 2)).tolist()) if swaps else (),
        float(torch.stack(arrived).sum(0).mean()) if arrived else None,
    )


def plot(history: Sequence[Record], warmed: int, path: Path) -> None:
    """Plot energies, prior and acceptance of every chain over the moves as a PNG; the warm-up is grey."""
    from matplotlib.figure import Figure

    rows = {name: [record.energies[name] for record in history] for name in history[0].energies}
    rows["prior |z|²/2"] = [record.prior for record in history]
    if any(bool((record.acceptance < 1).any()) for record in history):
        rows["acceptance"] = [record.acceptance for record in history]
    figure = Figure(figsize=(7, 2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, values) in zip(panels, rows.items(), strict=True):
        axes.plot(torch.stack(values).cpu().numpy(), linewidth=0.7, alpha=0.7)
        axes.axvspan(0, warmed, color="0.92", zorder=0)
        axes.set_ylabel(name)
    panels[-1].set_xlabel("move")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
