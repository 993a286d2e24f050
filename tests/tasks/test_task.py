import math

import torch

from vmamba.tasks.task import LOSS, Means, Score


class OneDevice:
    """Lightning's strategy of a single process."""

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return tensor


def test_scores_rank_and_show_their_values():
    accuracy = Score("top1", "accuracy")
    assert [accuracy.text(0.25), LOSS.text(0.25)] == ["25.00%", "0.2500"]
    assert sorted([0.2, math.nan, 0.9], key=accuracy.rank)[1:] == [0.2, 0.9]
    assert sorted([0.2, math.nan, 0.9], key=LOSS.rank)[1:] == [0.9, 0.2]


def test_means_are_sums_over_counts():
    means = Means(torch.device("cpu"))
    assert means.compute(OneDevice()) == {}
    means.add("loss", torch.tensor(3.0), 2)
    means.add("loss", torch.tensor(1.0), 2)
    means.add("none", 0, 0)
    assert means.local("loss") == 1.0
    assert means.compute(OneDevice()) == {"loss": 1.0, "none": 0.0}
