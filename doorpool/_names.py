"""
Doors in the file system: how a name appears, is taken over, goes away, and is reached.

The name of a door is a listening ``SOCK_SEQPACKET`` socket.  Four promises are kept here:

1. *A name is whole from its first moment.*  It never exists with another mode than the one
   asked for, nor without somebody who listens.
2. *One winner.*  Of any number of servers that want a name, one gets it, and the others
   learn who has it.  A name whose server was killed is free; a living one is not.
3. *Nothing of anybody else's is touched*: removed, replaced, followed or given another mode.
4. *Who connects reaches what it looked at*, and no symbolic link of a stranger leads it to
   another door.

**A name appears.**  Every step up to the last happens in a *room*: a directory of mode 0700
with a random name beside the target, ``.doorpool-…``, held by its descriptor.  Nobody else
can enter it, so nobody can put a symbolic link under our ``chmod`` (which turned a victim's
0600 file into a 0666 one when it was done in a shared directory: tried), and one way serves
both private directories and ``/tmp``.  In it: ``fchmod`` to the owner's bits alone, ``bind``,
the group and then the exact mode through an ``O_PATH`` descriptor (the ``umask`` has masked
the first: 0666 became 0644), ``listen``, and ``link`` to the name.  ``link`` never replaces,
so it decides who has a new name, and needs no lock.  The ``umask`` itself belongs to the
process and is never set.

**A name is taken over** in the room as well: ``RENAME_EXCHANGE`` swaps the new socket with
what is at the name, and what came out is compared, by device and inode, with what was found
stale (which is held open since, so that the number stays its own).  Only then is it removed;
else it is put back.  A plain rename would destroy whatever had come to the name in between,
a stranger's file included if we are root.

All this, and removing, happens under ``flock`` on the directory itself.  Without it two
servers may both find X stale:

    1. A and B both find X stale.
    2. A swaps its socket in and removes X.
    3. B swaps its own in, and out comes A, alive.

B could put A back, but for a moment A's clients would have met B (37 of 400 races had two
winners with plain renames and no lock; none with it).  The lock leaves no file behind and
goes with its holder.  It is advisory, and in a directory that others can read they can hold
it for ever: it is waited for two seconds, and then the error says so.  It is held through
a descriptor opened for the purpose, so that it also holds between threads.

**A name goes away** if what is there is still ours, by device and inode, looked at *while our
listener is open*: ext4 gives the inode number of a removed socket out again at once.

**Stale** means: a socket, of our own effective uid, that refuses connections.  It is asked
through an ``O_PATH|O_NOFOLLOW`` descriptor, never blocking.  "No room in the queue" is an
answer of the living.

**Who is killed in the middle** leaves a room behind, never a trap.  A living owner holds a
``flock`` on its room, so the next ``publish`` in the directory can tell and sweeps it out.

**Directories.**  Whoever may write a directory that is not sticky can swap the names in it;
so can its owner.  The first is refused to servers, and so is the second unless the owner is
us or root.  "May write" looks at the group's bits too, except that a group which is only
another name for one user (the umask of 002 that many distributions give makes all
directories writable by it) is that user.  Symbolic links *on the way* to the directory are
followed where none but us and root could have put them; the kernel's own rule for this
(``protected_symlinks``) is often switched off.

**Long paths.**  A socket address holds 107 bytes.  Each part of a path is opened from the
one before, and sockets are bound and reached through ``/proc/self/fd``, so that the length
does not matter and nothing can be swapped between looking and doing.

Roads not taken: abstract names (they have no permissions at all), ``chmod`` after ``listen``
(CVE-2023-45145), a lock file (it stays behind, and beside a shared name anybody can make it
first), ``realpath`` (it tells what was, not what is), ``getpeername`` (it shows the name in
the room).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import grp
import os
import pwd
import secrets
import select
import socket
import stat
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import attrs

from doorpool import _sockets
from doorpool._credentials import credentials_of, peer_pidfd, peer_ucred, unpack_ids
from doorpool._errors import AccessError, BrokenDoorError, CallTimeoutError, DoorError, NotADoorError
from doorpool._sockets import close_number, door_socket, own_number, refuse_rights, set_patience

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Identity = tuple[int, int]  # st_dev, st_ino

#: How many callers may wait to be accepted.  Any more wait in ``connect``, up to their
#: deadline, so that a larger number would serve only those who want to use up memory.
BACKLOG = 128

GREETING_TIMEOUT = 0.5  # seconds for somebody to greet in the place of a dead process
LOCK_TIMEOUT = 2.0  # seconds; what is done under the lock takes well under a millisecond
_GRUDGE = 10.0  # seconds for which nobody waits again for a lock that was waited for in vain

_ROOM_PREFIX = ".doorpool-"

#: The longest name that is bound in the room as itself, for the sake of those who read
#: ``ss -xl``; a longer one does not fit beside "/proc/self/fd/1234567890/" in an address.
_LONGEST_INNER_NAME = 80

_NAME_MAX = 255  # bytes; linux/limits.h
_MOST_LINKS = 40  # as many symbolic links as the kernel follows (MAXSYMLINKS)

_NO_TIMEOUT = bytes(struct.calcsize("@ll"))  # a struct timeval

#: How often a name may change under our eyes, or a room be swept away, before we give up.
_ATTEMPTS = 100

_DIRECTORY = os.O_PATH | os.O_DIRECTORY
_NODE = os.O_PATH | os.O_NOFOLLOW


# -- the server's side ---------------------------------------------------------------


class Name:
    """
    One name of a door, attached; owns the listening socket.

    Belongs to the process that published it: in a forked child the listener is closed and
    ``remove`` does nothing, so that a child that ends does not take its parent's name along.

    Attributes:
        path: the absolute path, as the user gave it.
        mode: the exact mode of the socket file.
        listener: the listening socket, non-blocking.
    """

    __slots__ = ("_generation", "_identity", "_place", "listener", "mode", "path")

    def __init__(self, place: _Place, listener: socket.socket, mode: int, identity: Identity) -> None:
        self.path = place.path
        self.mode = mode
        self.listener = listener
        self._place = place
        self._identity = identity
        self._generation = _sockets.generation

    @property
    def closed(self) -> bool:
        """Whether the listener is closed, here or by a fork."""
        return self.listener.fileno() < 0

    def is_ours(self) -> bool:
        """
        Tell whether the name still leads to this listener; False if that cannot be seen.

        False once closed: the number of a removed socket's inode may be another's by then.
        """
        with contextlib.suppress(OSError):
            return self._is_there()
        return False

    def _is_there(self) -> bool:
        if self.closed or self._generation != _sockets.here():
            return False
        try:
            status = self._place.look()
        except FileNotFoundError:
            return False
        return stat.S_ISSOCK(status.st_mode) and _identity(status) == self._identity

    def remove(self) -> bool:
        """
        Remove the name if it is still ours; tell whether it was.

        Connections already made, accepted or not, live on, and so does the listener: call
        this first and ``close`` afterwards.  A name that is gone, or another's, is left as
        it is.  Idempotent; waits at most ``LOCK_TIMEOUT`` for others at work in the directory.

        Raises:
            TimeoutError: somebody holds the lock on the directory.
            OSError: the directory may no longer be written.

        Modelled on: fdetach(3C)
        """
        with _explaining(self.path):
            if not self._is_there():  # then there is nothing to wait for
                return False
            with self._place.locked():
                return self._is_there() and self._place.unlink()

    def close(self) -> None:
        """Close the listener and let the directory go; the name stays.  Idempotent."""
        self.listener.close()
        self._place.close()

    def __enter__(self) -> Name:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Name {self.path!r} mode {self.mode:04o}{' closed' if self.closed else ''}>"

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if _ending() or not getattr(self, "listener", None) or self.closed:  # as in Channel
            return
        warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=1)
        self.close()


def publish(
    path: Path,
    *,
    mode: int = 0o600,
    group: str | int | None = None,
    replace: bool = False,
    backlog: int = BACKLOG,
    watch: Callable[[Name], Callable[[], None]] | None = None,
) -> Name:
    """
    Make a name and listen at it; the caller owns what is returned.

    The name of a server that is gone is taken over.  The mode is that of the socket file as
    ``ls -l`` shows it, whatever the umask; connecting takes *write* permission on Linux.
    Any thread; blocks only for others at work in the directory, at most ``LOCK_TIMEOUT``.

    Args:
        path: where.  A relative one is made absolute at once.
        mode: the permissions.
        group: name or number of the group that the file shall have.
        replace: take the name over from a live door of our own uid too.  Its clients stay
            with it; new ones come here.
        backlog: how many callers may wait to be accepted.
        watch: is given the name when all but the last step is done, so that nobody's name is lost if it
            fails; returns how to undo it.

    Raises:
        FileExistsError: a live door, a socket of another uid or kind, or something that is
            no socket is there; it was left alone.
        FileNotFoundError: the directory does not exist.
        PermissionError: the directory may be written by others, or not by us.
        TimeoutError: somebody holds the lock on the directory.
        LookupError: there is no such group.
        TypeError, ValueError: a path or a mode that is none.
        OSError: the file system refused; names the path and says what to do.

    Modelled on: fattach(3C)
    """
    told = absolute_path(path)
    mode = _checked_mode(mode)
    gid = -1 if group is None else _group_number(group)
    with _explaining(told), contextlib.ExitStack() as undo:
        place = _Place(told)
        undo.callback(place.close)
        place.check_for_server()
        _sweep(place)
        with _room(place) as room:
            listener = room.listen(mode, gid, backlog)
            undo.callback(listener.close)
            name = Name(place, listener, mode, room.ours)
            if watch is not None:
                undo.callback(watch(name))
            _take_name(place, room, replace=replace)
        undo.pop_all()
    return name


def _take_name(place: _Place, room: _Room, *, replace: bool) -> None:
    """
    Get the socket of the room to the name, or raise saying who has it.

    The first look is taken without the lock: those who come too late to a living door, the
    usual case, need not wait for it, nor can a stranger who holds it keep them from knowing.
    """
    if room.link_out():
        return
    with _occupant(place, replace=replace):
        pass
    with place.locked():
        for _ in range(_ATTEMPTS):
            if room.link_out():
                return
            with _occupant(place, replace=replace) as there:
                if there is not None and room.swap_out(there):
                    return
    raise OSError(errno.EEXIST, "others keep changing what is here; it was left alone, try again", place.path)


@contextlib.contextmanager
def _occupant(place: _Place, *, replace: bool) -> Iterator[Identity | None]:
    """
    Look who is at the name and may be replaced; None if nobody is there any more.

    Its inode is held meanwhile, or the number could be somebody else's when it is compared:
    a file made just after a stale socket was removed had it at once (ext4).

    Raises:
        FileExistsError: somebody is there who must be left alone; the message says who.
    """
    try:
        node = os.open(place.name, _NODE, dir_fd=place.descriptor)
    except FileNotFoundError:
        yield None
        return
    with _held(node):
        status = os.fstat(node)
        reason = _why_not_ours_to_replace(status) or _why_not_stale(node, status, replace=replace)
        if reason:
            raise OSError(errno.EEXIST, reason, place.path)
        yield _identity(status)


def _why_not_ours_to_replace(status: os.stat_result) -> str | None:
    if not stat.S_ISSOCK(status.st_mode):
        return f"{_kind(status.st_mode)} is here, not a door; it was left alone: choose another path"
    if status.st_uid != os.geteuid():
        return (
            f"a socket of uid {status.st_uid} is here, and this is uid {os.geteuid()}; "
            "it was left alone: choose another path"
        )
    return None


def _why_not_stale(node: int, status: os.stat_result, *, replace: bool) -> str | None:
    """Say why a socket of ours must be left alone; None if it is stale, or may be taken over."""
    number = _probe(node, status)
    if number == errno.ECONNREFUSED or (replace and number in (0, errno.EAGAIN)):
        return None
    if number == 0:
        return "a live door is here: close it first, or take its name over with replace=True"
    if number == errno.EAGAIN:
        return (
            "a live door is here, its queue of callers full: close it first, "
            "or take its name over with replace=True"
        )
    if number == errno.EPROTOTYPE:
        return "a live socket of another kind is here, not a door; it was left alone: choose another path"
    why = os.strerror(number)
    return f"a socket is here that cannot be asked whether it lives ({why}); it was left alone"


def _probe(node: int, status: os.stat_result) -> int:
    """
    Ask a socket of ours whether anybody listens: 0, or an errno.

    Waits only for whoever may have taken the place of a process that listened and is dead.

    A mode such as 0444 (on illumos, one that lets everybody in) keeps even its owner out.
    A killed server of that mode would leave a trap, so its owner gets the permission for the
    moment of asking: nobody gains by it who could not have done the same.
    """
    number = _knock(node)
    if number != errno.EACCES or status.st_mode & stat.S_IWUSR:
        return number
    mode = stat.S_IMODE(status.st_mode)
    os.chmod(_through(node), mode | stat.S_IWUSR)
    try:
        return _knock(node)
    finally:
        os.chmod(_through(node), mode)


def _knock(node: int) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as sock:
        number = sock.connect_ex(_through(node))
        return errno.ECONNREFUSED if number == 0 and _nobody_accepts(sock) else number


def _nobody_accepts(sock: socket.socket) -> bool:
    """
    Tell whether the process that listened is dead, and no other greets in its place.

    A child of a fork in C, past Python's hooks, holds the listener of its dead parent open.
    """
    return _listener_is_dead(sock) and not _is_readable(sock.fileno(), GREETING_TIMEOUT)


def _listener_is_dead(sock: socket.socket) -> bool:
    pidfd = peer_pidfd(sock)
    if pidfd < 0:  # the process is gone for good, or this kernel cannot say
        pid = unpack_ids(peer_ucred(sock))[0]
        if pid <= 0:  # of another namespace
            return False
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
    with _held(pidfd):
        return _is_readable(pidfd, 0)


def _is_readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


# -- the room ------------------------------------------------------------------------


class _Room:
    """
    A directory of our own beside the target, in which a name is made ready.

    Attributes:
        ours: device and inode of the socket that was made here.
    """

    __slots__ = ("_inner", "_keeps", "_name", "_place", "descriptor", "ours")

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._inner = _inner_name(place.name)
        self._keeps = False  # what came out of the name, and may be somebody else's
        self._name = _ROOM_PREFIX + secrets.token_hex(8)
        self.descriptor = -1
        self.ours: Identity = (0, 0)
        os.mkdir(self._name, stat.S_IRWXU, dir_fd=place.descriptor)

    def enter(self) -> bool:
        """
        Open and lock the room just made; False if a sweeper was quicker, and it is lost.

            1. We make the room.
            2. A sweeper opens it and has the lock.
            3. It removes the room.

        If our own lock comes between 2 and 3 it is refused; if after 3, the room that we
        hold has no link any more.
        """
        try:
            node = os.open(self._name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._place.descriptor)
        except FileNotFoundError:
            return False
        with _held(node):
            _close_to_others(node, self._place)
            self.descriptor = own_number(os.open(_through(node), os.O_RDONLY | os.O_DIRECTORY))
        return _is_held(self.descriptor)

    def listen(self, mode: int, gid: int, backlog: int) -> socket.socket:
        """Make the listening socket, with its exact mode; the caller owns it."""
        listener = door_socket()
        try:
            # Takes effect at bind, less the umask: whatever the directory's group, nobody
            # but us is let in before the group and the mode are right.
            os.fchmod(listener.fileno(), mode & stat.S_IRWXU)
            listener.bind(f"{_through(self.descriptor)}/{self._inner}")
            self.ours = _identity(self._look())
            with _held(os.open(self._inner, _NODE, dir_fd=self.descriptor)) as node:
                _set_permissions(node, mode, gid, self._place.path)
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
        return listener

    def link_out(self) -> bool:
        """Give our socket its name; False if something has that name already."""
        try:
            os.link(
                self._inner,
                self._place.name,
                src_dir_fd=self.descriptor,
                dst_dir_fd=self._place.descriptor,
                follow_symlinks=False,
            )
        except FileExistsError:
            return False
        return True

    def swap_out(self, wanted: Identity) -> bool:
        """
        Put our socket at the name and dispose of what was there, if it is what we want.

        False if it was something else, or nothing; then all is as it was, and so it is if that
        cannot be told.
        """
        self._keeps = True  # before anything can have come out
        try:
            if not self._exchange():
                return True
        except OSError as error:
            self._keeps = False
            if isinstance(error, FileNotFoundError):
                return False
            raise
        is_wanted = False
        try:
            is_wanted = _identity(self._look()) == wanted
        finally:
            if is_wanted:
                self._keeps = False
            else:
                self._put_back()
        return is_wanted

    def _exchange(self) -> bool:
        """
        Swap what is here with what is at the name.

        False if the file system has no such step, and what was at the name is replaced.
        That is done only where nobody but us and root can bring anything to the name; and
        those who do it as we do are kept out by the lock.
        """
        place = self._place
        number = _rename_exchange(self.descriptor, self._inner, place.descriptor, place.name)
        if not number:
            return True
        if number not in _NO_EXCHANGE or _others_may_write(place.descriptor):
            raise OSError(number, os.strerror(number))
        os.rename(self._inner, place.name, src_dir_fd=self.descriptor, dst_dir_fd=place.descriptor)
        return False

    def _put_back(self) -> None:
        try:
            self._exchange()
        except OSError as error:
            kept = os.path.join(self._place.directory, self._name)
            why = f"something came to the name meanwhile, could not be put back and is kept in {kept!r}"
            raise OSError(errno.EEXIST, why, self._place.path) from error
        self._keeps = False

    def _look(self) -> os.stat_result:
        return os.stat(self._inner, dir_fd=self.descriptor, follow_symlinks=False)

    def clear(self) -> None:
        """
        Leave the room and remove it, with what it holds: our socket, or the stale one.

        What came out of the name, is neither and could not be put back stays, and so does the
        room: better a strange directory than a lost file.
        """
        if self.descriptor >= 0:
            if not self._keeps:
                with contextlib.suppress(OSError):
                    os.unlink(self._inner, dir_fd=self.descriptor)
            close_number(self.descriptor)
            self.descriptor = -1
        with contextlib.suppress(OSError):
            os.rmdir(self._name, dir_fd=self._place.descriptor)


def _inner_name(name: str) -> str:
    if name in (os.curdir, os.pardir) or len(os.fsencode(name)) > _LONGEST_INNER_NAME:
        return "door"
    return name


@contextlib.contextmanager
def _room(place: _Place) -> Iterator[_Room]:
    """Make a room; it is removed on leaving."""
    for _ in range(_ATTEMPTS):
        room = _Room(place)
        try:
            if room.enter():
                yield room
                return
        finally:
            room.clear()
    raise OSError(errno.EBUSY, f"others keep removing directories in {place.directory!r}", place.path)


def _close_to_others(room: int, place: _Place) -> None:
    """See to it that a room is ours and closed to others, whatever the umask made of it."""
    status = os.fstat(room)
    if status.st_uid != os.geteuid():
        why = f"a directory made in {place.directory!r} belongs to uid {status.st_uid}, not to us"
        raise OSError(errno.EPERM, why, place.path)
    if status.st_mode & 0o777 != stat.S_IRWXU:
        os.chmod(_through(room), stat.S_IRWXU)


def _set_permissions(node: int, mode: int, gid: int, path: str) -> None:
    """Give a socket its group, then its mode: the other way round the wrong group would have it."""
    if gid != -1:
        _give_to_group(node, gid, path)
    os.chmod(_through(node), mode)
    if stat.S_IMODE(os.fstat(node).st_mode) != mode:
        why = f"the file system does not keep the mode {mode:04o}: choose another directory"
        raise OSError(errno.EPERM, why, path)


def _is_held(descriptor: int) -> bool:
    """Lock a room of ours against sweepers; False if one has it or has had it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks on this file system: then nobody sweeps here either
    return os.fstat(descriptor).st_nlink > 0


