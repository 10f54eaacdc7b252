"""
Take results of any size.  In C, doors make the caller offer a buffer, hand him another if the
result does not fit, and leave it to him to unmap it.  Here a result is an object like any other.

Prints:

             0 bytes: b''
         1,000 bytes: b'knock! knock! '
     1,000,000 bytes: b'knock! knock! '
    50,000,000 bytes: b'knock! knock! '
         2,000 bytes: b'knock! knock! '
"""

from doorpool import Proxy

with Proxy("server.door") as knock:
    for n in (0, 1_000, 1_000_000, 50_000_000, 2_000):
        result = knock(n)
        assert len(result) == n
        print(f"{len(result):>10,} bytes: {result[:14]!r}")
