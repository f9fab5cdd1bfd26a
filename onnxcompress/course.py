"""The passes that change outputs, one after the other, and which of them the result is better with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxcompress.base import KEEP, Pass, Stage
from onnxcompress.calibrate import value_shapes
from onnxcompress.footprint import Footprints
from onnxcompress.questions import offers
from onnxcompress.report import Attempt, PassReport, SiteReport
from onnxcompress.trial import pass_options
from onnxcompress.turn import Conditions, Turn, take_turn
from onnxcompress.view import GraphView
from onnxcompress.work import Shapes

__all__ = ["Course", "State"]

_FITTED = (Stage.PRUNE, Stage.FACTORIZE)
"""Families whose weights are fitted to samples."""
_WORTH_TRYING = 0.25
"""Least share of the budget that they are tried with."""
_CAUTION = 0.25
"""Share of what is left that they may use: noise of what was fitted to samples says less of other data."""
_WORTH_KEEPING = 0.97
"""They are kept where the whole then takes less than this part of what is aimed at."""
_LEAST_PORTION = 0.1
"""Share of the budget below which what runs faster is left out where the target is all about files."""


@dataclass(frozen=True)
class State:
    """Where a run stands: a model, and how it came about."""

    model: ir.Model
    saved: float = 0.0
    rewrites: tuple[PassReport, ...] = ()
    sites: tuple[SiteReport, ...] = ()

    def and_left(self, report: PassReport, sites: Iterable[SiteReport]) -> State:
        """This one, with a pass on record that was not tried."""
        return replace(self, rewrites=(*self.rewrites, report), sites=(*self.sites, *sites))

    def after(self, turn: Turn) -> State:
        """What a turn made of it."""
        saved, rewrites = self.saved + turn.saved, (*self.rewrites, turn.report)
        return State(turn.model, saved, rewrites, (*self.sites, *turn.sites))

    def with_dropped(self, tried: State, reason: str) -> State:
        """This one, with what was tried and is not kept on record."""
        rows = (replace(r, changed=0, outcome="dropped", reason=reason, added=None) if r.changed else r
                for r in tried.rewrites)  # fmt: skip
        sites = (s if s.decision == KEEP else replace(s, decision=KEEP, reason=reason) for s in tried.sites)
        return replace(self, rewrites=(*self.rewrites, *rows), sites=(*self.sites, *sites))


@dataclass(frozen=True)
class Course:
    """The turns of one run.

    Attributes:
        model: the normalised model.
        shapes: concrete shapes of its values.
        passes: all that change outputs, in the order of their stages.
        conditions: of the run.
        footprints: what models take.
        attempts: every plan that is built is added to these.
        by_hand: the user named the passes.
        float_only: only choices that leave the kernels float.
    """

    model: ir.Model
    shapes: Shapes
    passes: tuple[Pass, ...]
    conditions: Conditions
    footprints: Footprints
    attempts: list[Attempt]
    by_hand: bool
    float_only: bool = False

    def run(self) -> State:
        """All passes, on the normalised model.

        What is fitted to samples (pruning, factors) comes first in the graph but last in the plan: noise buys more
        elsewhere, so it is tried with what the others leave of the budget, and kept where the whole then takes less of
        what is aimed at. What stores weights in fewer bits comes last and uses up what there is, so it is no part of
        what the others leave.
        """
        plain = self._in_turn(State(self.model), self._others, 1.0)
        done = self._in_turn(plain, self._storing, 1.0)
        used_nothing = not self._fitted or plain.model is self.model
        share = 1.0 if used_nothing else self.conditions.judge.left(plain.model)
        if share >= _WORTH_TRYING:
            return self._first_tried(plain, done, _CAUTION * share)
        used = f"other rewrites pay more and leave {share:.0%} of the accuracy budget: too little for this one"
        return self._not_tried(done, self._fitted, used)

    @property
    def _fitted(self) -> list[Pass]:
        """Passes that fit weights to samples; who names one wants it where it stands."""
        return [] if self.by_hand else [p for p in self.passes if p.stage in _FITTED]

    @property
    def _others(self) -> list[Pass]:
        return [p for p in self.passes if p not in self._fitted and not p.for_size]

    @property
    def _storing(self) -> list[Pass]:
        return [p for p in self.passes if p not in self._fitted and p.for_size]

    def _first_tried(self, plain: State, done: State, share: float) -> State:
        """Tries passes before the others, one after the other, and keeps the first with which the whole is better.

        Factors of what was pruned, or the other way round, are for who names both. Storing takes long, so it follows
        only where the whole is better before it, too: it makes files of any kind smaller by much the same factor.

        Args:
            plain: what the others made without them.
            done: the same, stored.
            share: of the budget that one may use.
        """
        dropped: list[State] = []
        waiting = self._fitted
        kept: State | None = None
        while waiting and kept is None:
            tried = self._in_turn(State(self.model), [waiting.pop(0)], share)
            if tried.model is not self.model:
                whole = self._in_turn(tried, self._others, 1.0)
                better = self._better(whole, plain)
                if better and self._storing:
                    whole = self._in_turn(whole, self._storing, 1.0)
                    better = self._better(whole, done)
                if better and not self.conditions.judge.check(whole.model).problem:
                    kept = whole
                    break
            dropped.append(tried)
        self.conditions.data.forget()
        result = done if kept is None else kept
        for state in dropped:
            result = result.with_dropped(state, self._no_better(done))
        other = "another family that is fitted to samples is in its place; name both to have both"
        return self._not_tried(result, waiting, other)

    def _better(self, one: State, other: State) -> bool:
        """Whether one takes enough less of what is aimed at than the other."""
        objective, first = self.conditions.objective, self.footprints.of(self.model, self.shapes)
        now, then = (objective.value(self.footprints.of(state.model), first) for state in (one, other))
        return now < _WORTH_KEEPING * then

    def _no_better(self, than: State) -> str:
        if self.conditions.objective.by_bytes or self.conditions.objective.energy:
            return "with it the whole is predicted to take as much of what is aimed at, or more, as without it"
        seconds = self.footprints.of(than.model).seconds
        return f"with it the whole is predicted to take {1e3 * seconds:.3g} ms or more, as without it"

    def _not_tried(self, state: State, passes: Iterable[Pass], reason: str) -> State:
        """Says of every site of some passes why they were not tried."""
        view = GraphView(self.model, self.shapes)
        ops = {str(n.name): n.op_type for n in view.nodes()}
        for pass_ in passes:
            offer = offers(pass_, view, self.conditions.target, synthetic=self.conditions.data.synthetic)
            reasons = {**{s.key: s.reason for s in offer.skipped}, **{s.key: reason for s in offer.choices}}
            report = PassReport(pass_.name, pass_options(pass_), 0, "nothing to do", reason if offer.choices else "")
            state = state.and_left(
                report, (SiteReport(pass_.name, key, ops.get(key, ""), KEEP, why) for key, why in reasons.items())
            )
        return state

    def _in_turn(self, state: State, passes: Iterable[Pass], share: float) -> State:
        """Passes one after the other.

        Args:
            state: what they find.
            passes: in the order they run.
            share: of the budget that each may use, those before it included.
        """
        for pass_ in passes:
            stored_by = self._stored_after(pass_)
            portion = self._portion(pass_, stored_by)
            if portion < _LEAST_PORTION:
                why = f"the target leaves nearly all of the accuracy budget to {stored_by}"
                state = self._not_tried(state, [pass_], why)
                continue
            gentler = pass_.gentler() if self.conditions.target.required and not self.by_hand else ()
            ways = [pass_, *gentler]
            while ways:
                way = ways.pop(0)
                turn = take_turn(
                    state.model, self._shapes_of(state.model), way, portion * share, self.conditions,
                    by_hand=self.by_hand, float_only=self.float_only, stored_by=stored_by,
                )  # fmt: skip
                self.attempts.extend(turn.attempts)
                if turn.report.outcome == "dropped" and ways:  # the attempts still tell of it
                    continue
                state = state.after(turn)
                break
        return state

    def _stored_after(self, pass_: Pass) -> str:
        """Name of a later pass that stores weights in fewer bits; empty if none does."""
        return next((p.name for p in self.passes if p.for_size and p.stage > pass_.stage), "")

    def _portion(self, pass_: Pass, stored_by: str) -> float:
        """Share of the budget that a pass may use where a later one makes files smaller for the rest of it.

        All of it where the user named the passes, or the device runs nothing but what this one makes.
        """
        divided = stored_by and pass_.stage is Stage.QUANTIZE and not self.by_hand
        return self.conditions.objective.running if divided and not self.conditions.target.required else 1.0

    def _shapes_of(self, model: ir.Model) -> Shapes:
        """Measured shapes of a model; earlier passes may have changed those of the normalised one."""
        if model is self.model:
            return self.shapes
        return value_shapes(model, self.conditions.data.source.first(), bodies=True)
