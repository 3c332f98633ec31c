r"""How exactly real images come back from their codes, and how Gaussian the codes are.

    python benchmarks/inversion.py --data fashion.npz                    # what results/inversion.json has not yet
    python benchmarks/inversion.py --data fashion.npz --cases fashion-vp --plans "ddim 50"
    python benchmarks/inversion.py --evaluations --digits mnist.npz      # results/inversion-evaluations.json
    python benchmarks/inversion.py --roots                               # what results/inversion-roots.json has not yet

`--evaluations` counts those of exact codes, found for one state after another or for all at once, beside Uni-Inv's; the
run of the plan that measures the error is included. Images are samples of the model, or foreign: digits of MNIST.
`--roots` begins the inversion of samples at several codes, and counts those that are different and decode to the image
(errors up to 1e-4, apart by more than 1e-2 of their norm), and how straight the ways from them are: the length of the
path, in the units of flow matching, over the distance of its ends.

The file of Fashion-MNIST is made by `examples/zoo_data.py`; its first test images are taken, with their labels.

An image is inverted, its code is decoded step by step, and the greatest difference of any pixel counts (images are in
[-1, 1]). *Rounds* are batched network calls one after another, *NFE* network evaluations an image, and the *residual*
is the error that the inversion itself estimates. Of the codes the table gives the least and the greatest standard
deviation of an image's, and the correlation of neighbours in a row over all; they are 1 and 0 for Gaussian codes.

Ours is the exact inversion of any plan that ends at t_min: *noisy* (the default: noise of that time is added to the
image and kept in the code) and *clean* (none is). Beside it, on plans that end at clean data as the field has them:

- *naive DDIM*: the plain inversion, one call a step, with the network asked at the time of the state it knows (`own`)
  or of the one it seeks (`target`, as `DDIMInverseScheduler` of `diffusers` is used);
- *O-BELM* and *BDIA*: reversible two-step solvers run backwards by algebra. They come back exactly from the *pair* of
  first states, twice the numbers of an image; decoding from the first state alone is given, too. Their states are in
  float64 around the float32 network.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from _common import number, plot_lines, read_json, table, write_json, write_text
from torch import Tensor

from pushforward import SOLVERS, Code, Diffusion, Model, Plan, PushforwardError, grid, load
from pushforward.data.pictures import from_bytes
from pushforward.execute import Round, run
from pushforward.execute.backward import backward, end_pair, forward, naive_inversion
from pushforward.execute.inverse import INVERSE
from pushforward.linear import ScaledProcess
from pushforward.maps.diffusion import Inversion
from pushforward.maps.labels import in_turn
from pushforward.maps.normality import statistics as code_statistics
from pushforward.maps.passes import passed

MODELS = ("fashion-vp", "fashion-blurring", "fashion-langevin")
MAIN = "ddim 50"  # measured on all images; the other plans on half of them
PLANS: dict[str, tuple[str, int, dict[str, Any]]] = {
    MAIN: ("ddim", 50, {}),
    "ddim 100": ("ddim", 100, {}),
    "gddim order 2, 50": ("gddim", 50, {"order": 2}),
    "unipc 50": ("unipc", 50, {}),
    "heun 25": ("heun", 25, {}),
    "dpm++ 50": ("dpm++", 50, {}),
}
PEERS = ("naive DDIM, own", "naive DDIM, target", "O-BELM", "BDIA")
PEER_PLANS = (MAIN, "ddim 100")


@dataclass(frozen=True, eq=False)
class Images:
    """Images in [-1, 1], `(count, 1, 28, 28)`, and their labels."""

    pixels: Tensor
    labels: Tensor

    def first(self, count: int) -> Images:
        """The first `count` of them."""
        return Images(self.pixels[:count], self.labels[:count])


def read(path: Path, count: int) -> Images:
    """The first test images of a file."""
    with np.load(path) as arrays:
        pixels = from_bytes(torch.from_numpy(arrays["x_test"][:count]).reshape(-1, 28, 28, 1))
        labels = torch.from_numpy(arrays["y_test"][:count]).long()
    return Images(pixels.movedim(-1, 1), labels)


# -- measuring ------------------------------------------------------------------------------------------------------


def plan_of(model: Model, name: str, end: float, steps: int | None = None) -> Plan:
    """One of `PLANS` on the quadratic grid."""
    solver, own, settings = PLANS[name]
    return SOLVERS[solver](model.process, grid.power(model.process, steps or own, end=end), **settings)


def exact(model: Model, name: str, images: Images, steps: int | None, *, noisy: bool) -> dict[str, Any]:
    """Ours."""
    diffusion = Diffusion(model, plan_of(model, name, model.process.t_min, steps)).given(images.labels)
    residuals: list[float] = []

    def tell(step: Round) -> None:
        if step.done == len(residuals) + 1:  # images that are tried again begin at round 1
            residuals.append(step.residual)

    found = diffusion.invert(images.pixels, noisy=noisy, callback=tell)
    try:
        back = found.decode()
    except PushforwardError:  # the inversion failed so badly that the code cannot be decoded
        back = torch.full_like(images.pixels, float("inf"))
    return {
        "rounds": found.rounds,
        "nfe": float(found.nfe.double().mean()),
        "residual": _short(float(found.residual.max())),
        "residuals": [_short(r) for r in residuals],
        **_quality(images, back, found.code.start),
    }


def naive(
    model: Model, name: str, images: Images, steps: int | None, *, asked: Literal["own", "target"]
) -> dict[str, Any]:
    """The plain inversion of DDIM, from clean data."""
    plan = plan_of(model, name, 0.0, steps)
    diffusion = Diffusion(model, plan).given(images.labels)
    denoiser = diffusion.model.denoiser
    first = naive_inversion(plan, denoiser, model.process.lift(images.pixels), asked=asked)
    code = Code(diffusion.code(first))
    calls = len(plan.nodes) - 1
    back = diffusion.decode(code)
    return {"rounds": calls, "nfe": float(calls), **_quality(images, back, code.start)}


def reversible(model: Model, solver: str, name: str, images: Images, steps: int | None) -> dict[str, Any]:
    """A two-step solver backwards and forwards, from clean data."""
    process = model.process
    plan = SOLVERS[solver](process, grid.power(process, steps or PLANS[name][1]))
    denoiser = model.given(images.labels).denoiser
    clean = process.lift(images.pixels.double())
    pair = end_pair(plan, denoiser, clean, network_dtype=torch.float32)
    first, second = backward(plan, denoiser, *pair, network_dtype=torch.float32)
    _, last = forward(plan, denoiser, first, second, network_dtype=torch.float32)
    code = Diffusion(model, plan, dtype=torch.float64).code(first)
    rounds = len(plan.nodes) - 1
    try:
        alone = process.image(run(plan, denoiser, first.float()))
    except PushforwardError:
        alone = torch.full_like(images.pixels, float("inf"))
    return {
        "rounds": rounds,
        "nfe": float(rounds),
        "alone": _errors(images, alone),
        **_quality(images, process.image(last), code),
    }


def _quality(images: Images, back: Tensor, code: Tensor) -> dict[str, Any]:
    """Errors of an image each, and how Gaussian the codes are."""
    said = code_statistics(code)
    deviations = [image["std"] for image in said["images"]]
    return {
        "errors": _errors(images, back),
        "std": [_short(min(deviations)), _short(max(deviations))],
        "autocorrelation": _short(said["horizontal"]),
        "rejected": said["rejected"],
    }


def _errors(images: Images, back: Tensor) -> list[float]:
    return [_short(float(e)) for e in (back.double() - images.pixels).flatten(1).abs().amax(1)]


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def measure(model: Model, key: str, images: Images, steps: int | None) -> dict[str, Any]:
    """The row of a key `plan | way`."""
    name, way = key.split(" | ")
    if way in ("noisy", "clean"):
        row = exact(model, name, images, steps, noisy=way == "noisy")
    elif way.startswith("naive"):
        row = naive(model, name, images, steps, asked="own" if way.endswith("own") else "target")
    else:
        row = reversible(model, way.lower(), name, images, steps)
    return {"images": len(images.pixels), **row}


def keys() -> list[str]:
    """What is measured of each model."""
    ours = [f"{name} | {way}" for name in PLANS for way in ("noisy", "clean")]
    return ours + [f"{name} | {way}" for name in PEER_PLANS for way in PEERS]


# -- reporting ------------------------------------------------------------------------------------------------------


def _cell(errors: Sequence[float]) -> str:
    return f"{number(float(f'{statistics.median(errors):.2g}'))} ({number(float(f'{max(errors):.2g}'))})"


def report(name: str, rows: dict[str, Any]) -> str:
    """A model's table."""
    lines: list[list[object]] = []
    for key in (k for k in keys() if k in rows):
        row, (plan, way) = rows[key], key.split(" | ")
        if way.startswith(("O-", "BD")):
            plan, way = f"{way} {plan.split()[-1]}", "from the pair"
        elif way.startswith("naive"):
            way = way.replace("naive DDIM", "naive")
        else:
            way = f"**{way}**"
        ends = [f"{row['nfe']:.0f}", row.get("residual"), " to ".join(number(s) for s in row["std"]),
                f"{row['autocorrelation']:.2f}"]  # fmt: skip
        lines.append([plan, way, _cell(row["errors"]), row["rounds"], *ends, row["images"]])
        if "alone" in row:
            lines.append([plan, "from the first state", _cell(row["alone"]), row["rounds"], *ends, row["images"]])
    columns = ["plan", "way", "error: median (worst)", "rounds", "NFE", "residual", "code std", "correlation", "images"]
    return f"## {name}\n\n{table(columns, lines)}"


