"""
A storm of kill -9, either side, at random points, with arrays in flight.

See ``support.storm``.  The survivor is asked for everything: each value byte for byte, arrays that
were kept unchanged, nothing run twice, and no descriptor, segment, page, thread or file left.
"""

from __future__ import annotations

import collections

import pytest
from support.journal import MAY_HAVE_RUN, RESULT, Books, Journal
from support.rawdoor import PATIENCE

pytest.importorskip("numpy")

KILL_SERVERS = """
    import sys
    from support.storm import kill_servers
    kill_servers(sys.argv[1], int(sys.argv[2]), ready)
"""

KILL_CLIENTS = """
    import sys
    from support.storm import kill_clients
    kill_clients(sys.argv[1], int(sys.argv[2]))
"""

CLIENT = """
    import sys
    from support.storm import survive_as_client
    ready()
    result(survive_as_client(sys.argv[1]))
"""

SERVER = """
    import sys
    from support.storm import survive_as_server
    result(survive_as_server(sys.argv[1], ready))
"""


@pytest.mark.leaves_names
@pytest.mark.ids("E01", "E02", "H04")
def test_servers_that_are_killed_while_arrays_cross(spawn_server, door_dir, many):
    nest = spawn_server(KILL_SERVERS, door_dir, many(25, 700))
    client = spawn_server(CLIENT, door_dir)
    finished = client.finish(timeout=many(50, 900))
    assert finished.returncode == 0, finished.stderr
    assert nest.terminate(timeout=PATIENCE) == 0, nest.stderr
    survivor = finished.value
    with Journal(door_dir / "journal") as journal:
        books = Books(journal)
        books.enter_all(survivor["told"])
        kinds = books.balance()
    print(kinds, collections.Counter(survivor["killed"]), survivor["kept"])
    assert set(survivor["killed"]) == {"BrokenDoorError"}
    in_flight = kinds[MAY_HAVE_RUN, 1] + kinds[MAY_HAVE_RUN, 0]  # the others found no server
    assert in_flight >= many(5, 350)
    assert kinds[MAY_HAVE_RUN, 1] > 0
    assert survivor["kept"] > 0
    assert survivor["left"] == []


@pytest.mark.ids("E02", "H04")
def test_clients_that_are_killed_while_arrays_cross(spawn_server, run_python, door_dir, many):
    server = spawn_server(SERVER, door_dir)
    nest = run_python(KILL_CLIENTS, door_dir, many(25, 700), timeout=many(50, 900))
    assert nest.returncode == 0, nest.stderr
    assert server.terminate(timeout=PATIENCE) == 0, server.stderr
    survivor = server.finish(timeout=PATIENCE).value
    with Journal(door_dir / "begun") as begun, Journal(door_dir / "done") as done:
        all_begun, went_well = begun.read(), set(done.read())
    with Journal(door_dir / "journal") as journal:
        books = Books(journal)
        books.enter_all((number, RESULT if number in went_well else MAY_HAVE_RUN) for number in all_begun)
        kinds = books.balance()
    print(kinds, {name: survivor[name] for name in ("kept", "channels", "mapped")})
    assert len(all_begun) - len(went_well) >= many(25, 1_650)
    assert kinds[RESULT, 1] > 0
    assert survivor["kept"] > 0
    assert (survivor["channels"], survivor["mapped"]) == (0, 0)
    assert survivor["left"] == []
