"""
What can go wrong at a door, as one tree.

Each class answers two questions: whose act was it, and may the caller retry?  The
second answer is an attribute of every one of them, so that one
``except DoorError as error`` can decide by ``error.may_have_run``.

    DoorError                                     whose act                 may have run
    ├── ClosedError       (ValueError)            yours: it is closed        no
    ├── RevokedError      (ConnectionError)       the server's, on purpose   no
    ├── BrokenDoorError   (ConnectionError)       nobody's: server gone      says which
    ├── CallTimeoutError  (TimeoutError)          time ran out               says which
    ├── BusyError                                 load                       no
    ├── LimitError        (ValueError)            too much, by a limit       no; yes for a reply
    ├── MarshalError      (TypeError)             a value could not cross    argument no, result yes
    ├── AccessError       (PermissionError)       not between these two      no
    ├── NotADoorError     (OSError)               the path is no door        no
    ├── ProtocolError     (ConnectionError)       a bug or an attack         says which
    └── RemoteError                               the procedure's error      yes

A user's own exception is not in the tree: it crosses the door as itself, and the text
of the remote traceback is the ``RemoteTraceback`` at the end of its ``__cause__`` chain.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "AccessError",
    "BrokenDoorError",
    "BusyError",
    "CallTimeoutError",
    "ClosedError",
    "DoorError",
    "LimitError",
    "MarshalError",
    "NotADoorError",
    "ProtocolError",
    "RemoteError",
    "RemoteTraceback",
    "RevokedError",
]

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

#: The errno that say something about this system now, and nothing about the other side.
SHORTAGE = frozenset({_errno.EMFILE, _errno.ENFILE, _errno.ENOMEM, _errno.ENOBUFS})


class DoorError(Exception):
    """
    A door could not do what was asked; the base of every error of the library.

    Attributes:
        may_have_run: whether the procedure may have run, or may still be running.
            False is a promise: it did not run and will not, so the call can be
            repeated.  True means that it ran, or that nobody can say.
    """

    #: What a new error of the class says when it is not told otherwise.
    _may_have_run = False

    #: The errno of those that are an ``OSError`` too.
    _errno: int | None = None

    may_have_run: bool

    def __init__(
        self,
        message: str = "",
        *,
        may_have_run: bool | None = None,
        filename: Path | None = None,
    ) -> None:
        if isinstance(self, OSError):
            os_error: OSError = self
            super().__init__(self._errno, message)
            os_error.filename = filename
        else:
            super().__init__(message)
        self.may_have_run = self._may_have_run if may_have_run is None else may_have_run

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__), getattr(self, "filename", None))


def _rebuild(
    kind: type[DoorError], args: tuple[object, ...], state: dict[str, object], filename: Path | None
) -> DoorError:
    error = kind.__new__(kind, *args)
    if isinstance(error, OSError):
        OSError.__init__(error, *args)
        error.filename = filename
    else:
        error.args = args
    error.__dict__.update(state)
    return error


class ClosedError(DoorError, ValueError):
    """This object is closed, by its owner; nothing was sent."""


class RevokedError(DoorError, ConnectionError):
    """The server has taken the door away on purpose, and said so; the call did not run."""

    _errno = _errno.ECONNREFUSED


class BrokenDoorError(DoorError, ConnectionError):
    """The server is gone without a goodbye; ``may_have_run`` says what became of the call."""

    _errno = _errno.ECONNRESET


class CallTimeoutError(DoorError, TimeoutError):
    """The time given for the call, or for opening the door, has run out."""

    _errno = _errno.ETIMEDOUT


class BusyError(DoorError):
    """
    The server had no channel, thread or descriptor to spare, or the caller's user has his share of them
    (``doorpool.Limits``); the call did not run.  (Of a user whose results take too many bytes it did:
    ``may_have_run`` says so.)

    Or it would have waited for itself.  (Where the caller itself has run out of descriptors, that is an
    ``OSError``, ``EMFILE``, as of ``open``.)
    """


class LimitError(DoorError, ValueError):
    """
    Too many bytes or descriptors for this door.

    Attributes:
        limit: the limit, in the unit that the message names.
        value: what was asked for.
    """

    def __init__(
        self,
        message: str = "",
        *,
        limit: int = 0,
        value: int = 0,
        may_have_run: bool | None = None,
    ) -> None:
        super().__init__(message, may_have_run=may_have_run)
        self.limit = limit
        self.value = value


class MarshalError(DoorError, TypeError):
    """A value could not cross the door; the message names the path to it."""


class AccessError(DoorError, PermissionError):
    """These two processes may not talk; the message names both and the rule."""

    _errno = _errno.EACCES


class NotADoorError(DoorError, OSError):
    """What was opened is no door."""

    _errno = _errno.EBADF


class ProtocolError(DoorError, ConnectionError):
    """The other side said what it must not say; the channel is gone."""

    _errno = _errno.EPROTO


class RemoteError(DoorError):
    """
    The procedure's own error, which could not, or must not, cross as itself.

    It must not if it is a ``DoorError`` (from a call that the procedure made itself: the caller
    would take its ``may_have_run`` for that of his own call) or no ``Exception`` (a server's
    ``sys.exit()`` must not end its clients).

    Attributes:
        type_name: the qualified name of the class that was raised there.
    """

    _may_have_run = True

    def __init__(self, message: str = "", *, type_name: str = "", may_have_run: bool | None = None) -> None:
        super().__init__(message, may_have_run=may_have_run)
        self.type_name = type_name


class RemoteTraceback(Exception):
    """
    The text of a traceback in another process; it prints where a cause would print.

    Never raised: it is found at the end of the ``__cause__`` chain of an exception
    that came through a door.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'
