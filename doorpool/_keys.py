"""
Reading MessagePack of strangers, who choose the keys: no dict or set is made of such as collide.

Why, and how it is found out, is told in ``_keys.c``.  Here is which containers an annotation lets msgspec
make: any dict where it says nothing, and else those that it names.  A message in which nothing large can
become one costs a glance at its bytes, in C; and one of an annotation that names none, nothing.

Roads not taken: a bound on the number of such keys (a dict of a million coordinates is honest); on how many
share one hash (numbers collide without); containers with another hash (a procedure wants a dict).
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import inspect
from msgspec.msgpack import Decoder

from doorpool._impl import shuttle

#: Bytes up to which a message has no container large enough to be looked at.
_SMALL = 32


class Unfit(ValueError):
    """What has come cannot become what is wanted: a word of the library's own, for whoever has sent it."""


class Steps:
    """
    What may be spent on the keys of one message.

    For each key there are its bytes, for one that comes again is compared, and some more, for honest ones
    take up to 26 mostly; and some go to the whole: the 729 points of six coordinates, each of which is -2, -1
    or 0, take 127 each.

    One kind of honest keys is refused with those that were chosen: very many multiples of a high power of
    two.  A dict looks at the low bits of a hash first, which all of these have in common; the more there
    are, the longer they stand in one another's way.  A million and a half of 2**24 take 160 steps each: to
    count them takes 2 s, and to make the dict as long again.  All of 50,000 and fewer pass.
    """

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = 2**20

    def take(self, keys: tuple[Any, ...], sizes: tuple[int, ...], is_map: bool) -> None:
        """
        Take what it costs to make a dict or a set of keys.

        Args:
            sizes: the bytes of each, of which as many steps are to spare, for one that comes again.

        Raises:
            Unfit: that is more than there is.
        """
        most = self._left + 32 * len(keys) + sum(sizes)
        self._left = most - shuttle.steps_of(keys, sizes, is_map, most)
        if self._left < 0:
            what = "keys of a dict" if is_map else "items of a set"
            raise Unfit(f"{len(keys)} {what} collide: that takes more than {most} steps")


class Reader:
    """
    A decoder, which refuses keys that collide.

    Args:
        hint: what to make of a message.
        hooks: of ``Decoder``.
    """

    __slots__ = ("_arrays", "_decode", "_maps", "_sets", "_texts", "decode")

    #: Reads a message; raises as ``Decoder`` does, and as ``check``.
    decode: Callable[..., Any]

    def __init__(self, hint: Any, **hooks: Any) -> None:
        self._decode = Decoder(hint, **hooks).decode
        maps, sets = _containers_in(hint)
        self._maps = [_decoder_of_keys(kind) for kind in maps]
        self._sets = [_decoder_of_keys(kind) for kind in sets]
        self._arrays = bool(sets)
        self._texts = any(kind is not Any for kind in maps)
        self.decode = self._check_and_decode if maps or sets else self._only_decode

    @property
    def makes_keys(self) -> bool:
        """Whether it makes keys of what is none yet."""
        return self._arrays or self._texts

    def check(self, data: Any, steps: Steps | None = None) -> None:
        """
        Refuse a message of which a container would be made whose keys collide.

        Args:
            steps: of the message, if this is but a part.

        Raises:
            Unfit: so it is.
        """
        steps = steps or Steps()
        try:
            found = shuttle.keys_of(data, self._arrays, self._texts)
        except ValueError as error:
            raise Unfit(str(error)) from None
        for is_map, chunks in found:
            for decoder in self._maps if is_map else self._sets:
                steps.take(*_keys_in(chunks, decoder), is_map)

    def _check_and_decode(self, data: Any, steps: Steps | None = None) -> Any:
        if len(data) > _SMALL:
            self.check(data, steps)
        return self._decode(data)

    def _only_decode(self, data: Any, steps: Steps | None = None) -> Any:
        return self._decode(data)


