"""What somebody else's error becomes in a sentence of ours, whatever it says or fails to say."""

import pytest
import torch

from gdnfuse.errors import LONGEST, one_line
from gdnfuse.passes import verify
from gdnfuse.rewrite import proof
from gdnfuse.rewrite.columns import Columns
from gdnfuse.rewrite.pattern import Mismatch
from tests.rewrite.captured import Captured
from tests.rewrite.test_proof import record_of


class Mute(RuntimeError):
    def __str__(self):
        raise ValueError("cannot say what it is about")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too long."), "ValueError: too long"),
        (OSError("no file\n  in the folder.\n\n"), "OSError: no file in the folder"),
        (AssertionError(), "AssertionError: no message"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("\n"), "RuntimeError: no message"),
        (Mute(), "Mute: no message"),
        (RuntimeError("x" * 1000), f"RuntimeError: {'x' * LONGEST}…"),
    ],
)
def test_an_error_is_one_line(error, line):
    assert one_line(error) == line


def silent(*args, **kwargs):
    raise AssertionError


def test_an_error_without_text_is_a_sentence_in_a_proof(monkeypatch):
    monkeypatch.setattr(proof, "evaluate", silent)
    proof.forget()
    record = record_of(lambda x: x.reshape(-1) * 7, lambda x: x.reshape(-1) * 7, torch.randn(2, 4))
    proof.forget()
    assert record.reason == "The proof could not be run: AssertionError: no message."


def test_an_error_without_text_is_a_sentence_of_columns_and_of_verify(monkeypatch):
    graph = Captured(lambda x: x.transpose(0, 1).exp(), torch.randn(2, 4))
    view, *_ = (n for n in graph.gm.graph.nodes if n.target == "transpose")
    monkeypatch.setattr("gdnfuse.rewrite.columns.evaluate_node", lambda *_: (_ for _ in ()).throw(TypeError()))
    with pytest.raises(Mismatch, match="TypeError: no message"):
        Columns().of(view, 2)
    monkeypatch.setattr(verify.Interpreter, "run", silent)
    with pytest.raises(verify.Refused, match="found AssertionError: no message."):
        verify.verify(graph.before, graph.gm, graph.args, [])
