"""
Do long work, and stop when nobody waits for it any more.

Prints, when its caller has given up:

    The caller has given up; so do I.
"""

import time

from doorpool import Server, current_call

server = Server()


@server.endpoint("server.door")
def work(seconds):
    """Work in small pieces, and look up after each."""
    call = current_call()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if call.cancelled:
            print("The caller has given up; so do I.")
            return None
        time.sleep(0.01)  # a piece of work
    return f"worked for {seconds} s"


server.run()
