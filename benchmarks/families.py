"""Write docs/pipelines.md: what holds of each family of `diffusers` pipelines as a model, measured on tiny ones.

python benchmarks/families.py
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import pushforward as pf  # noqa: E402
from support.conformance import examine  # noqa: E402
from support.families import FAMILIES  # noqa: E402

HEAD = """# Pipelines

`pushforward.from_pipeline(pipe, **call)` makes a model of any pipeline of `diffusers`. Each row below is a family, made
tiny with random weights and measured by `python benchmarks/families.py`; `tests/test_families.py` holds the same.

- *together*: states at any `times` are asked about in one call, as all steps at once need; or one `state` per call,
  since the pipeline refuses batches or makes answers depend on them. Then all steps at once save no time.
- *images in*: whether images have states, for `invert`, `encode`, `edit` and `translate`.
- The rest are errors relative to the largest value: *own*, of the last state after four steps of DDIM or Euler against
  the pipeline's own; *all at once* against step by step; *batch* against one image at a time; *inverse*, of the state
  that the code of a state leads back to, over 16 steps; *gradient* against a central difference in float32.

| family | together | images in | own | all at once | batch | inverse | gradient |
|---|---|---|---|---|---|---|---|
"""
MIDDLE = """
## Refused

| family | sentence |
|---|---|
"""
TAIL = """
Refused besides, whatever the family: caches between steps (`disable_cache()` first), callbacks at steps' ends, and
arguments that act in some steps only, such as `control_guidance_end` below 1. `pushforward.PushforwardScheduler` in the
pipeline samples with all of these, one step after another.
"""


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows, refused = [], []
    for name, make in FAMILIES.items():
        try:
            found = examine(make())
        except pf.PushforwardError as error:
            refused.append(f"| {name} | {error} |\n")
            continue
        errors = (found.own, found.parallel, found.batch, found.inverse, found.gradient)
        told = ["–" if error is None else f"{error:.0e}" for error in errors]
        rows.append(f"| {name} | {found.together} | {'yes' if found.encoder else 'no'} | {' | '.join(told)} |\n")
        print(rows[-1], end="", flush=True)
    text = HEAD + "".join(rows) + MIDDLE + "".join(refused) + TAIL
    (ROOT / "docs" / "pipelines.md").write_text(text)
    print(f"{len(rows)} families work, {len(refused)} are refused.")


if __name__ == "__main__":
    main()
