"""The other ranks: who they are, and whether one of them is gone. A lost rank is one line on the screen, not a hang.

When contact with a rank is lost, the communication library says no more than that (gloo), or waits an hour (NCCL), and the
launcher names the wrong rank. So every rank knows from the start which process on which host each rank is, and looks itself:

  same host    the kernel's list of processes: (process id, time at which it started), so that a reused id is no mistake
  other hosts  a TCP connection between rank 0 and each rank elsewhere, on which nothing is ever sent. The kernel closes it
               when the process ends, however it ends, and its keep-alive probes fail when the host or the network is gone. A
               slow, stopped or swapped-out process keeps it open, so it is never taken for a dead one.

A rank that ends by itself leaves a note first, in the process group's store and in its file in the run folder, so that what is
gone without a note was killed. `<run>/ranks/0001.json` holds rank, host, pid, started, place, and the note as "end". Survivors
read it when rank 0, and with it the store, is gone; rank 0 removes the files when all have ended well.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dopsd_fast.errors import AgreedError, UserError

PERIOD = 1.0
"""Seconds between two looks."""
GRACE = 10.0
"""Seconds that the main thread has to notice for itself that a rank is gone."""
LINGER = 20.0
"""Seconds that rank 0, which holds the store, waits for the notes of the others before it ends."""
MEETING = 120.0
"""Seconds within which all ranks say who they are, once they are in contact."""
PREFIX = "dopsd_fast/ranks/"
WELL = {"alone": False, "said": False, "lost": []}
"""The note of a rank that has finished, was stopped, or ended with an error that all ranks raise."""


class LostPeer(UserError):
    """Another rank is gone. `speaks`: this rank is the one that says so. `ranks`: those that were killed."""

    def __init__(self, message: str, speaks: bool, ranks: Iterable[int]) -> None:
        super().__init__(message)
        self.speaks, self.ranks = speaks, sorted(ranks)


@dataclass(frozen=True)
class RankProcess:
    """One rank's process."""

    rank: int
    host: str
    pid: int
    started: int
    """Clock ticks from the boot of the host to the start of the process."""
    place: str
    """Where `pid` means this process: boot and process namespace. Empty where the system does not tell."""

    @classmethod
    def me(cls, rank: int) -> RankProcess:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
            return cls(rank, socket.gethostname(), os.getpid(), started(os.getpid()) or 0, place)
        except OSError:
            return cls(rank, socket.gethostname(), os.getpid(), 0, "")

    def runs(self) -> bool:
        """Whether the process is there; asked at its own place."""
        return started(self.pid) in (self.started, -1)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on host {self.host})"


