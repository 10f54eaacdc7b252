"""
Be called back. A plain function would be sent away as a value, and run over there; an Endpoint of it
is a door, and it runs here.

Prints:

    1 of 4
    2 of 4
    3 of 4
    4 of 4
    ['small a', 'small b', 'small c', 'small d']
"""

from doorpool import Endpoint, Proxy


def show(done, total):
    print(done, "of", total)


with Proxy("server.door") as resize:
    print(resize("abcd", progress=Endpoint(show)))
