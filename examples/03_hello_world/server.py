"""
Answer a greeting.

Prints, when it is called:

    A caller says: Hello, World!
"""

from doorpool import Server

server = Server()


@server.endpoint("server.door")
def answer(greeting):
    print("A caller says:", greeting)
    return "Well, hello to you too!"


with server:
    server.run()
