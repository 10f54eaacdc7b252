"""
Work, tell the caller how far it is, and call him back when something is odd.

Prints, when it is called:

    resized 3 pictures
"""

import time

from doorpool import Server, track

server = Server()


@server.endpoint("server.door")
def resize(pictures, warn):
    done = []
    for picture in track(pictures, "resizing"):  # reports to whoever listens, and else does nothing
        if picture == "b":
            warn(picture)  # runs in the caller's process, while he waits
        else:
            time.sleep(0.1)  # in place of work
            done.append(f"tiny {picture}")
    print("resized", len(done), "pictures")
    return done


server.run()
