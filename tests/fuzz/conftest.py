import sys
from pathlib import Path

# Calls of kernels (kernel_cases, interpreted) are imported by name, as beside them.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
