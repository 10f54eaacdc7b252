"""
The soak, as a command: ``python -m tests.soak --minutes 60``.
"""

import os
import sys
from pathlib import Path

# NumPy's own threads would be forked away in the middle of something.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for ``support`` and ``soak``, as in the tests

from soak.run import main

sys.exit(main(sys.argv[1:]))
