"""The rows of a comparison of samplers, and figures with their standard errors as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Row", "aligned", "cell", "distance_name", "table", "too_few", "with_error"]

SHARES = 1000  # images below which shares of them are not to be trusted


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Args:
        model: name of the model.
        process: name of its process.
        sampler: the sampler as text; "converged" for the run that others are compared with.
        steps: steps of the solver.
        nfe: network evaluations of each image, on average.
        rounds: batched network calls on the critical path.
        count: images.
        error: `median`, `mean` and `worst` relative distance to the converged image; `None` if stochastic.
        measures: by feature network: `frechet`, `frechet_error` (standard error), `extrapolated`,
            `extrapolated_error`, `ratio`, `ratio_error`, `kernel`, `kernel_error`, `precision`, `recall`, `density`,
            `coverage`; what cannot be said is left out.
    """

    model: str
    process: str
    sampler: str
    steps: int | None
    nfe: float
    rounds: int
    count: int
    error: dict[str, float] | None
    measures: dict[str, dict[str, float | None]] = field(default_factory=dict)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, columns aligned; distances with their standard errors.

    `FD-NAME inf` is the extrapolated Fréchet distance, `ratio` that over the converged run's, `KD` the kernel distance
    times 1000, `P R D C` precision, recall, density and coverage.
    """
    nets = list(dict.fromkeys(net for row in rows for net in row.measures))
    head = ["model", "sampler", "NFE", "rounds", "images", "error", "worst"]
    for net in nets:
        name = distance_name(net)
        head += [name, f"{name} inf", "ratio", f"KD-{net} x1000", "P", "R", "D", "C"]
    lines = [head]
    for row in rows:
        error = row.error or {}
        line = [row.model, row.sampler, f"{row.nfe:.4g}", str(row.rounds), str(row.count),
                _number(error.get("median")), _number(error.get("worst"))]  # fmt: skip
        for net in nets:
            line += _cells(row.measures[net])
        lines.append(line)
    return aligned(lines)


def _cells(measures: Mapping[str, float | None]) -> list[str]:
    distances = [cell(measures, name) for name in ("frechet", "extrapolated", "ratio")]
    shares = [_number(measures.get(name)) for name in ("precision", "recall", "density", "coverage")]
    return [*distances, cell(measures, "kernel", 1000.0), *shares]


def too_few(rows: Sequence[Row]) -> list[str]:
    """Return what the number of images is too small for, a sentence each."""
    said = []
    count = min(row.count for row in rows)
    if any(measures.get("extrapolated") is None for row in rows for measures in row.measures.values()):
        said.append(
            f"{count} images are too few for a Fréchet distance without bias: it is too large, by about as much for "
            "all samplers; an extrapolated one needs eight times as many images as there are features (--count)"
        )
    if count < SHARES:
        said.append(f"of {count} images, precision, recall, density and coverage say little: take {SHARES} or more")
    return said


def distance_name(net: str) -> str:
    """Return what the Fréchet distance of a feature network is called: FID is Inception's alone."""
    return "FID" if net == "Inception" else f"FD-{net}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text, every column as wide as its widest cell."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join("  ".join(one.ljust(w) for one, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def cell(measures: Mapping[str, float | None], name: str, scale: float = 1.0) -> str:
    """Return the measure `name` times `scale`, with its standard error where it has one; `-` where it is not known."""
    value, error = measures.get(name), measures.get(f"{name}_error")
    return "-" if value is None else with_error(scale * value, None if error is None else scale * error)


def with_error(value: float, error: float | None) -> str:
    """Return a figure and its standard error, with three digits, or as many more as reach the error's first one."""
    if not error or not math.isfinite(value):
        return f"{value:.3g}"
    if error >= 9.5:
        return f"{value:.0f} ± {error:.0f}"
    said = f"{error:.1g}"
    digits = max(3, len(f"{abs(value) / 10 ** math.floor(math.log10(float(said))):.0f}"))
    return f"{value:.{digits}g} ± {said}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