def write(name: str, cases: dict[str, Any]) -> None:
    """Tables, JSON and plot."""
    texts = [report(case, rows) for case, rows in cases.items() if rows]
    intro = (
        "Greatest error of any pixel after inverting and decoding, median (worst) over the images. **noisy** and "
        "**clean** are ours."
    )
    write_text(name, f"# Inversion of real images\n\n{intro}\n\n" + "\n\n".join(texts))
    write_json(name, {"cases": cases})
    panels = {case: lines for case, rows in cases.items() if (lines := _panel(rows))}
    if panels:
        plot_lines(name, panels, "rounds", "greatest error estimated in any image")


def _panel(rows: dict[str, Any]) -> dict[str, tuple[list[float], list[float], bool]]:
    lines = {}
    for key, row in rows.items():
        points = [(k + 1.0, r) for k, r in enumerate(row.get("residuals", ())) if 0 < r < float("inf")]
        if points and (key.endswith("noisy") or key.startswith(f"{MAIN} |")):
            lines[key.replace(" | ", ", ")] = ([r for r, _ in points], [e for _, e in points], key.endswith("noisy"))
    return lines


# -- evaluations, and roots -----------------------------------------------------------------------------------------

COUNTED = (
    ("fashion-vp", 1.0, False), ("fashion-vp", 1.0, True), ("emoji", 1.0, False), ("emoji", 3.0, False),
    ("emoji", 5.0, False),
)  # fmt: skip
SAME = 1e-2  # of the norm: codes that are nearer are one


