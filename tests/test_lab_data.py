"""The samples of a run: who sees what, and in which order."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from normkit.lab.data import Data, Order, as_data, fingerprint
from normkit.lab.errors import LabError
from normkit.lab.labelled import hold_out, split
from normkit.lab.seeds import derive

X, Y = torch.arange(60.0).view(30, 2), torch.arange(30) % 3


class Squares(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([float(index)]), torch.tensor(index**2)


class Endless(IterableDataset):
    def __iter__(self):
        yield 1


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order():
    order = Order(length=20, batch_size=5, seed=3)
    epochs = [torch.cat([order.batch(4 * epoch + step) for step in range(4)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(epochs[0], epochs[1])


def test_the_order_depends_on_seed_and_step_alone():
    asked_in_order = [Order(23, 5, seed=7).batch(step) for step in range(12)]
    one = Order(23, 5, seed=7)
    for step in (11, 0, 5, 4, 9):  # a resumed run asks for any step first
        assert torch.equal(one.batch(step), asked_in_order[step])
    assert not torch.equal(Order(23, 5, seed=8).batch(0), asked_in_order[0])
    torch.manual_seed(99)
    assert torch.equal(Order(23, 5, seed=7).batch(3), asked_in_order[3])


def test_a_partial_batch_is_dropped_and_a_batch_that_is_too_large_refused():
    order = Order(length=11, batch_size=4, seed=0)
    assert len(order.batch(1)) == 4
    assert order.epoch == 0
    order.batch(2)
    assert order.epoch == 1
    with pytest.raises(LabError, match="a batch of 12 samples cannot be drawn from 11"):
        Order(length=11, batch_size=12, seed=0)


@pytest.mark.parametrize(
    "part",
    [(X, Y), [X, Y], TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)],
    ids=["pair", "list", "dataset", "loader"],
)
def test_tensors_datasets_and_loaders_give_the_same_batches(part):
    data = as_data((part, (X, Y), (X, Y)))
    x, y = data.train.take(torch.tensor([4, 1, 7]))
    assert torch.equal(x, X[[4, 1, 7]])
    assert torch.equal(y, Y[[4, 1, 7]])
    assert len(data.train) == 30
    assert torch.equal(torch.cat([x for x, _ in data.train.chunks(7)]), X)


def test_a_loader_keeps_its_own_collation():
    loader = DataLoader(Squares(), collate_fn=lambda items: (torch.stack([x for x, _ in items]) + 100, items[0][1]))
    assert as_data((loader, Squares(), Squares())).train.take(torch.tensor([2]))[0].item() == 102


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((X, Y), "a tuple of 2 where \\(train, validation, test\\) is needed"),
        (7, "int where \\(train, validation, test\\)"),
        (((X, Y[:3]), (X, Y), (X, Y)), "train data: 30 inputs and 3 targets"),
        (((X, Y), (X[:0], Y[:0]), (X, Y)), "validation data: 0 inputs"),
        (((X, Y), (X, Y), "test.csv"), "test data is str"),
        ((Endless(), (X, Y), (X, Y)), "train data is an iterable dataset"),
        ((TensorDataset(X[:0]), (X, Y), (X, Y)), "train data is empty"),
    ],
)
def test_what_is_no_data_is_named(value, words):
    with pytest.raises(LabError, match=words):
        as_data(value)


def test_the_fingerprint_changes_with_the_data():
    data = as_data(((X, Y),) * 3)
    changed = X.clone()
    changed[29, 1] += 1
    assert fingerprint(data) == fingerprint(as_data(((X, Y),) * 3))
    assert fingerprint(data) != fingerprint(as_data(((changed, Y), (X, Y), (X, Y))))
    assert fingerprint(data) != fingerprint(as_data(((X, Y.float()), (X, Y), (X, Y))))
    assert fingerprint(data) != fingerprint(Data(*as_data(((X, Y), (X[:29], Y[:29]), (X, Y)))))


def test_the_test_part_is_the_same_for_every_seed_and_in_no_other_part():
    source = hold_out(torch.arange(100.0).view(100, 1) + 1, torch.arange(100) % 2, 2, "numbers")
    assert source.test is not None
    held = set(source.test[0].flatten().tolist())
    assert len(held) == 25
    assert held.isdisjoint(source.x.flatten().tolist())
    for seed in range(3):
        parts = split(source, seed, validation=15)
        assert [len(part) for part in parts] == [60, 15, 25]
    first, second = split(source, 0), split(source, 1)
    assert not torch.equal(first.train.first(60)[1], second.train.first(60)[1])


def test_inputs_are_standardised_by_the_training_part():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 0.0]) + 50
    data = split(hold_out(x, torch.arange(200) % 2, 2, "x"), seed=0)
    train = data.train.first(10**6)[0]
    assert torch.allclose(train.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(train.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4)
    assert bool(torch.isfinite(data.test.first(10**6)[0]).all())


@pytest.mark.parametrize(
    ("layout", "shape"), [("flat", (32,)), ("image", (2, 4, 4)), ("rows", (4, 8)), ("pixels", (16, 2))]
)
def test_layouts_of_an_image(layout, shape):
    x = torch.rand(40, 2, 4, 4)
    data = split(hold_out(x, torch.arange(40) % 2, 2, "x"), seed=0, layout=layout)
    assert data.train.first(5)[0].shape == (5, *shape)


def test_a_row_is_a_row():
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(40, -1, -1, -1).clone()
    rows = split(hold_out(x, torch.arange(40) % 2, 2, "x"), seed=0, layout="rows").train.first(1)[0][0]
    assert torch.equal(rows.argsort(1), torch.arange(4).expand(4, 4))  # along a row values grow
    assert bool((rows[1:, 0] > rows[:-1, 3]).all())  # and a later row is larger throughout


def test_too_few_samples_are_refused():
    with pytest.raises(LabError, match="19 samples are too few"):
        hold_out(torch.zeros(19, 2), torch.zeros(19).long(), 2, "few")


def test_seeds_of_different_purposes_differ():
    seeds = {derive(seed, purpose) for seed in range(50) for purpose in ("order", "weights", "split")}
    assert len(seeds) == 150
    assert derive(3, "order", 1) != derive(31, "order")


def test_an_axis_of_one_may_have_any_stride():
    """So does a sequence of single pixels that is a view of images."""
    x = torch.arange(12.0).view(2, 1, 6).mT
    assert x.stride(-1) != 1
    prints = [fingerprint(as_data(((x_, torch.zeros(2)),) * 3, "test")) for x_ in (x, x.clone().contiguous(), x + 1)]
    assert prints[0] == prints[1] != prints[2]
