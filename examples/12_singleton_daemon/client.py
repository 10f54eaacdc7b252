"""
Use the daemon, try to start a second one, and be its last user.

Prints:

    A second one says: There is one already.
    Users: 2
    Users: 1
    And it takes its name away: True
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from doorpool import Proxy

second = subprocess.run(
    [sys.executable, Path(__file__).with_name("server.py")], capture_output=True, text=True, check=True
)
print("A second one says:", second.stdout, end="")

with Proxy("server.door") as daemon, daemon.join() as users:
    with daemon.join():
        print("Users:", users())
    while users() > 1:  # the kernel tells the daemon, in its own time
        time.sleep(0.01)
    print("Users:", users())
while os.path.exists("server.door"):
    time.sleep(0.01)
print("And it takes its name away:", not os.path.exists("server.door"))
