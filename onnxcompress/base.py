"""What a pass is: a frozen dataclass whose fields are its options.

A pass finds places (:meth:`Pass.sites`, only reads), names the strengths worth trying there
(:meth:`Pass.choices`) and makes one (:meth:`Pass.apply`, only writes). It knows no profile, no
budget and no other pass; what the device can run at all it learns from ``Target``.

    @dataclass(frozen=True)
    class RoundWeights(Pass):
        name: ClassVar[str] = "round_weights"
        ops: ClassVar[tuple[str, ...]] = ("MatMul",)
        digits: int = 2

        def match(self, node: ir.Node, view: GraphView) -> Site:
            if not view.is_float_weight(node.inputs[1]):
                raise Skip("its second input is not a constant")
            return Site.of(node)

        def choices(self, site: Site, view: GraphView, target: Target) -> list[Choice]:
            return [Choice(site, f"{self.digits} digits")]

        def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None:
            node = rewriter.node(choice.site.key)
            weight = rewriter.own_weight(node, 1).const_value.numpy()
            rewriter.set_weight(node, 1, weight.round(self.digits))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Self

import onnx_ir as ir

from onnxcompress.errors import OnnxCompressError, PassContractError
from onnxcompress.rewrite import Rewriter
from onnxcompress.sketch import Drawn
from onnxcompress.statistics import Evidence, Need, Pair
from onnxcompress.target import Target
from onnxcompress.view import GraphView

__all__ = ["KEEP", "Choice", "Pass", "Precision", "Site", "Skip", "Skipped", "Stage", "Term"]

KEEP = "keep"
"""Name of the choice that leaves a site as it is; the planner adds it to every site."""


class Precision:
    """Names of the ways a node can run; profiles price each, ``Target`` says which exist."""

    FLOAT: ClassVar[str] = "f32"
    STATIC: ClassVar[str] = "u8s8"
    DYNAMIC: ClassVar[str] = "dynamic"
    BLOCKED8: ClassVar[str] = "w8"
    BLOCKED4: ClassVar[str] = "w4"


class Stage(IntEnum):
    """The order in which families of passes run; each sees what the one before left."""

    NORMALISE = 0
    EQUALIZE = 1
    PRUNE = 2
    FACTORIZE = 3
    SHARE = 4
    QUANTIZE = 5
    STORE = 6
    """How the weights lie in the file, once it is settled what they are."""


class Skip(Exception):  # noqa: N818 - an answer, not an error
    """Raised by :meth:`Pass.match` or :meth:`Pass.apply`: this site is left alone, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Site:
    """A place a pass could change.

    Attributes:
        key: name of the node (or value) it is about; unique within a pass, stable over clones.
        nodes: names of all nodes the rewrite covers, ``key`` among them (a Conv and its Relu).
    """

    key: str
    nodes: tuple[str, ...]

    @classmethod
    def of(cls, node: ir.Node, *more: ir.Node) -> Site:
        """The site of a node and the nodes that run with it."""
        return cls(str(node.name), tuple(str(n.name) for n in (node, *more)))


@dataclass(frozen=True)
class Skipped:
    """A place that was looked at and left alone."""

    key: str
    reason: str


@dataclass(frozen=True, order=True)
class Term:
    """One source of distortion, shared by every choice that causes it.

    The price of a plan is the sum over its terms, each counted once: two convolutions that read
    the same quantized value cause its rounding error once.

    Attributes:
        kind: what is done ("activation", "weight", "dynamic", ...), the pass's own word.
        subject: name of the value it is done to.
    """

    kind: str
    subject: str


