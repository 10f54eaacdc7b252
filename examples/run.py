"""
Run one of the examples: its server, and, as soon as the door answers, its client.  What else is
in the folder runs between the two; its door has its name (``proxy.py``: ``proxy.door``).

    python examples/run.py 03_hello_world

They run as processes of their own, in a directory made for the purpose.  What they print
is shown with the name of the side that printed it.  Afterwards the server is told to stop,
as Ctrl-C or `kill` would tell it, and must then end by itself.

Where a lesson is about users (``USERS``), and root runs it, each side is a user of its own.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from doorpool import Proxy, anyone

#: Who plays what, by lesson, if root runs it: the uids need not be anybody's.
USERS = {"09_door_through_a_door": {"server": 4201, "proxy": 4202, "client": 65534}}

# Becomes another user, and then runs the script.  Both it and the library have been read by then: the new
# user may not be allowed to, where they are in root's home.
AS_USER = """
import os, sys, doorpool
uid, script = int(sys.argv[1]), sys.argv[2]
with open(script) as file:
    code = compile(file.read(), script, "exec")
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
exec(code, {"__name__": "__main__"})
"""


def start(script: Path, cwd: str, uid: int | None) -> tuple[subprocess.Popen[str], threading.Thread]:
    """Start one side, as another user if one is given, and a thread that shows what it prints."""
    side = [script] if uid is None else ["-c", AS_USER, str(uid), script]
    process = subprocess.Popen(
        [sys.executable, "-u", *side], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printer = threading.Thread(target=show, args=(script.stem, process.stdout))
    printer.start()
    return process, printer


def show(side, lines):
    with lines:
        for line in lines:
            print(f"{side} | {line}", end="", flush=True)


def stop(server: subprocess.Popen[str], door: str) -> None:
    """Have a server end; one that has taken its name away may be doing so already."""
    if not os.path.exists(door):
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=1)
    server.terminate()
    server.wait()


def main(name: str) -> int:
    folder = Path(__file__).resolve().parent / name
    users = USERS.get(folder.name, {}) if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="dp-") as cwd:
        if users:
            os.chmod(cwd, 0o1777)  # as /tmp: all may make names in it, and each takes away his own
        others = sorted({path.stem for path in folder.glob("*.py")} - {"server", "client"})
        running = []
        try:
            for name in ("server", *others):
                door = os.path.join(cwd, f"{name}.door")
                running.append((door, *start(folder / f"{name}.py", cwd, users.get(name))))
                Proxy(door, wait=10, server=anyone).close()
            client, client_printer = start(folder / "client.py", cwd, users.get("client"))
            client.wait()
            client_printer.join()
        finally:
            for door, server, printer in reversed(running):
                stop(server, door)
                printer.join()
    return client.returncode or max(server.returncode for _, server, _ in running)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