def _sweep(place: _Place) -> None:
    """
    Remove the rooms of servers of our uid that were killed in the middle of ``publish``.

    A courtesy: what cannot be opened or removed is left for another time.  But a directory
    that cannot be read cannot be locked either, so that a name in it could be made and
    never again removed or taken over: that is found out here.
    """
    with _held(place.open_to_read()) as listing:
        for name in os.listdir(listing):
            if name.startswith(_ROOM_PREFIX):
                with contextlib.suppress(OSError):
                    _sweep_room(place, name)


def _sweep_room(place: _Place, name: str) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    with _held(os.open(name, flags, dir_fd=place.descriptor)) as room:
        status = os.fstat(room)
        if status.st_uid != os.geteuid() or status.st_mode & 0o777 != stat.S_IRWXU:
            return
        fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its owner lives
        for inner in os.listdir(room):
            status = os.stat(inner, dir_fd=room, follow_symlinks=False)
            if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid():
                os.unlink(inner, dir_fd=room)
        os.rmdir(name, dir_fd=place.descriptor)


# -- the place -----------------------------------------------------------------------


class _Place:
    """
    Where a name is or shall be: a directory, held open, and the last part of the path.

    Attributes:
        path: the absolute path, as the user gave it.
        directory: all of it but the last part.
        name: the last part; "." if the path ends with a slash.
        descriptor: of the directory (``O_PATH``).
    """

    __slots__ = ("_generation", "descriptor", "directory", "name", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.directory, self.name = os.path.split(path)
        self.name = self.name or os.curdir
        self.descriptor = -1
        self._generation = _sockets.generation
        try:
            self.descriptor = own_number(_walk(self.directory))
        except DoorError:
            raise
        except OSError as error:
            why = _DIRECTORY_ADVICE.get(error.errno or 0)
            if why is None:
                raise OSError(error.errno, error.strerror) from error
            raise OSError(error.errno, f"the directory {self.directory!r} {why}", path) from error

    def look(self) -> os.stat_result:
        """Return what ``lstat`` says of the name."""
        return os.stat(self.name, dir_fd=self.descriptor, follow_symlinks=False)

    def unlink(self) -> bool:
        """Remove the name; False if somebody who uses no lock (``rm``) was quicker."""
        try:
            os.unlink(self.name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return False
        return True

    def check_for_server(self) -> None:
        """
        Refuse a directory in which others could put something else at our name.

        A sticky one (``/tmp``) will do if root or we own it, or somebody whom our user
        namespace does not map: seen from a sandbox, root is nobody in particular.
        """
        status = os.fstat(self.descriptor)
        if not _others_may_write(self.descriptor):
            return
        owner, sticky = status.st_uid, status.st_mode & stat.S_ISVTX
        if owner not in _trusted() and not (sticky and _is_unknown(owner)):
            why = f"belongs to uid {owner}, who could put another door here"
        elif not sticky:
            why = "may be written by others and is not sticky, so that anybody could put another door here"
        else:
            return
        raise OSError(
            errno.EACCES,
            f"the directory {self.directory!r} (mode {stat.S_IMODE(status.st_mode):04o}) {why}: "
            "use a directory of your own",
            self.directory,
        )

    def open_to_read(self) -> int:
        """Open the directory once more, for listing and locking; the caller closes it."""
        return os.open(_through(self.descriptor), os.O_RDONLY | os.O_DIRECTORY)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the directory, against other threads and processes."""
        with _held(self.open_to_read()) as lock:
            self._wait_for(lock)
            try:
                yield
            finally:
                # Not left to the close: a child forked meanwhile has a copy.  If it fails, what was done
                # stays done all the same.
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_UN)

    def _wait_for(self, lock: int) -> None:
        """Take the lock, looking again at growing intervals (``flock`` itself has no timeout)."""
        began = time.monotonic()
        directory = self.directory, _identity(os.fstat(lock))  # the number of one removed is soon another's
        # A server may have many names here, and whoever holds the lock may do so for ever.
        patience = LOCK_TIMEOUT if began > _in_vain.get(directory, -_GRUDGE) + _GRUDGE else 0.0
        pause = 0.0005
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= began + patience:
                    break
            else:
                _in_vain.pop(directory, None)
                return
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        if patience:
            _remember(directory)
        raise OSError(
            errno.ETIMEDOUT,
            f"somebody has held the lock on the directory {self.directory!r} for {LOCK_TIMEOUT:g} seconds "
            "(`lslocks` shows who): use a directory of your own",
            self.path,
        )

    def close(self) -> None:
        """Let the directory go.  Idempotent; a forked child has let it go already."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0 and self._generation == _sockets.generation:
            close_number(descriptor)


#: When the lock of a directory was last waited for in vain; forgotten with the grudge.
_in_vain: dict[tuple[str, Identity], float] = {}


def _remember(directory: tuple[str, Identity]) -> None:
    """Note that a lock was waited for in vain just now, and forget those of long ago."""
    now = time.monotonic()
    for other, since in list(_in_vain.items()):
        if now > since + _GRUDGE:
            _in_vain.pop(other, None)
    _in_vain[directory] = now


_DIRECTORY_ADVICE = {
    errno.ENOENT: "does not exist: make it first",
    errno.ENOTDIR: "is none: a part of it is a file",
    errno.EACCES: "may not be entered: that takes search permission (x) on each part of it",
    errno.ELOOP: "leads through too many symbolic links",
}


def _walk(directory: str) -> int:
    """
    Open a directory part by part, following symbolic links only where they can be trusted.

    Raises:
        AccessError: a part is a symbolic link that a stranger may have put there.
    """
    here = os.open("/", _DIRECTORY)
    try:
        ahead, links = _parts(directory), 0
        while ahead:
            step, link = _step(here, ahead.pop())
            # In this order: Ctrl-C may come out of the close, and a number closed twice is a stranger's.
            left, here = here, step
            os.close(left)
            if link is not None:
                ahead += _parts(link)
                links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except BaseException:
        os.close(here)
        raise
    return here


def _parts(path: str) -> list[str]:
    """Return the parts of a path, the next one last."""
    return [part for part in reversed(path.split("/")) if part]


def _step(here: int, part: str) -> tuple[int, str | None]:
    """
    Open one part of a path; if it is a symbolic link, return where it starts and its text.
    """
    try:
        return os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=here), None
    except NotADirectoryError:
        if not stat.S_ISLNK(os.stat(part, dir_fd=here, follow_symlinks=False).st_mode):
            raise
    link = _read_trusted_link(here, part)
    return (os.open("/", _DIRECTORY) if link.startswith("/") else os.dup(here)), link


def _read_trusted_link(here: int, part: str) -> str:
    """
    Read a symbolic link on the way to a directory.

    Trusted are links where none but us and root can write, and in sticky directories those
    that we or root made: there nobody else can have swapped them.
    """
    node = os.open(part, _NODE, dir_fd=here)
    try:
        link, where = os.fstat(node), os.fstat(here)
        sticky = where.st_mode & stat.S_ISVTX and where.st_uid in _trusted()
        if _others_may_write(here) and not (sticky and link.st_uid in _trusted()):
            raise AccessError(
                f"{part!r} is a symbolic link of uid {link.st_uid} in a directory that others can write, "
                "so that it could lead anywhere: use the path that it stands for",
                filename=part,
            )
        return os.readlink("", dir_fd=node)
    finally:
        os.close(node)


def _trusted() -> tuple[int, int]:
    """Return the uids that can do to us whatever they like: our own, and root."""
    return os.geteuid(), 0


def _is_unknown(uid: int) -> bool:
    return credentials_of((os.getpid(), uid, 0), None).uid is None


def _others_may_write(directory: int) -> bool:
    """Tell whether anybody but us and root may put names into a directory, or allow himself to."""
    status = os.fstat(directory)
    if status.st_uid not in _trusted() or status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_group_of_one(directory, status.st_gid)


def _is_group_of_one(directory: int, gid: int) -> bool:
    """
    Tell whether the group's bits of a directory speak of nobody but us.

    By the rule of pam_umask's "usergroups", which makes such directories: an ordinary user,
    whose primary group has the user's name; and nobody else is in it.  With an access
    control list the group's bits speak of everybody on that list.
    """
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    if user.pw_uid == 0 or user.pw_gid != gid or user.pw_name != group.gr_name:
        return False
    return set(group.gr_mem) <= {user.pw_name} and not _has_access_list(directory)


def _has_access_list(directory: int) -> bool:
    try:
        os.getxattr(_through(directory), "system.posix_acl_access")
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.EOPNOTSUPP)
    return True


