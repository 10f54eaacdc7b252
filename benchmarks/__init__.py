"""
Measurements beside the other ways to call a function of another process: ``python -m benchmarks``.

The rooms, from the roof down; each leans only on those below it:

    __main__     the command
    _report      the table, the bars, the JSON, the plot
    _run         processes and turns: who is measured when, and where
    _workloads   what is called, how it is timed, and the bars
    _floors      what the machine itself takes, without anybody's library
    _peers       the ways to call, one server and one client each
    _iceoryx     one of them, which needs more lines than the others
    _machine     CPUs, pinning, memory
"""
