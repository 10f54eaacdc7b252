"""
The child's side: what a process started by a test says to it, and who it becomes.

Nothing here imports doorpool or pytest before it is asked to: a child may be one that
must not have the library loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import pickle
import sys
import threading
import time
from typing import Any

# On standard error, where the test finds them: warnings and errors of the library, which by itself is silent.
_handler = logging.StreamHandler()
_handler.setLevel(logging.WARNING)
logging.getLogger("doorpool").addHandler(_handler)

#: Names, in the environment, the descriptor on which the child reports to the test.
REPORT_FD = "DOORPOOL_TEST_REPORT_FD"

#: Imported before a child gives its privileges up: afterwards it may be unable to read the
#: directories that the interpreter lives in (root's home, say).
_BEFORE_BECOMING = (
    "concurrent.futures.process",
    "concurrent.futures.thread",
    "contextlib",
    "doorpool",
    "doorpool.door",
    "encodings.idna",
    "linecache",
    "multiprocessing.reduction",
    "multiprocessing.resource_sharer",
    "pickletools",
    "tempfile",
    "traceback",
    "uuid",
)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4  # linux/prctl.h
_CLONE_NEWUSER, _CLONE_NEWPID = 0x1000_0000, 0x2000_0000  # linux/sched.h; os.unshare() is of 3.12

_libc = ctypes.CDLL(None, use_errno=True)

_found_classes = 0
_counting = False

# The report is between this process and the test: no program started from here inherits it,
# or, running the same script (multiprocessing's "spawn"), looks for it.
_report_fd = int(os.environ.pop(REPORT_FD, -1))
if _report_fd >= 0:
    os.set_inheritable(_report_fd, False)


def ready(value: Any = None) -> None:
    """
    Tell the test that the child is ready, with a value it may want to know.
    """
    _report(("ready", value))


def result(value: Any) -> None:
    """
    Hand the result of the child to the test; the last one counts.
    """
    _report(("result", value))


def _report(message: tuple[str, Any]) -> None:
    body = dumps(message)
    body = len(body).to_bytes(8, "little") + body
    while body:
        body = body[os.write(_report_fd, body) :]


def dumps(value: Any) -> bytes:
    """
    Pickle by reference where that works, by value where it does not.
    """
    try:
        return pickle.dumps(value)
    except Exception:
        return importlib.import_module("cloudpickle").dumps(value)


def become(uid: int, gid: int | None = None, groups: tuple[int, ...] = ()) -> None:
    """
    Give up root for good: all of the process's ids become those given.

    What the child may need later is imported first (see ``_BEFORE_BECOMING``).
    """
    for name in _BEFORE_BECOMING:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    gid = uid if gid is None else gid
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # As if the process had been started by that user: /proc/self is its own again.
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def fork_in_c() -> int:
    """
    Fork past Python's hooks, when no other thread wants the interpreter's lock.

    CPython cannot clear up in a child that it knows nothing of, where those threads are not.  One that has
    waited for as long as the switch interval has its holder wait for it when it gives the lock up: the
    child would for ever, and so it would where one holds the lock's own mutex.
    """
    interval, own = sys.getswitchinterval(), str(threading.get_native_id())
    sys.setswitchinterval(60)
    try:
        time.sleep(2 * interval)  # who waits by the old one has had the lock then, or waits by the new one
        for _ in range(1000):
            if all(task == own or _sleeps(task) for task in os.listdir("/proc/self/task")):
                break
            time.sleep(0.001)
        return int(ctypes.PyDLL(None).fork())  # with the lock held
    finally:
        sys.setswitchinterval(interval)


def _sleeps(task: str) -> bool:
    """Whether a thread waits for something, but not for a lock."""
    try:
        with open(f"/proc/self/task/{task}/wchan") as file:
            where = file.read()
    except OSError:
        return True  # it has ended
    return where not in ("", "0") and "futex" not in where


def enter_user_namespace(*ranges: tuple[int, int, int]) -> None:
    """
    Move this process into a user namespace of its own (root only, one thread).

    Args:
        ranges: lines of the map, for users and groups alike: (first id inside, first id
            outside, how many).  The process has its old ids until it changes them.
    """
    lines = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in ranges)
    mine = os.getpid()
    wait, go = os.pipe()
    if (writer := os.fork()) == 0:  # stays outside, where it may write the map
        try:
            os.close(go)
            if os.read(wait, 1):
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{mine}/{name}", "w") as file:
                        file.write(lines)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    os.close(wait)
    try:
        _unshare(_CLONE_NEWUSER)
        os.write(go, b"!")
    finally:
        os.close(go)
        failed = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
    if failed:
        raise OSError(failed, f"cannot map {lines!r}: {os.strerror(failed)}")


def enter_pid_namespace() -> None:
    """
    Go on as process 1 of a new pid namespace: the caller of this is a fork of the process.

    The process itself waits for it, and ends with its code.
    """
    _unshare(_CLONE_NEWPID)
    if (inside := os.fork()) != 0:
        code = os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    _libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)


def _unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")


def count_unpickling() -> None:
    """
    Count from now on, in this process, the classes and functions that any unpickler looks up.

    An audit hook cannot be taken out again: for child processes only.
    """
    global _counting
    if not _counting:
        _counting = True
        sys.addaudithook(_on_audit)


def _on_audit(event: str, _args: tuple[Any, ...]) -> None:
    global _found_classes
    if event == "pickle.find_class":
        _found_classes += 1


def unpickling_counts() -> dict[str, int]:
    """
    Read the counters: ``find_class`` since count_unpickling(), ``unpickled`` by the library.
    """
    marshal = sys.modules.get("doorpool._marshal")
    return {
        "find_class": _found_classes,
        "unpickled": 0 if marshal is None else int(marshal.unpickled),
    }
