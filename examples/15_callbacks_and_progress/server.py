"""
Work, and tell the caller how far it is by calling him back.

Prints, when it is called:

    resized 4 pictures
"""

from doorpool import Server

server = Server()


@server.endpoint("server.door")
def resize(pictures, progress):
    done = []
    for number, picture in enumerate(pictures, 1):
        done.append(f"small {picture}")
        progress(number, len(pictures))  # runs in the caller's process, while he waits
    print("resized", len(done), "pictures")
    return done


server.run()