def _keys_in(
    chunks: list[bytes], decoder: Decoder[list[dict[Any, int]]]
) -> tuple[tuple[Any, ...], tuple[int, ...]]:  # fmt: skip
    """Read keys and their sizes, up to one that is none: msgspec will get no further."""
    found: list[tuple[Any, int]] = []
    try:
        for chunk in chunks:
            found += [item for each in decoder.decode(chunk) for item in each.items()]
    except MemoryError:
        raise
    except Exception:  # no key, however a type says so: reading the whole will tell, and gets no further
        pass
    return tuple(key for key, _ in found), tuple(size for _, size in found)


def _decoder_of_keys(kind: Any) -> Decoder[list[dict[Any, int]]]:
    return Decoder(
        list[dict[kind, int]],
        ext_hook=lambda code, body: object(),
        dec_hook=lambda kind, value: value,
    )


# --- what an annotation lets be made --------------------------------------------------------------


def _containers_in(hint: Any) -> tuple[list[Any], list[Any]]:
    """Find of which types the keys of dicts may be, and the items of sets, where these may collide."""
    maps: list[Any] = []
    sets: list[Any] = []
    for node in _nodes_in(inspect.type_info(hint), set()):
        if isinstance(node, inspect.DictType):
            found, kind = maps, node.key_type
        elif isinstance(node, inspect.SetType | inspect.FrozenSetType):
            found, kind = sets, node.item_type
        elif isinstance(node, inspect.AnyType | inspect.CustomType):
            found, kind = maps, inspect.AnyType()
        else:
            continue
        keys = _type_of(kind)
        if not _is_safe(kind) and keys not in found:
            found.append(keys)
    return maps, sets


def _nodes_in(node: Any, seen: set[int]) -> Iterator[inspect.Type]:
    """Go through a description of a type and all its parts."""
    if isinstance(node, tuple):
        for part in node:
            yield from _nodes_in(part, seen)
    elif isinstance(node, inspect.Field):
        yield from _nodes_in(node.type, seen)
    elif isinstance(node, inspect.Type) and id(node) not in seen:
        seen.add(id(node))
        yield node
        for name in node.__struct_fields__:
            yield from _nodes_in(getattr(node, name), seen)


#: Whose hashes are keyed, or which are few: those that an annotation names.
_SAFE = (
    inspect.StrType, inspect.BytesType, inspect.NoneType, inspect.BoolType, inspect.EnumType,
    inspect.LiteralType, inspect.DateType,
)  # fmt: skip


def _is_safe(node: inspect.Type) -> bool:
    parts = node.types if isinstance(node, inspect.UnionType) else (node,)
    return all(isinstance(part, _SAFE) for part in parts)


def _type_of(node: inspect.Type) -> Any:
    """Return a type of which at least all keys are that a description describes."""
    if isinstance(node, inspect.UnionType):
        return typing.Union[tuple(map(_type_of, node.types))]  # noqa: UP007
    if isinstance(node, inspect.TupleType):
        return tuple[tuple(map(_type_of, node.item_types))]  # type: ignore[misc]
    if isinstance(node, inspect.VarTupleType):
        return tuple[_type_of(node.item_type), ...]  # type: ignore[misc]
    if isinstance(node, inspect.FrozenSetType):
        return frozenset[_type_of(node.item_type)]  # type: ignore[misc]
    if isinstance(node, inspect.LiteralType):
        return typing.Literal[node.values]
    if isinstance(node, _CLASSES):
        return node.cls
    return _PLAIN.get(type(node), Any)


_CLASSES = inspect.EnumType, inspect.StructType, inspect.DataclassType, inspect.NamedTupleType


def _plain() -> dict[type, Any]:
    import datetime
    import decimal
    import uuid

    return {
        type(inspect.type_info(kind)): kind
        for kind in (
            None, bool, int, float, str, bytes, memoryview, datetime.datetime, datetime.date, datetime.time,
            datetime.timedelta, decimal.Decimal, uuid.UUID,
        )
    }  # fmt: skip


_PLAIN = _plain()
