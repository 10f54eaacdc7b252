"""
Borrow two doors: let go of one, and be told that the other was taken back.

Prints:

    Borrowed, and called: 2
    Let go, and the lender knows: True
    Taken back: RevokedError, it may have run: False
"""

from doorpool import Proxy, RevokedError

with Proxy("server.door") as lender:
    with lender.lend() as first:
        print("Borrowed, and called:", first(1))
    print("Let go, and the lender knows:", lender.wait())

    with lender.lend() as second:
        second(1)
        lender.take_back()
        try:
            second(2)
        except RevokedError as error:
            print(f"Taken back: RevokedError, it may have run: {error.may_have_run}")
