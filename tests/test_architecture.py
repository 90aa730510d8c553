"""What may import what, and that nothing but CUDA needs triton."""

import subprocess
import sys
import textwrap
from pathlib import Path

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
