"""
The helpers of the tests: that they notice what they are there to notice.
"""

import errno
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import support


def test_holdings_name_a_descriptor_left_open():
    before = support.Holdings()
    left, right = socket.socketpair()
    try:
        found = support.Holdings.left_since(before, settling_time=0)
    finally:
        left.close()
        right.close()
    assert len(found) == 2
    assert all(line.startswith("descriptor left open") and "socket:" in line for line in found)
    assert support.Holdings.left_since(before) == []


def test_holdings_name_a_descriptor_of_somebody_else_that_was_closed():
    strangers, other = os.pipe()
    before = support.Holdings()
    os.close(strangers)
    found = support.Holdings.left_since(before, settling_time=0)
    os.close(other)
    assert found == [line for line in found if line.startswith("descriptor of somebody else closed")] != []


def test_holdings_name_a_thread_and_a_child():
    before = support.Holdings()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="straggler")
    thread.start()
    child = support.start_python("import time; ready(); time.sleep(60)")
    child.wait_ready()
    found = "\n".join(support.Holdings.left_since(before, settling_time=0))
    child.close()
    stop.set()
    thread.join()
    assert "straggler" in found
    assert f"child left behind: {child.pid}" in found
    assert support.Holdings.left_since(before) == []


def test_a_started_script_says_when_it_is_ready_and_what_its_result_is(run_python):
    with support.start_python("ready(os_getpid := __import__('os').getpid()); result([1, 2])") as child:
        assert child.wait_ready() == child.pid
        finished = child.finish()
    assert (finished.returncode, finished.value, finished.stderr) == (0, [1, 2], "")


def test_a_script_runs_as_main_in_a_file_of_its_own(run_python):
    finished = run_python("import sys; print(sys.argv[1:]); result((__name__, __file__))", "a", 2)
    assert finished.stdout == "['a', '2']\n"
    assert finished.value[0] == "__main__"
    assert finished.value[1].endswith("script.py")


THREE = 3


def _times_three(number):
    return number * THREE


def test_a_function_of_a_test_module_runs_in_another_process(run_python):
    assert run_python(_times_three, 14).value == 42


def test_a_child_that_fails_is_shown_with_what_it_printed(run_python):
    with pytest.raises(support.ChildFailed, match=r"(?s)ended with 3.*going down"):
        run_python("import sys; print('going down'); sys.exit(3)")


def test_a_child_that_ends_before_it_is_ready_is_not_waited_for():
    with support.start_python("raise SystemExit('no')") as child:
        with pytest.raises(support.ChildFailed, match="ended before it was ready"):
            child.wait_ready()


def test_children_end_with_their_own_children():
    with support.start_python(
        "import os, time; pid = os.fork(); pid and ready(pid); time.sleep(60)"
    ) as child:
        grandchild = os.pidfd_open(child.wait_ready())
    try:
        support.wait_until(lambda: not _alive(grandchild))
    finally:
        os.close(grandchild)


def _alive(pidfd):
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody reaps takes signals for ever: is it only that?
    return not select.select([pidfd], [], [], 0)[0]


def test_spawned_servers_are_ready_when_they_are_handed_out(spawn_server):
    server = spawn_server("import signal; ready('here'); signal.pause()")
    assert server.ready == "here"
    assert server.terminate() == -signal.SIGTERM


def test_stop_and_cont(spawn_server):
    server = spawn_server("import signal; ready(); signal.pause()")
    server.stop()
    state = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0]
    server.cont()
    assert state == "T"
    assert server.kill() == -signal.SIGKILL


def test_a_forked_child_returns_its_result_and_raises_its_error():
    assert support.run_as_uid(None, lambda: os.getpid()) != os.getpid()
    with pytest.raises(KeyError, match="colour") as caught:
        support.run_as_uid(None, {}.__getitem__, "colour")
    assert "in the child" in caught.value.__notes__[0]


def test_a_forked_child_that_says_nothing_is_an_error():
    with pytest.raises(support.ChildFailed, match="ended with 7"):
        support.run_as_uid(None, os._exit, 7)
    with pytest.raises(support.ChildFailed, match="the time was over"):
        support.run_as_uid(None, time.sleep, 60, timeout=0.1)


def _ids():
    return os.getresuid(), os.getresgid(), os.getgroups(), os.access("/proc/self/fd/0", os.F_OK)


def test_a_forked_child_is_wholly_the_other_user(as_uid):
    uids, gids, groups, _ = as_uid(54321, _ids, gid=54322, groups=[54323])
    assert (uids, gids, groups) == ((54321,) * 3, (54322,) * 3, [54323])


@pytest.mark.usefixtures("root_only")
def test_a_started_script_is_wholly_the_other_user(run_python):
    value = run_python("import os; result((os.getresuid(), os.getresgid(), os.getgroups()))", uid=54321).value
    assert value == ((54321,) * 3, (54321,) * 3, [])


@pytest.mark.usefixtures("namespaces")
def test_a_forked_child_can_move_into_a_user_namespace():
    def inside():
        before = os.getuid()
        support.enter_user_namespace((0, 0, 1), (65534, 1000, 1))
        return before, os.getuid(), os.stat(f"/proc/{os.getppid()}").st_uid

    assert support.run_as_uid(None, inside) == (0, 0, 0)
    with pytest.raises(OSError, match="cannot map") as caught:
        support.run_as_uid(None, support.enter_user_namespace, (0, 0, 0))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.usefixtures("namespaces")
def test_a_forked_child_can_move_into_a_pid_namespace():
    def inside():
        support.enter_pid_namespace()
        return os.getpid()

    assert support.run_as_uid(None, inside) == 1


def test_a_bomb_leaves_its_mark_and_the_audit_hook_counts_it(marker, run_python):
    assert not marker.went_off
    code = "import pickle, sys; count_unpickling(); pickle.loads(bytes.fromhex(sys.argv[1]))\n"
    finished = run_python(code + "result(unpickling_counts())", marker.bytes.hex())
    assert marker.went_off
    assert finished.value["find_class"] == 1


def test_the_door_dir_is_private_and_short(door_dir):
    assert door_dir.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(door_dir)) < 60
