import sys
from pathlib import Path

# The modules beside the tests (kernel_cases, interpreted) are imported by name in whichever import mode pytest runs.
sys.path.insert(0, str(Path(__file__).parent))
