"""After convert_sync_batchnorm the network is as good as linear: the converter has left the activations behind.

https://github.com/huggingface/pytorch-image-models/issues/1254
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "activation_lost"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nk.BatchNorm2d(8, activation="relu"), nn.Flatten(), nn.Linear(288, 10)
    )
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return nk.diagnose(model, (x[:64], y[:64]), F.cross_entropy, optimizer)


if __name__ == "__main__":
    print(diagnosis())
