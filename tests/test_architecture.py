"""What may import what, and that nothing but CUDA needs triton."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.modules["triton"] = None
sys.meta_path.insert(0, Block())
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_importing_loads_neither_triton_nor_transformers():
    assert run("import gdnfuse, sys; print([m for m in ('triton', 'transformers') if m in sys.modules])") == "[]"


def test_without_triton_a_decode_step_compiles_on_cpu():
    out = run(
        BLOCKED
        + """
import gdnfuse, torch
from tests.models import zoo

model = zoo.causal_lm(**zoo.SMALL)
tokens = zoo.tokens_for(2, 2)
e, mask = zoo.prefill(model, 2, "static")
wanted = zoo.decode(model, e, mask, tokens)
a, _ = zoo.prefill(model, 2, "static")
run = torch.compile(model, backend="gdnfuse", fullgraph=True, options={"inner": "aot_eager", "strict": True})
assert zoo.relative(zoo.decode(run, a, mask, tokens), wanted) < 1e-5
print(gdnfuse.reports()[0].fused_layers, sys.modules["triton"])
"""
    )
    assert out.splitlines()[-1] == "1 None"


def test_arrows_run_one_way():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# Modules that no underscore marks and whose interface torch and Triton promise to nobody.
NOT_PUBLIC = re.compile(
    r"torch\.fx\.experimental|triton\.(backends|compiler|experimental|knobs|runtime|language\.extra)(\.|$)|(torch|triton|transformers)\b.*\._(?!_)"
)
ALLOWED = {"_replace", "_fields", "_reinterpret"}  # of NamedTuples, and of Gluon's tensors, which compat.gluon looks for
LOGGERS = {"logging.getLogger('torch._dynamo').setLevel"}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(tree):
    """What a file of ours calls private itself."""
    for n in ast.walk(tree):
        if isinstance(n, ast.FunctionDef | ast.ClassDef):
            yield n.name
        elif (
            isinstance(n, ast.Name | ast.Attribute)
            and isinstance(n.ctx, ast.Store)
            and ast.unparse(n).startswith(("_", "self._"))
        ):
            yield n.attr if isinstance(n, ast.Attribute) else n.id


def private_apis(tree, own):
    """Imports, attributes and names in getattr that are private and not ours: (line, what)."""
    for n in ast.walk(tree):
        names = []
        if isinstance(n, ast.Import):
            names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            names = [f"{n.module}.{a.name}" for a in n.names]
        elif isinstance(n, ast.Attribute):
            names = [ast.unparse(n)]
        elif isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
            names = [f"?.{a.value}" for a in n.args[1:2] if isinstance(a, ast.Constant)]
        for name in names:
            last = name.rpartition(".")[2]
            if name not in LOGGERS and (NOT_PUBLIC.match(name) or private(last) and last not in own):
                yield n.lineno, name


def test_private_apis_stand_in_compat_alone():
    trees = {p.relative_to(ROOT): ast.parse(p.read_text()) for p in (ROOT / "gdnfuse").rglob("*.py") if p.name != "compat.py"}
    own = ALLOWED.union(*map(own_names, trees.values()))
    assert {f"{path}:{line} {name}" for path, tree in trees.items() for line, name in private_apis(tree, own)} == set()


@pytest.mark.parametrize(
    "code",
    [
        "from torch._dynamo import utils",
        "import torch.utils._pytree as pytree",
        "from torch.fx import _pytree",
        "import triton.runtime.jit",
        "from triton.language.extra.cuda import gdc_wait",
        "from transformers.utils import _sentence",
        "torch._C._cuda_getDevice()",
        "torch.ops.aten._scaled_dot_product_flash_attention.default(q)",
        "model._call_impl(x)",
        "getattr(model, '_call_impl')",
        "triton.knobs.runtime",
        "x.untyped_storage()._cdata",
    ],
)
def test_a_private_api_is_found(code):
    assert list(private_apis(ast.parse(code), {"_seen"})), code
    assert not list(
        private_apis(ast.parse("from gdnfuse.packing import pack\nself._seen\nx.size(0)\ntorch.utils.data"), {"_seen"})
    )