# -- the client's side ---------------------------------------------------------------


@attrs.frozen
class Reached:
    """
    A connection to the door at a path.

    Attributes:
        path: the absolute path, as the user gave it.
        owner: the uid that owns the socket file.  Whoever answers has to be of this uid, or
            something was swapped.
        socket: the connection, non-blocking; the caller owns it.
    """

    path: str
    owner: int
    socket: socket.socket


def reach(path: Path, *, deadline: float | None = None) -> Reached:
    """
    Connect to the door at a path; the caller owns the connection.

    Blocks only while the queue of callers at the door is full.  Permission is looked at
    here, once, and never again at a call.

    Args:
        path: where.  A relative one is made absolute at once.
        deadline: until when to wait, by ``time.monotonic()``; None for ever.

    Raises:
        FileNotFoundError: nothing is there.
        PermissionError: the file may not be written by us, or what is there cannot be
            trusted; an ``AccessError`` where the rule is ours.
        NotADoorError: something else is there.
        BrokenDoorError: the server is gone; nothing ran.
        CallTimeoutError: no room in the queue before the deadline; nothing ran.
        TypeError, ValueError: a path that is none.

    Modelled on: open(2) of a door
    """
    told = absolute_path(path)
    with _explaining(told):
        node, status = _find(told)
        own_number(node)
        try:
            if stat.S_ISSOCK(status.st_mode):
                return Reached(told, status.st_uid, _connect(node, status, told, deadline))
        finally:
            close_number(node)
        raise NotADoorError(f"{_kind(status.st_mode)} is at {told!r}, not a door", filename=told)


