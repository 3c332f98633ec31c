"""Editing an image by two texts: what it shows, and what it shall show.

The image's code under the source text is decoded under the target text (CycleDiffusion). How strong the edit is depends
on the share of steps that are skipped and on the guidance, and each draw of a code edits in its own way; so many
candidates are made, and the best taken. *The network that selects must not be the one that judges*: the best of many
by a score has a high score by luck, so results are reported by another network.

References:
    Wu & De la Torre, arXiv 2210.05559, section 4.2 (zero-shot editing, search over guidance, skip and trials);
    Li et al., Your Diffusion Model is Secretly a Zero-Shot Classifier, arXiv 2303.16203, equation 5 (likelihood).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pushforward.data import schema
from pushforward.data.memory import check_images
from pushforward.errors import PushforwardError
from pushforward.execute import Solution
from pushforward.maps.code import GaussianStream, batches
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import check_told
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.plan import Plan
from pushforward.plan.grid import spread_times
from pushforward.translation.translate import (
    CODELESS,
    ONE_CODE,
    Coded,
    Method,
    code_of,
    decoded,
    sampler_for,
    translate,
)

__all__ = ["Candidate", "Search", "edits", "likelihood", "plans"]


@dataclass(frozen=True)
class Search:
    """Which candidates are made: all combinations.

    Args:
        guidances: weights of guidance towards the target text.
        skips: shares of the steps that are skipped, from noise: 0 edits most.
        trials: draws of a code.
        source_guidance: weight of guidance of the encoding; 1 in the paper.
        method: how codes are found, see `translation.translate`.
    """

    guidances: Sequence[float] = (3.0,)
    skips: Sequence[float] = (0.2,)
    trials: int = 1
    source_guidance: float = 1.0
    method: Method = "stochastic"

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if self.trials < 1 or not self.guidances or not self.skips or not all(0 <= s < 1 for s in self.skips):
            raise PushforwardError("A search needs a trial, a guidance, and skips from 0 up to below 1.")
        if self.method in ONE_CODE and self.trials > 1:
            raise PushforwardError(
                "Deterministic codes are the same in every trial; take 1 trial, or the stochastic method."
            )

    @property
    def count(self) -> int:
        """Candidates of an image."""
        return len(self.guidances) * len(self.skips) * self.trials


@dataclass(frozen=True, eq=False)
class Candidate:
    """One edit.

    Args:
        image: in [-1, 1], `(channels, height, width)`.
        skip: share of the steps skipped.
        guidance: towards the target text.
        trial: number of the draw.
    """

    image: Tensor
    skip: float
    guidance: float
    trial: int

    @property
    def name(self) -> str:
        """A file's name, without its end."""
        return f"skip{self.skip:g}-guidance{self.guidance:g}-trial{self.trial:02d}"


def edits(
    model: Model,
    image: Tensor,
    source: str,
    target: str,
    sampler: SamplerSpec,
    search: Search,
    *,
    seed: int = 0,
    batch: int = 16,
    callback: Callable[[int], None] | None = None,
) -> Iterator[Candidate]:
    """All candidates of a search, one batch after the other.

    Args:
        model: that reads prompts, or has classes.
        image: in [-1, 1], `(channels, height, width)`.
        source: text, or class, of what it shows.
        target: text, or class, of what it shall show.
        sampler: the plan without skips; if it takes all steps at once, each guidance begins at the last one's states.
        search: which candidates.
        seed: seed of the codes; a trial's depends on the seed and its number alone.
        batch: candidates at a time.
        callback: told how many candidates are done.

    Raises:
        PushforwardError: a model that reads no prompts and has no classes, or an image of another shape.
    """
    check_told(model)
    check_images(search.count, image.shape, "candidates")
    for skip, plan in plans(model, sampler, search).items():
        diffusion = Diffusion(model, plan, parallel=sampler.method(plan))
        for some in batches(search.trials, batch):
            trials, first = range(search.trials)[some], some.start
            images = image[None].expand(len(trials), *image.shape)
            shown = diffusion.given(source, search.source_guidance)
            coded: Coded | None = None
            solved: list[Solution] = []
            for guidance in search.guidances:
                to = diffusion.given(target, guidance)
                if solved and to.parallel is not None:
                    to = to.run_by(parallel=replace(to.parallel, start=solved.pop()))
                if search.method in CODELESS:
                    found = translate(images, shown, to, method=search.method, seed=seed, first=first).images
                else:
                    if coded is None:
                        coded = code_of(images, shown, shown, method=search.method, seed=seed, first=first, rows=batch)
                    found = decoded(coded.code, to, search.method, found=solved.append)
                for trial, edited in zip(trials, found, strict=True):
                    yield Candidate(edited, skip, guidance, trial)
                if callback is not None:
                    callback(len(trials))


def plans(model: Model, sampler: SamplerSpec, search: Search) -> dict[float, Plan]:
    """The plan of each skip.

    Raises:
        PushforwardError: a skip that leaves no step, or a sampler that does not fit the model or the method.
    """
    made: dict[float, Plan] = {}
    for skip in search.skips:
        if round((1 - skip) * sampler.steps) < 1:
            raise PushforwardError(
                f"A skip of {skip:g} leaves none of the {sampler.steps} steps; skip less, or take more steps."
            )
        made[skip] = sampler_for(model, replace(sampler, start=1 - skip), search.method).plan(model)
    return made


@torch.no_grad()
def likelihood(
    model: Model, images: Tensor, source: str, target: str, *, times: int = 16, seed: int = 0, batch: int = 64
) -> Tensor:
    """How much better the model explains images by the target text than by the source text, `(count,)`.

    Images are noised to several levels and denoised under both texts; with errors e_s and e_t (sums of squares), this
    is the mean of `(e_s - e_t) / (e_s + e_t)` over the levels: between -1 and 1, and 0 if the texts make no difference.
    Noise is the same for both texts and for all images.

    Args:
        model: that reads prompts.
        images: in [-1, 1], `(count, channels, height, width)`.
        source: text of what they showed.
        target: text of what they shall show.
        times: noise levels, spread evenly in the whitening angle.
        seed: seed of the noise.
        batch: states in a network call.
    """
    process = model.process
    levels = spread_times(process, model.gaussian, times)
    signal, spread = process.signal(levels), process.covariance(levels).cholesky()
    clean = process.lift(model.latents(images.to(model.device)))
    noise = GaussianStream(seed, range(times), clean.shape[1:]).draw().to(clean)
    asks = [model.given([text] * len(clean)).denoiser.at(process, levels, clean) for text in (source, target)]
    gains, every = [], torch.arange(len(clean), device="cpu")
    for k in range(times):
        states = signal[k](clean) + spread[k](noise[k].expand_as(clean))
        errors = []
        for ask in asks:
            pieces = [ask(k, states[some], every[some]) for some in batches(len(clean), batch)]
            errors.append((process.image(torch.cat(pieces) - clean)).flatten(1).double().square().sum(1))
        both = (errors[0] + errors[1]).clamp_min(torch.finfo(torch.float64).tiny)  # 0 where neither errs
        gains.append((errors[0] - errors[1]) / both)
    return torch.stack(gains).mean(0).cpu()
