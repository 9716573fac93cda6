"""Several processes of one run: a roll call before they start, and word at once when one of them is gone.

JAX waits for absent processes without naming them and then aborts, and a collective hangs when one dies. So process 0 first
listens at the coordinator's address until all have reported, and the connections stay: they break when the other end dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax._src.clusters import ClusterEnv  # What jax.distributed.initialize asks, which does not tell.

from input_pipeline.records import DataError
from magnet_jax.errors import UserError

_LONGEST = 4096  # Bytes of a message.
_GRACE = 10.0  # Seconds that a process has to say what is wrong itself before it is ended.


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process this is: the address of process 0, how many there are, and its own number.

    devices: numbers of the accelerators of this host that belong to it; None: all.
    """

    coordinator: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator is '{self.coordinator}'; expected the address of process 0 as host:port"
            )
        if not 0 <= self.index < self.count:
            raise UserError(
                f"--process_index is {self.index} of --process_count {self.count}; expected 0 to count - 1"
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_place(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> Place:
    """The place of this process: what is given, else JAX's environment variables, else the cluster (TPU, GKE, Slurm, MPI).

    Raises UserError where something stays unknown.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    index = _number("JAX_PROCESS_ID") if index is None else index
    try:
        coordinator, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, count, index, None, None, 60
        )
    except Exception as error:  # The clusters' metadata fail in many ways.
        raise UserError(f"the cluster does not say which process this is ({error}); {_GIVE}") from error
    found = {"--coordinator": coordinator, "--process_count": count, "--process_index": index}
    if unknown := [name for name, value in found.items() if value is None]:
        raise UserError(f"{', '.join(unknown)}: not given, and no cluster is found that tells; {_GIVE}")
    return Place(coordinator, count, index, None if devices is None else tuple(devices))


_GIVE = "give every process --coordinator=HOST:PORT (of process 0) --process_count=N --process_index=0 to N-1"


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise UserError(f"{variable} is '{text}'; expected a number")
    return None if text is None else int(text)


@contextlib.contextmanager
def joined(place: Place, patience: float) -> Iterator[None]:
    """Joins the processes of a run, for as long as the block runs; nothing else of JAX may be used before.

    patience: seconds to wait for all to start. Raises UserError where one does not start, and where the block fails because
    one is gone. Where the block would wait for such a one for ever, the program ends, with a line that says so.
    """
    if place.count == 1:
        yield
        return
    links, port = _Listener(place, patience).gather() if place.index == 0 else _report(place, patience)
    host = place.coordinator.rpartition(":")[0]
    jax.distributed.initialize(
        f"{host}:{port}",
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
    )
    watch = _Watch(place, links)
    try:
        yield
    except (UserError, DataError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and (gone := watch.gone(_GRACE)):
            raise UserError(gone) from error
        raise
    watch.close()


def end_on_sigterm() -> None:
    """Lets SIGTERM end this process from now on: JAX only notes it, for a loop that asks at every step."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclasses.dataclass
class _Link:
    """A connection to another process, which sends JSON, an object a line."""

    connection: socket.socket
    process: int
    host: str
    unread: bytes = b""

    def send(self, **message) -> None:
        with contextlib.suppress(OSError):  # One that is gone is noticed by reading.
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None) -> dict | None:
        """The next message; None where the connection ends, is silent for `timeout` seconds or talks of other things."""
        try:
            self.connection.settimeout(timeout)
            while b"\n" not in self.unread:
                more = self.connection.recv(_LONGEST)
                self.unread += more
                if not more or len(self.unread) > _LONGEST:
                    return None
            line, _, self.unread = self.unread.partition(b"\n")
            message = json.loads(line)
        except (OSError, ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def __str__(self) -> str:
        return f"process {self.process} (on {self.host})"


class _Listener:
    """Process 0: hears the others' reports."""

    def __init__(self, place: Place, patience: float):
        self.place, self.patience = place, patience
        self.links: dict[int, _Link] = {}

    def gather(self) -> tuple[list[_Link], int]:
        """Connections to all others, which have been told the port of JAX's own service."""
        host, port = self.place.address
        here = host in ("localhost", "127.0.0.1")
        both = not here and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            server = socket.create_server((host if here else "", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at {self.place.coordinator} ({os.strerror(error.errno or 0)}); "
                "give another port by --coordinator"
            ) from error
        start = time.monotonic()
        with server:
            told = start
            while missing := self._missing():
                now = time.monotonic()
                if now - start > self.patience:
                    self._give_up(
                        f"{_processes(missing)} of {self.place.count} did not report to {self.place.coordinator} within "
                        f"{self.patience:.0f} s; see what became of them, and start all again"
                    )
                if now - told > 10:
                    told = now
                    waited = f"{now - start:.0f} of {self.patience:.0f} s"
                    print(f"waiting for {_processes(missing)} of {self.place.count} ({waited})", flush=True)
                server.settimeout(1.0)
                with contextlib.suppress(TimeoutError):
                    self._welcome(server.accept()[0])
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        for link in self.links.values():
            link.send(port=port)
        return list(self.links.values()), port

    def _missing(self) -> list[int]:
        return [i for i in range(1, self.place.count) if i not in self.links]

    def _welcome(self, connection: socket.socket) -> None:
        link = _Link(connection, -1, "?")
        hello = link.receive(2.0)
        index, count = (hello or {}).get("process"), (hello or {}).get("count")
        if not isinstance(index, int) or not isinstance(count, int):
            connection.close()  # Whoever that was.
            return
        link.process = index
        link.host = "".join(filter(str.isprintable, str(hello.get("host"))[:100]))
        wrong = ""
        if count != self.place.count:
            wrong = f"{link} was started with --process_count={count}, process 0 with {self.place.count}"
        elif not 0 < index < count:
            wrong = f"{link} was started with --process_index={index}; expected 1 to {count - 1}"
        elif index in self.links:
            wrong = f"{link} and {self.links[index]} were both started with --process_index={index}"
        if wrong:
            link.send(error=wrong)
            self._give_up(f"{wrong}; start all again")
        self.links[index] = link

    def _give_up(self, line: str) -> None:
        for link in self.links.values():
            link.send(error=line)
        raise UserError(line)


def _report(place: Place, patience: float) -> tuple[list[_Link], int]:
    """Every other process: reports to process 0; returns the connection to it and the port of JAX's service."""
    end = time.monotonic() + patience + 5  # Process 0, which knows who is missing, may give up first.
    while (left := end - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(place.address, timeout=min(left, 5.0))
        except OSError:
            time.sleep(0.3)
            continue
        link = _Link(connection, 0, place.address[0])
        link.send(process=place.index, count=place.count, host=socket.gethostname())
        answer = link.receive(patience + 5) or {}  # Now it is process 0 that waits for the others.
        if isinstance(answer.get("error"), str):
            raise UserError(answer["error"])
        if isinstance(answer.get("port"), int):
            return [link], answer["port"]
        connection.close()
        time.sleep(0.3)
    raise UserError(
        f"process 0 did not answer at {place.coordinator} within {patience:.0f} s; start it, or correct --coordinator"
    )


class _Watch:
    """Listens to the connections while the processes work."""

    def __init__(self, place: Place, links: list[_Link]):
        self._first, self._links, self._lock = place.index == 0, links, threading.Lock()
        self._line, self._concluded, self._closed = "", threading.Event(), False
        for link in links:
            link.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # A host that vanishes sends nothing: after 20 s of silence it is asked, every 5 s, 4 times.
            for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
                if hasattr(socket, name):
                    link.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def gone(self, timeout: float) -> str:
        """Who is gone, in a line; empty where nobody is, after `timeout` seconds."""
        self._concluded.wait(timeout)
        return self._line

    def close(self) -> None:
        """Says that this process has done its work."""
        self._closed = True
        for link in self._links:
            link.send(done=True)

    def _listen(self, link: _Link) -> None:
        message = link.receive(None)
        if message and message.get("done"):
            return
        line = message.get("gone") if message else None
        if not isinstance(line, str):
            line = f"{link} is gone; see what it said last, and start all again: the run goes on from its last checkpoint"
        with self._lock:
            if self._closed or self._line:
                return
            self._line = line
        if self._first:
            for other in self._links:
                other.send(gone=line)
            self._concluded.set()
            time.sleep(_GRACE)
        # The others do not wait: without process 0, JAX would abort them, with many words and none of this.
        if not self._closed:
            print(f"error: {line}", file=sys.stderr, flush=True)
            os._exit(1)


def _processes(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
