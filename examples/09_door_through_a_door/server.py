"""
Answer whoever holds the door, however it came to him.

Prints, when the client has called:

    Called by the proxy's process: False
"""

from doorpool import Server, current_call

server = Server()
proxies = []


@server.endpoint("server.door")
def answer(greeting):
    if greeting == "I am the proxy":
        proxies.append(current_call().caller.pid)
        return None
    print("Called by the proxy's process:", current_call().caller.pid in proxies)
    return "Well, hello to you too!"


server.run()
