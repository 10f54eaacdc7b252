"""
The ids of parametrized tests: the same in each run, so that any can be asked for, and runs compared.
"""

from __future__ import annotations

import re


def described(value: object) -> str:
    """Return the ``repr`` of a value without where it stands in memory, or in a file."""
    return re.sub(r" at 0x[0-9a-f]+|(, file| from) .*(?=>)", "", repr(value))
