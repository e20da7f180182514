"""The pretrained backbone is frozen, and yet its outputs drift from epoch to epoch.

https://github.com/pgniewko/gt-pyg/issues/112
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "frozen_but_training"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    convolutions = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    for layer in convolutions:
        for parameter in layer.parameters():
            parameter.requires_grad = False
    optimizer = torch.optim.SGD(model[-1].parameters(), lr=0.1)
    for _ in range(60):
        model.train()  # which takes the frozen batch norm along
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return nk.diagnose(model, (x[:64], y[:64]), F.cross_entropy, optimizer)


if __name__ == "__main__":
    print(diagnosis())
