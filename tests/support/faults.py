"""
Faults: each system call that the library makes fails once, with each errno that its manual page knows.

One *case* is (scenario, side, call, errno, n): while a client plays the scenario, from the opening of a door
to its closing, the n-th such call of one of the two processes is not made and fails.  Whatever comes of it,

- the client gets the right answer or an error that the library may raise, in time;
- the call ran at most once; just once if it went well, not at all if the error promises that;
- afterwards the same pair of processes plays the scenario well;
- descriptors, threads and names are what they were before, no thread of the server's has died, and nothing
  was logged that asks to be reported.

The calls are made to fail inside the process, by a small preloaded library (``faults.c``, compiled when it is
first wanted), and not by ``strace --inject``: it counts from the moment in which a scenario begins, for all
threads but the test's own, in processes that go on from case to case.  A case takes some ten milliseconds and
not three hundred, so that every one can be tried; and nobody needs the right to trace.  ``strace -f -c`` says
which calls there are.

Left out: ``read`` and ``write``, which the library calls for nobody but its users; ``futex``, by which the
interpreter makes its locks, and ``brk``, ``mprotect`` and the like of ``malloc``, which are made inside libc.
CPython ends the process when a lock of its own fails, as it should.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import faulthandler
import gc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from pathlib import Path
from typing import Any

import attrs

from support.actors import Actor, here
from support.processes import ChildFailed, wait_until

SOURCE = Path(__file__).with_name("faults.c")
MACHINES = ("x86_64", "aarch64")  # see faults.c about "all longs"

PATIENCE = 2.0  # seconds to open a door in
HANG = 8.0  # seconds after which a scenario that takes milliseconds is taken for hanging
SETTLING = 4.0  # seconds for what was given up to be gone

#: What the manual pages (Linux man-pages, section 2; pthread_create of section 3) say of each call: first
#: what is a state of the machine or of the other side, at the end the caller's own mistakes.
ERRORS: dict[str, str] = {
    "accept4": "EMFILE ENFILE ENOBUFS ENOMEM ECONNABORTED EPERM EPROTO EINTR EAGAIN "
    "EBADF EFAULT EINVAL ENOTSOCK EOPNOTSUPP",
    "bind": "EACCES EADDRINUSE EADDRNOTAVAIL ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EROFS ENOSPC "
    "EBADF EFAULT EINVAL ENOTSOCK",
    "connect": "EACCES EPERM EAGAIN ECONNREFUSED ENOMEM ENOBUFS EINTR ETIMEDOUT EPROTOTYPE ENOENT EADDRINUSE "
    "EBADF EFAULT EISCONN ENOTSOCK",
    "listen": "EADDRINUSE EBADF ENOTSOCK EOPNOTSUPP",
    "socket": "EMFILE ENFILE ENOBUFS ENOMEM EACCES EAFNOSUPPORT EPROTONOSUPPORT EINVAL",
    "socketpair": "EMFILE ENFILE ENOBUFS ENOMEM EAFNOSUPPORT EOPNOTSUPP EPROTONOSUPPORT EFAULT",
    "shutdown": "ENOTCONN EBADF EINVAL ENOTSOCK",
    "setsockopt": "ENOMEM ENOBUFS EPERM EBADF EFAULT EINVAL ENOPROTOOPT ENOTSOCK",
    "getsockopt": "ENOBUFS ENOMEM EMFILE ESRCH ENODATA EBADF EFAULT EINVAL ENOPROTOOPT ENOTSOCK",
    "getsockname": "ENOBUFS EBADF EFAULT EINVAL ENOTSOCK",
    "getpeername": "ENOBUFS ENOTCONN EBADF EFAULT EINVAL ENOTSOCK",
    "sendmsg": "EAGAIN ENOBUFS ENOMEM ECONNRESET EPIPE ETOOMANYREFS EINTR EMSGSIZE EACCES ENOTCONN "
    "EBADF EFAULT EINVAL EISCONN ENOTSOCK EOPNOTSUPP",
    "recvmsg": "EAGAIN ENOMEM EINTR ECONNREFUSED ENOTCONN EBADF EFAULT EINVAL ENOTSOCK",
    "send": "EAGAIN ENOBUFS ENOMEM ECONNRESET EPIPE EINTR EMSGSIZE ENOTCONN "
    "EBADF EFAULT EINVAL ENOTSOCK EOPNOTSUPP",
    "recv": "EAGAIN ENOMEM EINTR ECONNREFUSED ENOTCONN EBADF EFAULT EINVAL ENOTSOCK",
    "pwrite": "ENOSPC EDQUOT EFBIG EIO EINTR EPERM EAGAIN EBADF EFAULT EINVAL ENXIO EOVERFLOW ESPIPE",
    "preadv": "EIO EINTR EAGAIN EISDIR ENOSYS EOPNOTSUPP EBADF EFAULT EINVAL ENXIO EOVERFLOW ESPIPE",
    "lseek": "ENXIO EOVERFLOW ESPIPE EBADF EINVAL",
    "poll": "EINTR ENOMEM EFAULT EINVAL",
    "ppoll": "EINTR ENOMEM EFAULT EINVAL",
    "epoll_create1": "EMFILE ENFILE ENOMEM EINVAL",
    "epoll_ctl": "ENOMEM ENOSPC EEXIST ENOENT ELOOP EPERM EBADF EINVAL",
    "epoll_wait": "EINTR EBADF EFAULT EINVAL",
    "eventfd": "EMFILE ENFILE ENODEV ENOMEM EINVAL",
    "eventfd_read": "EAGAIN EINTR EINVAL",
    "eventfd_write": "EINTR EINVAL",  # EAGAIN says that there is enough in it to wake somebody
    "memfd_create": "EMFILE ENFILE ENOMEM EPERM EFAULT EINVAL ENOSYS",
    "ftruncate": "EFBIG EINTR EIO EPERM ETXTBSY EBADF EINVAL ENOSPC ENOMEM",
    "fcntl": "EACCES EAGAIN EBUSY EINTR ENOLCK EMFILE EPERM EBADF EFAULT EINVAL",
    "ioctl": "ENOTTY EMFILE ENOMEM EPERM ESRCH EBADF EFAULT EINVAL",
    "mmap": "ENOMEM EAGAIN ENFILE EPERM EACCES ENODEV ETXTBSY EOVERFLOW EBADF EINVAL",
    "munmap": "ENOMEM EINVAL",
    "mremap": "ENOMEM EAGAIN EFAULT EINVAL",
    "madvise": "ENOMEM EAGAIN EIO EPERM EACCES EBADF EINVAL",
    "open": "EMFILE ENFILE ENOMEM ENOSPC EDQUOT EROFS EACCES EPERM EINTR ELOOP ENAMETOOLONG ENOENT ENOTDIR "
    "EEXIST EISDIR ENODEV ENXIO EBUSY EOVERFLOW ETXTBSY EBADF EFAULT EINVAL",
    "link": "EACCES EDQUOT EEXIST EIO ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC ENOTDIR EPERM EROFS "
    "EXDEV EBADF EFAULT EINVAL",
    "rename": "EACCES EBUSY EDQUOT EEXIST EISDIR ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC ENOTDIR "
    "EPERM EROFS EXDEV EFAULT EINVAL",
    "renameat2": "EACCES EBUSY EDQUOT EEXIST ENOENT ENOMEM ENOSPC ENOSYS EOPNOTSUPP EPERM EROFS EXDEV EFAULT "
    "EINVAL",
    "unlink": "EACCES EBUSY EIO EISDIR ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EPERM EROFS "
    "EBADF EFAULT EINVAL",
    "mkdir": "EACCES EDQUOT EEXIST ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC ENOTDIR EPERM EROFS "
    "EBADF EFAULT EINVAL",
    "rmdir": "EACCES EBUSY ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR ENOTEMPTY EPERM EROFS EFAULT EINVAL",
    "chmod": "EACCES EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EPERM EROFS EBADF EFAULT EINVAL",
    "chown": "EACCES EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EPERM EROFS EBADF EFAULT EINVAL",
    "stat": "EACCES ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EOVERFLOW EBADF EFAULT EINVAL",
    "fstatfs": "EINTR EIO ENOMEM ENOSYS EOVERFLOW EBADF EFAULT",
    "readlink": "EACCES EIO ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EBADF EFAULT EINVAL",
    "flock": "EINTR ENOLCK EWOULDBLOCK EBADF EINVAL",
    "dup": "EMFILE ENFILE EINTR EBUSY EBADF EINVAL",
    "sched_getaffinity": "EPERM ESRCH EFAULT EINVAL",
    "waitid": "ECHILD EINTR ESRCH EBADF EINVAL",
    "capget": "EPERM ESRCH EFAULT EINVAL",
    "getrandom": "EAGAIN EINTR ENOSYS EFAULT EINVAL",
    "getrlimit": "EPERM ESRCH EFAULT EINVAL",
    "getresuid": "EFAULT",
    "getresgid": "EFAULT",
    "close": "EINTR EIO ENOSPC EDQUOT EBADF",
    "pthread_create": "EAGAIN EPERM EINVAL",
    "opendir": "EACCES EMFILE ENFILE ENOENT ENOMEM ENOTDIR EBADF",
    "readdir": "EBADF",
    "pidfd_open": "EMFILE ENFILE ENODEV ENOMEM ESRCH EINVAL",
    "pidfd_send_signal": "EPERM ESRCH EBADF EINVAL",
}


#: Errnos that say that we have made a mistake ourselves: to log that and to ask for a report is right then.
MISTAKES = (
    "EBADF", "EFAULT", "EINVAL", "ENOTSOCK", "ENOTTY", "EOPNOTSUPP", "ENOPROTOOPT", "EISCONN", "EEXIST",
    "ENOENT", "ELOOP", "EPERM",
)  # fmt: skip

#: What cannot be held against the library, by the call, or by the call and its error: names or descriptors
#: that are left, lines of the log.
EXCUSED = {
    # Of what we open nothing can be flushed, so none ever fails.
    "close": ("descriptors", "names", "not settled", "logged", "nobody has the name"),
    # CPython asks it of each number that it makes a socket of.  Of one that accept() or socketpair() has just
    # returned it passes over all errors but these two, on which it loses the number: the other end hears no
    # hang-up.  The kernel can say neither of a socket that nobody else knows, so that is not worked around.
    # All other errors are held against the library, and what arrives (``adopt``) stays its sender's with any.
    "getsockname EBADF": ("descriptors", "it hangs, but for its time"),
    "getsockname ENOTSOCK": ("descriptors", "it hangs, but for its time"),
    "getrandom ENOSYS": ("descriptors",),  # CPython opens /dev/urandom then, once for good
    "ioctl": ("logged",),  # what it may say is another thing for each request
    "munmap": ("descriptors",),
    "open": ("names", "not settled"),  # who may not remove a name leaves it
    "unlink": ("names", "not settled"),
    "stat": ("names", "not settled"),  # what cannot be looked at may be another's
    "flock": ("names", "not settled"),  # nor is anything removed while others may be at work
    "rmdir": ("names", "not settled"),
    "rename": ("names", "not settled"),
}


@attrs.frozen
class Case:
    """One call that fails."""

    scenario: str
    side: str
    call: str
    error: str
    nth: int

    def __str__(self) -> str:
        return f"{self.scenario}/{self.side}: {self.call} #{self.nth} fails with {self.error}"


@attrs.frozen
class Outcome:
    """What came of a scenario: the name of the error ("" for none), and whether the call may have run."""

    error: str
    text: str
    may_have_run: bool
    allowed: bool
    right: bool


# -- the library -----------------------------------------------------------------------------


def build(folder: Path, source: Path = SOURCE) -> Path | str:
    """Compile the library, or another, into a folder; return where it is, or why it cannot be had."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return "no C compiler to make the library with that makes system calls fail"
    if platform.machine() not in MACHINES or sys.maxsize < 2**32:
        return f"system calls are not made to fail on {platform.machine()}"
    target = folder / f"{source.stem}.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", target, source, "-ldl"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"the library that makes system calls fail cannot be compiled: {made.stderr[:500]}"
    return target


