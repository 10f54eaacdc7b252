"""
Get a door through a door, and call it when the name by which it could be opened is gone.

Prints:

    It has a name of its own: None
    Well, hello to you too!
"""

from doorpool import Proxy, anyone

with Proxy("proxy.door", server=anyone) as give, give() as given:
    print("It has a name of its own:", given.info.path)
    with Proxy(given, server=anyone) as door:  # it is not the proxy's own, and we do not mind
        door("Take your name down")  # a door that was passed needs no path, and no permission on any
        print(door("Hello, World!"))
