"""
Ask the helper for files; what arrives is open already, and takes no permission here.

Prints:

    the report of this year
    refused: the policy does not give you payroll
"""

import os

from doorpool import Proxy

with Proxy("server.door") as lend:
    with lend("report") as file:  # one open file for all who have it: read where you want, not where it is
        print(os.pread(file.fileno(), 4096, 0).decode(), end="")
    try:
        lend("payroll")
    except PermissionError as error:
        print("refused:", error)
