"""
Give away the lines of a log as they are asked for. It has a million; nobody ever holds them all.

Prints, when it is called:

    the log is open
    the log is closed
"""

from doorpool import Server

with open("app.log", "w") as log:
    log.writelines(f"{n} {'ERROR' if n % 1000 == 7 else 'fine'}\n" for n in range(1_000_000))

server = Server()


@server.endpoint("server.door")
def lines(word):
    print("the log is open")
    try:
        with open("app.log") as log:
            for line in log:
                if word in line:
                    yield line.rstrip()
    finally:
        print("the log is closed")


server.run()
