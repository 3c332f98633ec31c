"""docs/results.md: the tables of samplers, processes and settings, in the form of gDDIM's.

    python benchmarks/tables.py                               # draw the page from the kept figures (make tables)
    python benchmarks/tables.py --data fashion.npz vp deq     # measure these tables anew (all, if none is named)

Every table is one `pushforward evaluate`, whose command stands beside it and whose report is kept in
benchmarks/results/tables. Generated images stay in --work: an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from _common import table

from pushforward.data.files import atomic_path
from pushforward.evaluation.plots import distance_curves
from pushforward.evaluation.report import Row, cell

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "tables"
PAGE = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "images" / "results.png"
NET = "Fashion"

# CIFAR-10 FID by network calls, gDDIM (arXiv 2206.05564); only ratios to the last column carry over to other weights.
CALLS = (10, 20, 50, 100, 1000)
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "vp": {
        "euler-maruyama": (None, None, 31.2, 12.2, 2.64),
        "heun": (66.25, 6.62, 2.65, 2.57, 2.56),
        "gddim:order=2": (4.17, 3.03, 2.59, 2.56, 2.56),
    },
    "blurring": {
        "ddpm": (None, None, 29.8, 9.73, 2.51),
        "gddim:order=2": (4.52, 2.97, 2.49, 2.47, 2.46),
    },
    "langevin": {
        "euler-maruyama": (None, None, 57.72, 13.21, 2.39),
        "gddim:order=2": (13.41, 3.39, 2.26, 2.26, 2.25),
    },
}


@dataclass(frozen=True)
class Table:
    """What one table measures: a title, the options of `pushforward evaluate`, and a sentence on how to read it."""

    title: str
    options: str
    text: str


RK45 = "rk45:tolerance=0.1,rk45:tolerance=0.01,rk45:tolerance=0.001"
LEVELS = (0, 0.3, 0.7, 1)
ORDERS = ",".join(f"gddim:order={k}" for k in range(4))
TABLES = {
    "vp": Table(
        "Variance-preserving diffusion",
        f"fashion-vp --solvers euler-maruyama,heun,gddim:order=2,auto,{RK45} --nfe 10,20,50,100",
        "gDDIM is, for VP, the exponential integrator in the noise prediction (DEIS).",
    ),
    "blurring": Table(
        "Blurring diffusion",
        f"fashion-blurring --solvers ddpm,gddim:order=2,auto,{RK45} --nfe 10,20,50,100",
        "`ddpm` is ancestral sampling.",
    ),
    "blurring-ancestral": Table(
        "Blurring diffusion, ancestral sampling with many calls",
        "fashion-blurring --solvers ddpm --nfe 200",
        "This shows how many calls ancestral sampling needs for the distance that `auto` has at 10 and 20.",
    ),
    "langevin": Table(
        "Critically damped Langevin diffusion",
        "fashion-langevin --solvers euler-maruyama,sscs,gddim:order=2,auto,rk45:tolerance=0.01 --nfe 10,20,50,100",
        "`sscs` is the splitting sampler of the paper that introduced the diffusion (arXiv 2112.07068).",
    ),
    "orders": Table(
        "Langevin: order, coordinates, corrector",
        f"fashion-langevin --solvers {ORDERS},gddim:order=0:factor=cholesky,gddim:order=2:factor=cholesky,"
        "gddim:order=2:corrector=reuse,gddim:order=2:corrector=evaluate --nfe 10,20 --count 2000",
        "`factor=cholesky` takes the coordinates L_t of the Cholesky factor instead of the root R_t; `reuse` corrects "
        "a step with the answer that the next one takes anyway, `evaluate` with one more call.",
    ),
    "noise": Table(
        "Langevin: noise at each step",
        "fashion-langevin --solvers "
        + ",".join(f"{name}:noise={level}:end=0.001" for name in ("gddim", "euler-maruyama") for level in LEVELS)
        + " --nfe 50 --count 2000",
        "Stochastic samplers run with 50 calls to t_min at noise level lambda; Euler–Maruyama has the factor "
        "(1 + lambda^2) / 2, for which the marginals are right at every lambda.",
    ),
    "reference": Table(
        "VP: the reference Gaussian",
        "fashion-vp --solvers gddim:order=2,gddim:order=2:reference=data,gddim:order=2:reference=spectrum "
        "--nfe 10,20 --count 2000",
        "The solver runs in the coordinates of point data (gDDIM), of N(m, s^2 I), and of the data's spectrum.",
    ),
    "deq": Table(
        "VP: all steps at once",
        "fashion-vp --solvers ddim,ddim:parallel=preconditioned:within=0.001 --steps 50 --count 2000",
        "One sampler is run one call after another, and solved for all times together; rounds are batched network "
        "calls. (They wait for the slowest of 500 images, and bfloat16's rounding is above the tolerance of .001: in "
        "float32, an image takes 9 rounds, `benchmarks/results/parallel.md`.)",
    ),
    "rounds": Table(
        "Five rounds all at once, and five and ten calls in a row",
        "fashion-vp fashion-blurring fashion-langevin "
        "--solvers auto:steps=5,auto:steps=10,gddim:order=2:steps=10,auto:rounds=5 "
        "--count 1000 --converged 60 --batch 100",
        "`rounds=5` makes the best image that it can in five batched calls. (With the present `auto`, on a CPU.)",
    ),
}


def command(name: str) -> list[str]:
    """The arguments of the table's `pushforward evaluate`; a table's own options come last and win."""
    plain = (
        "--data fashion.npz --split test --features fashion --count 5000 --converged 200 --precision bf16 --batch 500"
    )
    words = shlex.split(TABLES[name].options)
    models = [*takewhile(lambda word: not word.startswith("--"), words)]
    return ["evaluate", *models, *shlex.split(plain), *words[len(models) :]]


def measure(name: str, data: Path, work: Path) -> None:
    """Run the command, and keep its report."""
    arguments = [str(data) if a == "fashion.npz" else a for a in command(name)]
    out = work / name
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pushforward", *arguments, "--out", str(work), "--json", str(out.with_suffix(".json"))],
        check=True,
    )
    report = json.loads(out.with_suffix(".json").read_text())
    report["command"] = shlex.join(["pushforward", *command(name)])
    report["reference"] = "fashion.npz"
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# -- the page --------------------------------------------------------------------------------------------------------


def page() -> str:
    """All tables that there are figures for."""
    reports = {name: json.loads(p.read_text()) for name in TABLES if (p := KEPT / f"{name}.json").exists()}
    parts = [INTRODUCTION, summary(reports), picture(reports), savings(reports)]
    for name, report in reports.items():
        parts += [f"## {TABLES[name].title}", TABLES[name].text]
        if name in PUBLISHED:
            parts.append(ratios(report["rows"], PUBLISHED[name]))
        parts += [listing(report["rows"]), f"`{report['command']}`"]
    return "\n\n".join(part for part in parts if part) + "\n"


INTRODUCTION = f"""# Results: three diffusions, their samplers, one set of data

