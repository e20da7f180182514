"""The same image gets another class when it is classified beside other images.

https://github.com/xu-ji/IIC/issues/49
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "no_running_statistics"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return nk.diagnose(model.eval(), (x[:64], y[:64]), F.cross_entropy, optimizer)


if __name__ == "__main__":
    print(diagnosis())
