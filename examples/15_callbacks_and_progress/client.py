"""
Be called back. A plain function would be sent away as a value, and run over there; an Endpoint of it
is a door, and it runs here. How far the work is, comes the same way; with `rich` installed
(`pip install rich`), as a bar.

Prints, where there is no terminal:

    resizing: 0 of 4
    too small: b
    resizing: 4 of 4
    ['tiny a', 'tiny c', 'tiny d']
"""

import sys

from doorpool import Endpoint, Proxy

try:
    from rich.progress import Progress
except ImportError:
    Progress = None


def say(done, total, text):
    if done in (0, total):  # there may be others in between, up to twenty a second
        print(f"{text}: {done} of {total}")


with Proxy("server.door") as resize:
    warn = Endpoint(lambda picture: print("too small:", picture))
    if Progress and sys.stdout.isatty():
        with Progress() as bars:
            bar = bars.add_task("starting")
            show = resize.options(progress=lambda n, total, text: bars.update(
                bar, completed=n, total=total, description=text))  # fmt: skip
            print(show("abcd", warn))
    else:
        print(resize.options(progress=say)("abcd", warn))