@dataclass(frozen=True)
class Choice:
    """One strength of a rewrite at one site.

    Attributes:
        site: where.
        name: short, for reports and recipes; unique within the site.
        precision: how the covered nodes run afterwards (a :class:`Precision`).
        reads: values it wants as integers; the planner pays for quantizing them where the
            producer leaves them float.
        native: those of ``reads`` that must be integers already, because a QuantizeLinear of their
            own there would be worse than nothing.
        writes: values it leaves as integers; the planner pays for each float consumer.
        adds: float operators it inserts: (operator type, name of the value it runs on).
        removes: names of nodes of the site that go; what they take now is its gain. Sites at these nodes cannot
            be changed at the same time.
        resizes: axes that get another size: (name of the value or weight, axis, size). The planner prices
            the graph at these sizes.
        becomes: nodes that take the place of all nodes of the site, drawn before their weights are known; the
            planner prices them instead.
        bytes_saved: weight bytes it takes off the file.
        download_saved: weight bytes it takes off the compressed file; None where they follow from ``bytes_saved`` in
            proportion.
        resident_saved: bytes of weights it takes out of memory while the model runs; None where they equal
            ``bytes_saved``.
        stored: it only changes how weights lie in the file; left to a pass of :attr:`Stage.STORE` where one runs.
        terms: the distortions it causes, for passes that can :meth:`Pass.simulate` them.
        detail: the pass's own settings for the choice (``Rank(32)``); any hashable value.
        calibrated: it relies on ranges seen in calibration, so made-up inputs are no ground for it.
        effects: rewrites of the covered nodes change the graph's cost in a way ``precision`` does
            not tell (fewer channels, lower rank): the pipeline prices the choice by making it on
            a clone.
    """

    site: Site
    name: str
    precision: str = Precision.FLOAT
    reads: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    adds: tuple[tuple[str, str], ...] = ()
    removes: tuple[str, ...] = ()
    resizes: tuple[tuple[str, int, int], ...] = ()
    becomes: tuple[Drawn, ...] = ()
    bytes_saved: int = 0
    download_saved: int | None = None
    resident_saved: int | None = None
    stored: bool = False
    terms: tuple[Term, ...] = ()
    detail: Hashable = None
    calibrated: bool = False
    effects: bool = True