def _find(told: str) -> tuple[int, os.stat_result]:
    """Open (``O_PATH``) what is at a path, following links where the rules allow; tell what it is."""
    path = told
    for _ in range(_MOST_LINKS):
        place = _Place(path)
        try:
            _check_for_client(place, told)
            node = _open_node(place, told)
            try:
                status = os.fstat(node)
            except BaseException:
                os.close(node)
                raise
            if not stat.S_ISLNK(status.st_mode):
                return node, status
            path = _follow(place, node, told)
        finally:
            place.close()
    raise OSError(errno.ELOOP, "too many symbolic links lead on from here", told)


def _open_node(place: _Place, told: str) -> int:
    try:
        return os.open(place.name, _NODE, dir_fd=place.descriptor)
    except FileNotFoundError:
        raise OSError(errno.ENOENT, "no door is here: start its server, or see to the path", told) from None


def _check_for_client(place: _Place, told: str) -> None:
    """Refuse a directory where anybody could have put a door of his own."""
    mode = os.fstat(place.descriptor).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise AccessError(
            f"anybody could have put a socket at {told!r}: the directory {place.directory!r} may be written "
            f"by everybody and is not sticky (mode {stat.S_IMODE(mode):04o}); have the door moved to another",
            filename=told,
        )


def _follow(place: _Place, node: int, told: str) -> str:
    """Return where a symbolic link that stands for the door leads; closes the link."""
    try:
        if _others_may_write(place.descriptor):
            raise AccessError(
                f"{place.path!r} is a symbolic link in a directory that others can write, so that it could "
                "lead to any other door: use the path that it stands for",
                filename=told,
            )
        return os.path.join(place.directory, os.readlink("", dir_fd=node))
    finally:
        os.close(node)