def _drawn(name: str, steps: int, guidance: float, count: int, digits: Path | None) -> tuple[Diffusion, Tensor]:
    """A map to t_min, bound to classes in turn, and images: its own samples, or digits."""
    model = load(name)
    labels = in_turn(model, count)
    own = Diffusion(model, SOLVERS["ddim"](model.process, grid.power(model.process, 20))).given(labels, guidance)
    images = own.sample(count, seed=3) if digits is None else read(digits, count).pixels
    plan = SOLVERS["ddim"](model.process, grid.power(model.process, steps, end=model.process.t_min))
    return Diffusion(model, plan).given(labels, guidance), images


def evaluations(steps: Sequence[int], count: int, digits: Path | None) -> None:
    """Write `results/inversion-evaluations`."""
    rows: list[dict[str, Any]] = []
    columns = ["model", "guidance", "images", "steps", "way", "error: median (worst)", "NFE", "calls", "seconds"]
    for name, guidance, foreign in COUNTED:
        for number_of in steps if digits is not None or not foreign else ():
            diffusion, images = _drawn(name, number_of, guidance, count, digits if foreign else None)
            for way in ("uni-inv", "sequential", "at once"):
                began = time.perf_counter()
                found = passed(diffusion, images, "uni-inv") if way == "uni-inv" else diffusion.invert(
                    images, sequential=way == "sequential")  # fmt: skip
                rows.append({
                    "model": name, "guidance": guidance, "images": "digits" if foreign else "own", "steps": number_of,
                    "way": way, "errors": [_short(float(e)) for e in found.residual], "nfe": found.nfe.tolist(),
                    "calls": found.rounds + found.decoding, "seconds": round(time.perf_counter() - began, 1),
                })  # fmt: skip
                print(rows[-1], flush=True)
    lines = [
        [r["model"], f"{r['guidance']:g}", r["images"], r["steps"], r["way"], _cell(r["errors"]),
         f"{statistics.mean(r['nfe']):.0f}", r["calls"], r["seconds"]] for r in rows
    ]  # fmt: skip
    write_json("inversion-evaluations", {"rows": rows})
    write_text("inversion-evaluations", f"# Evaluations of exact codes\n\n{count} images.\n\n{table(columns, lines)}")


