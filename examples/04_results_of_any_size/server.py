"""
Return as much as the caller asks for; nobody has to say beforehand how much that will be.

Prints, when it is called:

    asked for 0 bytes
    asked for 1,000 bytes
    asked for 1,000,000 bytes
    asked for 50,000,000 bytes
    asked for 2,000 bytes
"""

from doorpool import Server

server = Server(name="sizes")


# One result may have up to 1 GiB; a door that wants to promise less says so.
@server.endpoint("server.door", max_reply=100_000_000)
def knock_n_times(n):
    print(f"asked for {n:,} bytes")
    return (b"knock! " * (n // 7 + 1))[:n]


with server:
    server.run()
