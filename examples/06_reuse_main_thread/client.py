"""
Ask which thread of the server answers.

Prints:

    It was MainThread.
"""

from doorpool import Proxy

with Proxy("server.door") as who_answers:
    print(f"It was {who_answers()}.")
