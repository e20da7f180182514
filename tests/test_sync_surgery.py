"""nk.sync_, nk.unsync_, nk.merge_statistics_: on models that exist, alone, wrapped and sharded."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.statistics import Batch, Ghost, PerDomain, Synchronized
from normkit.statistics.synchronized import Stored
from processes import spawn
from test_synchronized import assert_near, draw


class Subclass(nn.BatchNorm2d):
    """Somebody's own, whose forward nobody may replace."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def model() -> nn.Module:
    """torch's layers and ours, one under two names, one with a hook."""
    shared = nn.BatchNorm2d(4)
    shared.register_forward_hook(lambda module, args, output: output + 1)
    parts = [nn.Conv2d(3, 4, 3), shared, nn.ReLU(), nk.BatchNorm2d(4, activation="relu"), nn.SyncBatchNorm(4), shared]
    return nn.Sequential(*parts).train()


def facts(module: nn.Module) -> Any:
    """All that must be as it was."""
    names = [
        (name, id(child), type(child), child.training) for name, child in module.named_modules(remove_duplicate=False)
    ]
    tensors = [(name, id(t)) for name, t in [*module.named_parameters(), *module.named_buffers()]]
    plain = lambda child: {k: v for k, v in vars(child).items() if not k.startswith("_")}
    return names, tensors, [(plain(child), sorted(child._non_persistent_buffers_set)) for child in module.modules()]


def test_sync_keeps_every_object_and_unsync_is_its_inverse():
    net = model()
    before, state = facts(net), copy.deepcopy(net.state_dict())
    certificate = nk.sync_(net, example_inputs=torch.randn(2, 3, 6, 6))
    assert [type(net[i]) for i in (1, 3, 4, 5)] == [nk.BatchNorm2d, nk.BatchNorm2d, nk.SyncBatchNorm, nk.BatchNorm2d]
    assert all(net[i].statistics == Synchronized(required=i != 4) for i in (1, 3, 4))
    assert net[1] is net[5]
    assert net[3].activation is not None
    assert [row.training for row in certificate.agreement] == [False]
    assert certificate.verdict == "sync_: 2 x BatchNorm2d synchronised, 1 x SyncBatchNorm synchronised."
    assert nk.sync_(net).verdict == "sync_: nothing was changed; 3 skipped."
    assert [*net.state_dict()] == [*state]
    certificate = nk.unsync_(net, example_inputs=torch.randn(2, 3, 6, 6))
    assert facts(net) == before
    assert nk.unsync_(net).verdict == "unsync_: nothing was changed."
    certificate.undo()
    assert isinstance(net[1].statistics, Synchronized)
    assert net[4].process_group is None
    nk.unsync_(net)
    assert facts(net) == before


def test_undo_is_the_inverse_too():
    net = model()
    before = facts(net)
    certificate = nk.sync_(net)
    certificate.undo()
    assert facts(net) == before
    certificate = nk.sync_(net)
    net[3].statistics = Batch()
    with pytest.raises(RuntimeError, match="its statistics have been changed since"):
        certificate.undo()


def test_unsync_works_on_a_model_that_was_stored_in_between():
    net = nn.Sequential(nn.BatchNorm2d(4), nk.BatchNorm2d(4, statistics=Batch(on_single="skip")))
    before = repr(net)
    nk.sync_(net)
    net = pickle.loads(pickle.dumps(net))
    assert isinstance(net[0].statistics, Synchronized)
    nk.unsync_(net)
    assert repr(net) == before
    assert type(net[0]) is nn.BatchNorm2d
    assert "hold" not in vars(net[0])
    assert [name for name, _ in net[0].named_buffers()] == [name for name, _ in nn.BatchNorm2d(4).named_buffers()]
    assert net[1].statistics == Batch(on_single="skip")


