"""Trees of partial thoughts on the host. A search looks at many trees at once; each tree is plain Python."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, slots=True)
class Node:
    """A partial thought: the tokens of one step behind its parent's.

    Attributes:
        parent: None: this is the root, which stands for the prompt.
        tokens: ids of the step.
        value: q, in the units of the evaluation.
        visits: how often the node was evaluated or passed through.
        total: sum of the values that were backed up through it, for mean backups.
        prior: probability of the step among its siblings; 1 without one.
        is_terminal: the completion ends here.
        children: in order of their creation.
        note: what an operator left here, such as the prediction.
    """

    parent: "Node | None" = None
    tokens: list[int] = field(default_factory=list)
    value: float = 0.0
    visits: int = 0
    total: float = 0.0
    prior: float = 1.0
    is_terminal: bool = False
    children: list["Node"] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)

    def add(self, child: "Node") -> "Node":
        """Append a child and return it."""
        child.parent = self
        self.children.append(child)
        return child

    def path(self) -> list["Node"]:
        """Return the nodes from the root to this one."""
        found, node = [], self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def all_tokens(self) -> list[int]:
        """Return the ids of the completion up to this node."""
        return [token for node in self.path() for token in node.tokens]

    def walk(self) -> Iterator["Node"]:
        """Yield this node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def depth(self) -> int:
        """Return the number of steps before and at this node; 0 for the root."""
        return len(self.path()) - 1
