"""One run of the optimizer: what stays the same while models come and go.

Every rewrite is made on a clone and compared with the input model before it is kept. A plan that
turns out over budget is tightened and solved again; if nothing pays, the result is the normalised
model and the records say why for every site.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model as models
from onnxcompress import registry
from onnxcompress.base import KEEP, Choice, Pass, Stage
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import CostModel
from onnxcompress.course import Course
from onnxcompress.data import Feed, Source
from onnxcompress.errors import DataError, ModelRunError
from onnxcompress.evaluate import measure
from onnxcompress.footprint import Footprints
from onnxcompress.judge import DEFAULT_MIN_SQNR_DB, Judge, Metric
from onnxcompress.loading import measure_load
from onnxcompress.objective import DEFAULT, Objective, Spent
from onnxcompress.profile import Profile
from onnxcompress.report import Attempt, Budget, Latency, Load, OnDevice, PassReport, Report, SiteReport, Totals
from onnxcompress.sizes import file_size, model_size
from onnxcompress.statistics import Evidence
from onnxcompress.suitability import on_device, remarks, stranded
from onnxcompress.target import Target
from onnxcompress.trial import LOSSLESS_SAMPLES, Tidied, tidy
from onnxcompress.turn import FEW, Calibrator, Conditions, Progress
from onnxcompress.view import GraphView

__all__ = ["DEFAULT_MIN_SQNR_DB", "IN_MEMORY", "Job", "Metric", "Progress"]

logger = logging.getLogger(__name__)

_HOLDOUT_LIMIT = 16
_TIMING_SECONDS = 0.25
_LOADING_SECONDS = 2.0
_FILE_ALLOWANCE_DB = 1.0
IN_MEMORY = "model in memory"
_SLOWER = 0.97
"""Measured speed-up below which a result counts as slower; timing of equal models scatters by 3 %."""


class Job:
    """One run: what stays the same while models come and go."""

    def __init__(
        self,
        original: ir.Model,
        profile: Profile,
        source: Source,
        budget: Budget,
        metric: Metric | None,
        timing: bool,
        progress: Progress,
        objective: Objective = DEFAULT,
    ) -> None:
        self.objective = objective
        self.original, self.profile, self.source, self.progress = original, profile, source, progress
        self.timing = timing and profile.device.is_here()
        for done, _ in enumerate(source):  # every sample is checked before any work is done on some
            self.progress("reading the data", done + 1, len(source))
        self.calibration, holdout = source.split()
        self.holdout: list[Feed] = list(holdout.take(_HOLDOUT_LIMIT))
        if not self.holdout:
            raise DataError("the calibration data holds no sample")
        self.judge = Judge(original, self.holdout, budget, metric)
        self.data = Calibrator(self.calibration, progress)
        self.cost = CostModel(profile)
        self.target: Target = profile.target()
        self.conditions = Conditions(self.target, self.cost, self.judge, self.data, progress, objective)
        self.footprints = Footprints(self.cost, self.calibration.first(), objective)
        self.attempts: list[Attempt] = []
        self.tidied: list[PassReport] = []  # lossless passes
        self.left_alone: list[SiteReport] = []  # their sites
        self.rewrites: list[PassReport] = []  # passes that change outputs
        self.sites: list[SiteReport] = []  # their sites
        self.normalised = self.result = original
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.predicted = 0.0  # seconds of the normalised model on the profile
        self.saved = 0.0  # seconds the plans save on the profile
        self.latency: Latency | None = None
        self._stages: dict[str, Stage] = {}

    # --- the whole way -------------------------------------------------------------------------

    def run(self, passes: Sequence[Pass] | None) -> None:
        """Goes all the way; what came of it is in ``result`` and the records."""
        by_hand = passes is not None
        chosen = list(passes) if passes is not None else _automatic(self.objective)
        chosen.sort(key=lambda p: (p.stage, p.place))
        tidying = [p for p in chosen if p.lossless and p.stage is Stage.NORMALISE]
        if by_hand and not tidying:  # rewrites by hand still start from a tidy graph
            tidying = [p() for p in registry.available().values() if p.lossless and p.stage is Stage.NORMALISE]
            if any(p.counts_positions for p in chosen):
                tidying = [p for p in tidying if not p.resizes]
        lossy = [p for p in chosen if not p.lossless]
        self._stages = {p.name: p.stage for p in lossy}
        model = self._raise_opset(self._lossless(self.original, tidying), lossy)
        model = models.infer_types(model)
        model = self._lossless(model, [p for p in chosen if p.lossless and p.stage is not Stage.NORMALISE])
        self.normalised = self.result = model
        self.shapes = value_shapes(model, self.calibration.first(), bodies=True)
        self.predicted = self.footprints.of(model, self.shapes).seconds
        self._rewrite(lossy, by_hand=by_hand)
        if self.timing:
            self._not_slower(lossy, by_hand=by_hand)

    def _rewrite(self, passes: Sequence[Pass], *, by_hand: bool, float_only: bool = False) -> None:
        """All passes that change outputs, on the normalised model."""
        done = Course(
            self.normalised, self.shapes, tuple(passes), self.conditions, self.footprints, self.attempts,
            by_hand, float_only,
        ).run()  # fmt: skip
        self.result, self.saved = done.model, done.saved
        self.rewrites, self.sites = list(done.rewrites), list(done.sites)

    def _lossless(self, model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
        """Lossless passes one after another, checked once; one by one only if the whole does not hold."""
        results: list[Tidied] = []
        current = model
        for pass_ in passes:
            results.append(self._tidied(current, pass_))
            current = results[-1].model
        if current is not model and (problem := self.judge.difference(current)):
            logger.info("together, the lossless passes do not hold (%s): trying them one by one", problem)
            results, current = [], model
            for pass_ in passes:
                done = self._tidied(current, pass_)
                if done.model is not current and (problem := self.judge.difference(done.model)):
                    report = replace(done.report, changed=0, outcome="dropped", reason=problem)
                    done = Tidied(current, report, done.skipped)
                results.append(done)
                current = done.model
        ops = {str(n.name): n.op_type for m in (model, current) for n in GraphView(m).nodes()}
        self.tidied += [r.report for r in results]
        self.left_alone += [
            SiteReport(r.report.name, s.key, ops.get(s.key, ""), KEEP, s.reason) for r in results for s in r.skipped
        ]
        return current

    def _tidied(self, model: ir.Model, pass_: Pass) -> Tidied:
        self.progress(pass_.name, 0, None)

        def gather(view: GraphView, choices: Sequence[Choice]) -> Evidence:
            return self.data.observe(model, {n for c in choices for n in pass_.needs(c, view)}, first=FEW)

        return tidy(model, pass_, self.target, gather)

    def _raise_opset(self, model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
        wanted = max((p.min_opset for p in passes), default=1)
        if GraphView(model).quantized_nodes:
            return model
        current = GraphView(model).opset
        raised = models.raise_opset(model, wanted)
        if raised is model:
            return model
        comparison = self.judge.reference.compare(raised, limit=LOSSLESS_SAMPLES)
        if comparison.min_sqnr_db < 60:
            raise ModelRunError(
                f"raising the opset from {current} to {wanted} changed the outputs ({comparison.min_sqnr_db:.0f} dB)",
                hint="re-export the model with a newer opset",
            )
        self.tidied.append(PassReport("raise_opset", {}, 1, "applied", f"{current} -> {wanted}"))
        return raised

    # --- verifying -----------------------------------------------------------------------------

    def final(self, result: ir.Model | Path) -> None:
        """The last look: the result, or the file it was written to, against the input model."""
        self.comparison = self.judge.compare(result)
        promised = [a.min_sqnr_db for a in self.attempts if a.verdict == "accepted" and a.min_sqnr_db is not None]
        if self.sites and promised and self.comparison.min_sqnr_db < min(promised) - _FILE_ALLOWANCE_DB:
            raise ModelRunError(
                f"the written file is at {self.comparison.min_sqnr_db:.1f} dB, the model in memory was not",
                path=result if isinstance(result, Path) else None,
                hint="this is a bug; please report it",
            )

    def _not_slower(self, lossy: Sequence[Pass], *, by_hand: bool) -> None:
        """What measures slower than the input on this machine is not kept.

        Falls back to rewrites that leave the kernels float, then to the normalised model, then to
        the input.
        """
        self.progress("timing", 0, None)
        if self._keeps_up("result"):
            return
        if self.result is not self.normalised and not by_hand:
            self._rewrite(lossy, by_hand=False, float_only=True)
            if self.result is not self.normalised and self._keeps_up("float kernels only"):
                return
        slower = "the result measured slower than the input on this machine"
        self.sites = [replace(s, decision=KEEP, reason=slower) if s.decision != KEEP else s for s in self.sites]
        self.rewrites = [replace(r, changed=0, outcome="dropped", reason=slower) for r in self.rewrites]
        self.result, self.saved = self.normalised, 0.0
        if not self._keeps_up("normalised model"):
            self.result = self.original
            self.tidied = [replace(r, changed=0, outcome="dropped", reason=slower) for r in self.tidied]

    def _keeps_up(self, name: str) -> bool:
        feed = self.holdout[0]
        latency = measure(self.original, self.result, feed, seconds=_TIMING_SECONDS)
        if latency.speed_up < _SLOWER:  # once more and longer: a busy machine is no reason
            latency = measure(self.original, self.result, feed, seconds=4 * _TIMING_SECONDS)
        if latency.speed_up >= _SLOWER:
            self.latency = latency
            return True
        verdict = "slower than the input on this machine"
        seconds = 1e3 * (self.predicted - self.saved)
        self.attempts.append(Attempt(name, 0, seconds, None, None, latency.speed_up, verdict))
        return False

    # --- reporting -----------------------------------------------------------------------------

    def report(self, name: str, seed: int, files: Sequence[Path]) -> Report:
        """Everything about the run; after :meth:`final`."""
        origin = models.source_files(self.original) if name != IN_MEMORY else ()
        before = file_size(*origin) if origin else model_size(self.original)
        after = file_size(*files) if files else model_size(self.result)
        in_order = sorted(self.sites, key=lambda s: self._stages.get(s.pass_name, Stage.NORMALISE))
        reasons = {s.key: s.reason for s in in_order if s.decision == KEEP}  # what makes integers has the last word
        device = on_device(self.result, self.profile, self.calibration.first(), after.raw, reasons)
        failed = [a for a in self.attempts if a.verdict != "accepted"]
        nearest = max(failed, key=lambda a: -math.inf if a.min_sqnr_db is None else a.min_sqnr_db, default=None)
        dropped = nearest.verdict if nearest and any(r.outcome == "dropped" for r in self.rewrites) else ""
        notes, warnings = remarks(device, self.profile, dropped=dropped, synthetic=self.source.synthetic)
        spent, then = self._spent(self.normalised), self._spent(self.result)
        totals = Totals(
            (before.raw, after.raw),
            (before.zstd, after.zstd),
            self._predictions(device),
            self.latency,
            self.comparison,
            self.judge.metric_before,
            self.judge.score(self.result),
            memory_bytes=(spent.memory_bytes or 0, then.memory_bytes or 0),
            energy_mj=None if spent.joules is None or then.joules is None else (1e3 * spent.joules, 1e3 * then.joules),
            load=self._load(origin, files),
        )
        changed = sum(s.decision != KEEP for s in self.sites)
        outcome = "the input model is kept" if self.result is self.original else "the model is normalised only"
        why = "nothing could be made integer" if self.target.required else "no rewrite pays"
        return Report(
            input=name,
            profile=self.profile.name,
            calibration=self.source.description,
            budget=self.judge.budget,
            seed=seed,
            outcome=f"{changed} sites rewritten" if changed else f"{why}; {outcome}",
            totals=totals,
            passes=(*self.tidied, *self.rewrites),
            sites=(*self.sites, *self.left_alone),
            attempts=tuple(self.attempts),
            notes=(*models.notes(self.original), *self.source.notes, *notes),
            warnings=(*((self.source.warning,) if self.source.warning else ()), *warnings),
            versions={p: importlib.metadata.version(p) for p in ("onnxruntime", "onnx", "onnx-ir", "numpy")},
            on_device=device,
            target=dict(self.objective.weights),
        )

    def _load(self, origin: Sequence[Path], files: Sequence[Path]) -> Load | None:
        """What loading takes, where weights are stored in another form for it to unpack."""
        if not self.timing or not any(r.changed and self._stages[r.name] is Stage.STORE for r in self.rewrites):
            return None
        self.progress("timing", 0, None)
        first, second = origin[0] if origin else self.original, files[0] if files else self.result
        return measure_load(first, second, seconds=_LOADING_SECONDS)

    def _spent(self, model: ir.Model) -> Spent:
        """What a model takes as it was built; the plan only knew what it would be, conversions and layouts aside."""
        same = model is self.normalised or model is self.original
        return self.footprints.of(self.normalised, self.shapes) if same else self.footprints.of(model)

    def _predictions(self, device: OnDevice | None) -> tuple[float | None, float | None]:
        """Milliseconds before and after; None of a model that a device of integers only does not run."""
        before, after = 1e3 * self.predicted, 1e3 * self._spent(self.result).seconds
        if device is None or not self.target.required:
            return before, after
        idle = stranded(GraphView(self.normalised), self.profile, self.shapes)
        return None if idle else before, after if device.runs else None


def _automatic(objective: Objective) -> list[Pass]:
    """The passes that run where none are named."""
    found = [cls for cls in registry.available().values() if cls.automatic]
    return [cls.by_default() for cls in found if objective.for_files or not cls.for_size]