def roots(steps: int, count: int, *, redo: bool) -> None:
    """Write `results/inversion-roots`."""
    known = read_json("inversion-roots")
    rows: list[dict[str, Any]] = known["rows"] if known.get("steps") == steps and not redo else []
    for guidance in (1.0, 3.0, 5.0):
        if any(row["guidance"] == guidance for row in rows):
            continue
        diffusion, images = _drawn("emoji", steps, guidance, count, None)
        every = [diffusion.invert(images, sequential=True)]
        begins = [passed(diffusion, images, "uni-inv").code, Code(every[0].code.start.roll(1, 0)),
                  *(Code(diffusion.draw(count, seed=seed).start) for seed in (1, 2, 3))]  # fmt: skip
        every += [diffusion.invert(images, begin=begin, sequential=True) for begin in begins]
        lengths = torch.stack([straightness(diffusion, one.code) for one in every])
        for i in range(count):
            found = [k for k, one in enumerate(every) if float(one.residual[i]) <= INVERSE.tolerance]
            codes = torch.stack([one.code.start[i] for one in every])
            apart = torch.cdist(codes.flatten(1).double(), codes.flatten(1).double()) / codes[found[:1]].norm()
            different: list[int] = []
            for k in found:
                if all(float(apart[k, other]) > SAME for other in different):
                    different.append(k)
            gaussian = [code_statistics(codes[k : k + 1]) for k in different]
            middles = [(codes[k] + codes[j]) / 2 for k, j in combinations(different, 2)]
            rows.append({
                "guidance": guidance, "image": i, "residuals": [_short(float(one.residual[i])) for one in every],
                "nfe": [int(one.nfe[i]) for one in every], "exact": len(found), "different": len(different),
                "within": _short(max((float(apart[k, different].min()) for k in found), default=0.0)),
                "between": [_short(float(d)) for d in apart[different][:, different].triu(1).flatten() if d > 0],
                "midway": [_short(_missed(diffusion, every[0], images, i, z)) for z in middles],
                "std": [_short(g["std"]) for g in gaussian],
                "autocorrelation": [_short(g["horizontal"]) for g in gaussian],
                "p_value": [_short(g["p_value"]) for g in gaussian],
                "length": [_short(float(lengths[k, i])) for k in different],
            })  # fmt: skip
            print(rows[-1], flush=True)
        _write_roots(steps, count, rows)


def _missed(diffusion: Diffusion, found: Inversion, images: Tensor, i: int, z: Tensor) -> float:
    """Greatest error of image i decoded from another code."""
    codes = found.code.start.clone()
    codes[i] = z
    return float((diffusion.decode(replace(found.code, start=codes)) - images)[i].abs().max())


