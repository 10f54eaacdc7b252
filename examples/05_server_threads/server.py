"""
Answer three callers at the same time, each on a server thread of its own.

Prints, when three have called:

    Three calls are being answered at the same time.
"""

import threading

from doorpool import Server

server = Server()
meeting = threading.Barrier(3)


@server.endpoint("server.door")
def meet():
    """Wait for two other calls, and say which thread this is."""
    if meeting.wait(timeout=10) == 0:
        print("Three calls are being answered at the same time.")
    return threading.get_ident()


server.run()
