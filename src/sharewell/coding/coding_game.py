"""A Markov coding game: an agent sends a message by its actions, whose distribution stays that of its policy.

At each step both ends hold the same belief about the message. The sender compresses it to R bits, couples
the code with the policy's action distribution and draws the action given the true message; both then update
the belief by Bayes. Averaged over messages the actions follow the policy exactly, so reward and secrecy
cost nothing; what varies is how often the receiver's best guess is right. Source: Ebrahimi et al. 2024
(2410.21666), section 5; the game is Sokota et al. 2022 (2202.04126)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from .coupling import _greedy_max
from .info import distribution, entropy
from .mecb import greedy_labels

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left
COMPRESSORS = ("ebim", "none", "index", "index-off", "sorted-off", "support-off")


class ImpossibleObservation(ValueError):
    """An action that the policy never takes in its state."""


class Environment(Protocol):
    """What the game needs of a gymnasium environment with numbered states and actions."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[int, dict]: ...

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]: ...


@dataclass(frozen=True)
class GridWorld:
    """A grid with a goal (+1) and a trap (-1); a move slips to either side with probability ``slip``.

    The default is the world of the paper's code: 8 x 8, goal (0, 7), trap (1, 7), obstacles on the diagonal
    from (1, 1) to (7, 7), start (5, 4). States are row * size + column. Raises ValueError for a slip
    outside [0, 0.5]."""

    size: int = 8
    goal: tuple[int, int] = (0, 7)
    trap: tuple[int, int] = (1, 7)
    start: tuple[int, int] = (5, 4)
    obstacles: tuple[tuple[int, int], ...] = tuple((i, i) for i in range(1, 8))
    slip: float = 0.1
    max_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.slip <= 0.5:
            raise ValueError(f"slip must be in [0, 0.5], got {self.slip}")
        for name in ("goal", "trap", "start"):
            r, c = getattr(self, name)
            if not (0 <= r < self.size and 0 <= c < self.size) or (r, c) in self.obstacles:
                raise ValueError(f"{name} must be a free cell of the grid, got {(r, c)}")

    def model(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(transitions [states, actions, states], reward on entering a state [states], terminal [states])."""
        n = self.size * self.size
        transitions, reward = np.zeros((n, 4, n)), np.zeros(n)
        terminal = np.zeros(n, bool)
        goal, trap = (r * self.size + c for r, c in (self.goal, self.trap))
        reward[goal], reward[trap] = 1, -1
        terminal[[goal, trap]] = True
        for s in range(n):
            r, c = divmod(s, self.size)
            for a in range(4):
                for turn, p in ((0, 1 - 2 * self.slip), (1, self.slip), (3, self.slip)):
                    dr, dc = MOVES[(a + turn) % 4]
                    inside = 0 <= r + dr < self.size and 0 <= c + dc < self.size
                    free = inside and (r + dr, c + dc) not in self.obstacles
                    to = (r + dr) * self.size + c + dc if free else s
                    transitions[s, a, to if not terminal[s] else s] += p
        return transitions, reward, terminal

    def environment(self) -> GridEnvironment:
        """A fresh environment to play in."""
        return GridEnvironment(self)


class GridEnvironment:
    """A :class:`GridWorld` to step through, as gymnasium environments are."""

    def __init__(self, world: GridWorld) -> None:
        self.world = world
        self._cumulative = world.model()[0].cumsum(2)
        _, self._reward, self._terminal = world.model()
        self._rng = np.random.default_rng(0)
        self._state = self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict]:
        """Back to the start; ``seed`` fixes the slips to come."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._state, self._steps = self.world.start[0] * self.world.size + self.world.start[1], 0
        return self._state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        """(state, reward, terminated, truncated, info). Raises ValueError for an unknown action."""
        if not 0 <= action < 4:
            raise ValueError(f"action must be in [0, 3], got {action}")
        row = self._cumulative[self._state, action]
        self._state = min(int(np.searchsorted(row, self._rng.random() * row[-1], side="right")), len(row) - 1)
        self._steps += 1
        done = bool(self._terminal[self._state])
        truncated = not done and self._steps >= self.world.max_steps
        return self._state, float(self._reward[self._state]), done, truncated, {}


def soft_policy(
    world: GridWorld, log_beta: float, discount: float = 0.95, tolerance: float = 1e-12
) -> np.ndarray:
    """Maximum-entropy policy [states, actions] by soft value iteration: Q = E[r + discount V],
    V = beta logsumexp(Q / beta), policy = softmax(Q / beta), beta = e^log_beta."""
    if not 0 < discount < 1:
        raise ValueError(f"discount must be in (0, 1), got {discount}")
    transitions, reward, terminal = world.model()
    beta = float(np.exp(log_beta))
    value = np.zeros(len(reward))
    while True:
        q = transitions @ (reward + discount * np.where(terminal, 0, value))
        top = q.max(1)
        fresh = top + beta * np.log(np.exp((q - top[:, None]) / beta).sum(1))
        fresh[terminal] = 0
        if np.abs(fresh - value).max() < tolerance:
            break
        value = fresh
    weights = np.exp((q - q.max(1, keepdims=True)) / beta)
    return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class Trajectory:
    """What the receiver sees: the states in which actions were taken, the actions, and what they earned."""

    states: tuple[int, ...]
    actions: tuple[int, ...]
    rewards: tuple[float, ...]
    terminated: bool

    def discounted_reward(self, discount: float = 0.95) -> float:
        """Sum of discount^t r_t."""
        return float(sum(discount**t * r for t, r in enumerate(self.rewards)))


@dataclass(frozen=True)
class Belief:
    """What the receiver knows: the distribution over messages, its entropy in bits, and whether the
    trajectory was whole (a guess from one that was cut off is no answer)."""

    probabilities: np.ndarray
    entropy: float
    complete: bool

    @property
    def best(self) -> int:
        """The most probable message, of equally probable ones the first."""
        return int(self.probabilities.argmax())


def code_labels(belief: np.ndarray, rate: float, compressor: str) -> np.ndarray:
    """int64 [n]: the code of each message, of at most ``rate`` bits.

    ``ebim``; ``none``, no compression; and four uniform quantisers of 2^rate cells: ``index``, cells of
    neighbouring numbers, always on (the paper's baseline); ``index-off``, the same, but off once the
    belief's entropy is within the rate; ``sorted-off``, cells of neighbouring ranks, off likewise;
    ``support-off``, the same among the messages that are still possible (the strongest)."""
    n = len(belief)
    if compressor == "none":
        return np.arange(n)
    if compressor == "ebim":
        return greedy_labels(belief, rate)
    if compressor != "index":
        positive = belief[belief > 0]
        if -(positive * np.log2(positive)).sum() <= rate:
            return np.arange(n)
    cells = max(1, min(n, int(2**rate + 1e-9)))
    if compressor.startswith("index"):
        return np.arange(n) * cells // n
    alive = np.count_nonzero(belief) if compressor == "support-off" else n
    labels = np.empty(n, np.int64)
    labels[np.argsort(-belief, kind="stable")] = np.minimum(np.arange(n) * cells // alive, cells - 1)
    return labels


def action_given_message(
    belief: np.ndarray, policy: np.ndarray, rate: float, compressor: str = "ebim"
) -> np.ndarray:
    """p(a | message) [messages, actions], whose mean under the belief is ``policy`` exactly."""
    labels = code_labels(belief, rate, compressor)
    p_t = np.bincount(labels, weights=belief)
    size = len(p_t) + len(policy)
    rows, columns, masses = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size)
    # rounding: both sides must hold the same mass, or the last cell is short
    k = _greedy_max(p_t * (policy.sum() / p_t.sum()), policy.copy(), rows, columns, masses)
    joint = np.zeros((len(p_t), len(policy)))
    joint[rows[:k], columns[:k]] = masses[:k]
    total = joint.sum(1, keepdims=True)
    given_t = np.where(total > 0, joint / np.where(total > 0, total, 1), policy)
    return given_t[labels]


class MarkovCodingGame:
    """Both ends of the game.

    policy: action distribution of each state [states, actions]. prior: of the messages. rate: bits of a
    step's code as a share of the prior's entropy. on_impossible: what the receiver does about an action
    that the policy never takes: ``raise`` :class:`ImpossibleObservation`, or ``ignore`` it and keep the
    belief."""

    def __init__(
        self,
        env: Environment,
        policy: np.ndarray,
        prior: Any,
        rate: float = 0.5,
        compressor: Literal["ebim", "none", "index", "index-off", "sorted-off", "support-off"] = "ebim",
        on_impossible: Literal["raise", "ignore"] = "raise",
    ) -> None:
        if not rate >= 0:
            raise ValueError(f"rate must be at least 0, got {rate}")
        if compressor not in COMPRESSORS:
            raise ValueError(f"compressor must be one of {', '.join(COMPRESSORS)}, got {compressor!r}")
        if on_impossible not in ("raise", "ignore"):
            raise ValueError(f"on_impossible must be raise or ignore, got {on_impossible!r}")
        self.env, self.compressor, self.on_impossible = env, compressor, on_impossible
        self.policy = np.stack([distribution(row, f"policy of state {s}") for s, row in enumerate(policy)])
        self.prior = distribution(prior, "prior").ravel()
        self.rate_bits = rate * entropy(self.prior)

    def update(self, belief: np.ndarray, state: int, action: int) -> np.ndarray:
        """The belief after seeing ``action`` in ``state``."""
        if not 0 <= state < len(self.policy):
            raise ValueError(f"state must be in [0, {len(self.policy) - 1}], got {state}")
        if not 0 <= action < self.policy.shape[1]:
            raise ValueError(f"action must be in [0, {self.policy.shape[1] - 1}], got {action}")
        likelihood = action_given_message(belief, self.policy[state], self.rate_bits, self.compressor)
        posterior = belief * likelihood[:, action]
        mass = posterior.sum()
        if mass <= 0:
            if self.on_impossible == "raise":
                raise ImpossibleObservation(f"the policy never takes action {action} in state {state}")
            return belief
        return posterior / mass

    def send(self, message: int, seed: int) -> Trajectory:
        """Play one episode that carries ``message``; ``seed`` fixes the draws of sender and world."""
        if not 0 <= message < len(self.prior) or self.prior[message] <= 0:
            raise ValueError(
                f"message must be a number with prior mass below {len(self.prior)}, got {message}"
            )
        rng = np.random.default_rng([seed, 1])
        state, _ = self.env.reset(seed=seed)
        belief = self.prior
        states, actions, rewards = [], [], []
        terminated = truncated = False
        while not (terminated or truncated):
            given = action_given_message(belief, self.policy[state], self.rate_bits, self.compressor)[message]
            cumulative = given.cumsum()
            action = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
            action = min(action, int(np.flatnonzero(given)[-1]))
            belief = self.update(belief, state, action)
            states.append(state)
            actions.append(action)
            state, reward, terminated, truncated, _ = self.env.step(action)
            rewards.append(reward)
        return Trajectory(tuple(states), tuple(actions), tuple(rewards), terminated)

    def receive(self, trajectory: Trajectory) -> Belief:
        """What ``trajectory`` says about the message. Raises ImpossibleObservation, see above."""
        belief = self.prior
        for state, action in zip(trajectory.states, trajectory.actions, strict=True):
            belief = self.update(belief, state, action)
        return Belief(belief, entropy(belief), trajectory.terminated)


def play(game: MarkovCodingGame, messages: Sequence[int], seed: int) -> tuple[float, float]:
    """(share of messages received, mean discounted reward) of one episode for each message."""
    right, reward = 0, 0.0
    for k, message in enumerate(messages):
        trajectory = game.send(message, seed + k)
        right += game.receive(trajectory).best == message
        reward += trajectory.discounted_reward()
    return right / len(messages), reward / len(messages)
