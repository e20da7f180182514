"""Gradients are accumulated over 16 batches of 4, to train as with a batch of 64, and it is worse than that.

https://github.com/ultralytics/yolov5/issues/1630
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "accumulation_splits_batches"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nk.watch(model, optimizer, every=2, out=None, budget=None) as watched:
        for _ in range(20):
            optimizer.zero_grad()
            for _ in range(16):
                rows = torch.randint(len(x), (4,))
                (F.cross_entropy(model(x[rows]), y[rows]) / 16).backward()
            optimizer.step()
        return watched.diagnose()


if __name__ == "__main__":
    print(diagnosis())
