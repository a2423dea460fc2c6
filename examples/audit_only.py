"""An audit before the training: looks, prints, changes nothing, and ends with an exit code.

0: no finding of severity warning or above; 1: at least one. The same check without a script:
`rnnguard audit audit_only:build_model --memory 200 --fail-on warning`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import rnnguard


class Tagger(nn.Module):
    """Names what a signal of 40 channels shows, from the mean over all steps."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(40, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x)
        return self.head(out.mean(dim=1))


def build_model() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


def main(memory: int = 200) -> int:
    """The exit code; `memory` is how many steps back the task has to look."""
    inputs = torch.randn(8, memory, 40, generator=torch.Generator().manual_seed(0))
    report = rnnguard.audit(build_model(), inputs=inputs, memory=memory)

    site = report["gru"]
    print(f"the gradient shrinks to {site.decay_per_step:.2f} of itself per step")
    print(f"and keeps 1e-2 of itself over {site.effective_length} of {memory} steps\n")
    for finding in report.findings:
        print(f"{finding.severity}: {finding.name} ({finding.code}): {finding.message}")
        print(f"    cure: {finding.cure}")
    return 1 if report.exceeds("warning") else 0


if __name__ == "__main__":
    sys.exit(main())
