"""Batch norm was replaced by GroupNorm(4, 4), as a validator asks for, and the network learns nothing any more.

https://github.com/pytorch/opacus/issues/567
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "groups_of_one"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    model = nn.Sequential(nn.Linear(64, 4), nn.GroupNorm(4, 4), nn.ReLU(), nn.Linear(4, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return nk.diagnose(model, (x[:64], y[:64]), F.cross_entropy, optimizer)


if __name__ == "__main__":
    print(diagnosis())
