"""
Run one of the examples: its server, and, as soon as the door answers, its client.  What else is
in the folder runs between the two; its door has its name (``proxy.py``: ``proxy.door``).

    python examples/run.py 03_hello_world

They run as processes of their own, in a directory made for the purpose.  What they print
is shown with the name of the side that printed it.  Afterwards the server is told to stop,
as Ctrl-C or `kill` would tell it, and must then end by itself.
"""

import contextlib
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
    with lines:
        for line in lines:
            print(f"{side} | {line}", end="", flush=True)


def stop(server: subprocess.Popen[str], cwd: str) -> None:
    """Have a server end; one that has taken its name away may be doing so already."""
    if not os.path.exists(os.path.join(cwd, "server.door")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=1)
    server.terminate()
    server.wait()


def main(name: str) -> int:
    folder = Path(__file__).resolve().parent / name
    with tempfile.TemporaryDirectory(prefix="dp-") as cwd:
        others = sorted({path.stem for path in folder.glob("*.py")} - {"server", "client"})
        running = []
        try:
            for name in ("server", *others):
                running.append(start(folder / f"{name}.py", cwd))
                Proxy(os.path.join(cwd, f"{name}.door"), wait=10).close()
            client, client_printer = start(folder / "client.py", cwd)
            client.wait()
            client_printer.join()
        finally:
            for server, printer in reversed(running):
                stop(server, cwd)
                printer.join()
    return client.returncode or max(server.returncode for server, _ in running)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
