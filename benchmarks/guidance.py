"""Guidance by energies: on codes, by chains, and at every step; against truth, and against one another.

    python benchmarks/guidance.py --closed                      # an exact mixture, whose posterior is known
    python benchmarks/guidance.py --fashion fashion.npz         # clothes of a class, by a classifier's energy
    python benchmarks/guidance.py --fashion fashion.npz --rare gan.safetensors rare-vp    # classes hardly seen
    python benchmarks/guidance.py --faces dcgan.pth dlib.safetensors
    python benchmarks/guidance.py --cost                        # rounds and evaluations of one gradient
    python benchmarks/guidance.py --moves                       # rounds of a chain's next move
    python benchmarks/guidance.py --optimisers fashion.npz      # steps of descents to the same energy

`--closed`: data are a mixture of Gaussians, the network is its exact denoiser and the energy a quadratic, so that the
posterior of images is a mixture again, in closed form. Chains on codes and guidance at every step are held against it
at equal numbers of network evaluations (a vector-Jacobian product counts as one).

`fashion.npz` is made by `examples/zoo_data.py`. Images are guided to a class by one classifier, trained here in some
minutes, and judged by another one, of another architecture (92.4% right on real images). A vector-Jacobian product
counts as one evaluation. For `--rare`, a GAN and a diffusion learn from the same images, few of them bags and trousers:

    python examples/gan_fashion.py fashion.npz --rare 8:0.02 1:0.1 --data-out rare.npz
    pushforward train rare-vp --data rare.npz --process vp --half --ema 0.998 --steps 1800
    python benchmarks/guidance.py --fashion fashion.npz --rare gan.safetensors rare-vp --labels bag trouser
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import RESULTS, median, read_json, table, write_json, write_text
from _mixture import Mixture as ExactDenoiser
from torch import Tensor

from pushforward import (
    Diffusion,
    Exact,
    Gaussian,
    Implicit,
    Model,
    Network,
    PushforwardError,
    load,
    process_from_config,
)
from pushforward.data.pictures import compared, from_bytes, save_image, to_bytes
from pushforward.evaluation.distances import FEWEST, Reference, Sample, neighbourhoods
from pushforward.execute import Parallel, Solution
from pushforward.guidance import energies
from pushforward.guidance.decoding import Counted, Trails
from pushforward.guidance.diagnostics import diagnose
from pushforward.guidance.dynamics import Dynamics, Schedule, hmc, langevin, mala, pcn
from pushforward.guidance.particles import Particles, fk, psi
from pushforward.guidance.particles import guide as gather
from pushforward.guidance.posterior import best, guide
from pushforward.guidance.spectrum import bands, norms
from pushforward.guidance.steering import STEERINGS, steered
from pushforward.maps.code import Code
from pushforward.maps.generator import Generator
from pushforward.maps.load import load_generator
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.vision.features import classify, feature_net, features

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of networks, but of --closed and --cost
WEIGHTS = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the closed form's energy, of which steering has the best in hindsight
BUDGET = 6000  # evaluations of a tempered chain of --closed
FREE = 1000  # samples in which rare classes are counted

# -- (a) the truth in closed form --------------------------------------------------------------------------------------

SIDE, CENTRES, VARIANCE, SEEN, DEVIATION = 4, 5, 0.04, 6, 0.3
LEVELS, DIRECTIONS = 1999, 200  # of the sliced distance


@dataclass(frozen=True, eq=False)
class Mixture:
    """Images around some centres, what is seen of them, and so what they must be.

    Args:
        centres: `(n, SIDE * SIDE)`.
        seen: the linear map `(SEEN, SIDE * SIDE)` of an image that is observed.
        observed: `(SEEN,)`, with noise of the deviation `DEVIATION`.
    """

    centres: Tensor
    seen: Tensor
    observed: Tensor

    @classmethod
    def make(cls, seed: int = 0) -> Mixture:
        """Centres of deviation 0.5, and an observation of one of them."""
        random = torch.Generator().manual_seed(seed)
        centres = 0.5 * torch.randn(CENTRES, SIDE * SIDE, generator=random, dtype=torch.float64)
        seen = torch.randn(SEEN, SIDE * SIDE, generator=random, dtype=torch.float64) / SIDE
        return cls(centres, seen, seen @ centres[0] * 0.5 + seen @ centres[1] * 0.5)

    def energy(self, images: Tensor, code: Code) -> Tensor:  # noqa: ARG002 - an energy's arguments
        """Minus the logarithm of the likelihood."""
        gap = images.flatten(1).double() @ self.seen.T - self.observed
        return gap.square().sum(1) / (2 * DEVIATION**2)

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights `(n,)`, means `(n, d)` and the covariance `(d, d)` of the components."""
        one = torch.eye(SIDE * SIDE, dtype=torch.float64)
        covariance = torch.linalg.inv(one / VARIANCE + self.seen.T @ self.seen / DEVIATION**2)
        spread = VARIANCE * self.seen @ self.seen.T + DEVIATION**2 * torch.eye(SEEN, dtype=torch.float64)
        gap = self.observed - self.centres @ self.seen.T
        weights = (-0.5 * (gap @ torch.linalg.inv(spread) * gap).sum(1)).softmax(0)
        means = (self.centres / VARIANCE + self.observed @ self.seen / DEVIATION**2) @ covariance
        return weights, means, covariance

    def log_evidence(self) -> float:
        """The logarithm of the mean of `exp(-energy)` over the images."""
        spread = VARIANCE * self.seen @ self.seen.T + DEVIATION**2 * torch.eye(SEEN, dtype=torch.float64)
        gap = self.observed - self.centres @ self.seen.T
        each = -0.5 * (gap @ torch.linalg.inv(spread) * gap).sum(1) - 0.5 * torch.logdet(spread)
        return float(each.logsumexp(0)) - math.log(CENTRES) + SEEN * math.log(DEVIATION)

    def truth(self, count: int, seed: int) -> Tensor:
        """Images of the posterior, `(count, d)`."""
        weights, means, covariance = self.posterior()
        random = torch.Generator().manual_seed(seed)
        which = torch.multinomial(weights, count, replacement=True, generator=random)
        noise = torch.randn(count, len(covariance), generator=random, dtype=torch.float64)
        return means[which] + noise @ torch.linalg.cholesky(covariance).T

    def misplaced(self, x: Tensor) -> float:
        """The greatest error of a sample's shares of the posterior's components, each image in its likeliest."""
        weights, means, covariance = self.posterior()
        precision = torch.linalg.inv(covariance)
        gap = x[:, None] - means
        likely = weights.log() - 0.5 * torch.einsum("nki,ij,nkj->nk", gap, precision, gap)
        return float((likely.argmax(1).bincount(minlength=len(means)) / len(x) - weights).abs().max())

    def quantiles(self) -> Tensor:
        """Quantiles of the posterior's projections, `(LEVELS, DIRECTIONS)`: exact to rounding, by bisection."""
        weights, means, covariance = self.posterior()
        middles, spread = means @ directions(), (directions() * (covariance @ directions())).sum(0).sqrt()
        low = (middles - 10 * spread).amin(0).expand(LEVELS, -1)
        high = (middles + 10 * spread).amax(0).expand(LEVELS, -1)
        for _ in range(60):
            middle = (low + high) / 2
            reached = torch.special.ndtr((middle[:, None] - middles) / spread)  # (levels, components, directions)
            short = torch.einsum("lkn,k->ln", reached, weights) < levels()[:, None]
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return (low + high) / 2


