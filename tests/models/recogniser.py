"""Speech-like recognition: convolutions over a spectrogram, two bidirectional GRU layers, CTC.

Made-up recordings: every symbol lights a few bands for some frames, between stretches of noise.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

Batch = tuple[Tensor, Tensor, Tensor, Tensor]

BLANK, SYMBOLS, BANDS = 0, 7, 32

MEMORY = 6  # half a symbol lasts about five frames after the stride


class Recogniser(nn.Module):
    def __init__(self, bands: int, symbols: int, channels: int = 48, hidden: int = 64) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv1d(bands, channels, kernel_size=5, padding=2, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Conv1d(channels, channels, kernel_size=5, stride=2, padding=2, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
        )
        self.gru = nn.GRU(channels, hidden, num_layers=2, bidirectional=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.head = nn.Linear(2 * hidden, symbols + 1)
        for name, parameter in self.gru.named_parameters():
            if "weight_hh" in name:
                for gate in parameter.chunk(3):
                    nn.init.orthogonal_(gate)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (T, B, symbols + 1) and their lengths; `frames` is (B, T, bands)."""
        features = self.front(frames.transpose(1, 2)).permute(2, 0, 1)
        shorter = torch.div(lengths - 1, 2, rounding_mode="floor") + 1
        packed = pack_padded_sequence(features, shorter.cpu(), enforce_sorted=False)
        out, _ = pad_packed_sequence(self.gru(packed)[0])
        return self.head(self.norm(out)).log_softmax(dim=-1), shorter


def _recording(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count = int(torch.randint(3, 6, (), generator=generator))
    symbols = torch.randint(1, SYMBOLS + 1, (count,), generator=generator)
    parts = []
    for symbol in symbols.tolist():
        pause = int(torch.randint(3, 7, (), generator=generator))
        length = int(torch.randint(8, 13, (), generator=generator))
        part = 0.3 * torch.randn(pause + length, BANDS, generator=generator)
        part[pause:, 4 * symbol : 4 * symbol + 4] += 1.5
        parts.append(part)
    return torch.cat(parts), symbols


def batches(size: int = 10) -> list[Batch]:
    """Frames, their lengths, symbols, their lengths."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(3):
        recordings = [_recording(generator) for _ in range(size)]
        frames, symbols = zip(*recordings, strict=True)
        frame_lengths = torch.tensor([len(one) for one in frames])
        symbol_lengths = torch.tensor([len(one) for one in symbols])
        padded = pad_sequence(list(frames), True), pad_sequence(list(symbols), True)
        made.append((padded[0], frame_lengths, padded[1], symbol_lengths))
    return made


def build() -> Recogniser:
    return Recogniser(BANDS, SYMBOLS)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def step(model: nn.Module, batch: Batch) -> Tensor:
    frames, frame_lengths, symbols, symbol_lengths = batch
    log_probs, lengths = model(frames, frame_lengths)
    return nn.functional.ctc_loss(
        log_probs, symbols, lengths, symbol_lengths, blank=BLANK, zero_infinity=True
    )


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    model.train()
    optimizer.zero_grad()
    loss = step(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), max_norm=5.0)
    optimizer.step()
    return loss.detach()
