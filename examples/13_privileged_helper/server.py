"""
Hold a privilege for others: lend open files to those whom the policy gives them. Run it as root, with a
policy for the users that there are, and it is the only root process that they need.

Prints, when it is called:

    report: lent
    payroll: refused
"""

import os

from doorpool import Descriptor, Server, anyone, current_call

POLICY = {os.getuid(): {"report"}, 65534: set()}  # by uid: whose the caller is, the kernel says

FILES = {}
for name in ("report", "payroll"):
    with open(name, "w") as file:
        file.write(f"the {name} of this year\n")
    os.chmod(name, 0o600)
    FILES[name] = Descriptor(os.open(name, os.O_RDONLY))

server = Server()


# "data": others than our own user may call, and nothing that they send is unpickled.
@server.endpoint("server.door", mode=0o666, codec="data", callers=anyone, errors=[PermissionError])
def lend(name: str):
    if name not in POLICY.get(current_call().caller.uid, ()):
        print(f"{name}: refused")
        raise PermissionError(f"the policy does not give you {name}")
    print(f"{name}: lent")
    return FILES[name]  # it stays open here, and is open there, too


server.run()
for file in FILES.values():
    file.close()
