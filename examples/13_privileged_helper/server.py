"""
Hold a privilege for others: open files for those whom the policy gives them. Run it as root, with a
policy for the users that there are, and it is the only root process that they need.

Prints, when it is called:

    report: lent
    payroll: refused
"""

import os
from typing import BinaryIO

from doorpool import Server, anyone, current_call, take

FOLDER = os.path.abspath("files")
POLICY = {65534: {"report"}, os.getuid(): {"report"}}  # by uid: whose the caller is, the kernel says

os.mkdir(FOLDER, 0o700)
for name in ("report", "payroll"):
    with open(f"{FOLDER}/{name}", "w") as file:
        file.write(f"the {name} of this year\n")

server = Server()


# "data": others than our own user may call, and nothing that they send is unpickled.
@server.endpoint("server.door", mode=0o666, codec="data", callers=anyone, errors=[PermissionError])
def lend(name: str) -> BinaryIO:
    if name not in POLICY.get(current_call().caller.uid, ()):  # a name of the policy's is no path elsewhere
        print(f"{name}: refused")
        raise PermissionError(f"the policy does not give you {name}")
    print(f"{name}: lent")
    return take(open(f"{FOLDER}/{name}", "rb"))  # the caller's from now on, and closed here


server.run()
