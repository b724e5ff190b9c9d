"""Batches: every image once, the same order for the same (seed, epoch), equal shares among processes."""

import pytest
import torch

from cvfast.data import ImageData, batches, epoch_generator, load

from .helpers import write_image


def numbered(count: int) -> ImageData:
    """Images [1, 1, 1] whose pixel is their index, as is their label."""
    numbers = torch.arange(count)
    return ImageData(numbers.byte().reshape(-1, 1, 1, 1), numbers, [str(i) for i in range(count)], "numbers")


def visited(result) -> list[list[int]]:
    """The images' numbers, batch by batch; labels must agree with them."""
    order = []
    for images, labels in result:
        assert images.dtype == torch.uint8 and images.shape[1:] == (1, 1, 1) and labels.dtype == torch.int64
        assert images.flatten().tolist() == labels.tolist()
        order.append(labels.tolist())
    return order


def test_in_order():
    result = batches(numbered(7), 3)
    assert len(result) == 3 and visited(result) == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(batches(numbered(6), 3)) == 2


def test_drop_last():
    result = batches(numbered(7), 3, drop_last=True)
    assert len(result) == 2 and visited(result) == [[0, 1, 2], [3, 4, 5]]
    assert len(batches(numbered(2), 3, drop_last=True)) == 0


def test_shuffled():
    """Every image once, another order each epoch and seed, and the same order each time one is gone through."""
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**40, 0), (0, 0)):
        result = batches(numbered(50), 8, shuffle=True, generator=epoch_generator(seed, epoch))
        order = sum(visited(result), [])
        assert sorted(order) == list(range(50)) and order == sum(visited(result), [])
        orders.append(order)
    assert orders[0] == orders[4]
    assert len({tuple(order) for order in orders[:4]}) == 4


def test_epoch_generator_depends_on_nothing_else():
    """torch's own generator is neither read nor changed."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = torch.rand(4, generator=epoch_generator(3, 4))
    list(batches(numbered(9), 2, shuffle=True, generator=epoch_generator(3, 4)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(4, generator=epoch_generator(3, 4)))


def test_batches_are_copies():
    """Changing a batch leaves the data as it is."""
    data = numbered(4)
    for images, _ in batches(data, 4):
        images.zero_()
    assert data.images.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("count, world_size", [(12, 2), (13, 2), (13, 3), (2, 4), (1, 3)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_shares_of_processes(count, world_size, shuffle):
    """All processes get equally many batches and images, together every image, and at most world_size - 1 twice.

    Batch k of all together is batch k of one process with a batch size of world_size times as many.
    """
    parts = [
        batches(numbered(count), 2, shuffle, epoch_generator(0, 0), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    orders = [visited(part) for part in parts]
    assert len({len(part) for part in parts}) == 1
    assert len({tuple(map(len, order)) for order in orders}) == 1
    everything = sum((sum(order, []) for order in orders), [])
    assert set(everything) == set(range(count)) and len(everything) - count < world_size
    alone = visited(batches(numbered(count), 2 * world_size, shuffle, epoch_generator(0, 0)))
    for k, batch in enumerate(alone[: count // (2 * world_size)]):
        assert sorted(sum((order[k] for order in orders), [])) == sorted(batch)


@pytest.mark.parametrize("count, world_size", [(13, 2), (11, 3), (2, 4)])
def test_shares_with_drop_last(count, world_size):
    """With drop_last no image comes twice, every batch is full, and no full batch of all together is lost."""
    orders = [
        visited(batches(numbered(count), 2, drop_last=True, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    everything = sum((sum(order, []) for order in orders), [])
    assert len(everything) == len(set(everything)) == count // (2 * world_size) * 2 * world_size
    assert all(len(batch) == 2 for order in orders for batch in order)


def test_files(tmp_path):
    """Images on disk come in the same batches, with workers and without, and leave torch's own generator alone."""
    for i in range(10):
        pixels = torch.full((3, 4, 4), i, dtype=torch.uint8)
        write_image(tmp_path / "train" / f"class_{i}" / "image.png", pixels)
        write_image(tmp_path / "test" / f"class_{i}" / "image.png", pixels)
    data = load(tmp_path).train
    state = torch.get_rng_state()
    want = visited(batches(numbered(10), 4, True, epoch_generator(0, 0)))
    for workers in (0, 2):
        result = batches(data, 4, True, epoch_generator(0, 0), num_workers=workers)
        got = [(images, labels) for images, labels in result]
        assert len(result) == 3 and [labels.tolist() for _, labels in got] == want
        for images, labels in got:
            assert images.shape[1:] == (3, 4, 4) and torch.equal(images[:, 0, 0, 0], labels.byte())
    assert torch.equal(state, torch.get_rng_state())


def test_device():
    """Batches are moved to the device; data that is there already is batched there."""
    images, labels = next(iter(batches(numbered(4), 2, device="meta")))
    assert images.device.type == labels.device.type == "meta"
    there = ImageData(torch.zeros(4, 1, 1, 1, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ["a"])
    assert next(iter(batches(there, 3)))[0].device == there.images.device


def test_wrong_arguments():
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        batches(numbered(3), 0)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank must be from 0 to world_size - 1 = 1, got {rank}"):
            batches(numbered(3), 1, rank=rank, world_size=2)
    with pytest.raises(ValueError, match="numbers has no images"):
        batches(numbered(0), 1)