def started(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it has ended, -1 if that cannot be told now."""
    try:  # "pid (name) state ...", and the name may hold anything
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:  # such as too many open files
        return -1
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass(frozen=True)
class Verdict:
    text: str
    """Empty where the rank that failed has said why itself."""
    speaker: int
    lost: tuple[int, ...]


class RankWatch:
    """The ranks of this run, as one of them sees them.

        with RankWatch() as watch:      # says at the end how this rank ended
            ...init_distributed()
            watch.meet()            # a daemon thread watches the others from here on
            watch.register(folder)  # the run folder

    The thread looks every PERIOD seconds. When a rank is gone and the main thread has not noticed within GRACE seconds, because
    it waits in a collective or computes, the thread says so and ends this process with os._exit(2). That is safe at any moment:
    checkpoints, exports and the cache are written under a temporary name and renamed once they are whole and on the disk, and
    a torn line of metrics is dropped when the run continues.
    """

    def __init__(self) -> None:
        self.rank, self.everyone = 0, [RankProcess.me(0)]
        self.folder: Path | None = None
        self._store: Any = None
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._busy = False
        self._notes: dict[int, dict[str, Any]] = {}
        self._cut: set[int] = set()
        self._lines: selectors.BaseSelector | None = None
        self._token = ""

    def __enter__(self) -> RankWatch:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.leave(error)

    @property
    def others(self) -> list[RankProcess]:
        return [peer for peer in self.everyone if peer.rank != self.rank]

    def name(self, rank: int) -> str:
        return f"rank {rank} on host {self.everyone[rank].host}"

    # ---- coming ------------------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Learns who the others are, and starts to watch them. Every rank calls it, when the process group exists."""
        import torch.distributed as group

        self.rank, world = group.get_rank(), group.get_world_size()
        self.everyone = [RankProcess.me(self.rank)]
        if world == 1:
            return
        # A connection of its own: a call that waits on the group's would keep the other threads out.
        store: Any = group.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=MEETING))
        self._store.set(f"{PREFIX}{self.rank}", json.dumps(asdict(self.everyone[0])))
        self.everyone = [RankProcess(**json.loads(self._store.get(f"{PREFIX}{rank}"))) for rank in range(world)]
        if any(self._is_far(peer) for peer in self.others):
            self._connect()
        self._store.set_timeout(timedelta(seconds=5))
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def register(self, folder: Path) -> None:
        """Writes this rank's file into the run folder, over one that an earlier run left."""
        if not self.others:
            return
        self.folder = folder / "ranks"
        with contextlib.suppress(OSError):  # a full disk shows itself where it matters
            self.folder.mkdir(exist_ok=True)
            self._write(asdict(self.everyone[self.rank]))
            for file in self.folder.glob("*.json*") if self.rank == 0 else ():
                if file.name.partition(".")[0] not in {f"{peer.rank:04}" for peer in self.everyone}:
                    file.unlink()  # of a run with more ranks

    def _write(self, content: dict[str, Any]) -> None:
        assert self.folder is not None
        part = self.folder / f"{self.rank:04}.json.part"
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")
        part.replace(self.folder / f"{self.rank:04}.json")

    # ---- looking -----------------------------------------------------------------------------------------------------

    def missing(self, error: BaseException) -> LostPeer:
        """What to raise when a collective failed with `error`: the rank that is gone, if that shows within GRACE seconds."""
        with self._lock:
            self._busy = True  # this thread is looking: the other one need not end the process
        ends = time.monotonic() + GRACE
        while (verdict := self.verdict()) is None and time.monotonic() < ends:
            time.sleep(0.1)
        if verdict is not None:
            return LostPeer(verdict.text, verdict.speaker == self.rank and bool(verdict.text), verdict.lost)
        said = " ".join(str(error).split())[:120]
        text = f"rank {self.rank} has no contact with another rank, though all seem to be there ({said}...); {self._hint()}"
        return LostPeer(text, True, ())

    def verdict(self) -> Verdict | None:
        """Which ranks are gone, and were not to go; None if all are there or ended with this one's consent."""
        with self._lock:
            lost: set[int] = set()
            failed: set[int] = set()
            for peer in self.others:
                if peer.rank in self._notes or self._ended(peer):
                    note = self._note(peer)
                    if note is None:
                        lost.add(peer.rank)
                    elif note["lost"]:
                        lost.update(note["lost"])
                    elif note["alone"]:
                        failed.add(peer.rank)
            lost.discard(self.rank)
            if lost:
                left = [peer.rank for peer in self.everyone if peer.rank not in lost]
                return Verdict(f"{self._gone(sorted(lost))}; {self._hint()}", left[0], tuple(sorted(lost)))
            if failed:
                left = [peer.rank for peer in self.everyone if peer.rank not in failed]
                said = any(self._notes[rank]["said"] for rank in failed)
                text = f"{self.everyone[min(failed)]} has failed, see its message; {self._hint()}"
                return Verdict("" if said else text, left[0], ())
            return None

    def _gone(self, lost: list[int]) -> str:
        names = [str(self.everyone[rank]).removeprefix("rank ") for rank in lost]
        far = any(self._is_far(self.everyone[rank]) for rank in lost)
        one = len(lost) == 1
        what = f"{'has' if one else 'have'} ended{',' if far else ' or'} {'was' if one else 'were'} killed"
        return f"{'rank' if one else 'ranks'} {', '.join(names)} {what}{' or cannot be reached' if far else ''}"

    def _hint(self) -> str:
        from dopsd_fast.storage import checkpoints

        found = None
        if self.folder is not None:
            with contextlib.suppress(OSError):
                found = checkpoints.latest(self.folder.parent / "checkpoints")
        if found is None:
            return "there is no checkpoint yet, resume=auto begins anew"
        return f"resume=auto continues from the last checkpoint (step {int(found.name.partition('-')[2])})"

    def _is_far(self, peer: RankProcess) -> bool:
        here = self.everyone[self.rank].place
        return peer.place != here or not here

    def _ended(self, peer: RankProcess) -> bool:
        return peer.rank in self._cut if self._is_far(peer) else not peer.runs()

    def _note(self, peer: RankProcess) -> dict[str, Any] | None:
        """What a rank that is gone has left: {"alone", "said", "lost"}."""
        if peer.rank not in self._notes:
            found: dict[str, Any] = {}
            key = f"{PREFIX}{peer.rank}/end"
            with contextlib.suppress(RuntimeError, ValueError):  # with rank 0 the store is gone
                if self._store.check([key]):
                    found = json.loads(self._store.get(key))
            if not found and self.folder is not None:
                file = self.folder / f"{peer.rank:04}.json"
                with contextlib.suppress(OSError, ValueError, KeyError):
                    content = json.loads(file.read_text(encoding="utf-8"))
                    if (content["pid"], content["started"]) == (peer.pid, peer.started):  # not of an earlier run
                        found = content["end"]
            if not found:
                return None
            self._notes[peer.rank] = found
        return self._notes[peer.rank]

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        since: float | None = None
        while not self._over.is_set():
            self._listen()
            verdict = self.verdict()
            if verdict is None:
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > GRACE:
                with self._lock:
                    if not self._busy and not self._over.is_set():
                        self._end(verdict)
                        os._exit(2)

    def told(self) -> None:
        """What SIGTERM does until the trainer has handlers of its own: the launcher sends it when a rank is gone."""
        verdict = self.verdict()
        if verdict is not None:
            self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        if verdict.speaker == self.rank and verdict.text:
            with contextlib.suppress(OSError):  # a line of its own, whatever a progress bar has written
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nerror: {verdict.text}\n".encode())
        self._leave_note({"alone": not verdict.lost, "said": True, "lost": list(verdict.lost)})

    # ---- connections between hosts -----------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Rank 0 listens; each rank at another place connects to it. Where that fails, only the communication library notices
        that a rank of another host is gone."""
        self._lines = selectors.DefaultSelector()
        key = f"{PREFIX}line"
        if self.rank == 0:
            try:
                server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
            except (OSError, ValueError):
                server = socket.create_server(("", 0))
            server.setblocking(False)
            self._token = secrets.token_hex(16)
            self._lines.register(server, selectors.EVENT_READ, None)
            self._store.set(key, f"{server.getsockname()[1]} {self._token}")
        elif self._is_far(self.everyone[0]):
            port, token = self._store.get(key).decode().split()
            with contextlib.suppress(OSError):
                line = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=GRACE)
                line.sendall(f"{token} {self.rank:08}".encode())
                self._keep(line, 0)

    def _keep(self, line: socket.socket, rank: int) -> None:
        """Watches a connection. Unanswered for 45 seconds, it counts as cut."""
        assert self._lines is not None
        line.setblocking(False)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 7)):
            if hasattr(socket, option):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._lines.register(line, selectors.EVENT_READ, rank)

    def _listen(self) -> None:
        """Waits PERIOD seconds, or until a connection comes or goes."""
        if self._lines is None:
            self._over.wait(PERIOD)
            return
        for key, _ in self._lines.select(PERIOD):
            line: Any = key.fileobj
            if key.data is None:
                self._accept(line)
                continue
            try:
                gone = not line.recv(1)
            except BlockingIOError:
                continue
            except OSError:
                gone = True
            if gone:
                self._lines.unregister(line)
                line.close()
                self._cut.add(key.data)

    def _accept(self, server: socket.socket) -> None:
        """A connection that does not begin with the token of this run is nobody's."""
        with contextlib.suppress(OSError, ValueError):
            line, _ = server.accept()
            line.settimeout(PERIOD)
            with line.makefile("rb") as stream:
                said, _, rank = stream.read(len(self._token) + 9).partition(b" ")
            if secrets.compare_digest(said, self._token.encode()):
                self._keep(line, int(rank))
            else:
                line.close()

    # ---- going -------------------------------------------------------------------------------------------------------

    def leave(self, error: BaseException | None = None) -> None:
        """Says how this rank ends: well or in agreement with the others, because of ranks that were lost, or alone."""
        if not self.others or self._over.is_set():
            return
        with self._lock:
            self._busy = True
            lost = error.ranks if isinstance(error, LostPeer) else []
            alone = error is not None and not isinstance(error, AgreedError | LostPeer)
            self._leave_note({"alone": alone, "said": alone and isinstance(error, UserError), "lost": lost})
        ends = time.monotonic() + LINGER
        while self.rank == 0 and time.monotonic() < ends and not all(map(self._is_off, self.others)):
            time.sleep(0.02)
        self._over.set()
        if self.rank == 0 and self.folder is not None:
            with contextlib.suppress(OSError):  # what is left after a failure stays in it
                for peer in self.everyone:
                    if not alone and not lost and (peer.rank == 0 or self._notes.get(peer.rank) == WELL):
                        (self.folder / f"{peer.rank:04}.json").unlink(missing_ok=True)
                self.folder.rmdir()

    def _is_off(self, peer: RankProcess) -> bool:
        with self._lock:
            ended = self._ended(peer)  # asked first: after that no note comes any more
            return self._note(peer) is not None or ended

    def _leave_note(self, end: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the file first: rank 0 removes it as soon as the store has the note
            if self.folder is not None:
                self._write(asdict(self.everyone[self.rank]) | {"end": end})
        with self._lock, contextlib.suppress(RuntimeError):
            self._store.set(f"{PREFIX}{self.rank}/end", json.dumps(end))
