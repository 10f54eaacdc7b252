"""
Run one of the examples: its server, and, as soon as the door answers, its client.

    python examples/run.py 03_hello_world

The two run as processes of their own, in a directory made for the purpose.  What they print
is shown with the name of the side that printed it.  Afterwards the server is told to stop,
as Ctrl-C or `kill` would tell it, and must then end by itself.
"""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from doorpool import Proxy


def start(script: Path, cwd: str) -> tuple[subprocess.Popen[str], threading.Thread]:
    """Start one side, and a thread that shows what it prints."""
    process = subprocess.Popen(
        [sys.executable, "-u", script], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printer = threading.Thread(target=show, args=(script.stem, process.stdout))
    printer.start()
    return process, printer


def show(side, lines):
    for line in lines:
        print(f"{side} | {line}", end="", flush=True)


def main(name: str) -> int:
    folder = Path(__file__).resolve().parent / name
    with tempfile.TemporaryDirectory(prefix="dp-") as cwd:
        server, server_printer = start(folder / "server.py", cwd)
        try:
            Proxy(os.path.join(cwd, "server.door"), wait=10).close()
            client, client_printer = start(folder / "client.py", cwd)
            client.wait()
            client_printer.join()
        finally:
            server.terminate()
            server.wait()
            server_printer.join()
    return client.returncode or server.returncode


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
