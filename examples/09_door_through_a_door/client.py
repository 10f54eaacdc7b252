"""
Get a door through a door, and call it when the name by which it could be opened is gone.

Prints:

    It has a name of its own: None
    Well, hello to you too!
"""

import os

from doorpool import Proxy

with Proxy("proxy.door") as give, give() as door:
    os.unlink("server.door")  # a door that was passed needs no path, and no permission on any
    print("It has a name of its own:", door.info.path)
    print(door("Hello, World!"))
