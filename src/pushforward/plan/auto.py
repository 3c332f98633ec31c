r"""The default sampler: a rule for every process and every number of steps.

- Reference N(m, s^2 I) of the model, and the answers' deviation from it interpolated in the whitening angle, where the
  flow has no linear part.
- Quadratic predictor and cubic corrector; with fewer than 8 calls, whose steps are too long for them, linear and
  quadratic. The corrector takes the answer that the next step uses: one call per step.
- One degree less under guidance by a weight above 1, which makes answers turn faster than polynomials can follow.
- Steps equal in `atan((sigma / (1.3 s alpha))^0.65)`: densest in log-SNR where noise and images are alike, and of
  length 0 at both ends. The last call is where this grid has it, or at `t_min` if that comes earlier.
- With 10 calls or fewer, the last answer, moved to the corrected state, is the image: a long last step along the flow
  would leave noise on it. With more, the last step follows the flow to time 0 like the others, so that images converge
  to the flow's solution and not to the denoised state at `t_min`, which is a few thousandths away, for Langevin more.

Where every frequency fades at a rate of its own and there is no velocity (blurring), one angle and one variance suit
none of them well. There the rule takes point data as reference, a linear predictor, a quadratic corrector, and steps
equal in the angle.

For the best image in a few rounds of all steps at once (`in_rounds`) the degree is always the lower one, since rounds
that are few leave answers that are not settled, and what extrapolates least makes least of their errors; steps are
densest at more noise (2 s in the place of 1.3 s), and the last answer is the image. For Langevin gDDIM of order 2 on
the quadratic grid of time is better, and for blurring the rule is as above.

Evidence: `benchmarks/accuracy.py`, and `benchmarks/latency.py` for rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pushforward.linear import IDENTITY, WHITE, Gaussian, Process
from pushforward.plan.exponential import exponential
from pushforward.plan.gddim import gddim
from pushforward.plan.grid import angle, power
from pushforward.plan.plan import Plan

SPREAD, IN_ROUNDS, EXPONENT = 1.3, 2.0, 0.65
NARROW = 0.1  # deviation that data without any is taken to have, as it tells nothing of where images form
FEW = 10  # calls up to which the image is the last answer
ROUGH = 8  # calls from which on the polynomials are one degree higher
RULE = 3  # counts the rules there have been: 0.1 had the first; the second knew nothing of guidance


def auto_grid(
    process: Process, steps: int, reference: Gaussian = WHITE, end: float = 0.0, spread: float = SPREAD
) -> Tensor:
    """Return the times of the module's rule, from `t_max` to `end`, `(steps + 1,)`; `spread` in deviations."""
    if _fades_unevenly(process):
        return angle(process, steps, end=end)
    deviation = math.sqrt(float(torch.as_tensor(reference.variance, device="cpu").mean()))
    return angle(process, steps, scale=spread * max(deviation, NARROW), exponent=EXPONENT, end=end)


def auto(process: Process, steps: int, reference: Gaussian, end: float = 0.0, *, guided: bool = False) -> Plan:
    """Make the plan with `steps` network calls.

    Args:
        process: the diffusion.
        steps: number of network calls.
        reference: Gaussian N(m, s^2 I) fitted to the model's data.
        end: time of the last state.
        guided: for answers under guidance by a weight above 1.
    """
    return auto_at(process, auto_grid(process, steps, reference, end), guided=guided, reference=reference)


def in_rounds(process: Process, steps: int, reference: Gaussian, end: float = 0.0) -> Plan:
    """Make the plan with `steps` network calls for the best image in fewer rounds; arguments as for `auto`.

    Args:
        process: the diffusion.
        steps: number of network calls.
        reference: Gaussian N(m, s^2 I) fitted to the model's data.
        end: time of the last state.
    """
    if process.blocks > 1:
        return gddim(process, power(process, steps, end=end), order=2)
    if _fades_unevenly(process):
        return auto(process, steps, reference, end)
    grid = auto_grid(process, steps, reference, end, IN_ROUNDS)
    return auto_at(process, grid, order=1, denoise=end == 0, reference=reference)


def auto_at(
    process: Process,
    grid: Tensor,
    *,
    order: int | None = None,
    guided: bool = False,
    denoise: bool | None = None,
    reference: Gaussian = WHITE,
) -> Plan:
    """Apply the same rule at given times.

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        order: degree of the predictor, but for blurring; by default the rule's.
        guided: whether that is for answers under guidance by a weight above 1.
        denoise: end with the denoised state, but for blurring; by default as the rule does.
        reference: Gaussian N(m, s^2 I) fitted to the model's data.
    """
    if _fades_unevenly(process):
        return exponential(process, grid, order=1, variable="angle", corrector="reuse", name="auto")
    steps = len(grid) - 1
    if order is None:
        order = (1 if steps < ROUGH else 2) - guided
    if denoise is None:
        denoise = steps <= FEW and float(grid[-1]) == 0
    return exponential(process, grid, order=order, reference=reference, variable="angle", corrector="reuse",
                       denoise=denoise, name="auto")  # fmt: skip


def first_rule(times: Sequence[float]) -> dict[str, object]:
    """Return the settings of `auto` at its times in version 0.1, whose files of codes do not say them."""
    return {"order": 2, "denoise": len(times) - 1 <= 20 and times[-1] == 0}


def _fades_unevenly(process: Process) -> bool:
    return process.basis != IDENTITY and process.blocks == 1
