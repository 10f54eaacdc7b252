"""
Lend open files that nobody else can open, or may.

Prints:

    secret_data: lent
    menu: lent
    ../etc/passwd: refused
"""

import os

from doorpool import Server, take

server = Server()

with open("secret_data", "w") as file:
    file.write("The cake is in the cellar.\n")
secret = os.open("secret_data", os.O_RDONLY)
os.unlink("secret_data")  # from now on it has no name by which anybody could open it

os.mkdir("shelf")
with open("shelf/menu", "w") as file:
    file.write("Cake.\n")


@server.endpoint("server.door")
def lend(name):
    """Open a file for the caller, who gets it, or hears why not."""
    path = f"/proc/self/fd/{secret}" if name == "secret_data" else f"shelf/{name}"
    if "/" in name:
        print(f"{name}: refused")
        raise PermissionError(f"{name} is not on my shelf")
    print(f"{name}: lent")
    return take(open(path))  # the caller's from now on, and closed here


server.run()
