"""Behaviour cloning: a policy network learns from logs what a controller did, and is then run in its place.

    python -m workflows.recipes.cloning --task cart-pole         discrete actions are classes
    python -m workflows.recipes.cloning --task pendulum          continuous actions are values

The logs are made in Gymnasium's environments by controllers that are written out below. While they are recorded the
action that is carried out is now and then a random one, so that the logs also show what to do off the good path; what
is learned is always what the controller wants. Episodes of train, val and test start from different seeds. In the end
the controller, its clone and a random policy play the same ten new episodes.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from nf_pipeline import load_model
from workflows.recipes.networks import Chain
from workflows.recipes.recipe import Recipe, Samples, Splits, majority_class, mean_of_train, run_recipes

Policy = Callable[[np.ndarray], Any]
"""Observation, float32 [F], -> an action of the environment."""

ENVIRONMENTS = {"cart-pole": "CartPole-v1", "pendulum": "Pendulum-v1"}
RANDOM_SHARE = 0.2
FIRST_SEEDS = {"train": 0, "val": 10_000, "test": 20_000, "played": 30_000}
NUM_EPISODES = 10


def balance_cart(observation_F: np.ndarray) -> int:
    """Pushes the cart towards where the pole falls, and a little to the middle: linear state feedback."""
    position, speed, angle, turn = observation_F
    return int(0.1 * position + 0.3 * speed + 3.0 * angle + turn > 0)


def swing_up(observation_F: np.ndarray) -> np.ndarray:
    """Pumps energy into the pendulum until it is nearly upright, and then holds it there.

    Energy shaping of Astrom and Furuta (2000, "Swinging up a pendulum by energy control"), with
    proportional-derivative feedback near the top. The pendulum has mass, length 1 and gravity 10.
    """
    cosine, sine, turn = observation_F
    energy = turn**2 / 6 + 5 * cosine - 5
    is_up = cosine > 0.85 and abs(turn) < 3.0
    torque = -15.0 * np.arctan2(sine, cosine) - 4.0 * turn if is_up else -2.0 * np.sign(turn or 1.0) * np.sign(energy)
    return np.clip(np.array([torque], dtype=np.float32), -2.0, 2.0)


CONTROLLERS: dict[str, Policy] = {"cart-pole": balance_cart, "pendulum": swing_up}


def load_logs(rows: int, seed: int, *, task: str) -> Splits:
    """Records what the controller of a task wants until there are enough rows."""
    counts = {"train": rows, "val": rows // 4, "test": rows // 4}
    return {name: _record(task, FIRST_SEEDS[name] + 100_000 * seed, count) for name, count in counts.items()}


def _record(task: str, first_seed: int, rows: int) -> Samples:
    import gymnasium

    environment = gymnasium.make(ENVIRONMENTS[task])
    environment.action_space.seed(first_seed)
    rng, seen, wanted, is_over = np.random.default_rng(first_seed), [], [], True
    while len(seen) < rows:
        if is_over:
            observation_F, _ = environment.reset(seed=first_seed + len(seen))
        seen.append(observation_F)
        wanted.append(CONTROLLERS[task](observation_F))
        is_random = rng.random() < RANDOM_SHARE
        action = environment.action_space.sample() if is_random else wanted[-1]
        observation_F, _, has_ended, is_cut, _ = environment.step(action)
        is_over = has_ended or is_cut
    return Samples(inputs=np.stack(seen).astype(np.float32), labels=np.array(wanted))


def play(task: str, policy: Policy | None, num_episodes: int = NUM_EPISODES) -> float:
    """Returns the mean return of a policy over episodes that no log has; None acts at random."""
    import gymnasium

    environment = gymnasium.make(ENVIRONMENTS[task])
    environment.action_space.seed(FIRST_SEEDS["played"])
    total = 0.0
    for episode in range(num_episodes):
        observation_F, _ = environment.reset(seed=FIRST_SEEDS["played"] + episode)
        is_over = False
        while not is_over:
            action = environment.action_space.sample() if policy is None else policy(observation_F)
            observation_F, reward, has_ended, is_cut, _ = environment.step(action)
            total, is_over = total + float(reward), has_ended or is_cut
    return total / num_episodes


def clone_of(uri: str, model: str) -> Policy:
    """Loads the final model of a run as a policy: the likeliest action, or the values."""
    network = load_model(uri, model=model)
    is_class = network.card.target.kind == "class"
    actions = [int(name) for name in network.card.class_names]

    @torch.inference_mode()
    def policy(observation_F: np.ndarray) -> Any:
        outputs_K = network(torch.from_numpy(observation_F)[None])[0]
        return actions[int(outputs_K.argmax())] if is_class else outputs_K.clamp(-2.0, 2.0).numpy()

    return policy


def compare_returns(uri: str, model: str, *, task: str) -> list[str]:
    """Plays the controller, its clone and a random policy."""
    policies = {"controller": CONTROLLERS[task], "clone": clone_of(uri, model), "random": None}
    returns = ", ".join(f"{name} {play(task, policy):.0f}" for name, policy in policies.items())
    return [f"mean return of {NUM_EPISODES} episodes: {returns}"]


def perceptron(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Builds three hidden layers of 64."""
    hidden = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in pairwise((*input_shape, 64, 64, 64))]
    return Chain(*hidden, nn.Linear(64, num_outputs))


def _recipe(task: str, **changes: Any) -> Recipe:
    return Recipe(
        load=partial(load_logs, task=task),
        rows=4000,
        model="workflows.recipes.cloning:perceptron",
        settings={"memory.max_batch_size": 64},
        follow_up=partial(compare_returns, task=task),
        **changes,
    )


RECIPES = {
    "cart-pole": _recipe("cart-pole", budget="112KiB", baseline=majority_class),
    "pendulum": _recipe("pendulum", budget="112KiB", baseline=mean_of_train),
}

if __name__ == "__main__":  # worker processes import this file again
    run_recipes(__doc__, RECIPES)
