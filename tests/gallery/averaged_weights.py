"""Averaged weights (SWA) should be better than the last ones, and are far worse.

https://github.com/Lightning-AI/pytorch-lightning/issues/14866
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "stale_statistics"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    layers = [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for step in range(200):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if step == 50:
            averaged = copy.deepcopy(model)
        with torch.no_grad():
            for ours, theirs in zip(averaged.parameters(), model.parameters(), strict=True) if step > 50 else ():
                ours.lerp_(theirs, 1 / (step - 49))  # parameters, and no buffers
    return nk.diagnose(averaged.eval(), (x[:512], y[:512]), F.cross_entropy)


if __name__ == "__main__":
    print(diagnosis())
