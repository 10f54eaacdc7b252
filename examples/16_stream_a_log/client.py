"""
Read somebody else's log as if it were a list, and stop in the middle.

Prints:

    7 ERROR
    1007 ERROR
    2007 ERROR
    and so on
"""

from doorpool import Proxy

with Proxy("server.door") as lines:
    with lines("ERROR") as errors:  # at its end the generator over there is closed
        for line in errors:
            if line.startswith("3007"):
                print("and so on")
                break
            print(line)
