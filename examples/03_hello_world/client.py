"""
Call a function of another process, as if it were one's own.

Prints:

    Well, hello to you too!
"""

from doorpool import Proxy

with Proxy("server.door") as answer:
    print(answer("Hello, World!"))
