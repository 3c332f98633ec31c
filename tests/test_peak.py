"""The memory that solving all steps at once takes beside the network."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pushforward.execute import Parallel, parallel
from pushforward.linear import VP, Basis, Gaussian, Langevin
from pushforward.model import Network
from pushforward.plan import ddim, grid


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made within it."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known:
                    self.known[key] = storage.nbytes()
                    self.now += self.known[key]
                    weakref.finalize(storage, self.freed, key)
        self.most = max(self.most, self.now)
        return made

    def freed(self, key):
        self.now -= self.known.pop(key, 0)


@pytest.mark.parametrize("process", [VP(), Langevin()], ids=lambda process: process.name)
def test_rounds_take_a_dozen_times_the_memory_of_all_states(process):
    """States, answers, two rounds, differences of four more in half the precision; rows at the network, and parts."""
    side, steps = 96, 50
    spectrum = 1 / (1 + 100 * Basis((side, side)).eigenvalues())
    reference = Gaussian(spectrum / spectrum.mean())
    plan = ddim(process, grid.power(process, steps))
    start = torch.randn(1, 3 * process.blocks, side, side, generator=torch.Generator().manual_seed(0))
    network = Network(lambda u, *_: 0.1 * u[:, :3], prediction="residual", reference=Gaussian(0.25),
                      input_reference=Gaussian(0.25))  # fmt: skip
    with Peak() as peak:
        solution = parallel(plan, network, start, method=Parallel(reference=reference, tolerance=1e-5, max_rows=4))
    assert solution.rounds > 5  # past rounds are as many as are kept
    assert peak.most < 12 * solution.states.nbytes
