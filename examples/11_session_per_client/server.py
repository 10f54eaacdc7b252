"""
Give each client a door of its own, to an object that remembers him and ends with him.

Prints, when the clients have come and gone:

    Alice is gone, with 2 things in her basket.
    Bob is gone, with 2 things in his basket.
"""

import queue

from doorpool import Endpoint, Server

server = Server()
gone = queue.SimpleQueue()


class Basket:
    def __init__(self, name, whose):
        self._name, self._whose, self._things = name, whose, []

    def add(self, thing):
        self._things.append(thing)
        return list(self._things)

    def _end(self):
        print(f"{self._name} is gone, with {len(self._things)} things in {self._whose} basket.")
        gone.put(self._name)


@server.endpoint("server.door")
def connect(name, whose):
    basket = Basket(name, whose)
    return Endpoint(basket, on_unref=basket._end)


server.attach(gone.get, "gone.door")
server.run()
