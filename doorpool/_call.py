"""The call that a procedure is answering: who asked, until when, and whether he still waits."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from doorpool import _shelf

if TYPE_CHECKING:
    from doorpool._credentials import Credentials
    from doorpool.door import Invocation

__all__ = ["Call", "current_call"]

#: The invocation, of which a ``Call`` is made when somebody asks: few do, and it takes 0.3 µs.
current: ContextVar[Invocation] = ContextVar("doorpool.current_call")

#: The keyword by which a door goes along that wants to be told of progress: no name of a parameter.
LISTENER = "doorpool progress"


class Call:
    """
    One call, seen from the procedure that answers it; readable afterwards too.

    Attributes:
        endpoint: the door that was called.

    Modelled on: door_ucred(3C), door_info(3C) with DOOR_QUERY
    """

    __slots__ = ("_invocation", "endpoint")

    def __init__(self, invocation: Invocation, endpoint: Any) -> None:
        self._invocation = invocation
        self.endpoint = endpoint

    @property
    def caller(self) -> Credentials:
        """
        Who is calling, as the kernel said when the channel was opened.

        The immediate caller only: one that calls on behalf of somebody else hides him.
        """
        return self._invocation.credentials

    @property
    def deadline(self) -> float | None:
        """When the caller gives up, by ``time.monotonic()`` here; None for never."""
        return self._invocation.deadline

    @property
    def waited(self) -> float:
        """Seconds from sending to a thread's taking the call, by the caller's account."""
        return self._invocation.waited

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Call stays in the process that answers it; send its caller, or what else is needed"
        )

    def __repr__(self) -> str:
        return f"<Call of {self.endpoint.name!r} by {self.caller}>"

    @property
    def cancelled(self) -> bool:
        """
        Whether the caller has given up or is dead; False once the call was answered (in a generator that
        streams its items: whether the caller who pulls is gone).

        Looks at the channel and at the caller's process each time it is asked, and is true
        at once.  Nothing is ever interrupted: a procedure that wants to stop early asks.
        """
        invocation = self._invocation
        return (not invocation.answered or getattr(invocation, "goes_on", False)) and invocation.cancelled


def current_call() -> Call:
    """
    Return the call that this code is answering.

    It follows the context: ``asyncio.to_thread`` and copied contexts have it, a thread
    that the procedure starts by itself has none.

    Raises:
        RuntimeError: no call is being answered here.

    Modelled on: door_ucred(3C), which fails with EINVAL outside a server procedure
    """
    try:
        invocation = current.get()
    except LookupError:
        raise RuntimeError("no call is being answered here: current_call() is for procedures") from None
    if invocation.call is None:
        invocation.call = Call(invocation, invocation.door.cookie)
    call: Call = invocation.call
    return call


def _find_shelf() -> _shelf.Shelf | None:
    """Return the segments of the channel whose call this code is answering, if it is."""
    invocation = current.get(None)
    return None if invocation is None else invocation.line.channel.shelf


_shelf.set_finder(_find_shelf)
