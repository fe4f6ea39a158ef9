"""One decision on all ranks: an error of one is an error of all, what rank 0 finds is what all go on with, and every rank runs
the same program with the same settings on the same model and data.

An account is {section: {name: value}}, JSON-able. Ranks exchange its digest; only where one differs from rank 0's is rank 0's
account sent around, so that each rank can name its first difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as group

from dopsd_fast.errors import AgreedError, UserError
from dopsd_fast.storage.digests import digest

Account = dict[str, dict[str, Any]]
T = TypeVar("T")

SAME_DATA = "give every host the same data set"


class Consensus:
    """Every method is a collective call.

    name: what a rank is called in messages. places: what "{model}" and "{data}" in the name of a difference stand for, the
    settings model.path and data.path."""

    def __init__(self, name: Callable[[int], str], places: dict[str, str]) -> None:
        self.rank, self.world, self.name, self.places = group.get_rank(), group.get_world_size(), name, places

    def rank0(self, call: Callable[[], T]) -> T:
        """The result of `call` on rank 0, on every rank; its UserError too."""
        box: list[Any] = [None]
        with self.together():
            if self.rank == 0:
                box[0] = call()
        group.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A UserError in the block on one rank is one on all, with the same text. A rank that fails must not miss collective
        calls that the others make in the block, other than `agree` and `compare`."""
        problem = ""
        try:
            yield
        except AgreedError:
            raise
        except UserError as error:
            problem = f"{self.name(self.rank)}: {error}" if self.rank else str(error)
        self.agree(problem)

    def agree(self, problem: str = "") -> None:
        """Raises AgreedError on every rank when one has a problem."""
        if found := self.first_text(problem):
            raise AgreedError(found)

    def compare(self, account: Account) -> None:
        """Raises AgreedError on every rank when one has another account than rank 0, naming it and what differs."""
        self.agree()  # a rank that has failed is not there for what follows
        self.agree(self._difference(account))

    def first_text(self, text: str) -> str:
        """The same text on every rank: of those that are not empty, the first that does not point to another rank."""
        texts: list[Any] = [None] * self.world
        group.all_gather_object(texts, text)
        return min(filter(None, texts), key=lambda one: "another rank" in one, default="")

    def _difference(self, account: Account) -> str:
        """What this rank has otherwise than rank 0, as the text of an error; empty if nothing."""
        digests: list[Any] = [None] * self.world
        group.all_gather_object(digests, digest(account))
        if len(set(digests)) == 1:
            return ""
        first: list[Any] = [account if self.rank == 0 else None]
        group.broadcast_object_list(first)
        found = describe(first[0], account, self.name(self.rank), self.name(0))
        return f"{found[0].format(**self.places)}{found[1]}" if found else ""


def describe(first: Account, mine: Account, me: str, other: str) -> tuple[str, str] | None:
    """(setting that is concerned, text) of the first difference; `first` is rank 0's account, `other` its name."""
    for section, theirs in first.items():
        ours = mine[section]
        if section == "records" and len(theirs) != len(ours):
            return "data.path={data}: ", f"{me} reads {len(ours)} records, {other} {len(theirs)}: {SAME_DATA}"
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            old, new = theirs.get(name), ours.get(name)
            if old == new:
                continue
            if section == "versions":
                return "", f"{me} runs {name} {new}, {other} {old}: install the same on every host"
            if section == "settings":
                return "", f"{me} has {name}={new!r}, {other} {name}={old!r}: start every rank with the same settings"
            if section == "model":
                what = "has other contents" if old and new else f"is only on {other if old else me}"
                return "model.path={model}: ", f"{name} {what}, comparing {me} with {other}: give all the same model"
            record = f"record {name} ({(new or old or {}).get('file')})"
            return "data.path={data}: ", (f"{me} reads other records than {other}: {record} differs in its "
                                          f"{_field(old or {}, new or {})}: {SAME_DATA}")
    return None


def _field(old: dict[str, Any], new: dict[str, Any]) -> str:
    for name in [*old, *new]:
        if old.get(name) == new.get(name):
            continue
        if name == "prompts":
            theirs, ours = old.get(name) or {}, new.get(name) or {}
            prompts = (prompt for prompt in [*theirs, *ours] if theirs.get(prompt) != ours.get(prompt))
            return f"prompt {next(prompts, '(the order of its prompts)')}"
        return name
    return "fields"
