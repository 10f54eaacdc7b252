"""
Ask at the front door, and go on without it.

Prints:

    No: nobody here can subtract
    5, and the router is gone
"""

from doorpool import Proxy

with Proxy("router.door") as router:
    with router.find("add") as add:
        try:
            router.find("subtract")
        except LookupError as error:
            print("No:", error)
        router.leave()
        print(f"{add(2, 3)}, and the router is gone")
