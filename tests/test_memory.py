import pytest
import torch

from kfac_prune.memory import arriving, mapped

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_batches_arrive_in_order_with_their_values(device, count):
    batches = [(torch.full((3, 700), float(i)), mapped(torch.arange(i, i + 4))) for i in range(count)]
    arrived = list(arriving(iter(batches), device))
    assert len(arrived) == count
    for sent, got in zip(batches, arrived, strict=True):
        for one, other in zip(sent, got, strict=True):
            assert other.device == device
            torch.testing.assert_close(other.cpu(), one, rtol=0, atol=0)


def test_one_batch_is_under_way_while_another_is_worked_on():
    taken = []

    def batches():
        for number in range(4):
            taken.append(number)
            yield (torch.full((1,), float(number)),)

    for number, (tensor,) in enumerate(arriving(batches(), torch.device("cpu"))):
        assert float(tensor) == number
        assert taken == list(range(min(number + 2, 4)))  # this one and the next, no more


def test_an_error_in_a_batch_reaches_the_caller():
    def batches():
        yield (torch.zeros(2),)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(arriving(batches(), torch.device("cpu")))
