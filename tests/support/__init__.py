"""
What the tests share; the fixtures in ``conftest.py`` are made of it.

    child       what a child process of a test imports: ready(), result(), become(), counters
    processes   start Python processes and forked children, always with an end
    leaks       what a process holds: descriptors, threads, children
    measuring   what they do differently while coverage.py counts
    described   ids of parametrized tests that are the same in each run
    marker      a pickle that leaves a trace if anybody unpickles it
"""

from support.child import (
    become,
    count_unpickling,
    enter_pid_namespace,
    enter_user_namespace,
    fork_in_c,
    unpickling_counts,
)
from support.leaks import Holdings
from support.marker import Marker, bomb_bytes
from support.measuring import follow_bare_threads
from support.processes import (
    Child,
    ChildFailed,
    Finished,
    bare_environment,
    run_as_uid,
    run_python,
    start_python,
    wait_until,
)

follow_bare_threads()  # before anybody imports the library

__all__ = [
    "Child",
    "ChildFailed",
    "Finished",
    "Holdings",
    "Marker",
    "bare_environment",
    "become",
    "bomb_bytes",
    "count_unpickling",
    "enter_pid_namespace",
    "enter_user_namespace",
    "fork_in_c",
    "run_as_uid",
    "run_python",
    "start_python",
    "unpickling_counts",
    "wait_until",
]
