"""
One of the backends that stand behind the router.

Prints, when it is called:

    2 + 3
"""

from doorpool import Server

server = Server()


@server.endpoint("server.door")
def add(a, b):
    print(a, "+", b)
    return a + b


server.run()