def _write_roots(steps: int, count: int, rows: list[dict[str, Any]]) -> None:
    lines: list[list[object]] = []
    for guidance in sorted({row["guidance"] for row in rows}):
        some = [row for row in rows if row["guidance"] == guidance]
        lines.append([
            f"{guidance:g}", count, sum(len(row["residuals"]) for row in some), sum(row["exact"] for row in some),
            ", ".join(str(row["different"]) for row in some), f"{max(row['within'] for row in some):.1g}",
            *(_extent([d for row in some for d in row[key]])
              for key in ("between", "midway", "std", "autocorrelation", "p_value", "length")),
        ])  # fmt: skip
    columns = ["guidance", "images", "beginnings", "exact", "different codes, an image each", "apart within one",
               "apart between two", "error midway", "std", "correlation", "p-value", "path over chord"]  # fmt: skip
    intro = (
        f"`emoji`, DDIM, {steps} steps. Codes count if they decode with errors up to 1e-4, and are different if they "
        f"are apart by more than {SAME:g} of their norm; *error midway* is that of decoding the mean of two, which "
        "is small where they are one flat valley and not two solutions. Beginnings: the default, Uni-Inv's code, the "
        "code of another image and three random ones."
    )
    write_json("inversion-roots", {"steps": steps, "rows": rows})
    write_text("inversion-roots", f"# Codes of an image\n\n{intro}\n\n{table(columns, lines)}")


def _extent(values: Sequence[float]) -> str:
    """Least to greatest."""
    return f"{number(min(values))} to {number(max(values))}" if values else ""


def straightness(diffusion: Diffusion, code: Code) -> Tensor:
    """Length of each path in units of flow matching over the distance of its ends, `(count,)`."""
    states: list[Tensor] = []
    plan, start = diffusion.plan, diffusion.start(code.start)
    last = run(plan, diffusion.model_for(len(start)).denoiser, start, callback=lambda step: states.append(step.state))
    units = torch.stack(cast("ScaledProcess", plan.process).alpha_sigma(plan.node_times)).sum(0).to(start)
    path = torch.stack([*states, last]).flatten(2) / units[:, None, None]
    return path.diff(dim=0).norm(dim=2).sum(0) / (path[-1] - path[0]).norm(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=".npz with x_test and y_test of Fashion-MNIST")
    parser.add_argument("--cases", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--plans", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--images", type=int, default=16, help="how many with the main plan and the peers")
    parser.add_argument("--others", type=int, default=4, help="how many with the other plans")
    parser.add_argument("--steps", type=int, help="replaces the steps of all plans (to try things out)")
    parser.add_argument("--evaluations", action="store_true", help="count evaluations instead")
    parser.add_argument("--roots", action="store_true", help="count roots instead")
    parser.add_argument("--digits", type=Path, help=".npz with x_test and y_test of MNIST, for foreign images")
    parser.add_argument("--redo", action="store_true", help="measure again what the file has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="inversion", help="of the files in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.evaluations or arguments.roots:
        if arguments.roots:
            roots(arguments.steps or 28, arguments.others, redo=arguments.redo)
        if arguments.evaluations:
            evaluations([arguments.steps] if arguments.steps else [15, 28, 50], arguments.others, arguments.digits)
        return
    if arguments.data is None:
        parser.error("give the .npz of Fashion-MNIST by --data")
    images = read(arguments.data, arguments.images)
    cases: dict[str, Any] = read_json(arguments.name).get("cases", {})
    for case in arguments.cases:
        model, rows = load(case), cases.setdefault(case, {})
        for key in keys():
            if not any(part in key for part in arguments.plans) or (key in rows and not arguments.redo):
                continue
            ours = key.endswith(("noisy", "clean"))
            few = min(arguments.others, arguments.images) if ours and not key.startswith(f"{MAIN} |") else None
            began = time.perf_counter()
            with torch.no_grad():
                rows[key] = measure(model, key, images.first(few or arguments.images), arguments.steps)
            rows[key]["seconds"] = round(time.perf_counter() - began, 1)
            print(f"{case}, {key}: {rows[key]['seconds']:.0f} s, error {_cell(rows[key]['errors'])}", flush=True)
            write(arguments.name, cases)
        print("\n" + report(case, rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
