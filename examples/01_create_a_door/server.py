"""
Create a door: a name in the file system that leads to a function of this process.

Prints, and between the two lines waits to be called or to be told to stop:

    srw------- server.door
    server.door is gone: True
"""

import os
import stat

from doorpool import Server

server = Server()


@server.endpoint("server.door")
def answer():
    """Say nothing: this door is only to be looked at."""


with server:
    print(stat.filemode(os.stat("server.door").st_mode), "server.door")
    server.run()
print("server.door is gone:", not os.path.exists("server.door"))
