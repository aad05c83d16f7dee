"""What a loss of power may leave of a folder, from notes of all that changed in it.

`power_log.c` takes the notes. POSIX promises this alone: bytes are on disk after an
fsync of their file, and names after an fsync of their folder. Whatever came later is
there, or lost, or in part there: names one by one or up to some point, bytes page by
page, and a file's length without its bytes. A rename happens or does not. Permissions
and times are not replayed.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096


@dataclass(eq=False)
class Node:
    """A file, or a folder with `names`; `synced` is what is on disk for sure.

    `changes` are the writes (offset, bytes) and cuts (length, None) since then.
    """

    names: dict[str, "Node"] | None = None
    content: bytes = b""
    synced: bytes = b""
    synced_names: dict[str, "Node"] = field(default_factory=dict)
    changes: list[tuple[int, bytes | None]] = field(default_factory=list)

    def change(self, where: int, data: bytes | None) -> None:
        self.changes.append((where, data))
        self.content = changed(self.content, where, data)


@dataclass(eq=False)
class Renaming:
    """A change of names that comes whole or not at all: (folder, name, node) each."""

    node: Node
    entries: list[tuple[Node, str, Node | None]]

    def apply(self, names: Callable[[Node], dict[str, Node]]) -> None:
        for folder, name, node in self.entries:
            if node is not None:
                names(folder)[name] = node
            elif names(folder).get(name) is self.node:
                del names(folder)[name]


def changed(content: bytes, where: int, data: bytes | None) -> bytes:
    if data is None:
        return content[:where].ljust(where, b"\0")
    return content[:where].ljust(where, b"\0") + data + content[where + len(data) :]


def scan(path: Path) -> Node:
    """A folder as it lies on disk, all of it synced."""
    if path.is_file():
        content = path.read_bytes()
        return Node(content=content, synced=content)
    names = {child.name: scan(child) for child in path.iterdir()}
    return Node(names=names, synced_names=dict(names))


def read_notes(log: bytes) -> Iterator[list]:
    """[what, path, …] of each event; of a write also the bytes."""
    while log:
        line, _, log = log.partition(b"\n")
        what, *more = line.decode().split("\t")[:-1]
        if what == "write":
            size = int(more.pop())
            more.append(log[:size])
            log = log[size:]
        yield [what, *more]


class Disk:
    """A folder while its notes are replayed, one by one."""

    def __init__(self, root: Path):
        self.root = root
        self.top = scan(root)
        self.renamings: list[Renaming] = []  # that no fsync covers

    def find(self, path: str) -> tuple[Node, str]:
        """The folder that a path lies in, and its name there."""
        folder = self.top
        *parents, name = Path(path).relative_to(self.root).parts
        for parent in parents:
            assert folder.names is not None
            folder = folder.names[parent]
        return folder, name

    def node(self, path: str) -> Node:
        if Path(path) == self.root:
            return self.top
        folder, name = self.find(path)
        return folder.names[name]

    def replay(self, event: list) -> None:
        what, path, *more = event
        if what == "sync":
            self.sync(self.node(path))
        elif what in ("write", "cut"):
            self.node(path).change(int(more[0]), more[1] if more[1:] else None)
        elif what == "rename":
            node, to = self.node(path), self.find(more[0])
            self.rename(node, (*to, node), (*self.find(path), None))
        elif what == "remove":
            self.rename(self.node(path), (*self.find(path), None))
        else:
            node = Node(names={} if what == "mkdir" else None)
            self.rename(node, (*self.find(path), node))

    def rename(self, node: Node, *entries: tuple[Node, str, Node | None]) -> None:
        self.renamings.append(Renaming(node, list(entries)))
        self.renamings[-1].apply(lambda folder: folder.names)

    def sync(self, node: Node) -> None:
        if node.names is None:
            node.synced, node.changes = node.content, []
            return
        forced = {
            r for r in self.renamings if any(entry[0] is node for entry in r.entries)
        }
        forced = self.with_what_came_before(forced)
        for renaming in self.renamings:
            if renaming in forced:
                renaming.apply(lambda folder: folder.synced_names)
        self.renamings = [r for r in self.renamings if r not in forced]

    def with_what_came_before(self, chosen: set[Renaming]) -> set[Renaming]:
        """A file that got its second name had its first one."""
        nodes: set[Node] = set()
        closed = set()
        for renaming in reversed(self.renamings):
            if renaming in chosen or renaming.node in nodes:
                closed.add(renaming)
                nodes.add(renaming.node)
        return closed

    def states(self, rng: random.Random) -> Iterator[dict[str, bytes | None]]:
        """What a loss of power may leave now: bytes by path, None for a folder."""
        some = self.renamings[: rng.randint(0, len(self.renamings))]
        any_order = [r for r in self.renamings if rng.random() < 0.5]
        for renamings in ([], self.renamings, some, any_order):
            yield self.left(renamings, lambda node: node.synced)
            yield self.left(renamings, lambda node: node.content)
        yield self.left(self.renamings, lengths_alone)
        yield self.left(some, lambda node: some_pages(node, rng))
        yield self.left(any_order, lambda node: some_pages(node, rng))

    def left(
        self, renamings: list[Renaming], content: Callable[[Node], bytes]
    ) -> dict[str, bytes | None]:
        """What is there if of all that is not synced these came to be."""
        names: dict[Node, dict[str, Node]] = {}

        def names_of(folder: Node) -> dict[str, Node]:
            return names.setdefault(folder, dict(folder.synced_names))

        chosen = self.with_what_came_before(set(renamings))
        for renaming in self.renamings:
            if renaming in chosen:
                renaming.apply(names_of)
        found: dict[str, bytes | None] = {}

        def walk(folder: Node, path: str) -> None:
            for name, node in names_of(folder).items():
                if node.names is None:
                    found[path + name] = content(node)
                else:
                    found[path + name] = None
                    walk(node, f"{path}{name}/")

        walk(self.top, "")
        return found


def lengths_alone(node: Node) -> bytes:
    """As long as it was, with zeros where something was written."""
    content = node.synced
    for where, data in node.changes:
        content = changed(content, where, None if data is None else bytes(len(data)))
    return content


def some_pages(node: Node, rng: random.Random) -> bytes:
    """Some of the changes, and of what was written some pages."""
    content = node.synced
    for where, data in node.changes[: rng.randint(0, len(node.changes))]:
        if data is None:
            content = changed(content, where, None)
            continue
        pages = [data[i : i + PAGE] for i in range(0, len(data), PAGE)]
        kept = [page if rng.random() < 0.5 else bytes(len(page)) for page in pages]
        content = changed(content, where, b"".join(kept))
    return content


def write_state(root: Path, state: dict[str, bytes | None]) -> None:
    """Make an empty folder what `states` gave."""
    for name, content in state.items():  # a folder comes before what is in it
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
