"""
Be the only one: take a dead one's name over, leave a living one alone, go when nobody needs you.

Prints, when its users have gone:

    Nobody needs me any more.
"""

import threading

from doorpool import Endpoint, Server


class Daemon:
    """Count the users; each has a door of his own, which tells when he is gone."""

    def __init__(self, server):
        self._server, self._users, self._lock = server, 0, threading.Lock()

    def join(self):
        with self._lock:
            self._users += 1
        return Endpoint(lambda: self._users, on_unref=self._leave)

    def _leave(self):
        with self._lock:
            self._users -= 1
        if not self._users:
            print("Nobody needs me any more.")
            self._server.close()


server = Server()
try:
    server.attach(Daemon(server), "server.door")  # over a name whose server is dead, too
    server.run()
except FileExistsError:
    print("There is one already.")
