"""Filters, world models and latent dynamics, by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specimen import drawn, floats, native, written

FEATURES, HIDDEN, BATCH = 5, 8, 3


class Kalman(nn.Module):
    """Predict and correct with a mean and a covariance."""

    def __init__(self) -> None:
        super().__init__()
        self.F = nn.Parameter(torch.eye(6) * 0.9 + torch.randn(6, 6) * 0.05)
        self.H = nn.Parameter(torch.randn(FEATURES, 6) * 0.5)
        self.log_q, self.log_r = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(FEATURES))

    def forward(self, z: Tensor) -> Tensor:
        m, P, means = torch.zeros(z.size(0), 6), torch.eye(6), []
        for t in range(z.size(1)):
            m, P = m @ self.F.T, self.F @ P @ self.F.T + torch.diag(self.log_q.exp())
            S = self.H @ P @ self.H.T + torch.diag(self.log_r.exp())
            K = P @ self.H.T @ torch.linalg.inv(S)
            m = m + (z[:, t] - m @ self.H.T) @ K.T
            P = P - K @ self.H @ P
            means.append(m)
        return torch.stack(means, 1)


class WorldModel(nn.Module):
    """RSSM: a deterministic path, a stochastic latent, both carried; KL on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6 + 2, HIDDEN)
        self.gru = nn.Linear(2 * HIDDEN, 3 * HIDDEN)
        self.prior, self.post = nn.Linear(HIDDEN, 12), nn.Linear(HIDDEN + FEATURES, 12)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        deter, stoch = torch.zeros(obs.size(1), HIDDEN), torch.zeros(obs.size(1), 6)
        feats, kls = [], []
        for o, a in zip(obs, action, strict=True):
            x = functional.elu(self.mix(torch.cat([stoch, a], -1)))
            r, c, u = self.gru(torch.cat([x, deter], -1)).chunk(3, -1)
            u = torch.sigmoid(u - 1)
            deter = u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * deter
            p = torch.distributions.Normal(*self.split(self.prior(deter)))
            q = torch.distributions.Normal(*self.split(self.post(torch.cat([deter, o], -1))))
            stoch = q.rsample()
            kls.append(torch.distributions.kl_divergence(q, p).sum(-1))
            feats.append(torch.cat([deter, stoch], -1))
        return torch.stack(feats), torch.stack(kls)

    def split(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = raw.chunk(2, -1)
        return mean, functional.softplus(std) + 0.1


class StateSpaceVAE(nn.Module):
    """Latent dynamics sampled from the transition alone after an encoded start."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.move = nn.Linear(FEATURES, 12), nn.Linear(6, 12)
        self.emit = nn.Linear(6, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_var = self.encode(x[:, 0]).chunk(2, -1)
        z, out = mean + torch.randn_like(mean) * (0.5 * log_var).exp(), []
        for _ in range(x.size(1)):
            mean, log_var = self.move(z).chunk(2, -1)
            z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
            out.append(self.emit(z))
        return torch.stack(out, 1)


class Dreamer(nn.Module):
    """A world model with a GRUCell: a posterior while observing, the prior when it dreams on."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6 + 2, HIDDEN)
        self.prior, self.post = nn.Linear(HIDDEN, 6), nn.Linear(HIDDEN + FEATURES, 6)
        self.policy = nn.Linear(HIDDEN + 6, 2)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        h, z, feats = torch.zeros(obs.size(1), HIDDEN), torch.zeros(obs.size(1), 6), []
        for o, a in zip(obs, action, strict=True):
            h = self.cell(torch.cat([z, a], -1), h)
            z = torch.tanh(self.post(torch.cat([h, o], -1)))
            feats.append(torch.cat([h, z], -1))
        for _ in range(3):
            h = self.cell(torch.cat([z, torch.tanh(self.policy(feats[-1]))], -1), h)
            z = torch.tanh(self.prior(h))
            feats.append(torch.cat([h, z], -1))
        return torch.stack(feats)


class RecurrentVAE(nn.Module):
    """VRNN: the latent of each step is drawn given the state, and drives it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES + HIDDEN, 12)
        self.decoder = nn.Linear(6 + HIDDEN, FEATURES)
        self.transition = nn.RNNCell(FEATURES + 6, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, kl, means = torch.zeros(x.size(1), HIDDEN), torch.zeros(()), []
        for x_t in x:
            mu, log_var = self.encoder(torch.cat([x_t, h], 1)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)
            means.append(self.decoder(torch.cat([z, h], 1)))
            h = self.transition(torch.cat([x_t, z], 1), h)
            kl = kl - 0.5 * (1 + log_var - mu.square() - log_var.exp()).mean()
        return torch.stack(means), kl


class HiddenMarkov(nn.Module):
    """The forward algorithm of an HMM in log space, with neural emissions."""

    def __init__(self) -> None:
        super().__init__()
        self.transition = nn.Parameter(torch.randn(6, 6))
        self.emission = nn.Linear(FEATURES, 6)

    def forward(self, x: Tensor) -> Tensor:
        log_a = self.transition.log_softmax(-1)
        alpha, out = torch.full((x.size(0), 6), -1.8), []
        for e in self.emission(x).log_softmax(-1).unbind(1):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + log_a, dim=1) + e
            out.append(alpha)
        return torch.stack(out, 1)


BATCH_MAJOR = drawn(floats(BATCH, 9, FEATURES))
TIME_MAJOR = drawn(floats(9, BATCH, FEATURES))

SPECIMENS = (
    written("kalman", Kalman, BATCH_MAJOR, 9, ("F", "H"), "mean and covariance carried"),
    written(
        "rssm", WorldModel, drawn(floats(11, BATCH, FEATURES), floats(11, BATCH, 2)), 11,
        ("gru.weight", "mix.weight", "post.weight"), "stochastic and deterministic state",
    ),
    written(
        "latent-rollout", StateSpaceVAE, BATCH_MAJOR, 9, ("move.weight",),
        "a generative rollout: only the first observation enters", causal=False,
    ),
    native(
        "dreamer", Dreamer, drawn(floats(8, BATCH, FEATURES), floats(8, BATCH, 2)), 11,
        "eight observed steps, three dreamt", causal=False,
    ),
    native("vrnn", RecurrentVAE, TIME_MAJOR, 9, "a latent drawn in each step"),
    written("hmm-forward", HiddenMarkov, BATCH_MAJOR, 9, ("transition",), "logsumexp over states"),
)  # fmt: skip