def test_what_is_left_alone_is_named_with_its_reason():
    net = nn.ModuleDict(
        {
            "ghost": nk.BatchNorm2d(4, statistics=Ghost(4)),
            "own": Subclass(4),
            "output": nk.BatchNorm2d(4, save="output"),
            "lazy": nn.LazyBatchNorm2d(),
            "left": nn.BatchNorm2d(4),
            "instance": nn.InstanceNorm2d(4, track_running_stats=True),
            "mine": nk.BatchNorm2d(4, statistics=Synchronized()),
        }
    )
    certificate = nk.sync_(net, filter_fn=lambda module, name: name != "left")
    assert not certificate.changed
    assert {row.module: row.reason for row in certificate.skipped} == {
        "left": "filter_fn left it out",
        "mine": "it is synchronised already",
    }
    refused = {row.module: row.reason for row in certificate.refused}
    assert set(refused) == {"ghost", "own", "lazy", "output"}
    assert "save='output' is for the statistics of the mini-batch" in refused["output"]
    assert "statistics=Ghost(size=4) were chosen for it" in refused["ghost"]
    assert "is a subclass of BatchNorm2d" in refused["own"]
    assert "run one batch" in refused["lazy"]
    certificate = nk.unsync_(net)
    assert "it was built synchronised" in certificate.skipped[0].reason


