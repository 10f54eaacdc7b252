"""
Open the server's door, and hand it to whoever asks: the door, not its answers.

Prints, when it is asked:

    Here is the door; I am out of the way.
"""

from doorpool import Proxy, Server

server = Server()
door = Proxy("server.door")
door("I am the proxy")


@server.endpoint("proxy.door")
def give():
    print("Here is the door; I am out of the way.")
    return door


with door:
    server.run()
