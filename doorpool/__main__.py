"""
``python -m doorpool --version``: which doorpool this is, and which of the shuttle's twins it runs.
"""

import argparse
import platform

import doorpool
from doorpool import _impl


def main() -> None:
    """Say what was asked for."""
    python = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()}"
    version = f"doorpool {doorpool.__version__} ({python}); shuttle: {_impl.NAME} ({_impl.WHY})"
    parser = argparse.ArgumentParser("doorpool", description=(doorpool.__doc__ or "").strip().split("\n")[0])
    parser.add_argument("--version", action="version", version=version)
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
