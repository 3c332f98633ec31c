"""Train a model towards a reward, by policy gradients.

    python examples/reward_your_model.py

A stochastic sampler takes random moves, and `log_prob` tells how probable each one was under the network. Moves that
led to images of more reward than others are made more probable. The reward may be any number: it needs no gradient.
Here it is how sure a classifier is that it sees shoes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import pushforward as pf
from pushforward.guidance.energies import load_classifier

# %% The reward
# Anything that gives a number for each image will do: a person's choice, a program's answer, a file's size.

Reward = Callable[[Tensor], Tensor]  # of images, a number each
SHOES = ["sandal", "sneaker", "ankle boot"]


def shoes() -> Reward:
    """Return the probability that a classifier gives to shoes, a function of images `(count, 1, 28, 28)`."""
    network = load_classifier("fashion")
    places = [network.labels.index(name) for name in SHOES]
    return lambda images: network.logits(images).softmax(1)[:, places].sum(1)


# %% The training
# Each round draws images, and takes a step along the gradient of their moves' log-probabilities, weighted by how much
# better than the others each image was (REINFORCE with a baseline, as in DDPO, arXiv 2305.13301).


def train(sampler: pf.Diffusion, reward: Reward, rounds: int = 30, count: int = 32, rate: float = 1e-4) -> list[float]:
    """Train the sampler's network in place; return the mean reward of each round."""
    network = sampler.model.module.requires_grad_(True)
    optimiser = torch.optim.AdamW(network.parameters(), rate)
    curve = []
    for k in range(rounds):
        path = sampler.path(sampler.draw(count, seed=0, first=k * count))
        with torch.no_grad():
            rewards: Tensor = reward(sampler.images(path))
        advantage = ((rewards - rewards.mean()) / rewards.std().clamp_min(1e-6)).clamp(-3, 3)
        for move in range(sampler.noises):  # one at a time, for memory
            (-(advantage * sampler.log_prob(path, moves=[move])[0]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        curve.append(float(rewards.mean()))
        print(f"round {k + 1}: reward {curve[-1]:.3f}")
    return curve


# %% All of it


def main(
    model: str = "fashion-vp", rounds: int = 30, count: int = 32, steps: int = 8, out: str = "reward"
) -> list[float]:
    """Train a model towards shoes; plot the reward of each round."""
    trained = pf.load(model)
    plan = pf.solvers.ddim(trained.process, pf.grid.power(trained.process, steps), eta=1.0)
    curve = train(pf.Diffusion(trained, plan), shoes(), rounds, count)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(1, rounds + 1), curve, marker="o")
    axes.set(xlabel="round", ylabel="share of shoes", ylim=(0, 1))
    figure.savefig(Path(f"{out}.png"), dpi=120)
    plt.close(figure)
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a model towards a reward, by policy gradients.")
    parser.add_argument("--model", default="fashion-vp", help="Train this model.")
    parser.add_argument("--rounds", type=int, default=30, help="Take this many steps.")
    parser.add_argument("--count", type=int, default=32, help="Draw this many images in each.")
    main(**vars(parser.parse_args()))