def _connect(node: int, status: os.stat_result, told: str, deadline: float | None) -> socket.socket:
    sock = door_socket()
    try:
        refuse_rights(sock)  # nobody reads them: they would be closed with this socket, and might block
        number = sock.connect_ex(_through(node))
        if number == errno.EAGAIN:
            number = _wait_in_line(sock, _through(node), deadline)
        if number:
            raise _refusal(number, status, told)
    except BaseException:
        sock.close()
        raise
    return sock


def _wait_in_line(sock: socket.socket, address: str, deadline: float | None) -> int:
    """
    Connect, waiting in the kernel for room in the queue; return 0 or an errno.

    CPython takes a local ``connect`` that a signal has interrupted for one that goes on by
    itself, and then for a success: so success is looked at twice.
    """
    sock.settimeout(None)
    try:
        while True:
            if deadline is not None:
                if (left := deadline - time.monotonic()) <= 0:
                    return errno.EAGAIN
                set_patience(sock, socket.SO_SNDTIMEO, left)
            number = sock.connect_ex(address)
            if number not in (0, errno.EAGAIN, errno.EINTR) or (number == 0 and _is_connected(sock)):
                return number
    finally:
        sock.settimeout(0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _NO_TIMEOUT)


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return False
        raise
    return True


def _refusal(number: int, status: os.stat_result, told: str) -> OSError:
    """Turn an errno of ``connect`` into the error that says what to do."""
    if number == errno.ECONNREFUSED:
        return BrokenDoorError(
            f"the server of {told!r} is gone and has left the name behind: start it again",
            may_have_run=False,
            filename=told,
        )
    if number == errno.EAGAIN:
        return CallTimeoutError(
            f"the queue of callers at {told!r} was full until the time ran out",
            may_have_run=False,
            filename=told,
        )
    if number == errno.EPROTOTYPE:
        return NotADoorError(f"a socket of another kind is at {told!r}, not a door", filename=told)
    if number == errno.EACCES:
        return AccessError(
            f"{told!r} may not be opened by uid {os.geteuid()}: on Linux that takes write permission on the "
            f"file, which is of uid {status.st_uid}, gid {status.st_gid}, mode "
            f"{stat.S_IMODE(status.st_mode):04o}; have its server attach it with another mode= or group=",
            filename=told,
        )
    return OSError(number, os.strerror(number))


