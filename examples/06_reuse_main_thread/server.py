"""
Answer with the main thread and no other.

Prints, when it is called:

    MainThread answers.
"""

import threading

from doorpool import Server

server = Server(max_threads=1)


@server.endpoint("server.door")
def who_answers():
    """Name the thread that runs this."""
    name = threading.current_thread().name
    print(name, "answers.")
    return name


server.run()  # lends the thread that calls it; here that makes one of one
