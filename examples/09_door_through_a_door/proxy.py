"""
Open the server's door, and hand it to whoever asks: the door, not its answers.

Prints, when it is asked:

    Here is the door; I am out of the way.
"""

from doorpool import Proxy, Server, anyone

server = Server()

with Proxy("server.door", server=anyone) as door:  # another user's, perhaps: a greeting is no secret
    door("I am the proxy")

    @server.endpoint("proxy.door", codec="data", mode=0o666, callers=anyone)
    def give() -> Proxy:
        print("Here is the door; I am out of the way.")
        return door

    server.run()