def preloading(library: Path) -> dict[str, str]:
    """The environment in which Python starts with the library before libc."""
    present = os.environ.get("LD_PRELOAD")  # a sanitizer wants to be first
    return {"LD_PRELOAD": f"{present}:{library}" if present else str(library)}


@contextlib.contextmanager
def library() -> Iterator[Path]:
    """Have the library in a folder for a while, where it can be had."""
    with tempfile.TemporaryDirectory(prefix="dp-faults-") as folder:
        made = build(Path(folder))
        assert isinstance(made, Path), made
        yield made


_Teller = ctypes.CFUNCTYPE(None)


class _Library:
    """The library in this process."""

    def __init__(self) -> None:
        self._c = ctypes.CDLL(None)
        self._c.fault_name.restype = ctypes.c_char_p
        self._c.fault_count.restype = ctypes.c_long
        self._c.fault_slow.argtypes = [ctypes.c_long]
        self._c.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        self._told: list[str] = []
        self._teller = _Teller(self._tell)
        self._nobody = _Teller()

    def arm(self, call: str, error: int, first: int, last: int) -> None:
        self._told.clear()
        # In an allocator no Python can run.
        self._c.fault_tell(self._nobody if call in ("mmap", "munmap", "madvise") else self._teller)
        at = self._c.fault_arm(call.encode(), error, first, last)
        assert (at >= 0) == bool(call), f"faults.c does not know {call!r}"

    def dawdle(self, seed: int) -> None:
        """Fail nothing, and have all calls be slow, by a dice, until ``disarm``."""
        self._c.fault_slow(seed)
        self.arm("", 0, 1, 0)

    def knows(self, call: str) -> bool:
        """Tell whether a call can be made to fail."""
        known: int = self._c.fault_arm(call.encode(), 0, 0, 0)
        self._c.fault_disarm()
        return known >= 0

    def disarm(self) -> tuple[int, str]:
        return self._c.fault_disarm(), "".join(self._told)

    def spare(self) -> None:
        """Leave the calling thread out: it is the test's."""
        self._c.fault_spare(1)

    def counts(self) -> dict[str, int]:
        found = {}
        for at in range(200):
            name = self._c.fault_name(at)
            if name is None:
                break
            if count := self._c.fault_count(at):
                found[name.decode()] = count
        return found

    def _tell(self) -> None:
        self._told.append("".join(traceback.format_stack(sys._getframe(1), limit=8)))