class Pass(ABC):
    """Base of every pass; subclasses are frozen dataclasses.

    Class attributes:
        name: what the command line calls it; a verb.
        stage: when it runs.
        ops: operator types :meth:`match` is asked about.
        place: within the stage; smaller runs first, then by name.
        min_opset: version of the standard operator set its rewrites need; the pipeline raises it.
        lossless: it must not change any output beyond float rounding; the pipeline checks.
        automatic: it takes part where no passes are named; if not, only where the user asks for it.
        for_size: it only makes files smaller: where no passes are named, it runs if size or download are aimed at.
        resizes: it removes positions of tensors, so that others count differently afterwards.
        remark: what a user has to know of what it made; printed with it.
        summary: first line of the class docstring, shown by ``passes list``.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = Stage.SHARE
    ops: ClassVar[tuple[str, ...]] = ()
    place: ClassVar[int] = 0
    min_opset: ClassVar[int] = 1
    lossless: ClassVar[bool] = False
    automatic: ClassVar[bool] = True
    for_size: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    remark: ClassVar[str] = ""

    @property
    def planned(self) -> bool:
        """Whether the planner picks among its sites even where the user named the pass.

        By default a pass that is named makes its strongest choice wherever it can.
        """
        return False

    @property
    def counts_positions(self) -> bool:
        """Whether its options number positions of the model as given: then nothing that resizes tidies up before it."""
        return False

    def match(self, node: ir.Node, view: GraphView) -> Site:
        """The site at a node of one of ``ops``.

        Raises:
            Skip: nothing to do here, with the reason the report prints.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither match() nor sites()")

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        """Every place worth a look; by default :meth:`match` on each node of ``ops``."""
        for node in view.nodes(*self.ops):
            try:
                yield self.match(node, view)
            except Skip as skip:
                yield Skipped(str(node.name), skip.reason)

    def needs(self, choice: Choice, view: GraphView) -> Iterable[Need]:
        """Statistics :meth:`apply` and :meth:`simulate` want for this choice; none by default.

        Only what some plan wants is collected, so a choice nobody makes costs no calibration.
        """
        return ()

    @abstractmethod
    def choices(self, site: Site, view: GraphView, target: Target) -> Iterable[Choice]:
        """Strengths worth trying, weak to strong. "Keep as it is" is always there and not listed.

        Raises:
            Skip: the target cannot run any.
        """

    @abstractmethod
    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> Choice | None:
        """Makes the choice.

        Returns:
            The choice that was really made, where only the evidence told what that is; None for the one asked for.

        Raises:
            Skip: on a second look it cannot be made; nothing may have been edited by then.
        """

    def apply_all(
        self, choices: Sequence[Choice], rewriter: Rewriter, evidence: Evidence
    ) -> Mapping[Choice, str | Choice]:
        """Makes several choices; by default one after the other with :meth:`apply`.

        For passes whose choices meet in the same tensors, so that each has to know of the others.

        Returns:
            Of choices that could not be made, why; of those that became others (:meth:`apply`), what was made.
        """
        outcome: dict[Choice, str | Choice] = {}
        for choice in choices:
            edits = len(rewriter.log)
            try:
                instead = self.apply(choice, rewriter, evidence)
                if instead is not None:
                    outcome[choice] = instead
            except Skip as skip:
                if len(rewriter.log) != edits:
                    raise PassContractError(
                        f"pass {self.name!r} edited the model at {choice.site.key!r} and then refused: {skip.reason}"
                    ) from skip
                outcome[choice] = skip.reason
            except OnnxCompressError:
                raise
            except Exception as error:  # a pass may be anybody's code: say whose and where
                raise PassContractError(
                    f"pass {self.name!r} broke at {choice.site.key!r}: {type(error).__name__}: {error}",
                    hint="report it to the author of the pass",
                ) from error
        return outcome

    def simulate(self, term: Term, rewriter: Rewriter, evidence: Evidence, target: Target, switch: ir.Value) -> bool:
        """Adds the distortion of ``term`` to a model where the boolean scalar ``switch`` is true.

        With it the pipeline measures every term in one session: all switches off is the original,
        one switch on is that distortion alone. Returns False where the pass cannot (the default);
        its choices are then measured one clone at a time.
        """
        return False

    def relative(self, term: Term, evidence: Evidence) -> tuple[Hashable, float] | None:
        """How large a distortion is among others of its kind: terms with equal keys have prices in proportion.

        Then one of them is measured, the smallest, and the others follow from it. None, the default, where each has
        to be measured.

        Returns:
            A key, and the size: the share of a value's energy that is lost.
        """
        return None

    def settling(self, view: GraphView) -> Iterable[Collection[Need | Pair]]:
        """What to observe of the rewritten model and the one before, to settle what was made; nothing by default.

        A need is observed in both models, each by itself; a pair in both at once, on the same feeds.

        Args:
            view: of the rewritten model; what a rewrite noted on its nodes and values is there.

        Returns:
            Rounds: each is observed on what the one before left, and then settled.
        """
        return ()

    def settle(self, rewriter: Rewriter, before: Evidence, after: Evidence) -> None:  # noqa: B027 - an offer, not a duty
        """Makes the rewritten model up for how it differs from the one before; see :meth:`settling`.

        Args:
            rewriter: of the rewritten model.
            before: of the model before the pass, all rounds.
            after: of the rewritten model as it is, and of its pairs with the model before, this round.
        """

    @classmethod
    def by_default(cls) -> Self:
        """The pass as it runs where nobody named it; with its default options, unless that would be too bold."""
        return cls()

    def gentler(self) -> Iterable[Pass]:
        """The same pass with settings that take longer and distort less, in the order to try them; none by default.

        Asked where a device leaves no other way: all must be rewritten, and the result is not good enough.
        """
        return ()

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""
