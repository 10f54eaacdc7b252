"""
Wait for a while, and not longer.

Prints:

    No answer in time. The work may have been done: True
    worked for 0.05 s
"""

from doorpool import CallTimeoutError, Proxy

with Proxy("server.door") as work:
    try:
        work.options(timeout=0.2)(3600)
    except CallTimeoutError as error:
        print("No answer in time. The work may have been done:", error.may_have_run)
    print(work(0.05))
