r"""Gradients through a plan, at the memory of one network call and the states.

With the states S of all nodes solving `S = A S + B f(S) + N xi + ...` (`execute.system`) and `g` the gradient of a loss
in the last one, the cotangents `lambda` of all states solve the transposed system

    lambda = g + A^T lambda + J^T B^T lambda,        J_n = f_n'(S_n),

in which every node depends on later ones only. From them follow the gradients in the start, `lambda_0`; in the noises,
`N_n^T lambda_n`; and in whatever the network is made of, `sum_n (d f_n / d theta)^T (B^T lambda)_n`. Nothing of the
forward pass is kept but the states that the network was asked about; its calls are made again.

- `Exact` solves node after node, from the last to the first.
- `Implicit` solves for all nodes at once, in rounds of one batch of vector-Jacobian products each. The network's J is
  preconditioned by a response L known beforehand, as in the forward direction:

      (I - A - B L)^T delta = g + A^T lambda + J^T B^T lambda - lambda.

  The start is the reference Gaussian's own adjoint and asks for nothing. A node's product is final as soon as the
  cotangents of the later nodes are, so after as many rounds as the plan has calls the result is exact. (Not so for an
  implicit plan, whose nodes look ahead: its rounds go on until they have converged, and there is no `Exact`.)
- `Phantom` differentiates k damped steps `S <- (1 - tau) S + tau F(S)` of the preconditioned fixed point map
  `F(S) = S + M^-1 (A S + B f(S) + ... - S)`, `M = I - A - B L`, taken at the solution. With `K = I - A - B J` the
  tangent of such a step is `(I - tau M^-1 K) dS + tau M^-1 d(inputs)`, so the transpose of k of them is

      lambda = tau M^-T sum_{i < k} (I - tau K^T M^-T)^i g,

  which is k damped steps for the transposed system from zero, the first of them without the network.
- `Skeleton` is the first of those steps with the noise prediction held, `L = Psi^-1`: the network is constant.

References:
    Deep Equilibrium Approaches to Diffusion Models, Pokle et al., arXiv 2210.12867, section 4 (phantom gradients);
    On Training Implicit Models, Geng et al., arXiv 2111.05177 (phantom gradients);
    Deep Equilibrium Models, Bai et al., arXiv 1909.01377, theorem 1 (implicit gradients).
"""

from pushforward.execute.adjoint.differentiable import differentiable
from pushforward.execute.adjoint.modes import Exact, Gradient, Implicit, Phantom, Skeleton

__all__ = ["Exact", "Gradient", "Implicit", "Phantom", "Skeleton", "differentiable"]