def _begin() -> None:
    here.library = _Library()
    here.library.spare()
    here.ran = []
    here.played = threading.local()
    faulthandler.enable()


def arm(call: str = "", error: str = "EIO", first: int = 1, last: int = 0) -> None:
    """Count from now on; let calls first to last of one name fail."""
    here.library.arm(call, getattr(errno, error), first, last)


def dawdle(seed: int) -> None:
    """Have all calls be slow from now on."""
    here.library.dawdle(seed)


def disarm() -> tuple[int, str]:
    """Stop it; return how often it failed, and where."""
    answer: tuple[int, str] = here.library.disarm()
    return answer


def counts() -> dict[str, int]:
    """How often each call was made since ``arm``."""
    answer: dict[str, int] = here.library.counts()
    return answer


# -- the server ------------------------------------------------------------------------------


def serve(folder: str) -> None:
    """Open the doors of all scenarios."""
    from doorpool import Server, current_call, take

    _begin()
    server = here.server = Server(max_threads=4, close_timeout=2.0)

    def note(number: int) -> int:
        here.ran.append(number)
        return number

    def echo(number: int, value: Any = None) -> Any:
        return note(number), value

    def plain(number: int) -> int:
        return note(number)

    def file(number: int, given: Any) -> Any:
        note(number)
        with given:
            text = given.read()
        return text, take(open(f"{folder}/text"))

    def stream(number: int, items: Any) -> Iterator[int]:
        note(number)
        yield from items

    def back(number: int, callback: Any) -> Any:
        note(number)
        with callback:
            return callback(number)

    def slow(number: int) -> int:
        note(number)
        wait_until(lambda: current_call().cancelled, timeout=HANG)
        return number

    (Path(folder) / "text").write_text("some text")
    (Path(folder) / "way").symlink_to(".")
    for procedure in (echo, file, stream, back, slow):
        server.attach(procedure, f"{folder}/{procedure.__name__}")
    server.attach(plain, f"{folder}/plain", codec="data", mode=0o666)
    server.start()