def test_a_frozen_layer_does_not_become_torchs_again():
    net = nn.Sequential(nn.BatchNorm2d(4))
    nk.sync_(net)
    nk.freeze_(net)
    assert "it is frozen" in nk.unsync_(net).refused[0].reason
    nk.unfreeze_(net)
    nk.unsync_(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_another_group_takes_the_place_of_the_first_and_unsync_goes_back_to_the_beginning():
    net = nn.Sequential(nn.BatchNorm2d(4), nk.SyncBatchNorm(4))
    one, two = Stored((0, 1)), Stored((0,))
    nk.sync_(net, one)
    nk.sync_(net, two)
    assert [layer.statistics.process_group for layer in net] == [two, two]
    nk.unsync_(net)
    assert type(net[0]) is nn.BatchNorm2d
    assert net[1].statistics == Synchronized(required=False)


@pytest.mark.parametrize("operation", [nk.sync_, nk.unsync_], ids=["sync_", "unsync_"])
def test_wrappers_that_cannot_be_looked_through_are_refused(operation):
    with pytest.raises(TypeError, match="DataParallel"):
        operation(nn.DataParallel(model()))
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        operation([])


def test_merging_needs_processes():
    with pytest.raises(RuntimeError, match=r"not initialised.*\n.*torchrun"):
        nk.merge_statistics_(model())
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        nk.merge_statistics_([])


# two processes

SIZES = (3, 5)


class Net(nn.Module):
    """Two norms, so that the second one sees what the first one made."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        self.head = nn.Linear(4, 2)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(y.mean((2, 3)))


def the_same_net(**options: Any) -> Net:
    torch.manual_seed(3)
    return Net(**options).double()


def trained(net: nn.Module, x: Tensor, target: Tensor, scale: float) -> nn.Module:
    """Two steps of gradient descent on the sum of squared errors."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        ((net(x) - target).square().sum() * scale).backward()
        optimizer.step()
    return net


def in_each_process(rank: int) -> None:
    x, target = draw(sum(SIZES), 3, 8, 7, seed=1), draw(sum(SIZES), 2, seed=2)
    whole = trained(the_same_net(), x, target, 1 / sum(SIZES))
    mine, wanted = (t.split(SIZES)[rank] for t in (x, target))
    average = len(SIZES) / sum(SIZES)  # the wrapper averages over ranks what should be a sum
    for checkpointed in (False, True):
        net = the_same_net(checkpointed=checkpointed)
        nk.sync_(net)
        wrapped = trained(DistributedDataParallel(net), mine, wanted, average)
        for name, value in whole.state_dict().items():
            assert_near(wrapped.module.state_dict()[name], value, 1e-12, f"DDP, {checkpointed=}, {name}")
    wrapped = DistributedDataParallel(the_same_net())
    nk.sync_(wrapped)  # looked through
    assert_near(trained(wrapped, mine, wanted, average).module.head.weight, whole.head.weight, 1e-12, "sync_ of DDP")
    sharded(rank, whole, mine, wanted, average)
    merged(rank)
    merged_like_the_whole(rank)
    different_layers(rank)


def sharded(rank: int, whole: Net, mine: Tensor, wanted: Tensor, average: float) -> None:
    """FSDP2: parameters are sharded, buffers are not."""
    net = the_same_net()
    nk.sync_(net)
    mesh = dist.init_device_mesh("cpu", (len(SIZES),))
    fully_shard(net.body, mesh=mesh)
    fully_shard(net, mesh=mesh)
    trained(net, mine, wanted, average)
    for name, value in whole.state_dict().items():
        own = net.state_dict()[name]
        assert_near(own.full_tensor() if hasattr(own, "full_tensor") else own, value, 1e-12, f"FSDP2, {name}")


def merged(rank: int) -> None:
    """By hand: a rank that saw nothing counts nothing, values weigh where they are known, the rest weigh the same."""
    net = nn.ModuleDict(
        {
            "torchs": nn.BatchNorm1d(2),
            "momentum": nk.BatchNorm1d(2, momentum=0.1),
            "average": nk.BatchNorm1d(2, momentum=None),
            "one rank": nk.BatchNorm1d(2),
            "nobody": nk.BatchNorm1d(2),
            "instance": nk.InstanceNorm1d(2, track_running_stats=True),
            "domains": nk.BatchNorm1d(2, statistics=PerDomain(2)),
        }
    ).double()
    x = draw(3 + 4 * rank, 2, 5, seed=3 + rank) + 10 * rank
    for name, layer in net.items():
        if name == "nobody" or (name == "one rank" and rank == 0):
            continue
        with nk.domain(rank):
            layer(x)
    own = {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in net.items()}
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, own)
    certificate = nk.merge_statistics_(net)
    assert {p.module for p in certificate.changed} == {"torchs", "momentum", "average", "instance", "domains"} | (
        {"one rank"} if rank == 0 else set()
    )
    for name, layer in net.items():
        weights = {"average": (3 * 5, 7 * 5), "one rank": (0, 1), "nobody": (1, 1)}.get(name, (1, 1))
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        means, variances = (torch.stack([e[name][i] for e in everyone]) for i in (0, 1))
        mean = (shares[:, None] * means).sum(0)
        between = 0 if name == "instance" else (means - mean).square()  # it keeps variances within samples
        var = (shares[:, None] * (variances + between)).sum(0)
        assert_near(layer.running_mean, mean, 1e-12, f"merged {name}")
        assert_near(layer.running_var, var, 1e-12, f"merged {name}")
    table = net["domains"].statistics_state
    assert table.batches.tolist() == ([1, 0] if rank == 0 else [0, 1])  # counters stay
    assert (table.mean[1] > table.mean[0] / 2).all()  # each domain has what the rank that saw it saw
    state = copy.deepcopy(net.state_dict())
    assert not nk.merge_statistics_(net).changed
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    certificate.undo()
    assert all(torch.equal(net[name].running_var, var) for name, (_, var) in own.items())


def merged_like_the_whole(rank: int) -> None:
    """With one batch each and ``momentum=None`` the result is that of all values, but for n - 1 in the place of n."""
    layer = nk.BatchNorm1d(2, momentum=None).double()
    parts = [draw(30_000 * (1 + r), 2, seed=9 + r) * (r + 1) + 5 * r for r in (0, 1)]
    layer(parts[rank])
    nk.merge_statistics_(layer)
    everything = torch.cat(parts)
    assert_near(layer.running_mean, everything.mean(0), 1e-12, "mean of all")
    assert_near(layer.running_var, everything.var(0), 1e-4, "variance of all")


def different_layers(rank: int) -> None:
    with pytest.raises(RuntimeError, match=rf"rank {rank} has 1 with running statistics: 0: \[{3 + rank}\]"):
        nk.merge_statistics_(nn.Sequential(nk.BatchNorm1d(3 + rank)))


@pytest.mark.slow
def test_wrapped_sharded_and_merged_models_are_those_of_one_process(tmp_path):
    spawn(len(SIZES), tmp_path, in_each_process)
