"""The recorded graph as plain lists, and which of its values are weights."""

from __future__ import annotations

from functools import cached_property

from torch import fx

_MATRIX_PRODUCTS = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "addmm", "addbmm"),
    *("baddbmm", "addmv", "einsum", "tensordot", "bilinear", "inner", "outer", "ger", "kron"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "multi_head_attention_forward",
}
_PRODUCTS = _MATRIX_PRODUCTS | {
    *("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply", "addcmul", "addcmul_"),
    *("div", "__truediv__", "lerp", "pow", "__pow__"),
}

# A weight's name, and which part of it, "" for all.
Part = tuple[str, str]
_TAKES = {"__getitem__", "select", "narrow"}


class Flow:
    """The recorded graph as plain lists: which values are computed from which, by position."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        place = {node: index for index, node in enumerate(self.nodes)}
        self.sources = [[place[n] for n in node.all_input_nodes] for node in self.nodes]
        self.readers = [[place[n] for n in node.users if n in place] for node in self.nodes]
        self.real = [bool(node.meta.get("real", node.op == "output")) for node in self.nodes]
        self._place = place

    def name(self, index: int) -> str:
        node = self.nodes[index]
        return str(node.meta.get("name", node.op))

    def place(self, index: int) -> tuple[object, ...]:
        """What the same call of another step has in common: name, module, and place in the file."""
        meta = self.nodes[index].meta
        return (self.name(index), meta.get("module"), meta.get("location"), meta.get("spot"))

    def position(self, node: fx.Node) -> int:
        return self._place[node]

    @cached_property
    def weights(self) -> list[frozenset[Part] | None]:
        """The weights that a value consists of and nothing else; None for all other values.

        A product of a weight with a constant is no weight: a zero state times a matrix is
        the first step.
        """
        found: list[frozenset[Part] | None] = []
        for index, node in enumerate(self.nodes):
            if node.op == "get_attr":
                own = self.name(index) == "parameter"
                found.append(frozenset({(str(node.target), "")}) if own else None)
                continue
            parts = [found[source] for source in self.sources[index]]
            known = [part for part in parts if part is not None]
            blank = [s for s, part in zip(self.sources[index], parts, strict=True)
                     if part is None and self._from_nothing[s]]  # fmt: skip
            # What an unseen call read beside weights is not known.
            mixed = self.name(index) in (_MATRIX_PRODUCTS if blank else {"unrecorded"})
            whole = bool(known) and len(known) + len(blank) == len(parts) and not mixed
            met = frozenset().union(*known) if whole and node.op != "output" else None
            found.append(met and frozenset((weight, at + _taken(node)) for weight, at in met))
        return found

    @cached_property
    def _from_nothing(self) -> list[bool]:
        """Whether a value is made from nothing, as a mask or zeros are."""
        found: list[bool] = []
        for node, sources in zip(self.nodes, self.sources, strict=True):
            found.append(node.op == "call_function" and all(found[s] for s in sources))
        return found

    @cached_property
    def layers(self) -> list[frozenset[Part]]:
        """The matrices that a value was multiplied with last on its ways to where it is."""
        found: list[frozenset[Part]] = []
        for index, sources in enumerate(self.sources):
            met = [self.weights[source] for source in sources]
            own = frozenset().union(*(part for part in met if part is not None))
            past = own and self.weights[index] is None and self.name(index) in _MATRIX_PRODUCTS
            found.append(own if past else frozenset().union(*(found[s] for s in sources)))
        return found

    @cached_property
    def from_data(self) -> list[bool]:
        """Whether a value depends on what the model was given."""
        found: list[bool] = []
        for index, node in enumerate(self.nodes):
            given = node.op == "placeholder" or self.name(index) == "constant"
            found.append(given or any(found[source] for source in self.sources[index]))
        return found

    def is_trainable(self, weight: str) -> bool:
        """Whether gradient is asked of the weight."""
        own = (node for node in self.nodes if node.op == "get_attr" and node.target == weight)
        return any(node.meta["trainable"] for node in own)

    @cached_property
    def uses(self) -> dict[Part, list[int]]:
        """Where each weight meets a value that is none, in order.

        The parts of one tensor are weights of their own: the gates of a cell, or the layers.
        """
        found: dict[Part, list[int]] = {}
        for index, node in enumerate(self.nodes):
            if self.weights[index] is not None or node.op != "call_function":
                continue
            met = [self.weights[source] for source in self.sources[index]]
            for weight in sorted(frozenset().union(*(part for part in met if part is not None))):
                found.setdefault(weight, []).append(index)
        return found

    def mixes(self, index: int) -> bool:
        """Whether the value is a product with a matrix."""
        return self.name(index) in _MATRIX_PRODUCTS

    def multiplies(self, index: int, weight: str) -> bool:
        """Whether the value is a product in which the weight scales what it meets."""
        name, arguments = self.name(index), self.nodes[index].args
        if name in ("linear", "bilinear") or name.startswith("conv"):
            factors = arguments[1:2]
        elif name in ("addmm", "addbmm", "baddbmm", "addmv"):
            factors = arguments[1:3]
        elif name in _PRODUCTS or name == "unrecorded":
            factors = arguments
        else:
            return False
        nodes = [f for f in factors if isinstance(f, fx.Node)] or self.nodes[index].all_input_nodes
        met = (part for node in nodes for part in self.weights[self.position(node)] or ())
        return any(name == weight for name, _ in met)


def _taken(node: fx.Node) -> str:
    """Which part of a tensor a call takes, in words that are the same at every step."""
    name = str(node.meta.get("name"))
    if name == "item":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return f" {source.meta.get('name')} {source.args[1:]} {source.kwargs} {node.args[1]}"
    return f" {node.args[1:]} {node.kwargs}" if name in _TAKES else ""