def serve_and_be_killed(folder: str) -> None:
    """Have a name, which stays behind."""
    from doorpool import Server

    here.server = Server()
    here.server.attach(len, f"{folder}/killed")
    here.server.start()


def leave_behind(folder: str) -> None:
    """Have the killed server's name be where a play expects it, beside the room of one killed as it began."""
    clear_away(folder)
    room = f"{folder}/{ROOM}"
    os.mkdir(room, 0o700)
    os.link(f"{folder}/killed", f"{room}/life")
    with contextlib.suppress(FileExistsError):  # an earlier play has left one
        os.link(f"{folder}/killed", f"{folder}/life")


def clear_away(folder: str) -> list[str]:
    """Remove what is there still of what was left behind, and as it was; return what that is."""
    left = []
    for name in (f"{ROOM}/life", "life"):
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(f"{folder}/{name}"), os.lstat(f"{folder}/killed")):
                os.unlink(f"{folder}/{name}")
                left.append(name)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(f"{folder}/{ROOM}")
        left.append(ROOM)
    return left


def _life(folder: str) -> None:
    """It begins, has two names, loses one, closes."""
    from doorpool import Server

    with Server(max_threads=2, close_timeout=2.0) as server:
        endpoint = server.attach(lambda number: number, f"{folder}/life")
        server.attach(endpoint, f"{folder}/life-too")
        os.close(endpoint.open().take())
        endpoint.detach(f"{folder}/life-too")
        endpoint.revoke()


def _stale(folder: str) -> None:
    """The name is that of a killed server, then a living one's, which is refused, and then given up."""
    from doorpool import Server

    path = f"{folder}/way/life"
    with (
        Server(max_threads=2, close_timeout=2.0) as first,
        Server(max_threads=2, close_timeout=2.0) as second,
    ):
        first.attach(lambda number: number, path, group=os.getegid())
        try:
            second.attach(lambda number: number, path)
        except FileExistsError:
            _replace(second, path)
        else:
            raise AssertionError("it took the name of a living server")


def _replace(server: Any, path: str) -> None:
    """Take a name over from a living server, which keeps it where that fails."""
    from doorpool import Proxy

    try:
        server.attach(lambda number: number, path, replace=True)
    except Exception as error:
        try:
            Proxy(path, open_timeout=PATIENCE).close()
        except Exception:
            raise AssertionError(f"nobody has the name: {error}") from error
        raise