def levels() -> Tensor:
    """At which quantiles are compared, `(LEVELS,)`."""
    return torch.linspace(0, 1, LEVELS + 2, dtype=torch.float64)[1:-1]


def directions() -> Tensor:
    """Fixed directions of length 1, `(d, DIRECTIONS)`."""
    random = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(
        torch.randn(SIDE * SIDE, DIRECTIONS, generator=random, dtype=torch.float64), dim=0
    )


def sliced(x: Tensor, truth: Tensor) -> float:
    """Sliced 2-Wasserstein distance of a sample `(count, d)` to the posterior, by its quantiles."""
    return float((torch.quantile(x @ directions(), levels(), 0) - truth).square().mean().sqrt())


def closed(chains: int) -> None:
    """Every sampler's moments and distance to the truth, at the same network evaluations."""
    toy = Mixture.make()
    weights, means, covariance = toy.posterior()
    mean = weights @ means
    whole = covariance + (weights[:, None] * (means - mean)).T @ (means - mean)
    other = toy.quantiles()
    rows: list[dict[str, Any]] = [
        figures(f"truth, {count:,} draws", toy.truth(count, 1), mean, whole, other, 0, None)
        for count in (10 * chains, 100 * chains)
    ]
    process = process_from_config({"name": "vp"})
    model = Model(
        "mixture",
        process,
        ExactDenoiser(toy.centres.reshape(CENTRES, 1, SIDE, SIDE), VARIANCE**0.5),
        (1, SIDE, SIDE),
        Gaussian(0.25),
    )
    plan = SamplerSpec("dpm++", 12).plan(model)
    diffusion = Diffusion(model, plan, dtype=torch.float64)
    prior = diffusion.sample(10 * chains, batch=10 * chains).double().flatten(1)
    rows.append(figures("no guidance", prior, mean, whole, other, plan.nfe, None))
    for gradients in (100, 500, 2500):
        for name, how, leaps in samplers():
            schedule = Schedule(gradients // leaps, draws=gradients // leaps // 10)
            try:
                found = guide(diffusion, toy.energy, how, schedule, chains=chains, batch=chains)
            except PushforwardError:  # unadjusted steps that are too long
                rows.append({"sampler": f"{name}: diverged", "gradients": gradients})
                continue
            said = diagnose(found.history, schedule.warmed)
            x = found.images.double().flatten(1)
            rows.append({**figures(name, x, mean, whole, other, int(found.nfe[0]), said.acceptance, gradients),
                         "mode shares: error": toy.misplaced(x), "R-hat": said.worst})  # fmt: skip
            print(rows[-1], flush=True)
    short = replace(diffusion, plan=SamplerSpec("auto", 8).plan(model))
    for rungs, seed in ((3, 0), (5, 0), *((4, seed) for seed in range(8))):
        moves = BUDGET // short.plan.nfe // rungs - 1
        schedule = Schedule(moves, moves // 8, draws=moves - moves // 8, rungs=rungs)
        found = guide(short, toy.energy, pcn(), schedule, chains=chains, seed=seed, batch=rungs * chains)
        said, x = diagnose(found.history, schedule.warmed), found.images.double().flatten(1)
        name = f"pCN, tempered on {rungs} rungs, 8 steps of auto, seed {seed}"
        rows.append({**figures(name, x, mean, whole, other, int(found.nfe[0]), said.acceptance),
                     "mode shares: error": toy.misplaced(x), "R-hat": said.worst})  # fmt: skip
        print(rows[-1], flush=True)
    gathered = [
        gathered_closed(toy, model, name, how, steps, 10 * chains)
        for name, how, steps in (
            ("fk", fk(4, populations=10), 50),
            ("fk", fk(4, populations=10), 200),
            ("fk, lambda as the signal", fk(4, populations=10, temper="increase"), 200),
            ("psi, half-way", psi(4, populations=10, at=0.5), 50),
        )
    ]
    for name, steering in STEERINGS.items():
        for eta in (0.0, 1.0):
            made = SamplerSpec("ddim", 100, {"eta": eta}).plan(model)
            nfe = made.nfe * (2 if steering.through else 1)
            tried = []
            for weight in WEIGHTS:
                there = Diffusion(steered(model, weight * energies.of(toy.energy), steering), made, dtype=torch.float64)
                with suppress(PushforwardError):  # too strong
                    x = there.sample(10 * chains, batch=10 * chains).double().flatten(1)
                    row = figures(f"{name} x {weight:g}, eta {eta:g}", x, mean, whole, other, nfe, None)
                    tried += [row] if math.isfinite(row["sliced W2 / deviation"]) else []
            if tried:
                rows.append(min(tried, key=lambda row: row["sliced W2 / deviation"]))
                print(rows[-1], flush=True)
    bias = []
    for step in (0.05, 0.02, 0.01, 0.005):
        for preconditioned in (False, True):
            schedule = Schedule(round(8 / step), round(4 / step), draws=20)
            how = langevin(step, preconditioned=preconditioned)
            bias.append({"step size": step, "preconditioned": preconditioned})
            with suppress(PushforwardError):  # diverged: a row without figures
                found = guide(diffusion, toy.energy, how, schedule, chains=chains, batch=chains)
                x = found.images.double().flatten(1)
                bias[-1] |= figures("", x, mean, whole, other, int(found.nfe[0]), None)
            print(bias[-1], flush=True)
    columns = [*rows[0], "mode shares: error", "R-hat"]
    cells = table(columns, [[row.get(key) for key in columns] for row in rows])
    measures = [key for key in columns[2:-2] if key != "accepted"]
    more = table(["step size", "preconditioned", *measures],
                 [[row.get(key) for key in ("step size", "preconditioned", *measures)] for row in bias])  # fmt: skip
    most = table(list(gathered[0]), [list(row.values()) for row in gathered])
    print(cells, most, more, sep="\n\n")
    write_text(
        "guidance-closed",
        f"# A posterior in closed form\n\n{chains} chains, the second half of each; steering: {10 * chains} "
        f"samples, the best weight of {WEIGHTS} in hindsight.\n\n"
        f"{cells}\n\n## Particles, {10 * chains} samples of 10 populations\n\n{most}"
        f"\n\n## Unadjusted Langevin chains by step size, 8 units of time\n\n{more}",
    )
    write_json("guidance-closed", {"chains": chains, "rows": rows, "particles": gathered, "bias": bias})


def gathered_closed(
    toy: Mixture, model: Model, name: str, how: Particles, steps: int, count: int
) -> dict[str, Any]:  # fmt: skip
    """Particles' distance to the truth, their mode shares, and their evidence."""
    weights, means, covariance = toy.posterior()
    middle = weights @ means
    whole = covariance + (weights[:, None] * (means - middle)).T @ (means - middle)
    diffusion = Diffusion(model, SamplerSpec("ddim", steps, {"eta": 1.0}).plan(model), dtype=torch.float64)
    found = gather(diffusion, toy.energy, how, chains=count, batch=10 * count)
    some = torch.multinomial(found.weights, count, replacement=True, generator=torch.Generator().manual_seed(7))
    x = found.images.double().flatten(1)[some]
    white = torch.linalg.inv(torch.linalg.cholesky(covariance))
    shares = (torch.cdist(x @ white.T, means @ white.T).square() / -2 + weights.log()).softmax(1).mean(0)
    own = figures("", x, middle, whole, toy.quantiles(), 0, None)
    row = {
        "sampler": name, "steps": steps, "particles per sample": how.particles, "evaluations": int(found.nfe[0]),
        "sliced W2 / deviation": own["sliced W2 / deviation"],
        "mode shares: greatest error": float((shares - weights).abs().max()),
        "log evidence": found.evidence.log, "its error": found.evidence.error, "its truth": toy.log_evidence(),
    }  # fmt: skip
    print(row, flush=True)
    return row


def samplers() -> Iterator[tuple[str, Dynamics, int]]:
    """Chains with their leaps a move."""
    yield "Langevin, as published (.05)", langevin(), 1
    yield "Langevin, preconditioned", langevin(preconditioned=True), 1
    yield "MALA, plain", mala(preconditioned=False), 1
    yield "MALA, preconditioned", mala(), 1
    yield "HMC, plain", hmc(leaps=5, preconditioned=False), 5
    yield "HMC, preconditioned", hmc(leaps=5), 5


def figures(
    name: str, x: Tensor, mean: Tensor, whole: Tensor, truth: Tensor, nfe: int, accepted: float | None,
    gradients: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How far moments are from the truth, relative; and the sliced Wasserstein distance."""
    scale = float(whole.trace().sqrt())
    return {
        "sampler": name, "gradients": gradients, "evaluations": nfe, "accepted": accepted,
        "mean: error / deviation": float((x.mean(0) - mean).norm()) / scale,
        "variance / true": float(torch.cov(x.T).trace() / whole.trace()),
        "covariance: relative error": float((torch.cov(x.T) - whole).norm() / whole.norm()),
        "sliced W2 / deviation": sliced(x, truth) / scale * math.sqrt(len(mean)),
    }  # fmt: skip


# -- (b) clothes of a class --------------------------------------------------------------------------------------------


def steering_classifier(path: Path, epochs: int = 6) -> torch.nn.Module:
    """A classifier to guide by, trained here, that shares nothing with the judge: wider kernels, no pooling, GELU."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 24, 5, 2, 2), torch.nn.GELU(), torch.nn.Conv2d(24, 64, 5, 2, 2), torch.nn.GELU(),
        torch.nn.Conv2d(64, 96, 3, 2, 1), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(96 * 16, 10),
    ).to(DEVICE)  # fmt: skip
    data = np.load(path)
    x = from_bytes(torch.from_numpy(data["x_train"].reshape(-1, 1, 28, 28)).to(DEVICE))
    y = torch.from_numpy(data["y_train"].astype(np.int64)).to(DEVICE)
    rate = 2e-3
    adam = torch.optim.AdamW(net.parameters(), lr=rate)
    batches = len(x) // 250
    for epoch in range(epochs):
        for k, some in enumerate(torch.randperm(len(x)).split(250)):
            adam.param_groups[0]["lr"] = rate * (1 - (epoch * batches + k) / (epochs * batches + 1))
            level = 0.2 * torch.rand(len(some), 1, 1, 1, device=DEVICE)  # noise makes smoother gradients
            noisy = x[some] + level * torch.randn_like(x[some])
            loss = torch.nn.functional.cross_entropy(net(noisy), y[some], label_smoothing=0.05)
            adam.zero_grad()
            loss.backward()
            adam.step()
    test = from_bytes(torch.from_numpy(data["x_test"].reshape(-1, 1, 28, 28)))
    with torch.no_grad():
        found = net(test.to(DEVICE)).argmax(1).cpu()
        right = float((found == torch.from_numpy(data["y_test"].astype(np.int64))).float().mean())
    print(f"the classifier to guide by: {right:.1%} right", flush=True)
    return net.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Judge:
    """What a classifier that took no part says of images that shall be of a class.

    Args:
        label: the class.
        reference: features of the real images of the class.
    """

    label: int
    reference: Reference

    @classmethod
    def of(cls, data: Mapping[str, np.ndarray], label: str) -> Judge:
        """Of the test images of a class."""
        number = energies.load_classifier("fashion").number(label)
        real = torch.from_numpy(data["x_test"][data["y_test"] == number].reshape(-1, 1, 28, 28))
        return cls(number, Reference.of(features(feature_net("fashion"), real)))

    def __call__(self, images: Tensor) -> dict[str, float]:
        """How many are of the class, how near they are to real ones and these to them, and the Frechet distance."""
        sample = Sample(features(feature_net("fashion"), to_bytes(images)), self.reference)
        near = neighbourhoods(sample, k=3)
        success = float((classify(to_bytes(images)) == self.label).float().mean())
        return {"success": success, "precision": near["precision"], "recall": near["recall"], "FD": sample.frechet()}


def fashion(path: Path, count: int, names: list[str], labels: list[str], ways: list[str]) -> None:
    """A class by a classifier's energy: success by a judge, and how far from real and from conditional images.

    With `ways`, only rows that have one of these words are made, and take their places in the last results.
    """
    data = np.load(path)
    network = steering_classifier(path)
    rows: list[dict[str, Any]] = read_json("guidance-fashion").get("rows", []) if ways else []
    for name, label in itertools.product(names, labels):
        model, judge = fast(load(name, device=DEVICE)), Judge.of(data, label)
        differentiated = fast(load(name, device=DEVICE), compiled=False)
        energy = 5 * energies.classifier(network, judge.label)
        sheets: list[Tensor] = []
        before = {row["way"]: row for row in rows if (row["model"], row["class"]) == (name, label)}
        rows = [row for row in rows if (row["model"], row["class"]) != (name, label)]
        for way, draw in drawn(model, differentiated, energy, judge.label, count):
            if not ways or any(word in way for word in ways):
                images, more = draw()
                rows.append({"model": name, "class": label, "way": way, **judge(images), **more})
                sheets.append(images[:16])
                print(rows[-1], flush=True)
            elif way in before:
                rows.append(before[way])
        if not ways:
            save_image(compared(sheets), RESULTS / f"guidance-{name}-{label}.png")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = table(columns, [[row.get(key) for key in columns] for row in rows])
    print(cells)
    write_text("guidance-fashion", f"# A class by a classifier's energy\n\n{count} images a row, weight 5.\n\n{cells}")
    write_json("guidance-fashion", {"count": count, "rows": rows})


def drawn(
    model: Model, differentiated: Model, energy: energies.Energy, label: int, count: int
) -> Iterator[tuple[str, Callable[[], tuple[Tensor, dict[str, float]]]]]:
    """Every way by name, and how its images are drawn, with the evaluations of each and its evidence."""
    plain, long = SamplerSpec("dpm++", 20).plan(model), SamplerSpec("ddim", 50, {"eta": 1.0}).plan(model)

    def sampled(labels: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        return Diffusion(model, plain).given(labels).sample(count, batch=count), {"evaluations": plain.nfe}

    def chained(how: Dynamics, steps: int, schedule: Schedule) -> tuple[Tensor, dict[str, float]]:
        few = Diffusion(differentiated, SamplerSpec("dpm++", steps).plan(model))
        found = guide(few, energy, how, schedule, chains=count, seed=1, batch=count)
        return found.images, {"evaluations": float(found.nfe.double().mean())}

    def gathered(steps: int, particles: int) -> tuple[Tensor, dict[str, float]]:
        noisy = Diffusion(differentiated, SamplerSpec("dpm++", steps, {"noise": 1.0}).plan(model))
        found = gather(noisy, energy, fk(particles), chains=count, seed=11, batch=250)
        said = {"log evidence": found.evidence.log, "its error": found.evidence.error}
        return found.images, {"evaluations": float(found.nfe.double().mean()), **said}

    def led(steering: Any) -> tuple[Tensor, dict[str, float]]:
        there = Diffusion(steered(differentiated, energy, steering), long)
        nfe = long.nfe * (2 if steering.through else 1)
        return there.given(None).sample(count, seed=1, batch=count), {"evaluations": nfe}

    yield "told the label (bound)", partial(sampled, torch.full((count,), label))
    yield "no guidance (floor)", partial(sampled, None)
    for way, how, steps, schedule in (
        ("Langevin on codes, as published, 4 steps", langevin(), 4, Schedule(200)),
        ("MALA on codes, 8 steps", mala(), 8, Schedule(400)),
        ("HMC on codes, 8 steps", hmc(leaps=5), 8, Schedule(80)),
        ("pCN on codes, tempered on 3 rungs, 8 steps", pcn(), 8, Schedule(65, rungs=3)),
    ):
        yield way, partial(chained, how, steps, schedule)
    for steps, particles in ((20, 8), (20, 32)):
        yield f"fk, {steps} steps, {particles} particles an image", partial(gathered, steps, particles)
    for way, steering in STEERINGS.items():
        yield f"{way}, 50 steps", partial(led, steering)


# -- (d) what training hardly saw --------------------------------------------------------------------------------------


def rare(path: Path, gan: Path, model: str, labels: list[str], count: int) -> None:
    """Classes that were rare in training: how often they come by themselves, and how well energies find them.

    The GAN and the diffusion have learned from the same images, and are guided by the same chains.
    """
    data = np.load(path)
    network = steering_classifier(path)
    diffusion = fast(load(model, device=DEVICE), compiled=False)
    maps: dict[str, Generator | Diffusion] = {
        "GAN": load_generator(gan, device=DEVICE),
        "diffusion": Diffusion(diffusion, SamplerSpec("dpm++", 4).plan(diffusion)),
    }
    rows: list[dict[str, Any]] = []
    for name, pushforward in maps.items():
        free = pushforward.given(None).sample(FREE, batch=count)
        seen, sheets = classify(to_bytes(free)), []
        for label in labels:
            judge = Judge.of(data, label)
            energy = 5 * energies.classifier(network, judge.label)
            share = float((seen == judge.label).float().mean())
            for way, how in (("Langevin", langevin()), ("MALA", mala())):
                found = guide(pushforward, energy, how, Schedule(200), chains=count, seed=1, batch=count)
                rows.append({
                    "map": name, "class": label, "of its own": share, "way": way, **judge(found.images),
                    "evaluations": float(found.nfe.double().mean()),
                })  # fmt: skip
                sheets.append(found.images[:16])
                print(rows[-1], flush=True)
        save_image(compared(sheets), RESULTS / f"guidance-rare-{name.lower()}.png")
    cells = table(list(rows[0]), [list(row.values()) for row in rows])
    write_text(
        "guidance-rare",
        f"# Classes that were rare in training\n\n{count} chains of 200 moves a row, weight 5; *of its own*: their "
        f"share of {FREE} samples without guidance.\n\n{cells}",
    )
    write_json("guidance-rare", {"count": count, "rows": rows})


def fast(model: Model, *, compiled: bool = True) -> Model:
    """The model in bfloat16, and compiled on a CPU; states stay float32.

    Compile only what is not differentiated: with PyTorch 2.13 on a CPU, gradients through these networks were wrong by
    a relative .67 once compiled, and their answers right to rounding.
    """
    assert isinstance(model.denoiser, Network)
    module = model.denoiser.module
    module = torch.compile(module, dynamic=False) if compiled and DEVICE == "cpu" else module
    return replace(model, denoiser=replace(model.denoiser, module=module, autocast=torch.bfloat16))


# -- single best codes -------------------------------------------------------------------------------------------------


class Descent(NamedTuple):
    """How codes of low energy are sought: see `best`."""

    optimiser: Any
    prior: Any
    rate: float
    steps: int
    candidates: int = 1


DESCENTS: Mapping[str, tuple[int, tuple[Descent, ...]]] = {  # codes a seed, and descents
    "sneaker": (50, (
        Descent("adam", None, 0.1, 30), Descent("adam", None, 0.2, 30), Descent("adam", None, 0.3, 30),
        Descent("adam", "chi", 0.1, 30), Descent("adam", "chi", 0.2, 30), Descent("white", None, 0.6, 10),
        Descent("white", None, 0.6, 16), Descent("white", None, 0.6, 4, candidates=8),
    )),
    "low-pass": (12, (
        Descent("adam", None, 0.05, 30), Descent("adam", None, 0.1, 30), Descent("adam", "chi", 0.1, 30),
        Descent("white", None, 0.6, 16),
    )),
}  # fmt: skip
MOMENTS = (2, 5, 10, 15, 20, 30)  # steps after which energies are told


def optimisers(path: Path, seeds: int, ways: list[str]) -> None:
    """Energies that descents reach in so many steps, and what became of their codes and images.

    With `ways`, only rows of these optimisers are made, and take their places in the last results.
    """
    network, number = steering_classifier(path), energies.load_classifier("fashion").number("sneaker")
    before = {described(row): row for row in read_json("guidance-optimisers").get("rows", [])}
    rows = [
        descended(path, network, energy, how, seeds, count)
        if not ways or how.optimiser in ways
        else before[energy, how]
        for energy, (count, some) in DESCENTS.items()
        for how in some
    ]
    data = np.load(path)
    real = torch.from_numpy(data["x_test"][data["y_test"] == number].reshape(-1, 1, 28, 28)).to(DEVICE)
    each = 5 * energies.classifier(network, number)(from_bytes(real), Code(real))
    save_optimisers(rows, np.quantile(each.cpu().numpy(), (0.5, 0.75)).tolist())


def described(row: Mapping[str, Any]) -> tuple[str, Descent]:
    """The energy of a row, and its descent."""
    prior = None if row["prior"] == "none" else row["prior"]
    return row["energy"], Descent(
        row["optimiser"], prior, row["learning rate"], len(row["curve"]) - 1, row["candidates"]
    )


def descended(
    path: Path, network: torch.nn.Module, name: str, how: Descent, seeds: int, count: int
) -> dict[str, Any]:  # fmt: skip
    """Descents of `count` codes a seed: medians of the lowest energies so far, norms of bands, and the judge's word."""
    data, model = np.load(path), load("fashion-vp", device=DEVICE)
    few, judge = Diffusion(model, SamplerSpec("dpm++", 4).plan(model)), Judge.of(data, "sneaker")
    real = from_bytes(torch.from_numpy(data["x_test"][data["y_test"] == judge.label][3].reshape(1, 28, 28)))
    energy = {
        "sneaker": 5 * energies.classifier(network, judge.label),
        "low-pass": energies.low_pass(real, 7, deviation=0.1),
    }
    found = [
        best(few, energy[name], optimiser=how.optimiser, prior=how.prior, learning_rate=how.rate, steps=how.steps,
             candidates=how.candidates, count=count, seed=seed, batch=count)
        for seed in range(seeds)
    ]  # fmt: skip
    own = next(iter(found[0].history[0].energies))
    curves = torch.cat([torch.stack([r.energies[own] for r in one.history]) for one in found], 1)
    code = torch.cat([one.code.variables() for one in found])
    spectrum = norms(code, bands((1, 28, 28))).mean((0, 1))
    row: dict[str, Any] = {
        "energy": name, "codes": seeds * count, "optimiser": how.optimiser, "prior": how.prior or "none",
        "learning rate": how.rate, "candidates": how.candidates,
        "evaluations": float(torch.cat([one.nfe for one in found]).double().mean()),
        "norm": float(code.square().mean(1).sqrt().mean()), "lowest band": float(spectrum[0]),
    }  # fmt: skip
    images = torch.cat([one.images for one in found])
    row |= judge(images) if name == "sneaker" and len(images) >= FEWEST else {}
    print(row, flush=True)
    return {**row, "curve": median(curves.cummin(0).values, 1).tolist()}


def save_optimisers(rows: list[dict[str, Any]], real: list[float]) -> None:
    """Write the rows, and how many steps each descent of `white` takes to the energies of Adam's last step.

    Args:
        rows: of all descents.
        real: energies of real sneakers, their median and upper quartile.
    """
    shown = [
        {**{key: value for key, value in row.items() if key != "curve"},
         **{f"step {k}": row["curve"][k] for k in MOMENTS if k < len(row["curve"])}}
        for row in rows
    ]  # fmt: skip
    columns = list(dict.fromkeys(key for row in shown for key in row))
    cells = table(columns, [[row.get(key) for key in columns] for row in shown])
    firsts = []
    for energy in dict.fromkeys(row["energy"] for row in rows):
        some = [row for row in rows if row["energy"] == energy]
        for one in (row for row in some if row["optimiser"] == "adam"):
            row = {"energy": energy, "Adam's prior": one["prior"], "and rate": one["learning rate"],
                   "its steps": len(one["curve"]) - 1}  # fmt: skip
            for white in (row for row in some if row["optimiser"] == "white"):
                low = [k for k, value in enumerate(white["curve"]) if value <= one["curve"][-1]]
                many = f", {white['candidates']} candidates" * (white["candidates"] > 1)
                row[f"white{many}"] = low[0] if low else f"> {len(white['curve']) - 1}"
            firsts.append(row)
    columns = list(firsts[0])
    more = table(columns, [[row.get(key) for key in columns] for row in firsts])
    print(cells, more, sep="\n\n")
    write_text(
        "guidance-optimisers",
        "# Descents to one energy\n\nfashion-vp, dpm++ of 4 steps. Medians of the lowest energies so far; images "
        "are those of the last step. *Candidates*: codes drawn for each descent, which begins at the best. *Norm*: "
        "root mean square of the codes, and of their lowest band; noise has 1. Real sneakers have an energy of "
        f"{real[0]:.2g}, and a quarter of them more than {real[1]:.2g}.\n\n"
        f"{cells}\n\n## Steps of white codes to the energy of Adam's last step\n\n{more}",
    )
    write_json("guidance-optimisers", {"rows": rows, "real": real})


# -- (c) a GAN's faces -------------------------------------------------------------------------------------------------


def faces(generator: Path, network: Path, chains: int) -> None:
    """Faces like another one, by an embedding: cosine to it, and how usual the code stays."""
    gan = load_generator(generator, device=DEVICE)
    net = energies.load_faces(network, device=DEVICE)
    wanted = gan.sample(1, seed=77)

    @torch.no_grad()
    def embedded(images: Tensor) -> Tensor:
        return net(images.to(DEVICE))

    target, usual = embedded(wanted), embedded(gan.sample(200, seed=5))
    cosines = torch.nn.functional.cosine_similarity(usual, target)
    rows: list[dict[str, Any]] = [
        {"way": "other faces", "cosine": float(cosines.mean()), "greatest": float(cosines.max()),
         "distance": float((usual - target).norm(dim=1).mean()), "prior / usual": 1.0}
    ]  # fmt: skip
    energy = 2500 * energies.identity(net, wanted[0])
    ways: dict[str, Callable[[], Any]] = {
        "Langevin, as published (.005)": lambda: guide(
            gan, energy, langevin(0.005), Schedule(200), chains=chains, seed=1
        ),
        "MALA": lambda: guide(gan, energy, mala(0.005), Schedule(200), chains=chains, seed=1),
        "HMC": lambda: guide(gan, energy, hmc(0.05, 5), Schedule(40), chains=chains, seed=1),
        "Adam, chi prior (one best, no sample)": lambda: best(gan, energy, steps=200, count=chains, seed=1),
    }
    sheets = [wanted.expand(chains, -1, -1, -1), gan.sample(chains, seed=1)]
    for way, run in ways.items():
        found = run()
        there = embedded(found.images)
        cosine = torch.nn.functional.cosine_similarity(there, target)
        rows.append({
            "way": way, "cosine": float(cosine.mean()), "greatest": float(cosine.max()),
            "distance": float((there - target).norm(dim=1).mean()),
            "prior / usual": float(found.code.start.square().flatten(1).mean()),
            "accepted": float(torch.stack([r.acceptance for r in found.history]).mean()),
        })  # fmt: skip
        sheets.append(found.images)
        print(rows[-1], flush=True)
    columns = list(rows[-1])
    cells = table(columns, [[row.get(key, "-") for key in columns] for row in rows])
    print(cells)
    save_image(compared(sheets), RESULTS / "guidance-faces.png")
    write_text("guidance-faces", f"# Faces like another, by a GAN\n\n{chains} chains.\n\n{cells}")
    write_json("guidance-faces", {"chains": chains, "rows": rows})


# -- the cost of one gradient ------------------------------------------------------------------------------------------


def cost() -> None:
    """Rounds and evaluations of one gradient through 50 steps, step by step and all at once."""
    model = load("fashion-vp")
    rows = []
    for steps in (10, 50, 100):
        plan = SamplerSpec("ddim", steps).plan(model)
        diffusion = Diffusion(model, plan)
        code = diffusion.draw(2)
        exact: Tensor | None = None
        for way, parallel, gradient in (
            ("step by step", None, Exact()),
            ("all at once", parse("ddim:parallel=preconditioned").method(plan), Implicit(tolerance=1e-2)),
        ):
            forward = backward = 0

            def told(_: Any) -> None:
                nonlocal forward
                forward += 1

            counted = Counted.of(diffusion.run_by(parallel=parallel, gradient=gradient), 2)
            start = code.start.clone().requires_grad_()
            there = counted.some(torch.arange(2))
            assert isinstance(there, Diffusion)
            images = there.decode(replace(code, start=start), callback=told)
            before = counted.nfe.clone()
            (slope,) = torch.autograd.grad(images.square().sum(), start)
            backward = int((counted.nfe - before).max())
            exact = slope if exact is None else exact
            rows.append({
                "steps": steps, "way": way, "rounds forward": forward, "evaluations forward": int(before.max()),
                "evaluations backward": backward, "relative error": float((slope - exact).norm() / exact.norm()),
            })  # fmt: skip
            print(rows[-1], flush=True)
    cells = table(list(rows[0]), [list(row.values()) for row in rows])
    write_text("guidance-cost", f"# One gradient\n\nfashion-vp, 2 images.\n\n{cells}")
    write_json("guidance-cost", {"rows": rows})


def moves(images: int = 6, each: int = 3) -> None:
    """Rounds that a move of a chain takes at T = 50, begun anew and at the last trajectory."""
    model = load("fashion-vp")
    plan = SamplerSpec("ddim", 50).plan(model)
    diffusion = Diffusion(model, plan, parallel=Parallel()).given(labels="shirt")
    rows = []
    for step in (1e-5, 1e-4, 1e-3, 1e-2):
        taken: dict[str, list[tuple[int, int]]] = {"begun anew": [], "at the last trajectory": []}
        changes = []
        for image in range(images):
            code, random = diffusion.draw(1, first=image), torch.Generator().manual_seed(image)
            for way, counts in taken.items():
                trails, before, x = Trails(1), None, code.variables()
                for move in range(each + 1):
                    begin = trails.near(x, torch.tensor([0])) if way != "begun anew" else "reference"
                    solved: list[Solution] = []
                    there = diffusion.run_by(parallel=Parallel(start=begin))
                    picture = there.decode(code.with_variables(x), found=solved.append)
                    trails.keep(x, torch.tensor([0]), solved[0])
                    if move and before is not None:
                        counts.append((solved[0].rounds, int(solved[0].nfe)))
                        changes.append(float((picture - before).norm() / picture.norm()))
                    before = picture
                    h = step**0.5
                    x = x * math.cos(h) + math.sin(h) * torch.randn(x.shape, generator=random)
        for way, counts in taken.items():
            rounds, evaluations = (torch.tensor(one, dtype=torch.float64) for one in zip(*counts, strict=True))
            rows.append({
                "step size": step, "change of the image": float(np.median(changes)), "states begin": way,
                "rounds": float(rounds.quantile(0.5)), "at most": int(rounds.max()),
                "evaluations": float(evaluations.quantile(0.5)),
            })  # fmt: skip
            print(rows[-1], flush=True)
    cells = table(list(rows[0]), [list(row.values()) for row in rows])
    text = (
        f"# Moves of a chain\n\nfashion-vp, 50 steps at once to 1e-3: medians of {images * each} moves of the size "
        f"that Langevin's and MALA's step sizes mean.\n\n{cells}"
    )
    write_text("guidance-moves", text)
    write_json("guidance-moves", {"rows": rows})


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--closed", action="store_true")
    parser.add_argument("--chains", type=int, default=100, help="of --closed")
    parser.add_argument("--fashion", type=Path, metavar="NPZ")
    parser.add_argument("--models", nargs="*", default=["fashion-vp", "fashion-blurring", "fashion-langevin"])
    parser.add_argument("--labels", nargs="*", default=["sneaker"])
    parser.add_argument(
        "--ways",
        nargs="*",
        default=[],
        help="only rows of --fashion that have one of these words, or of these --optimisers",
    )
    parser.add_argument("--rare", nargs=2, metavar=("GAN", "MODEL"), help="in the place of --models, with --fashion")
    parser.add_argument("--count", type=int, default=100, help="images a row of --fashion")
    parser.add_argument("--faces", type=Path, nargs=2, metavar=("GAN", "NETWORK"))
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--moves", action="store_true")
    parser.add_argument("--optimisers", type=Path, metavar="NPZ")
    parser.add_argument("--seeds", type=int, default=2, help="of --optimisers")
    options = parser.parse_args()
    every = not (
        options.closed or options.cost or options.moves or options.faces or options.fashion or options.optimisers
    )  # that needs no files
    if options.closed or every:
        closed(options.chains)
    if options.moves or every:
        moves()
    if options.cost or every:
        cost()
    if options.optimisers:
        optimisers(options.optimisers, options.seeds, options.ways)
    if options.faces:
        faces(*options.faces, chains=12)
    if options.rare and not options.fashion:
        parser.error("--rare needs --fashion NPZ, whose test images it compares with.")
    if options.rare:
        rare(options.fashion, Path(options.rare[0]), options.rare[1], options.labels, options.count)
    elif options.fashion:
        fashion(options.fashion, options.count, options.models, options.labels, options.ways)


if __name__ == "__main__":
    main()
