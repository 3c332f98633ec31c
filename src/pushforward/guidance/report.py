"""What is said of guided samples: energies, chains and codes, as plain values and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pushforward.data.words import many
from pushforward.guidance.diagnostics import diagnose
from pushforward.guidance.dynamics import Schedule
from pushforward.guidance.posterior import Guided
from pushforward.maps.normality import statistics

__all__ = ["report_of", "summary"]

_SATURATED = 0.98  # values of an image beyond this are black or white
_VAGUE = 0.5  # error of a log evidence, above which few particles have most of the weight
_MOSTLY = 0.5  # share of the codes that a test rejects, from which it is said; of Gaussian ones it rejects 0.05


def report_of(found: Guided, schedule: Schedule | None) -> dict[str, Any]:
    """Energies of the samples, and what chains tell of themselves."""
    rows = [
        {
            "chain": chain,
            "weight": weight,
            "energy": total,
            "energies": {k: float(v[i]) for k, v in found.energies.items()},
        }
        for i, (chain, weight, total) in enumerate(
            zip(found.chain.tolist(), found.weights.tolist(), found.energy.tolist(), strict=True)
        )
    ]
    report: dict[str, Any] = {
        "count": len(rows), "energy": float((found.weights * found.energy).sum()),
        "energies": {name: float((found.weights * value).sum()) for name, value in found.energies.items()},
        "nfe": float(found.nfe.double().mean()),
    }  # fmt: skip
    if found.history:
        report["traces"] = {
            "energy": [float(record.energy.mean()) for record in found.history],
            "prior": [float(record.prior.mean()) for record in found.history],
        }
    if schedule is not None:
        said = diagnose(found.history, schedule.warmed)
        if schedule.anneal:
            weights = found.weights[-len(found.nfe) :]  # of one draw a chain
            report["effective_chains"] = float(weights.sum().square() / weights.square().sum())
        report |= {"acceptance": said.acceptance, "rhat": said.rhat, "ess": said.ess, "verdict": said.verdict,
                   "step": float(found.history[-1].step.mean())}  # fmt: skip
        if said.swaps:
            report |= {"swaps": list(said.swaps), "round_trips": said.round_trips}
    elif found.evidence is not None:
        report["evidence"] = asdict(found.evidence)
    elif found.history:
        codes = statistics(found.code.variables())
        report["codes"] = {name: codes[name] for name in ("mean", "std", "p_value", "rejected")}
        report["saturated"] = float((found.images.abs() > _SATURATED).double().mean())
    return {**report, "samples": rows}


def summary(report: Mapping[str, Any]) -> str:
    """The report in a sentence, with what should worry a reader."""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in report["energies"].items())
    text = f"{report['out']}: {many(report['count'], 'sample')}, mean energy {report['energy']:.4g}"
    text += f" ({report['unguided_energy']:.4g} without guidance)"
    text += f" ({parts})" * (len(report["energies"]) > 1)
    text += f", {many(report['nfe'], 'network evaluation')} {'per chain' if 'rhat' in report else 'each'}"
    text += f", {report['seconds']:.1f} s"
    if "rhat" in report:
        known = {name: value for name, value in report["rhat"].items() if value is not None}
        if report["acceptance"] < 1:
            text += f"; accepted {report['acceptance']:.2f}"
        if "swaps" in report:
            least, most = min(report["swaps"]), max(report["swaps"])
            text += f"; swaps accepted {least:.2f} to {most:.2f}, {report['round_trips']:.1f} round trips each"
        if known:
            text += "; R-hat " + ", ".join(f"{name} {value:.2f}" for name, value in known.items())
        text += f"; {report['verdict']}"
    if "evidence" in report:
        said = report["evidence"]
        how = "measured" if said["populations"] > 1 else "estimated"
        text += f"; log evidence {said['log']:.3f} +- {said['error']:.3f} ({how})"
        text += f"; {said['ancestors']} of the first particles have descendants among the samples"
        if said["error"] > _VAGUE:
            text += ": take more particles per image"
    if "codes" in report and report["codes"]["rejected"] > _MOSTLY:
        text += (
            f"; {report['codes']['rejected']:.0%} of the codes are no longer Gaussian, and their images may be unlike "
            f"the model's ({report['saturated']:.0%} of the values are black or white): take fewer moves, a smaller "
            "weight, or chains (--sampler mala)"
        )
    return text
