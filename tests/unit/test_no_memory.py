"""
The compiled part when memory is short: each allocation fails once, one after the other.

In a process of its own, which a wrong step would end, and in one thread, for the shortage is the process's.
"""

from __future__ import annotations

import pytest

from doorpool import _impl

pytestmark = pytest.mark.skipif(_impl.NAME != "c", reason="there is no compiled part here")
testcapi = pytest.importorskip("_testcapi", reason="this Python cannot refuse itself memory")

#: ``work`` is run with its first allocation failing, then with its second, and so on past its last one.
SCRIPT = """
    import gc, os, socket, struct, sys
    import _testcapi
    from doorpool import _impl

    shuttle = _impl.shuttle
    ARGS = ([1, 2.5, "three", b"four", None], (True, -(2**40), {{"five": [6, ()]}}))
    KWARGS = {{"seven": 8.0, "nine": ["ten", b"eleven"]}}
    CALL, VALUE = shuttle.pack_call(ARGS, KWARGS), shuttle.pack_value([ARGS, KWARGS])
    ITEMS = [1, -(2**40), 2.5, "six" * 20, b"seven", None, True, ("eight", 9)] * 10
    BATCH = shuttle.pack_items([None] * 600 + ITEMS)  # too many for a small pickle
    KEYS = tuple((-1 - number % 2, number) for number in range(40))
    SIZES = (1,) * len(KEYS)
    MESSAGE = b"\\xde\\0\\x80" + b"".join(b"\\x92\\xff" + bytes([number, 0]) for number in range(128))
    ME = struct.pack("3i", os.getpid(), os.geteuid(), os.getegid())
    ENDS = socket.socketpair()
    for end in ENDS:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def through_a_page():
        number = shuttle.make_page()
        try:
            client = shuttle.Page(number, ENDS[0].fileno(), ME, -1, 0)
            server = shuttle.Page(number, ENDS[1].fileno(), ME, -1, 0)
        finally:
            os.close(number)
        try:
            client.post(b"request", 0, 0)
            request = server.take()[0]
            server.answer(b"reply" * 100, 0)
            return request, client.wait(10**9)
        finally:
            client.close()
            server.close()

    def taken():
        items = []
        return shuttle.take_items(items, iter(ITEMS), 80, 10, 1 << 18, 1e18), items

    def work():
        return {work}

    right = work()

    def run():
        failed = went_well = 0
        for granted in range(200):
            value = None
            _testcapi.set_nomemory(granted, granted + 1)
            try:
                value = work()
            except MemoryError:
                failed += 1
            else:
                left_to_pickle = value is None or value is NotImplemented
                failed += left_to_pickle
                went_well += not left_to_pickle
            _testcapi.remove_mem_hooks()
            assert value in (None, NotImplemented, right), (granted, value)
        return failed, went_well

    def held():
        gc.collect()
        return sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))

    run()
    failed, went_well = run()
    before = held()
    for _ in range(20):
        run()
    result((failed, went_well, before, held()))
"""


@pytest.mark.ids("H08")
@pytest.mark.parametrize(
    "work",
    [
        "shuttle.pack_call(ARGS, KWARGS)",
        "shuttle.unpack_call(CALL)",
        "shuttle.pack_value([ARGS, KWARGS])",
        "shuttle.unpack_value(VALUE)",
        "shuttle.pack_items(ITEMS)",
        "shuttle.unpack_value(BATCH)",
        "taken()",
        "shuttle.keys_of(MESSAGE, True, True)",
        "shuttle.steps_of(KEYS, SIZES, True, 1000), shuttle.steps_of(KEYS, SIZES, False, 1000)",
        "through_a_page()",
    ],
)
def test_each_allocation_that_fails_is_an_error_or_left_to_pickle_and_leaves_nothing(run_python, work):
    failed, went_well, before, after = run_python(SCRIPT.format(work=work)).value
    assert failed >= 1
    assert went_well >= 50, "its last allocation is past"
    assert after[0] - before[0] < 100, "4,000 runs, not one block for each hundred failures"
    assert after[1] == before[1]
