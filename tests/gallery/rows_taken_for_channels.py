"""BatchNorm1d on (batch, length, features): it ran, until a sequence of another length came.

https://github.com/pytorch/pytorch/issues/76613
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit as nk

PLANTED = "channels_on_wrong_axis"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.norm, self.head = nn.GRU(8, 8, batch_first=True), nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, x):  # (batch, 8 rows, 8 pixels)
        return self.head(self.norm(self.recurrent(x)[0]).mean(1))


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return nk.diagnose(model, (x[:64], y[:64]), F.cross_entropy, optimizer)


if __name__ == "__main__":
    print(diagnosis())
