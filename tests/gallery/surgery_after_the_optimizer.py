"""The norms were converted after the optimizer had been built: the new ones never learn.

https://github.com/pytorch/opacus/issues/432
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "optimizer_misses_parameters"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for name, module in model.named_children():
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(4, module.num_features))
    for _ in range(60):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return nk.diagnose(model, (x[:64], y[:64]), F.cross_entropy, optimizer)


if __name__ == "__main__":
    print(diagnosis())
