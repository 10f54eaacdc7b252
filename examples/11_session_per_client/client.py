"""
Be two clients; one is killed, and the other does not notice.

Prints:

    Alice: ['apples', 'pears']
    Bob: ['books']
    The server has noticed that Alice is gone.
    Bob: ['books', 'pens']
    The server has noticed that Bob is gone.
"""

import os
import signal

from doorpool import Proxy

if (alice := os.fork()) == 0:
    with Proxy("server.door") as connect, connect("Alice", "her") as basket:
        basket.add("apples")
        print("Alice:", basket.add("pears"), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)  # no goodbye: the kernel tells the server
os.waitpid(alice, 0)

with Proxy("server.door") as connect, Proxy("gone.door") as gone:
    with connect("Bob", "his") as basket:
        print("Bob:", basket.add("books"))
        print("The server has noticed that", gone(), "is gone.")
        print("Bob:", basket.add("pens"))
    print("The server has noticed that", gone(), "is gone.")
