"""
Read through a door what one could not open oneself.

Prints:

    I cannot open it: No such file or directory
    The cake is in the cellar.
    Cake.
    I may not have that: ../etc/passwd is not on my shelf
"""

from doorpool import Proxy

try:
    with open("secret_data") as file:
        print(file.read())
except OSError as error:
    print("I cannot open it:", error.strerror)

with Proxy("server.door") as lend:
    with lend("secret_data") as file:  # an open file, as if from open()
        print(file.read(), end="")
    with lend("menu") as file:
        print(file.read(), end="")
    try:
        lend("../etc/passwd")
    except PermissionError as error:
        print("I may not have that:", error)