def _older(folder: str) -> None:
    """The same where names cannot be swapped in one step, and the kernel knows no SO_PEERPIDFD."""
    from doorpool import _names

    swap, ask = _names._rename_exchange, _names.peer_pidfd
    _names._rename_exchange, _names.peer_pidfd = lambda *_: errno.EINVAL, lambda _: -1
    try:
        _stale(folder)
    finally:
        _names._rename_exchange, _names.peer_pidfd = swap, ask


def live(life: str, folder: str, number: int) -> Outcome:
    """Play the life of a server, but for the call."""

    def lived() -> int:
        LIVES[life](folder)
        return number

    return _outcome(_in_thread(lived), number)


def server_state() -> dict[str, Any]:
    """What there is of the server."""
    from doorpool import _keeper

    load = here.server.statistics()
    return {
        "channels": load.channels, "running": load.running, "segments": load.segments,
        "dead threads": max(0, 2 - load.threads) + (not _keeper.keeper()._thread.is_alive()),
    }  # fmt: skip


def runs(number: int) -> int:
    """How often a call ran."""
    count: int = here.ran.count(number)
    return count


def forget_runs() -> None:
    """Begin a new journal."""
    here.ran.clear()


# -- the client ------------------------------------------------------------------------------


def prepare(folder: str) -> None:
    """Become a client."""
    _begin()
    here.folder = folder
    here.worker = ThreadPoolExecutor(1)
    here.kept = {}


def _small(number: int) -> Any:
    """A page."""
    from doorpool import Proxy

    with Proxy(f"{here.folder}/echo", open_timeout=PATIENCE) as door:
        return door(number)[0]


def _kept(number: int) -> Any:
    """A proxy that lasts, whatever happens."""
    from doorpool import Proxy

    if "door" not in here.kept:
        here.kept["door"] = Proxy(f"{here.folder}/echo", open_timeout=PATIENCE)
    return here.kept["door"](number)[0]


def _large(number: int) -> Any:
    """Many pieces, by the socket: an array of the standard library goes inside the pickle."""
    from doorpool import Proxy

    sent = array.array("q", range(50_000))
    with Proxy(f"{here.folder}/echo", open_timeout=PATIENCE) as door:
        answer, came = door(number, sent)
        return answer if came == sent else "other items"