# -- small things --------------------------------------------------------------------


def absolute_path(path: Path) -> str:
    """
    Check a path and make it absolute, leaving its parts as they are.

    Raises:
        TypeError, ValueError: it is no path, or an abstract one.
        FileNotFoundError: it is relative, and the working directory is gone.
        OSError: a part of it is too long.
    """
    text = os.fsdecode(path)
    if not text:
        raise ValueError("the path of a door cannot be empty")
    if text[0] in "@\0":
        raise ValueError(
            f"{text!r} is an abstract name, and those are not used: they have no permissions "
            "(for a file of that name write './@…')"
        )
    if "\0" in text:
        raise ValueError(f"the path of a door cannot hold a NUL: {text!r}")
    for part in text.split("/") if 4 * len(text) > _NAME_MAX else ():  # a character has 4 bytes at most
        if (size := len(os.fsencode(part))) > _NAME_MAX:
            why = f"a part of the path has {size} bytes; the most is {_NAME_MAX}"
            raise OSError(errno.ENAMETOOLONG, why, text)
    return text if text.startswith("/") else os.path.join(_working_directory(text), text)


def _working_directory(path: str) -> str:
    try:
        return os.getcwd()
    except OSError as error:
        why = "the working directory is gone or closed to us, so a relative path leads nowhere"
        raise OSError(error.errno, f"{why}: give an absolute one", path) from error


