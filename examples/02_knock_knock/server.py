"""
Run a procedure for whoever knocks.  What it prints, this process prints.

Prints one line a call, and waits for the next until it is told to stop:

    Who's there?
    Who's there?
"""

from doorpool import Server

server = Server()


@server.endpoint("server.door")
def knock():
    print("Who's there?")


with server:
    server.run()
