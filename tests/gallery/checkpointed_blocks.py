"""With activation checkpointing the network evaluates differently from the one without: statistics move twice.

https://github.com/pytorch/pytorch/issues/96136
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normkit as nk

PLANTED = "statistics_move_twice"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with nk.watch(model, optimizer, every=5, out=None, budget=None) as watched:
        for _ in range(50):
            rows = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        return watched.diagnose()


if __name__ == "__main__":
    print(diagnosis())