def _checked_mode(mode: object) -> int:
    if not isinstance(mode, int) or isinstance(mode, bool):
        raise TypeError(f"mode must be an int such as 0o600, not {type(mode).__name__}")
    if not 0 <= mode <= 0o777:
        raise ValueError(f"mode must be within 0 and 0o777, not {mode:#o}")
    return int(mode)


def _group_number(group: object) -> int:
    if isinstance(group, str):
        try:
            return grp.getgrnam(group).gr_gid
        except KeyError:
            raise LookupError(f"there is no group {group!r}") from None
    if not isinstance(group, int) or isinstance(group, bool):
        raise TypeError(f"group must be a name or a number, not {type(group).__name__}")
    if not 0 <= group < 2**32 - 1:
        raise ValueError(f"group must be a group's number, not {group}")
    return group


def _give_to_group(node: int, gid: int, path: str) -> None:
    try:
        os.chown(_through(node), -1, gid)
    except PermissionError as error:
        why = f"the socket may not be given to group {gid}: only root can do that, or a member of the group"
        raise OSError(error.errno, why, path) from error


def _through(descriptor: int) -> str:
    """Return a path to what a descriptor holds, whatever its own path is by now."""
    return f"/proc/self/fd/{descriptor}"


@contextlib.contextmanager
def _held(descriptor: int) -> Iterator[int]:
    """Close a descriptor on leaving, and in a child forked meanwhile."""
    own_number(descriptor)
    try:
        yield descriptor
    finally:
        close_number(descriptor)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def _kind(mode: int) -> str:
    return next((words for test, words in _KINDS if test(mode)), "something")


