"""
Rules about who may call, and about whose server is believed.

Both sides of a door have one question about the other, and one kind of answer to it:

    a set of uids, ``Group`` objects among them    whoever is one of these users, or in one of these groups
    anyone                                         everybody, and those whom the kernel does not name
    a function of ``Credentials``                  whoever it says true to; if it raises, nobody

A rule is asked once for each channel, when it opens, about who opens it; nobody becomes
somebody else on a channel that is open (``doorpool._channel``).

*Unknown is nobody.*  Whoever has no uid here (an overflow uid, a pid of 0 with it, a look-up that failed)
is in no set.  An overflow gid is in no group, not even in the initial user namespace, where it is called
nogroup.  Groups only ever grant: there is no "all but these", which a process could escape by giving a
group up.

*What is told to whom.*  The log of this side names both and the whole rule.  A stranger learns who
we think he is and what kind of rule kept him out, and not whom it would have let in.
"""

from __future__ import annotations

import grp
import os
from collections.abc import Callable, Collection
from typing import Any, Final

import attrs

from doorpool._credentials import Credentials, is_strange, overflow_ids

__all__ = ["Group", "anyone"]

_MOST = 2**32 - 2  # the greatest uid; one more means "none"


class _Anyone:
    """Whoever it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "anyone"

    def __reduce__(self) -> str:
        return "anyone"


#: Everybody, also those of whom the kernel does not say who they are.
anyone: Final = _Anyone()


@attrs.frozen(init=False)
class Group:
    """
    Whoever is in a group, by primary or supplementary membership, as the kernel knows it.

    Membership is that of the process, from its login on, and not what ``/etc/group`` says by now.

    Args:
        name: of the group, or its number.  A name is looked up here and now.

    Raises:
        LookupError: there is no such group.
        TypeError, ValueError: it is neither name nor number, or the number of those who are
            mapped to no group.
    """

    name: str | int
    gid: int = attrs.field(repr=False)

    def __init__(self, name: str | int) -> None:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise TypeError(f"a group is a name or a number, not {name!r}")
        gid = name if isinstance(name, int) else grp.getgrnam(name).gr_gid
        if not 0 <= gid <= _MOST or gid in overflow_ids("gid"):
            raise ValueError(f"{name!r} (gid {gid}) is no group that somebody could be in")
        self.__attrs_init__(name, gid)

    def __repr__(self) -> str:
        return f"Group({self.name!r})"

    def has(self, who: Credentials) -> bool:
        """Tell whether somebody is in it."""
        return self.gid == who.gid or self.gid in (who.groups or ())


Rule = Collection["int | Group"] | Group | _Anyone | Callable[[Credentials], Any]


@attrs.frozen
class Bar:
    """Why somebody may not come in: what he is told, and what our log says."""

    told: str
    logged: str


def describe(who: Credentials) -> str:
    """Name somebody as messages do."""
    return f"pid {who.pid}, uid {who.uid}, gid {who.gid}"


class Judge:
    """
    A rule, to be asked about somebody.

    Attributes:
        kind: what sort of rule it is, for strangers to know.
        asks: it is a function of the user's, which may do anything and take any time.
    """

    __slots__ = ("_function", "_groups", "_rule", "_uids", "asks", "kind")

    def __init__(self, rule: Rule, what: str) -> None:
        self._rule = rule
        self._uids: frozenset[int] = frozenset()
        self._groups: tuple[Group, ...] = ()
        self._function: Callable[[Credentials], Any] | None = None
        if rule is anyone:
            self.kind = "anyone"
        elif isinstance(rule, Collection | Group) and not isinstance(rule, str | bytes | bytearray):
            self._take_members([rule] if isinstance(rule, Group) else rule, what)
        elif callable(rule):
            self.kind, self._function = "a function", rule
        else:
            raise TypeError(
                f"{what} is a set of uids and Groups, anyone, or a function of Credentials; not {rule!r}"
            )
        self.asks = self._function is not None

    def _take_members(self, members: Collection[int | Group], what: str) -> None:
        self._groups = tuple(each for each in members if isinstance(each, Group))
        uids = [each for each in members if not isinstance(each, Group)]
        for uid in uids:
            if isinstance(uid, bool) or not isinstance(uid, int):
                raise TypeError(f"{what} holds uids and Groups, not {uid!r}")
            if not 0 <= uid <= _MOST:
                raise ValueError(f"{what}: a uid is from 0 to {_MOST}, not {uid}")
        self._uids = frozenset(uids)
        self.kind = "a set of users and groups" if self._groups else "a set of users"

    def __repr__(self) -> str:
        return f"<Judge by {self}>"

    def __str__(self) -> str:
        if self._function is not None:
            return f"the function {getattr(self._function, '__qualname__', self._function)!s}"
        if self._rule is anyone:
            return "anyone"
        members = [f"the uids {sorted(self._uids)}"] * bool(self._uids) + list(map(repr, self._groups))
        return " and ".join(members) or "nobody"

    def admits(self, who: Credentials) -> bool:
        """
        Tell whether somebody is let in.

        Raises: whatever the function raises, if the rule is one.
        """
        if self._function is not None:
            return bool(self._function(who))
        if self._rule is anyone:
            return True
        if who.uid is None:
            return False
        return who.uid in self._uids or any(group.has(who) for group in self._groups)

    def bar(self, who: Credentials) -> Bar | None:
        """Say why somebody may not call; None if he may.  Raises as ``admits``."""
        if self.admits(who):
            return None
        logged = (
            f"{describe(who)} is not among the callers of this server of uid {os.geteuid()}: they are {self}"
        )
        told = f"{describe(who)} is not among its callers, whom {self.kind} names"
        return Bar(told if is_strange(who.uid) else logged, logged)


def bar_unknown(who: Credentials) -> Bar | None:
    """The rule of a data door that was given none: whoever came by it, and is known to the kernel."""
    if who.uid is not None:
        return None
    text = f"the kernel does not say who {describe(who)} is; such callers are let in by callers=anyone only"
    return Bar(text, text)
