"""
Open the door, and look at it without calling.

Prints:

    It leads to 'answer', which says of itself:
    'Say nothing: this door is only to be looked at.'
    Its server runs in this process: False
    Its server is of my user: True
    Somebody is at home: True
"""

import os

from doorpool import Proxy

with Proxy("server.door") as door:
    print(f"It leads to {door.info.name!r}, which says of itself:")
    print(repr(door.info.doc))
    print("Its server runs in this process:", door.info.server.pid == os.getpid())
    print("Its server is of my user:", door.info.server.uid == os.geteuid())
    print("Somebody is at home:", door.alive)