# -- errors that say what to do --------------------------------------------------------

_ADVICE = {
    errno.EACCES: "the directory may not be used: that takes search permission (x), "
    "and for a server also those to read and write (rw)",
    errno.EBADF: "the file system has no locks: choose another directory",
    errno.EDQUOT: "the disk quota is used up",
    errno.EINVAL: "the file system cannot do what a door's name takes: choose another directory",
    errno.EMFILE: "this process has no free descriptor: close some, or raise RLIMIT_NOFILE (`ulimit -n`)",
    errno.ENFILE: "the system has no free descriptor (fs.file-max)",
    errno.ENOENT: "the directory has been removed meanwhile, or /proc is not mounted",
    errno.ENOLCK: "the file system has no locks: choose another directory",
    errno.ENOSPC: "the file system is full",
    errno.EOPNOTSUPP: "the file system takes no sockets, or no links to them: choose another directory",
    errno.EPERM: "the file system or a security policy forbids it: choose another directory",
    errno.EROFS: "the file system is read-only: choose another directory",
}


@contextlib.contextmanager
def _explaining(path: str) -> Iterator[None]:
    """
    Have every ``OSError`` name the path and say what to do.

    Those that name an absolute path are our own and say it already: the kernel is only ever
    asked about names in open directories.
    """
    try:
        yield
    except DoorError as error:
        if isinstance(error, OSError):
            error.filename = path
        raise
    except OSError as error:
        if str(error.filename or "").startswith("/") and not str(error.filename).startswith("/proc/self/fd/"):
            raise
        why = _ADVICE.get(error.errno or 0) or error.strerror or str(error)
        raise OSError(error.errno, why, path) from error


# -- renameat2(2) --------------------------------------------------------------------

_RENAME_EXCHANGE = 2  # linux/fs.h

#: How kernels and file systems say that they cannot do it.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

#: For C libraries without a wrapper (musl before 1.2.6): asm/unistd.h of these machines.
_RENAMEAT2_NUMBERS = {"x86_64": 316, "aarch64": 276, "riscv64": 276}

_libc = ctypes.CDLL(None, use_errno=True)


def _rename_exchange(from_directory: int, from_name: str, to_directory: int, to_name: str) -> int:
    """Swap two names in one step; return 0 or an errno."""
    arguments = (
        ctypes.c_int(from_directory),
        os.fsencode(from_name),
        ctypes.c_int(to_directory),
        os.fsencode(to_name),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    if hasattr(_libc, "renameat2"):
        failed = _libc.renameat2(*arguments)
    elif number := _RENAMEAT2_NUMBERS.get(os.uname().machine):
        failed = _libc.syscall(ctypes.c_long(number), *arguments)
    else:
        return errno.ENOSYS
    return ctypes.get_errno() if failed else 0
