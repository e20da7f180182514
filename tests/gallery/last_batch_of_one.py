"""Training runs for most of an epoch, then: Expected more than 1 value per channel when training.

https://github.com/scverse/scvi-tools/issues/2314
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import normkit as nk

PLANTED = "few_values_per_channel"


def diagnosis():
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.data[:961], dtype=torch.float32) / 16, torch.tensor(found.target[:961])
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in DataLoader(TensorDataset(x, y), batch_size=32):  # 961 = 30 * 32 + 1
        try:
            loss = F.cross_entropy(model(batch[0]), batch[1])
        except ValueError:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nk.diagnose(model, batch, F.cross_entropy, optimizer)


if __name__ == "__main__":
    print(diagnosis())
