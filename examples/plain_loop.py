"""Two adapters over a module of your own, in a plain training loop: run `python examples/plain_loop.py`.

The base learns nothing. "double" learns to answer 2x and "flip" to answer −x, both in the same forward and backward pass.
"""

from __future__ import annotations

import torch
from torch import nn

import lorabank as lb


def main(steps: int = 300) -> dict[str, float]:
    """Train both adapters; returns each one's last loss, and the base's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))

    bank = lb.attach(model)  # freezes the model
    bank.add("double", lb.AdapterConfig(rank=4, alpha=8))
    bank.add("flip", lb.AdapterConfig(rank=2, alpha=4, targets=["2"]))
    print(bank.summary())
    optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-2, weight_decay=0.0)

    rows = ["double"] * 8 + ["flip"] * 8 + [lb.BASE] * 8
    for _ in range(steps):
        x = torch.randn(24, 4)
        target = torch.cat([2 * x[:8], -x[8:16], x[16:]])
        with bank.route(rows):  # one entry a row
            losses = (model(x) - target).square().mean(1)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"double": losses[:8].mean().item(), "flip": losses[8:16].mean().item(), "base": losses[16:].mean().item()}


if __name__ == "__main__":
    for name, loss in main().items():
        print(f"{name}: loss {loss:.3f}")