def _segments(number: int) -> Any:
    """Two segments there, one of them lent, and two back, of which one finds no room and is copied out."""
    from doorpool import Proxy, _keeper, _shelf, buffer

    _keeper.keeper()  # which a client has when a segment comes back early, and then for good
    room, _shelf.BYTES_MAPPED = _shelf.BYTES_MAPPED, 512 << 10
    try:
        with Proxy(f"{here.folder}/echo", open_timeout=PATIENCE) as door:
            sent = memoryview(bytearray(b"sent" * (64 << 10))), buffer(_shelf.LARGE)
            sent[1][:] = b"lent" * (_shelf.LARGE // 4)
            answer, came = door(number, sent)
            return answer if came == sent else "other bytes"
    finally:
        _shelf.BYTES_MAPPED = room


def _socket(number: int) -> Any:
    """No page: plain data."""
    from doorpool import Proxy

    with Proxy(f"{here.folder}/plain", open_timeout=PATIENCE) as door:
        return door(number)


def _file(number: int) -> Any:
    """A descriptor there and one back."""
    from doorpool import Proxy

    with Proxy(f"{here.folder}/file", open_timeout=PATIENCE) as door:
        with open(f"{here.folder}/text") as given:
            text, came = door(number, given)
        with came:
            return number if text == came.read() == "some text" else text


def _stream(number: int) -> Any:
    """A generator there and one back."""
    from doorpool import Proxy

    with Proxy(f"{here.folder}/stream", open_timeout=PATIENCE) as door:
        with door(number, (n for n in range(300))) as items:
            return number if list(items) == list(range(300)) else "other items"


def _back(number: int) -> Any:
    """A callback."""
    from doorpool import Endpoint, Proxy

    with Proxy(f"{here.folder}/back", open_timeout=PATIENCE) as door:
        with Endpoint(lambda value: value) as endpoint:
            return door(number, endpoint)


def _given_up(number: int) -> Any:
    """A call whose time runs out."""
    from doorpool import CallTimeoutError, Proxy

    with Proxy(f"{here.folder}/slow", open_timeout=PATIENCE) as door:
        for seconds in (0.02, 0.2, 2.0):  # on a busy machine it may be over before the call was taken
            try:
                return door.options(timeout=seconds)(number)
            except CallTimeoutError as error:
                if error.may_have_run:
                    return number
                late = error
        raise late


SCENARIOS: dict[str, Callable[[int], Any]] = {
    "small": _small,
    "kept": _kept,
    "large": _large,
    "segments": _segments,
    "socket": _socket,
    "file": _file,
    "stream": _stream,
    "back": _back,
    "given up": _given_up,
}
#: What each scenario does in the same way, to open a door; the short selection has it in the first one alone,
#: and where it is done for segments too.
OPENING = (
    "accept4", "connect", "socket", "socketpair", "setsockopt", "getsockopt", "getsockname", "stat", "open",
    "fstatfs", "mmap", "madvise", "memfd_create", "chmod", "ftruncate", "fcntl", "close", "sched_getaffinity",
    "recv", "shutdown",
)  # fmt: skip

#: Played by the server alone.
LIVES: dict[str, Callable[[str], None]] = {
    "life": _life,
    "life over a stale name": _stale,
    "life on an older system": _older,
}
ROOM = ".doorpool-0123456789abcdef"  # of a server that was killed as it made a name

#: What no scenario does, for it is a way out that the kernel has to ask for, or the work of another day.
ELSEWHERE = ("getpeername", "dup", "waitid", "capget", "pidfd_send_signal")


def play(scenario: str, number: int) -> Outcome:
    """Play a scenario in the client's worker, and tell what came of it."""
    return _outcome(here.worker.submit(SCENARIOS[scenario], number).result, number)


def _in_thread(function: Callable[[], Any]) -> Callable[[float], Any]:
    with ThreadPoolExecutor(1) as worker:
        return worker.submit(function).result


def _outcome(result: Callable[[float], Any], number: int) -> Outcome:
    from doorpool import DoorError

    try:
        value = result(HANG)
    except TooLate as error:
        if not isinstance(error, DoorError) and error.errno is None:  # it is not connect()'s ETIMEDOUT
            faulthandler.dump_traceback(all_threads=True)
            return Outcome("Hang", "it hangs", True, False, False)
        return _failure(error)
    except BaseException as error:
        return _failure(error)
    return Outcome("", repr(value)[:100], True, True, value == number)


def _failure(error: BaseException) -> Outcome:
    from doorpool import DoorError

    # An error of the system does not say, but for a shortage of memory: then nothing was sent.
    may = error.may_have_run if isinstance(error, DoorError) else not _says_no(error)
    allowed = isinstance(error, DoorError | OSError | MemoryError) or (
        isinstance(error, RuntimeError) and "start new thread" in str(error)
    )
    # What a procedure was told itself, in the words of the system.
    trace = "".join(traceback.format_exception(error))
    if "RemoteTraceback" in trace:
        may = True
    return Outcome(type(error).__name__, f"{error}" if allowed else trace, may, allowed, True)


def _says_no(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.ENOBUFS, errno.ENFILE)


def together(scenario: str, numbers: list[int]) -> list[Outcome]:
    """Play a scenario in several threads at once."""
    with ThreadPoolExecutor(len(numbers)) as workers:
        started = [workers.submit(SCENARIOS[scenario], number) for number in numbers]
        return [_outcome(one.result, number) for one, number in zip(started, numbers, strict=True)]


# -- both ------------------------------------------------------------------------------------

_LASTING = ("MainThread", "doorpool-keeper", "doorpool-default", "doorpool-streams", "ThreadPoolExecutor")


def holdings(folder: str) -> dict[str, Counter[str]]:
    """What this process holds, as far as it may not grow."""
    threads = [it.name for it in threading.enumerate() if not it.name.startswith(_LASTING)]
    if hasattr(here, "server"):  # its own come and go
        threads = [name for name in threads if not name.startswith("doorpool-")]
    return {
        "descriptors": Counter(_descriptors()),
        "threads": Counter(threads),
        "names": Counter(str(it.relative_to(folder)) for it in Path(folder).rglob("*")),
        "kept": Counter(door=len(getattr(here, "kept", ()))),
    }


def _descriptors() -> Iterator[str]:
    """The kinds of those that can be read: that of the listing cannot."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{name}").split(":")[0]


def collect() -> None:
    """Collect garbage."""
    gc.collect()


def complaints() -> list[str]:
    """Lines of the log that no fault may cause."""
    from doorpool import _keeper

    if _keeper._keeper is not None:
        keeper = _keeper._keeper
        wait_until(lambda: not keeper._lines, "all lines are written")
    lines = [
        line
        for line in here.log
        if ("please report it" in line or "failed to answer" in line)
        and "more such in" not in line  # of earlier cases
    ]
    here.log.clear()
    return lines


# -- the director ----------------------------------------------------------------------------


class Stage:
    """A server and a client, to whom case after case happens; in a process that has the library preloaded."""

    def __init__(self) -> None:
        self._number = 0
        self.folder = tempfile.mkdtemp(prefix="dp-faults-")
        self._raise()

    def _raise(self) -> None:
        killed = Actor()
        killed(serve_and_be_killed, self.folder)
        killed.close()
        self.server, self.client = Actor(), Actor()
        self.server(serve, self.folder)
        self.client(prepare, self.folder)

    def close(self) -> None:
        self.client.close()
        self.server.close()
        shutil.rmtree(self.folder)

    def restart(self) -> None:
        """Have new actors, those before being in no state to go on."""
        self.close()
        os.mkdir(self.folder)
        self._raise()

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _play(self, scenario: str, number: int) -> Outcome:
        if scenario in LIVES:
            if scenario != "life":
                self.server(leave_behind, self.folder)
            return self.server(live, scenario, self.folder, number)
        return self.client(play, scenario, number)

    def _side(self, side: str) -> Actor:
        return self.server if side == "server" else self.client

    def warm(self, scenario: str) -> None:
        """Play it until nothing new is needed for it."""
        for _ in range(3):
            outcome = self._play(scenario, self._next())
            assert outcome.right, outcome
            assert not outcome.error, outcome
            assert not self.server(clear_away, self.folder)
        self.before = self._at_rest()

    def _at_rest(self) -> list[dict[str, Counter[str]]]:
        """What they hold when nothing is being closed any more."""
        last = self._holdings()
        while True:
            time.sleep(0.05)
            now = self._holdings()
            if now == last and not self.server(server_state)["channels"] - now[1]["kept"]["door"]:
                return now
            last = now

    def measure(self, scenario: str, side: str) -> dict[str, int]:
        """How often which call is made."""
        actor = self._side(side)
        actor(arm)
        outcome = self._play(scenario, self._next())
        self._unsettled()
        actor(disarm)
        assert outcome.right, outcome
        found: dict[str, int] = actor(counts)
        return found

    def _holdings(self) -> list[dict[str, Counter[str]]]:
        return [actor(holdings, self.folder) for actor in (self.server, self.client)]

    def _grown(self) -> list[str]:
        return [
            f"{side}: {kind}: {dict(more)}"
            for side, was, now in zip(("server", "client"), self.before, self._holdings(), strict=True)
            for kind in was
            if (more := now[kind] - was[kind])
        ]

    def _unsettled(self, patience: float = SETTLING) -> list[str]:
        """Wait until nothing runs and all is as it was; return what is not."""
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            state, grown = self.server(server_state), self._grown()
            if not state["running"] and not grown:
                return []
            if waited >= patience:
                return [*grown, f"not settled: {state}"]
            if waited > 0.1:  # what an error's traceback holds may be a part of a cycle
                for actor in (self.server, self.client):
                    actor(collect)
            time.sleep(0.002 if waited < 0.1 else 0.05)

    def run(self, case: Case, length: int = 1) -> tuple[Outcome, list[str], int]:
        """Have a case happen; return what came of it, what is wrong with that, and how often it failed."""
        wrong: list[str] = []
        number = self._next()
        actor = self._side(case.side)
        try:
            actor(arm, case.call, case.error, case.nth, case.nth + length - 1)
            outcome = self._play(case.scenario, number)
            if outcome.error == "Hang":
                wrong.append("it hangs")
            fired, where = actor(disarm)
            self.server(clear_away, self.folder)
            wrong += self._judge(outcome, case, number)
            wrong += self._afterwards(case.scenario)
            if wrong and not (wrong := _held_against(case, wrong)):
                self.before = self._at_rest()  # with what was lost
        except ChildFailed as error:
            self.restart()
            self.warm(case.scenario)
            return Outcome("ChildFailed", str(error), True, False, False), [f"an actor failed: {error}"], 1
        if wrong:
            wrong.append(f"where it failed:\n{where}")
            self.restart()
            self.warm(case.scenario)
        return outcome, wrong, fired

    def _judge(self, outcome: Outcome, case: Case, number: int) -> list[str]:
        wrong = []
        if not outcome.allowed:
            wrong.append(f"not an error of the library: {outcome.error}: {outcome.text}")
        if outcome.error == "CallTimeoutError" and case.scenario != "given up":
            wrong.append(f"it hangs, but for its time: {outcome.text}")
        if not outcome.right:
            wrong.append(f"a wrong answer: {outcome.text}")
        wrong += self._unsettled(0.2 if _excused(case) else SETTLING)
        if case.scenario not in LIVES:
            count = self.server(runs, number)
            least = outcome.error == "" and case.scenario != "given up"  # which may have run, and that is all
            if not least <= count <= outcome.may_have_run:
                wrong.append(f"ran {count} times: {outcome}")
        return wrong

    def _afterwards(self, scenario: str) -> list[str]:
        wrong = []
        again = self._play(scenario, self._next())
        if again.error or not again.right:
            wrong.append(f"afterwards: {again}")
        if left := self.server(clear_away, self.folder):
            wrong.append(f"afterwards: left behind once more: {left}")
        if scenario in LIVES and (names := self._holdings()[0]["names"] - self.before[0]["names"]):
            wrong.append(f"afterwards there are still {dict(names)}")
        if (state := self.server(server_state))["dead threads"]:
            wrong.append(f"dead threads: {state}")
        for actor in (self.server, self.client):
            wrong += [f"logged: {line}" for line in actor(complaints)]
        self.server(forget_runs)
        return wrong


def _excused(case: Case) -> tuple[str, ...]:
    return EXCUSED.get(case.call) or EXCUSED.get(f"{case.call} {case.error}", ())


def _held_against(case: Case, wrong: list[str]) -> list[str]:
    """Leave out what is excused."""
    excused = _excused(case)
    if case.error in MISTAKES:
        excused += ("logged",)
    left = [it for it in wrong if not any(f"{word}:" in it or it.startswith(word) for word in excused)]
    # That it has not settled says no more than what has grown.
    return [] if all(it.startswith("not settled") for it in left) and "descriptors" in excused else left


def cases(scenario: str, side: str, numbers: dict[str, int], *, short: bool) -> Iterator[Case]:
    """The cases of a scenario: all, or of most calls one, another in each scenario."""
    for call in ERRORS:
        if not (count := numbers.get(call, 0)):
            continue
        errors = ERRORS[call].split()
        if short and call in OPENING and scenario not in ("small", "segments", *LIVES):
            continue
        if short:
            dice = zlib.crc32(f"{scenario}/{side}/{call}".encode())
            yield Case(scenario, side, call, errors[dice // 97 % len(errors)], 1 + dice % count)
            continue
        for error in errors:
            for nth in range(1, count + 1):
                yield Case(scenario, side, call, error, nth)


def never_made() -> list[str]:
    """Play all scenarios, with no fault; return what of the table was not called though it should be."""
    stage = Stage()
    try:
        for actor in (stage.server, stage.client):
            actor(arm)
        for scenario in (*SCENARIOS, *LIVES):
            outcome = stage._play(scenario, stage._next())
            assert outcome.right, outcome
        made = {call for actor in (stage.server, stage.client) for call in actor(counts)}
    finally:
        stage.close()
    return [call for call in ERRORS if call not in made and call not in ELSEWHERE]


def slowly(seeds: int) -> dict[str, Any]:
    """
    Play all scenarios with every call of one side being slow, and then of both.

    Returns:
        ``plays``: how many; ``wrong``: what is.
    """
    stage, wrong, plays = Stage(), [], 0
    # Whose time is short may be given up before anything is sent.
    scenarios = [name for name in (*SCENARIOS, *LIVES) if name != "given up"]
    try:
        for scenario in scenarios:
            stage._play(scenario, stage._next())
        stage.before = stage._at_rest()
        for seed in range(1, seeds + 1):
            for slow in ([stage.server], [stage.client], [stage.server, stage.client]):
                for actor in slow:
                    actor(dawdle, seed)
                for scenario in scenarios:
                    number = stage._next()
                    outcome, count = stage._play(scenario, number), stage.server(runs, number)
                    plays += 1
                    if outcome.error or not outcome.right or count != (scenario not in LIVES):
                        wrong.append(f"{scenario}, seed {seed}: ran {count} times: {outcome}")
                for actor in slow:
                    actor(disarm)
        wrong += stage._unsettled()
        wrong += [f"logged: {line}" for actor in (stage.server, stage.client) for line in actor(complaints)]
    finally:
        stage.close()
    return {"plays": plays, "wrong": wrong}


def sweep(scenario: str, side: str, *, short: bool, only: str = "") -> dict[str, Any]:
    """
    Run the cases of a scenario, in this process, which has the library preloaded.

    Returns:
        ``cases``: how many; ``outcomes``: how often each; ``wrong``: what is; ``calls``: that were made.
    """
    stage = Stage()
    try:
        stage.warm(scenario)
        numbers = stage.measure(scenario, side)
        outcomes: dict[str, int] = {}
        wrong: list[str] = []
        count = 0
        for case in cases(scenario, side, numbers, short=short):
            if only and only not in str(case):
                continue
            outcome, found, fired = stage.run(case)
            count += 1
            name = (outcome.error or "success") if fired else "not reached"
            outcomes[name] = outcomes.get(name, 0) + 1
            if found:
                wrong.append(f"{case}: {outcome}\n  " + "\n  ".join(found))
                print(wrong[-1], flush=True)
    finally:
        stage.close()
    return {"cases": count, "outcomes": outcomes, "wrong": wrong, "calls": numbers}


if __name__ == "__main__":  # LD_PRELOAD=faults.so python -m support.faults SCENARIO SIDE [short|long] [only]
    began = time.monotonic()
    report = sweep(
        sys.argv[1], sys.argv[2], short=sys.argv[3] == "short", only=sys.argv[4] if len(sys.argv) > 4 else ""
    )
    print(report["outcomes"], report["calls"], len(report["wrong"]), "wrong of", report["cases"])
    print(f"{time.monotonic() - began:.1f} s")
