"""Which columns of which rows a tensor is put together from."""

import pytest
import torch

from gdnfuse.rewrite.columns import Columns
from gdnfuse.rewrite.pattern import Mismatch
from tests.rewrite.captured import Captured

B = 3
ROW, OTHER = torch.randn(B, 1, 12), torch.randn(B, 4)


def columns_of(f, *args, dynamic=None):
    """The numbers of the columns of what f returns, and how many columns the tensors have that it takes them from."""
    graph = Captured(f, *args, dynamic=dynamic).normalize().gm.graph
    (out,) = graph.find_nodes(op="output")[0].args[0]
    columns = Columns()
    return columns.of(out, B).tolist(), list(columns.rows.values())


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda x: x.narrow(-1, 2, 3), [2, 3, 4]),
        (lambda x: x[..., 1::4].float().transpose(1, 2), [1, 5, 9]),
        (lambda x: x.view(B, 2, 6).split([4, 2], -1)[1].reshape(B, 1, 4), [4, 5, 10, 11]),
        (lambda x: torch.cat([x.chunk(3, -1)[2], x[..., :1]], -1).bfloat16(), [8, 9, 10, 11, 0]),
        (lambda x: x.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(1)[:, :4], [0, 4, 8, 1]),
        (lambda x: x.expand(2, B, 1, 12)[1, :, 0, 5:7], [5, 6]),
    ],
)
def test_columns_of_one_row(f, found):
    assert columns_of(f, ROW) == (found, [12])
    assert columns_of(lambda x: f(x.exp()), ROW) == (found, [12])


def test_columns_of_several_rows_are_numbered_one_row_behind_the_other():
    f = lambda x, y: torch.cat([y[:, 1:3], x.squeeze(1)[:, 7:8], (y + 1)[:, :1], y[:, :1]], -1)  # noqa: E731
    assert columns_of(f, ROW, OTHER) == ([1, 2, 4 + 7, 4 + 12, 0], [4, 12, 4])


def test_all_that_a_sequence_has_is_its_columns():
    assert columns_of(lambda x: x.transpose(1, 2)[:, 5:7, 0], torch.randn(B, 2, 9)) == ([5, 6], [18])


def test_a_symbolic_batch():
    assert columns_of(lambda x: x.reshape(x.shape[0], 3, 4)[:, 1], ROW, dynamic=True) == ([4, 5, 6, 7], [12])


def test_columns_that_are_not_the_same_for_every_sequence():
    for f in (lambda x: x.view(2, B, 6).transpose(0, 1), lambda x: torch.cat([x[1:], x[:1]])):
        with pytest.raises(Mismatch, match="the same columns of every sequence, each in its place"):
            columns_of(f, ROW)


def test_what_depends_on_numbers_or_is_a_result_of_an_op_is_a_row_of_its_own():
    index = torch.tensor([3, 0])
    assert columns_of(lambda x: x[:, :, index][..., 1:], ROW) == ([1], [2])
    assert columns_of(lambda x: torch.topk(x, 4, -1).values[..., 2:], ROW) == ([2, 3], [4])
    assert columns_of(lambda x: x.unbind(1)[0][:, :2], ROW) == ([0, 1], [12])


def test_a_tensor_without_an_axis_of_sequences():
    with pytest.raises(Mismatch, match="views that can be run"):
        columns_of(lambda x: x[0, 0].exp()[:5], ROW)
