"""
Lend doors out: know when a borrower has let go of one, and take another one back.

Prints, when the client has called:

    Nobody can reach the first door any more.
    The second door is taken back.
"""

import threading

from doorpool import Endpoint, Server

server = Server()


class Lender:
    def __init__(self):
        self.lent = []
        self.let_go = threading.Event()

    def lend(self):
        self.lent.append(Endpoint(lambda n: n + 1, on_unref=self.hear))
        return self.lent[-1]

    def hear(self):
        print("Nobody can reach the first door any more.")
        self.let_go.set()

    def wait(self):
        return self.let_go.wait(10)

    def take_back(self):
        print("The second door is taken back.")
        self.lent[-1].revoke()


server.attach(Lender(), "server.door", expose=["lend", "wait", "take_back"])
server.run()