`make tables` writes this page from the reports in `benchmarks/results/tables`; below each table stands the command that
made it (`python benchmarks/tables.py --data fashion.npz NAME`). All figures are of the embedded Fashion-MNIST models,
on one NVIDIA H100, with networks in bfloat16.

**FD-{NET}** is the Fréchet distance in the 64 features of the classifier that comes with the package, to the 10000
test images. It is not the FID, and not comparable with distances in other features. It is extrapolated to infinitely
many images, and its standard error comes from a bootstrap of the images. **ratio** divides it by the distance of the
*converged* images (`auto`, 200 calls), with the error from resampling both alike. Below 1, a sampler's error happens to
hide some of the network's; the paired error does not have that blind spot. All samplers begin at the same codes and
labels. **error** is the median over images of the relative distance to the converged image of the same code, for
samplers that draw no noise; below .005 it is bfloat16's rounding. (Measured with an earlier `auto`, which ended in the
denoised state at `t_min` with any number of calls, .003 from the flow's end, and did not place its steps by the data's
deviation: its errors with few calls are smaller now, see [solvers](solvers.md).) P and R are precision
and recall (k = 5, with as many real images). NFE is the number of network evaluations per image. In the tables of
ratios, figures in parentheses are those of gDDIM's paper (FID on CIFAR-10, other networks), over its column of 1000
calls of the same sampler."""


def summary(reports: dict[str, Any]) -> str:
    """The converged runs side by side, and what the claims come to."""
    main = {name: reports[name]["rows"] for name in PUBLISHED if name in reports}
    if not main:
        return ""
    head = ["process", f"FD-{NET} converged", "precision", "recall", "best ratio at 10", "at 20", "at 50"]
    lines = []
    for name, rows in main.items():
        measures = rows[0]["measures"][NET]
        cells = [
            name,
            cell(measures, "extrapolated"),
            f"{measures['precision']:.2f}",
            f"{measures['recall']:.2f}",
        ]
        for calls in CALLS[:3]:
            of = [r for r in rows[1:] if round(r["nfe"]) in (calls, calls - 1)]
            best = min(of, key=lambda r: r["measures"][NET]["ratio"])
            cells.append(f"{cell(best['measures'][NET], 'ratio')} ({best['sampler']})")
        lines.append(cells)
    return "## In short\n\n" + table(head, lines)


def picture(reports: dict[str, Any]) -> str:
    """Distances by network calls, a panel a process."""
    rows = [Row(**row) for name in PUBLISHED if name in reports for row in reports[name]["rows"]]
    if not rows:
        return ""
    with atomic_path(PICTURE) as temporary:
        distance_curves(rows, temporary)
    return f"![Distances by network calls]({PICTURE.relative_to(PAGE.parent)})"


def savings(reports: dict[str, Any]) -> str:
    """Calls of ancestral sampling on blurring, and the fewest of another sampler that is no farther from the data."""
    if "blurring" not in reports:
        return ""
    rows = [r for name in ("blurring", "blurring-ancestral") for r in reports.get(name, {"rows": []})["rows"]]
    distances = {(r["sampler"], round(r["nfe"])): r["measures"][NET]["extrapolated"] for r in rows}
    lines = []
    for (sampler, calls), distance in sorted(distances.items()):
        near = [(n, s) for (s, n), d in distances.items() if s in ("auto", "gddim:order=2") and d <= distance]
        if sampler == "ddpm":
            fewest, other = min(near, default=(0, ""))
            found = [str(fewest), f"`{other}`", f"{calls / fewest:.0f}"] if near else ["none", "-", "-"]
            lines.append([str(calls), f"{distance:.3g}", *found])
    text = "On the blurring diffusion: network calls that reach the distance of ancestral sampling. "
    text += "Ten are the fewest measured.\n\n"
    return text + table(["ancestral calls", f"FD-{NET}", "as near with", "of", "fewer by"], lines)


def ratios(rows: list[dict[str, Any]], published: dict[str, tuple[float | None, ...]]) -> str:
    """Samplers by network calls: the ratio to the converged distance, beside the published one."""
    lines = []
    for sampler in dict.fromkeys(row["sampler"] for row in rows[1:] if not row["sampler"].startswith("rk45")):
        cells = [f"`{sampler}`"]
        known = published.get(sampler)
        for k, calls in enumerate(CALLS[:4]):
            of = [r for r in rows if r["sampler"] == sampler and round(r["nfe"]) in (calls, calls - 1)]
            ratio = cell(of[0]["measures"][NET], "ratio") if of else "-"
            if known is not None:
                there = known[k]
                ratio += f" ({there / known[-1]:.2f})" if there is not None else " (> 35)"
            cells.append(ratio)
        lines.append(cells)
    head = ["sampler", *(str(n) for n in CALLS[:4])]
    return "Ratio to the converged distance by network calls:\n\n" + table(head, lines)


def listing(rows: list[dict[str, Any]]) -> str:
    """Every row with all figures."""
    head = ["sampler", "NFE", "rounds", "images", f"FD-{NET}", "ratio", f"KD-{NET} x1000", "P", "R", "error"]
    several = len({row["model"] for row in rows}) > 1
    lines = []
    for row in rows:
        m = row["measures"][NET]
        error = "-" if row["error"] is None else f"{row['error']['median']:.2g}"
        cells = [
            f"`{row['sampler']}`", f"{row['nfe']:.4g}", str(row["rounds"]), str(row["count"]),
            cell(m, "extrapolated"), cell(m, "ratio"), cell(m, "kernel", 1000),
            f"{m['precision']:.2f}", f"{m['recall']:.2f}", error,
        ]  # fmt: skip
        lines.append([row["model"]] * several + cells)
    return table(["model"] * several + head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(TABLES))
    parser.add_argument("--data", type=Path, help="fashion.npz, as examples/zoo_data.py makes it")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tables", help="folder for generated images")
    options = parser.parse_args()
    if unknown := set(options.names) - set(TABLES):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    if options.names and options.data is None:
        parser.error("measuring needs --data")
    if options.data is not None:
        for name in options.names or TABLES:
            measure(name, options.data, options.work)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
