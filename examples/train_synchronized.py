"""Train over several processes with the batch statistics of all of them. Runs on CPUs as it stands:

    torchrun --standalone --nproc-per-node 2 examples/train_synchronized.py

Each process has 4 images per step, too few for batch norm by itself; together they have 8. On GPUs: the backend "nccl",
and the model and the images on the GPU `LOCAL_RANK`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import normkit as nk

STEPS, IMAGES = 60, 4


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same model everywhere
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    print_once(nk.sync_(model).verdict)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(dist.get_rank())  # other images on every rank
    for step in range(STEPS):
        images, labels = stripes(IMAGES, generator)
        optimizer.zero_grad()
        loss = cross_entropy(wrapped(images), labels)
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            print_once(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()  # from here on every process works by itself
    images, labels = stripes(500, torch.Generator().manual_seed(1000))
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print_once(f"accuracy on new images: {accuracy:.3f}")
    print_once(f"greatest difference of the running statistics between ranks: {difference(model):.1e}")
    dist.barrier()  # gloo may hang where a group is given up right behind an all-reduce
    dist.destroy_process_group()


def stripes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images with horizontal or vertical stripes, off-centre and off-scale."""
    labels = torch.randint(2, (count,), generator=generator)
    wave = torch.arange(12.0).mul(2).sin().expand(12, 12)
    images = torch.where(labels[:, None, None].bool(), wave, wave.T)
    noise = torch.randn(count, 12, 12, generator=generator)
    return (20 + 5 * (images + 0.5 * noise))[:, None], labels


def difference(model: nn.Module) -> float:
    """How far the running statistics of this rank are from the average of all ranks."""
    own = torch.cat([buffer.flatten() for name, buffer in model.named_buffers() if "running" in name])
    average = own.clone()
    dist.all_reduce(average)
    return (own - average / dist.get_world_size()).abs().max().item()


def print_once(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
