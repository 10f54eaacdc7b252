"""
Ask the helper for files; what arrives is open already, and takes no permission here.

Prints:

    the report of this year
    refused: the policy does not give you payroll
"""

from doorpool import Proxy

with Proxy("server.door") as lend:  # believed of our own user and of root
    with open(lend("report").take()) as file:  # a Descriptor, of which we make what it is to be here
        print(file.read(), end="")
    try:
        lend("payroll")
    except PermissionError as error:
        print("refused:", error)
