"""The whole model was cast to half precision, batch norm with it, and evaluation got worse.

https://github.com/Lightning-AI/pytorch-lightning/issues/18802
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "half_precision_statistics"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.bfloat16) / 16, torch.tensor(found.target)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]).float(), y[rows]).backward()
        optimizer.step()
    return nk.diagnose(model, (x[:64], y[:64]), lambda output, y: F.cross_entropy(output.float(), y), optimizer)


if __name__ == "__main__":
    print(diagnosis())
