"""
Answer whoever holds the door, however it came to him.

Prints, when the client has called:

    Called by the proxy's process: False
"""

from doorpool import Server, anyone, current_call

server = Server()
proxies = []


@server.endpoint("server.door", codec="data", mode=0o666, callers=anyone)
def answer(greeting: str) -> str:
    if greeting == "I am the proxy":
        proxies.append(current_call().caller.pid)
    elif greeting == "Take your name down":
        current_call().endpoint.detach()
    else:
        print("Called by the proxy's process:", current_call().caller.pid in proxies)
    return "Well, hello to you too!"


server.run()
