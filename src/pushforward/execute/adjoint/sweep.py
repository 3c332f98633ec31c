"""The exact gradient: cotangents node after node, from the last to the first."""

from __future__ import annotations

import torch
from torch import Tensor

from pushforward.execute.adjoint.products import Gradients, Task, prepared, summed, vector_jacobian
from pushforward.execute.sequential import compiled
from pushforward.linear import apply_coefficients
from pushforward.plan import Register


def sweep(task: Task) -> Gradients:
    """Return the transposed recurrence, from the last node to the first."""
    plan, gradient, parameters = task.plan, task.gradient, task.parameters
    basis, frequencies = plan.basis, len(plan.basis.shape)
    ask = prepared(plan, task.denoiser, gradient)
    program, _ = compiled(plan, gradient)
    place = {n: k for k, n in enumerate(plan.asked)}
    drawn = {n: i for i, n in enumerate(plan.noises)}
    noises = gradient.new_zeros(len(drawn), *gradient.shape)
    found: list[Tensor | None] = [None] * len(parameters)
    value = torch.zeros_like(gradient)
    waiting = {Register("state", len(plan.nodes) - 1): basis.forward(gradient)}
    for n in reversed(range(len(plan.nodes))):
        value = waiting.pop(Register("state", n), torch.zeros_like(gradient))
        answer = waiting.pop(Register("answer", n), None)
        if answer is not None:
            k = place[n]
            product, more = vector_jacobian(ask, k, task.states[k], None, basis.inverse(answer), parameters)
            value = value + basis.forward(product)
            found = summed(found, more)
        for register, coefficient in program[n]:
            if register.kind == "mean":
                continue
            if isinstance(coefficient, float):
                moved = coefficient * value
            else:
                moved = apply_coefficients(coefficient.mT, value, frequencies)
            if register.kind == "noise":
                noises[drawn[n]] = basis.inverse(moved)
            else:
                waiting[register] = waiting[register] + moved if register in waiting else moved
    return Gradients(basis.inverse(value), noises, found)
