"""How the models of a hub descend from each other: sources, 4-bit bases, adapters, merges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from qlformat.hub_server.descent import Descents, Facts, Parent
from qlformat.hub_server.index import Index, Repo
from qlformat.hub_server.refusals import Refused

MAX_NODES = 200
"""A lineage of more models is cut."""

VERBS = {"quantized": "quantized from", "adapter": "adapter for", "merge": "merged from", "finetune": "fine-tuned from"}


@dataclass(frozen=True)
class Link:
    """From a model to one that it was made from.

    Attributes:
        relation: in words, such as "adapter for".
        parent: name of that one.
        pin: "fits", "older" (fits an earlier commit of it), "differs", or "" where nothing pins it.
        fingerprint: what it is pinned to, or None.
    """

    relation: str
    parent: str
    pin: str = ""
    fingerprint: str | None = None


@dataclass(frozen=True)
class Node:
    """A model of a lineage.

    Attributes:
        name: NAMESPACE/NAME, or what is known of a model that is not here.
        kind: see Facts; "" for one that is not here.
        here: whether this hub has it, and the reader may see it.
        links: to what it was made from.
    """

    name: str
    kind: str = ""
    here: bool = False
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Lineage:
    """Generations, the oldest first; a model comes after everything that it was made from.

    Attributes:
        cut: whether there are more than MAX_NODES models.
    """

    generations: tuple[tuple[Node, ...], ...]
    cut: bool = False

    @property
    def alone(self) -> bool:
        """Whether the repository has no relatives."""
        return sum(map(len, self.generations)) <= 1


class Family:
    """The models that one reader may see, and what connects them.

    Args:
        index: resolves former names and commits.
        descents: reads facts.
        visible: the model repositories that the reader may see.
    """

    def __init__(self, index: Index, descents: Descents, visible: Iterable[Repo]) -> None:
        self._index = index
        self._descents = descents
        self._repos = {repo.name: repo for repo in sorted(visible, key=lambda repo: (repo.created, repo.key))}
        self._facts: dict[str, Facts] = {name: descents.of(repo) for name, repo in self._repos.items()}
        self._names = {name.lower(): name for name in self._repos}
        self._by_fingerprint: dict[str, list[str]] = {}
        self._by_weights: dict[str, list[str]] = {}
        for name, facts in self._facts.items():
            if facts.fingerprint:
                self._by_fingerprint.setdefault(facts.fingerprint, []).append(name)
            if facts.weights:
                self._by_weights.setdefault(facts.weights, []).append(name)
        self._nodes = {name: self._node(name) for name in self._repos}

    def of(self, repo: Repo) -> Lineage:
        """The ancestors and descendants of a repository."""
        children: dict[str, list[str]] = {}
        for node in self._nodes.values():
            for link in node.links:
                children.setdefault(link.parent, []).append(node.name)
        chosen = [repo.name]
        for follow in (self._parents, lambda name: children.get(name, [])):
            _reach(chosen, repo.name, follow)
        cut = len(chosen) > MAX_NODES
        nodes = [self._nodes.get(name) or Node(name) for name in chosen[:MAX_NODES]]
        return Lineage(_generations(nodes), cut)

    def _parents(self, name: str) -> list[str]:
        node = self._nodes.get(name)
        return [link.parent for link in node.links] if node else []

    def _node(self, name: str) -> Node:
        facts = self._facts[name]
        links: dict[str, Link] = {}
        for parent in facts.parents:
            link = self._link(parent, name)
            known = links.get(link.parent) if link else None
            if link and known is None:
                links[link.parent] = link
            elif link and known and link.pin and not known.pin:
                links[link.parent] = replace(known, pin=link.pin, fingerprint=link.fingerprint)
        return Node(name, facts.kind, here=True, links=tuple(links.values()))

    def _link(self, parent: Parent, child: str) -> Link | None:
        """The link to a parent, found by content before it is looked up by name; None for a model's own name."""
        verb = VERBS.get(parent.relation, "made from")
        named = self._present(parent.name)
        same = self._by_fingerprint.get(parent.fingerprint or "", []) or self._by_weights.get(parent.sha256 or "", [])
        same = [name for name in same if name != child]
        if same:
            found = named if named in same else same[0]
            return Link(verb, found, "fits", parent.fingerprint or parent.sha256)
        if named == child:
            return None
        if named:
            return Link(verb, named, self._pin_of(parent, named), parent.fingerprint or parent.sha256)
        if parent.name and "/" in parent.name:
            return Link(verb, parent.name, "", parent.fingerprint)
        known_by = parent.fingerprint or parent.sha256
        return Link(verb, f"{parent.name or 'a model'} ({known_by[:12]}…)", "", known_by) if known_by else None

    def _present(self, name: str | None) -> str | None:
        """The present name of a repository that is here."""
        if not name or "/" not in name:
            return None
        found = self._names.get(name.lower())
        if found is None:
            try:
                found = self._index.repo("model", name).name  # a former name
            except Refused:
                return None
        return found if found in self._repos else None

    def _pin_of(self, parent: Parent, name: str) -> str:
        """Whether a parent that is here is still what the child was made from."""
        if parent.fingerprint is None or self._facts[name].fingerprint is None:
            return ""
        repo = self._repos[name]
        try:
            then = self._descents.of(repo, self._index.commit(repo, parent.revision or ""))
        except Refused:
            return "differs"
        return "older" if then.fingerprint == parent.fingerprint else "differs"


def _reach(chosen: list[str], start: str, follow: Callable[[str], list[str]]) -> None:
    """Add everything that can be reached, the nearest first, up to one more than MAX_NODES."""
    seen, pending = {start}, [start]
    while pending and len(chosen) <= MAX_NODES:
        for name in follow(pending.pop(0)):
            if name not in seen:
                seen.add(name)
                pending.append(name)
                if name not in chosen:
                    chosen.append(name)


def _generations(nodes: list[Node]) -> tuple[tuple[Node, ...], ...]:
    """Put every node after its parents. Cards may claim a circle: such links count from the one met first."""
    by_name = {node.name: node for node in nodes}
    depth: dict[str, int] = {}
    for node in nodes:
        _measure(node.name, by_name, depth)
    rows: dict[int, list[Node]] = {}
    for node in sorted(nodes, key=lambda node: node.name.lower()):
        rows.setdefault(depth[node.name], []).append(node)
    return tuple(tuple(rows[level]) for level in sorted(rows))


def _measure(name: str, nodes: Mapping[str, Node], depth: dict[str, int]) -> None:
    """The length of the longest way up from each node reached, without recursion."""
    stack, open_ = [name], set[str]()
    while stack:
        current = stack[-1]
        parents = [link.parent for link in nodes[current].links if link.parent in nodes]
        waiting = [parent for parent in parents if parent not in depth and parent not in open_ and parent != current]
        open_.add(current)
        if waiting and current not in depth:
            stack.extend(waiting)
            continue
        stack.pop()
        depth.setdefault(current, max((depth[parent] + 1 for parent in parents if parent in depth), default=0))
