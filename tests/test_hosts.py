"""Hosts of a slice: what names them, how they find each other, and what becomes of one that is alone."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchinfer import hosts as hosts_module
from torchinfer.errors import ConfigError, EngineError
from torchinfer.hosts import Hosts, find_hosts, join
from torchinfer.link import Link

TWO = ("localhost", "localhost")


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def connected(port: int) -> socket.socket:
    for _ in range(1000):
        try:
            return socket.create_connection(("localhost", port), timeout=10)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError("nobody listens")


def pair() -> tuple[Link, Link]:
    one, other = socket.socketpair()
    return Link(one, "the other"), Link(other, "the one")


def test_gke_s_variables_name_the_hosts() -> None:
    assert find_hosts({"TPU_WORKER_HOSTNAMES": "a.b, c.d", "TPU_WORKER_ID": "1"}) == Hosts(("a.b", "c.d"), 1)
    assert find_hosts({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    assert find_hosts({}) is None


@pytest.mark.parametrize("index", ["", "2", "-1", "first"])
def test_a_place_that_no_host_has_is_refused(index: str) -> None:
    with pytest.raises(ConfigError, match=rf"TPU_WORKER_ID='{index}' must be a whole number from 0 to 1"):
        find_hosts({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": index})


def test_hosts_find_each_other_in_any_order() -> None:
    port, names = free_port(), ("localhost",) * 3
    with ThreadPoolExecutor() as pool:
        last, first, second = (pool.submit(join, Hosts(names, index), port, 30) for index in (2, 0, 1))
        links = first.result()
        assert [link.name for link in links] == ["host 1, localhost", "host 2, localhost"]
        links[1].send("you", 2)
        assert last.result()[0].receive() == ["you", 2]
        second.result()[0].send([1.5, None])
        assert links[0].receive() == [[1.5, None]]
    for link in [*links, *last.result(), *second.result()]:
        link.close()


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(EngineError, match="localhost did not come in time"):
        join(Hosts(TWO, 0), free_port(), 0.2)
    with pytest.raises(EngineError, match=r"host 0, localhost, port \d+, was not to be reached in time"):
        join(Hosts(TWO, 1), free_port(), 0.2)


def test_a_port_that_is_taken_is_an_error_of_the_configuration() -> None:
    refusal = r"hosts_port=\d+ .*give all another"
    with socket.create_server(("", 0)) as server, pytest.raises(ConfigError, match=refusal):
        join(Hosts(TWO, 0), server.getsockname()[1], 1)


def test_a_stranger_is_sent_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    port, known = free_port(), threading.Event()
    addresses = hosts_module._addresses
    monkeypatch.setattr(hosts_module, "_addresses", lambda name: addresses(name) if known.is_set() else {"192.0.2.1"})
    with ThreadPoolExecutor() as pool:
        first = pool.submit(join, Hosts(TWO, 0), port, 30)
        stranger = Link(connected(port), "host 0")
        with pytest.raises(EngineError, match="host 0, which computes with this process, is gone"):
            stranger.receive(10)
        known.set()
        other = join(Hosts(TWO, 1), port, 30)
        for link in [*first.result(), *other]:
            link.close()
    assert "none of the hosts of TPU_WORKER_HOSTNAMES" in caplog.text


def test_two_hosts_with_one_number_are_refused() -> None:
    port, names = free_port(), ("localhost",) * 3
    with ThreadPoolExecutor() as pool:
        first, second, third = (pool.submit(join, Hosts(names, index), port, 30) for index in (0, 1, 1))
        with pytest.raises(EngineError, match=r"says that it is host 1: is TPU_WORKER_ID another one on each host\?"):
            first.result()
        for link in [*second.result(), *third.result()]:
            link.close()


def test_the_end_of_one_process_is_an_error_in_the_other() -> None:
    one, other = pair()
    other.send("last")
    other.close()
    assert one.receive() == ["last"]
    for call in (one.receive, one.send):
        with pytest.raises(EngineError, match="the other, which computes with this process, is gone: its log says why"):
            call()


def test_silence_can_be_limited() -> None:
    one, other = pair()
    with pytest.raises(EngineError, match=r"the other said nothing for 0\.05 s"):
        one.receive(0.05)
    one.close()
    other.close()


@pytest.mark.parametrize(("is_busy", "code"), [(True, 1), (False, 0)])
def test_a_process_that_waits_for_its_device_ends_when_the_other_one_is_gone(is_busy: bool, code: int) -> None:
    program = (
        "import socket, time; from torchinfer import link; link.GRACE_SECONDS = 0.2\n"
        "one, other = socket.socketpair(); mine = link.Link(one, 'host 0')\n"
        f"mine.is_busy = {is_busy}; other.close(); time.sleep({60 if is_busy else 1})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == code
    assert ("host 0 is gone, and this process waits for it: it ends" in done.stderr) == is_busy
