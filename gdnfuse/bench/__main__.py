"""A worker, started by `gdnfuse.bench.run`."""

import sys

from gdnfuse.bench.run import worker

worker(sys.argv[1:])
