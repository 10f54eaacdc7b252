"""
A front door: check what is asked for, hand out the door of the right backend, and be out of the way.

Prints, when it is asked:

    add: come in
    subtract: no
    The router leaves.
"""

from doorpool import Proxy, Server

server = Server()


class Router:
    """Find the door for a word."""

    def __init__(self, **backends):
        self._backends = backends

    def find(self, word):
        backend = self._backends.get(word)
        print(f"{word}: {'come in' if backend else 'no'}")
        if backend is None:
            raise LookupError(f"nobody here can {word}")
        return backend

    def leave(self):
        print("The router leaves.")
        server.close()


with Proxy("server.door") as add:
    server.attach(Router(add=add), "router.door")
    server.run()
