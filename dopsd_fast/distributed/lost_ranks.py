"""Watches the other ranks, so that a rank that is lost shows as one line on the screen and not as a hang.

When contact with a rank is lost, gloo says only that, NCCL waits an hour, and the launcher names the wrong rank. So every rank
learns at the start which process on which host each rank is, and looks for itself whether these processes still run:

  same host    It reads (process id, time at which the process started) from the kernel's list of processes. The time tells a
               process from a later one with the same id.
  other hosts  Rank 0 keeps a TCP connection with each rank elsewhere, on which nothing is sent after a token. The kernel
               closes it when the process ends, however it ends, and its keep-alive probes fail when the host or the network is
               gone. A process that is slow, stopped or swapped out keeps it open, so it is never taken for a dead one.

A rank that ends by itself first leaves a note, in the process group's store and in its own file in the run folder. So a rank
that is gone without a note was killed. The file `<run>/ranks/0001.json` holds rank, host, pid, started, place, and the note as
"end". The others read it when rank 0 is gone, because the store is gone with it. Rank 0 removes the files when all ranks have
ended well.
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
from dopsd_fast.storage.atomic import write_text

PERIOD = 1.0
"""Seconds between two checks of the other ranks."""
GRACE = 10.0
"""Seconds that the main thread has to notice by itself that a rank is gone."""
LINGER = 20.0
"""Seconds that rank 0 waits for the notes of the others before it ends, because the store ends with it."""
MEETING = 120.0
"""Seconds within which all ranks must say who they are, once the process group exists."""
PREFIX = "dopsd_fast/ranks/"
WELL = {"alone": False, "said": False, "lost": []}
"""The note of a rank that has finished, was stopped by the user, or ended with an error that all ranks raise.

    alone  The rank failed with an error of its own.
    said   The user has been told why, in a message of its own.
    lost   It ended because these ranks were lost."""


class LostRank(UserError):
    """Another rank is gone. `speaks` says whether this rank is the one that reports it. `ranks` lists the ranks that were
    killed."""

    def __init__(self, message: str, speaks: bool, ranks: Iterable[int]) -> None:
        super().__init__(message)
        self.speaks, self.ranks = speaks, sorted(ranks)


@dataclass(frozen=True)
class RankProcess:
    """Identifies the process of one rank."""

    rank: int
    host: str
    pid: int
    started: int
    """Clock ticks between the boot of the host and the start of the process."""
    place: str
    """The boot and the process namespace in which `pid` means this process. It is empty where the system does not tell."""

    @classmethod
    def me(cls, rank: int) -> RankProcess:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
            return cls(rank, socket.gethostname(), os.getpid(), started(os.getpid()) or 0, place)
        except OSError:
            return cls(rank, socket.gethostname(), os.getpid(), 0, "")

    def runs(self) -> bool:
        """Tells whether the process still runs. Only a process at the same place may ask."""
        return started(self.pid) in (self.started, -1)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on host {self.host})"


def started(pid: int) -> int | None:
    """Returns when the process started, in clock ticks since boot, None if it has ended, or -1 if that cannot be told now."""
    try:  # The file reads "pid (name) state ...", and the name may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:  # such as too many open files
        return -1
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass(frozen=True)
class Verdict:
    """What has become of the run: `lost` ranks were killed, or another rank has failed, and rank `speaker` reports it."""

    text: str
    """The line for the user. It is empty where the rank that failed has given its reason itself."""
    speaker: int
    lost: tuple[int, ...]


class RankWatch:
    """Watches the ranks of this run from within one of them.

        with RankWatch() as watch:      # leaves a note at the end that says how this rank ended
            ...init_distributed()
            watch.meet()                # from here on a daemon thread watches the others
            watch.register(folder)      # the run folder

    The thread looks every PERIOD seconds. When a rank is gone and the main thread has not noticed it within GRACE seconds,
    because it waits in a collective or computes, the thread reports it and ends this process with os._exit(2). That is safe at
    any moment: checkpoints, exports and the cache are written under a temporary name and renamed once they are whole and on the
    disk, and a torn line of metrics is dropped when the run continues.
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
        return [process for process in self.everyone if process.rank != self.rank]

    def name(self, rank: int) -> str:
        return f"rank {rank} on host {self.everyone[rank].host}"

    # ---- coming ------------------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Learns which processes the other ranks are, and starts to watch them. Every rank must call it once the process group
        exists, because each waits until all have said who they are."""
        import torch.distributed as group

        self.rank, world = group.get_rank(), group.get_world_size()
        self.everyone = [RankProcess.me(self.rank)]
        if world == 1:
            return
        # The watch has its own connection to the store: a call that waits on the group's would block the other threads.
        store: Any = group.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=MEETING))
        self._store.set(f"{PREFIX}{self.rank}", json.dumps(asdict(self.everyone[0])))
        self.everyone = [RankProcess(**json.loads(self._store.get(f"{PREFIX}{rank}"))) for rank in range(world)]
        if any(self._is_far(process) for process in self.others):
            self._connect()
        self._store.set_timeout(timedelta(seconds=5))
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def register(self, folder: Path) -> None:
        """Writes this rank's file into the run folder, over the file that an earlier run may have left."""
        if not self.others:
            return
        self.folder = folder / "ranks"
        with contextlib.suppress(OSError):  # the run itself reports a full disk where it must write
            self.folder.mkdir(exist_ok=True)
            self._write(asdict(self.everyone[self.rank]))
            for file in self.folder.glob("*.json*") if self.rank == 0 else ():
                if file.name.partition(".")[0] not in {f"{process.rank:04}" for process in self.everyone}:
                    file.unlink()  # an earlier run with more ranks left it

    def _write(self, content: dict[str, Any]) -> None:
        assert self.folder is not None
        write_text(self.folder / f"{self.rank:04}.json", json.dumps(content) + "\n", flush=False)

    # ---- looking -----------------------------------------------------------------------------------------------------

    def missing(self, error: BaseException) -> LostRank:
        """Returns the exception to raise when a collective has failed with `error`. It names the rank that is gone, if one is
        found to be gone within GRACE seconds."""
        with self._lock:
            self._busy = True  # the main thread takes care of it: the watching thread must not end the process
        ends = time.monotonic() + GRACE
        while (verdict := self.verdict()) is None and time.monotonic() < ends:
            time.sleep(0.1)
        if verdict is not None:
            return LostRank(verdict.text, verdict.speaker == self.rank and bool(verdict.text), verdict.lost)
        said = " ".join(str(error).split())[:120]
        text = f"rank {self.rank} has no contact with another rank, though all seem to be there ({said}...); {self._hint()}"
        return LostRank(text, True, ())

    def verdict(self) -> Verdict | None:
        """Returns which ranks were killed or have failed, or None if all others run or have ended as they should."""
        with self._lock:
            lost: set[int] = set()
            failed: set[int] = set()
            for process in self.others:
                if process.rank in self._notes or self._ended(process):
                    note = self._note(process)
                    if note is None:
                        lost.add(process.rank)
                    elif note["lost"]:
                        lost.update(note["lost"])
                    elif note["alone"]:
                        failed.add(process.rank)
            lost.discard(self.rank)
            if lost:
                left = [process.rank for process in self.everyone if process.rank not in lost]
                return Verdict(f"{self._gone(sorted(lost))}; {self._hint()}", left[0], tuple(sorted(lost)))
            if failed:
                left = [process.rank for process in self.everyone if process.rank not in failed]
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

    def _is_far(self, process: RankProcess) -> bool:
        here = self.everyone[self.rank].place
        return process.place != here or not here

    def _ended(self, process: RankProcess) -> bool:
        return process.rank in self._cut if self._is_far(process) else not process.runs()

    def _note(self, process: RankProcess) -> dict[str, Any] | None:
        """Returns the note that a rank has left (see WELL), or None if it has left none."""
        if process.rank not in self._notes:
            found: dict[str, Any] = {}
            key = f"{PREFIX}{process.rank}/end"
            with contextlib.suppress(RuntimeError, ValueError):  # the store is gone if rank 0 is
                if self._store.check([key]):
                    found = json.loads(self._store.get(key))
            if not found and self.folder is not None:
                file = self.folder / f"{process.rank:04}.json"
                with contextlib.suppress(OSError, ValueError, KeyError):
                    content = json.loads(file.read_text(encoding="utf-8"))
                    if (content["pid"], content["started"]) == (process.pid, process.started):  # an earlier run's file differs
                        found = content["end"]
            if not found:
                return None
            self._notes[process.rank] = found
        return self._notes[process.rank]

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Looks after the other ranks until this one leaves. It ends the process when a rank is gone for GRACE seconds."""
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
        """Reports a lost rank, if there is one. SIGTERM calls this until the trainer installs its own handlers, because the
        launcher sends SIGTERM when a rank is gone."""
        verdict = self.verdict()
        if verdict is not None:
            self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        """Prints the verdict if this rank is to speak, and leaves this rank's note."""
        if verdict.speaker == self.rank and verdict.text:
            with contextlib.suppress(OSError):  # the line break ends whatever a progress bar has written
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nerror: {verdict.text}\n".encode())
        self._leave_note({"alone": not verdict.lost, "said": True, "lost": list(verdict.lost)})

    # ---- connections between hosts -----------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Opens the connections: rank 0 listens, and each rank at another place connects to it. Where that fails, only the
        communication library notices that a rank of another host is gone."""
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
        """Watches a connection. The kernel takes it for cut when probes stay unanswered for 45 seconds."""
        assert self._lines is not None
        line.setblocking(False)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 7)):
            if hasattr(socket, option):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._lines.register(line, selectors.EVENT_READ, rank)

    def _listen(self) -> None:
        """Waits PERIOD seconds, or until a connection is opened or cut, and notes the ranks whose connection is cut."""
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
        """Accepts a rank's connection. One that does not begin with the token of this run is closed, because it may come from
        any program on the network."""
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
        """Leaves the note that says how this rank ends: well or with an error that all ranks raise, because of ranks that were
        lost, or alone with `error`. Rank 0 then waits up to LINGER seconds for the notes of the others."""
        if not self.others or self._over.is_set():
            return
        with self._lock:
            self._busy = True
            lost = error.ranks if isinstance(error, LostRank) else []
            alone = error is not None and not isinstance(error, AgreedError | LostRank)
            self._leave_note({"alone": alone, "said": alone and isinstance(error, UserError), "lost": lost})
        ends = time.monotonic() + LINGER
        while self.rank == 0 and time.monotonic() < ends and not all(map(self._is_off, self.others)):
            time.sleep(0.02)
        self._over.set()
        if self.rank == 0 and self.folder is not None:
            with contextlib.suppress(OSError):  # after a failure, files stay in the folder
                for process in self.everyone:
                    if not alone and not lost and (process.rank == 0 or self._notes.get(process.rank) == WELL):
                        (self.folder / f"{process.rank:04}.json").unlink(missing_ok=True)
                self.folder.rmdir()

    def _is_off(self, process: RankProcess) -> bool:
        """Tells whether nothing more will come from a rank: it has left its note, or has ended without one."""
        with self._lock:
            ended = self._ended(process)  # asked before the note: a process that has ended leaves none afterwards
            return self._note(process) is not None or ended

    def _leave_note(self, end: dict[str, Any]) -> None:
        """Writes this rank's note, first to its file, because rank 0 removes the file as soon as the store has the note."""
        with contextlib.suppress(OSError):
            if self.folder is not None:
                self._write(asdict(self.everyone[self.rank]) | {"end": end})
        with self._lock, contextlib.suppress(RuntimeError):
            self._store.set(f"{PREFIX}{self.rank}/end", json.dumps(end))
