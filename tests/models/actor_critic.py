"""Actor and critic on one LSTM cell, trained on rollouts of parallel environments.

Made-up environment: a cue is shown in the first step of an episode only; acting by the cue pays.
The state is set to zero wherever an episode has ended, and starts from what the rollout began with.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

STEPS, ENVIRONMENTS, OBSERVED, ACTIONS, EPISODE = 40, 16, 10, 4, 8
HIDDEN = 64

MEMORY = EPISODE


class Rollout(NamedTuple):
    """All (T, B, ...), the state at its start (B, H); `fresh` marks the first step of episodes."""

    observations: Tensor
    fresh: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    state: tuple[Tensor, Tensor]


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(nn.Module):
    def __init__(self, observed: int, actions: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.encoder = nn.Sequential(_orthogonal(nn.Linear(observed, hidden), 2**0.5), nn.Tanh())
        self.cell = nn.LSTMCell(hidden, hidden)
        self.actor = _orthogonal(nn.Linear(hidden, actions), 0.01)
        self.critic = _orthogonal(nn.Linear(hidden, 1), 1.0)
        for weight in (self.cell.weight_ih, self.cell.weight_hh):
            for gate in weight.chunk(4):
                nn.init.orthogonal_(gate)
        nn.init.zeros_(self.cell.bias_hh)
        nn.init.zeros_(self.cell.bias_ih)
        nn.init.ones_(self.cell.bias_ih.chunk(4)[1])

    def forward(
        self, observations: Tensor, fresh: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Scores of the actions (T, B, actions) and values (T, B)."""
        h, c = state
        seen = []
        for features, begins in zip(self.encoder(observations), fresh, strict=True):
            going_on = (1.0 - begins).unsqueeze(-1)
            h, c = self.cell(features, (h * going_on, c * going_on))
            seen.append(h)
        states = torch.stack(seen)
        return self.actor(states), self.critic(states).squeeze(-1)


def batches() -> list[Rollout]:
    """Rollouts of a policy that acts at random, so that every action has the same probability."""
    generator = torch.Generator().manual_seed(6)
    made = []
    for _ in range(3):
        phase = torch.randint(0, EPISODE, (ENVIRONMENTS,), generator=generator)
        place = (torch.arange(STEPS).unsqueeze(1) + phase) % EPISODE
        episode = (torch.arange(STEPS).unsqueeze(1) + phase) // EPISODE
        cues = torch.randint(0, ACTIONS, (STEPS, ENVIRONMENTS), generator=generator)
        cue = cues.gather(0, episode)
        fresh = (place == 0).float()
        observations = 0.3 * torch.randn(STEPS, ENVIRONMENTS, OBSERVED, generator=generator)
        observations[..., :ACTIONS] += fresh.unsqueeze(-1) * nn.functional.one_hot(cue, ACTIONS)
        actions = torch.randint(0, ACTIONS, (STEPS, ENVIRONMENTS), generator=generator)
        advantages = torch.where(actions == cue, 1.0, 0.0)
        advantages = (advantages - advantages.mean()) / advantages.std()
        returns = cue / (ACTIONS - 1) * 2.0 - 1.0 + 0.1 * advantages
        log_probs = torch.full((STEPS, ENVIRONMENTS), 1.0 / ACTIONS).log()
        zero = torch.zeros(ENVIRONMENTS, HIDDEN)
        made.append(
            Rollout(observations, fresh, actions, log_probs, advantages, returns, (zero, zero))
        )
    return made


def build() -> ActorCritic:
    return ActorCritic(OBSERVED, ACTIONS)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2.5e-3, eps=1e-5)


def step(model: nn.Module, batch: Rollout) -> Tensor:
    """The clipped surrogate, the error of the values and a bonus for entropy."""
    logits, values = model(batch.observations, batch.fresh, batch.state)
    policy = torch.distributions.Categorical(logits=logits)
    ratio = (policy.log_prob(batch.actions) - batch.log_probs).exp()
    clipped = ratio.clamp(0.8, 1.2)
    surrogate = torch.minimum(ratio * batch.advantages, clipped * batch.advantages).mean()
    error = nn.functional.mse_loss(values, batch.returns)
    loss: Tensor = -surrogate + 0.5 * error - 0.01 * policy.entropy().mean()
    return loss


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Rollout) -> Tensor:
    model.train()
    optimizer.zero_grad()
    loss = step(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), max_norm=0.5)
    optimizer.step()
    return loss.detach()
