"""
Be three callers at once.

Prints:

    Threads that answered: 3
"""

from doorpool import Proxy

with Proxy("server.door") as meet:
    calls = [meet.submit() for _ in range(3)]  # each in a thread of this process
    threads = {call.result() for call in calls}
    print("Threads that answered:", len(threads))
