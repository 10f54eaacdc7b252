"""
Knock twice: two calls with no arguments and no results.

Prints:

    Knock, knock.
    The first call returned None
    The second call returned None
"""

from doorpool import Proxy

with Proxy("server.door") as knock:
    print("Knock, knock.")
    print("The first call returned", knock())
    print("The second call returned", knock())
