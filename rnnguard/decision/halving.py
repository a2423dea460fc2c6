"""Successive halving over paired courses: who goes on to the next heat, and who has won.

Every heat starts anew with a seed of its own, so that a winner is confirmed on draws that have
not chosen it; a heat that stands alone has to be clearer. Jamieson and Talwalkar 2016
(arXiv 1502.07943).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rnnguard.race import NOTHING, Candidate, Course, Entry, Fate, Gain, Heat, second_half

# Steps that follow each other share their weights' noise, so that blocks of them are compared.
BLOCKS = 10
CONFIDENCE = 0.99
CONFIDENCE_ALONE = 0.999
# Half a percent of the loss is nobody's reason to change a model.
LEAST_SHARE = 0.005
FEWEST_STEPS = 10
MANY = 5
LIKELY = 2
LONGER = 1.1

Run = Callable[[Sequence[Candidate], int, int], tuple[Course, ...]]


@dataclass(frozen=True)
class Budget:
    """Steps per candidate in the last heat, and what all may take together."""

    steps: int
    total: int
    seconds: float

    def course(self, most: int, before: int) -> tuple[int, tuple[int, ...]]:
        """How many candidates beside changing nothing can run, and the steps of each heat.

        most: candidates there are; before: steps that each of them takes before its first heat.
        Two heats, the first of half the steps, and with many candidates three; one where no
        more can be had, which then is as long as it may be. The unlikelier candidates come in
        where half of the budget is enough for all.
        """
        for count in range(most, 0, -1):
            parts = (4, 2, 1) if count >= MANY else (2, 1)
            lengths = tuple(max(FEWEST_STEPS, self.steps // part) for part in parts)
            affordable = self.total if count <= LIKELY else self.total // 2
            if count * before + _cost(count + 1, lengths) <= affordable:
                return count, lengths
        for count in range(min(most, LIKELY), 0, -1):
            length = (self.total - count * before) // (count + 1)
            if length >= self.steps or count == 1:
                return count, (max(FEWEST_STEPS, min(length, 2 * self.steps)),)
        return 0, ()


def _cost(candidates: int, lengths: Sequence[int]) -> int:
    """The most that heats of these lengths take, when half of the candidates go on from each."""
    cost = 0
    for length in lengths:
        cost += candidates * length
        candidates = 1 + max(1, candidates // 2)
    return cost


def gain_of(course: Course, over: Course, confidence: float = CONFIDENCE) -> Gain:
    """How far the course lies below the other one, paired step by step in their second halves."""
    if not (course.sound and over.sound):
        better, worse = course.sound and not over.sound, over.sound and not course.sound
        mean = math.inf if better else -math.inf if worse else 0.0
        return Gain(mean=mean, stderr=0.0, share=mean, clear=better)
    mine, theirs = second_half(course.losses), second_half(over.losses)
    gaps = [b - a for a, b in zip(mine, theirs, strict=True)]
    blocks = _blocks(gaps)
    mean, stderr = statistics.fmean(gaps), _stderr(blocks)
    size = abs(statistics.fmean(theirs))
    share = mean / size if size else 0.0
    clear = share > LEAST_SHARE and mean > _quantile(len(blocks) - 1, confidence) * stderr
    return Gain(mean=mean, stderr=stderr, share=share, clear=clear)


def leader(
    candidates: Sequence[Candidate], heat: Heat, confidence: float = CONFIDENCE
) -> Candidate:
    """The least invasive candidate that none clearly beats, going from less to more invasive.

    Of those that are alike in what they change, the lowest loss goes first.
    """
    there = [c for c in candidates if c.name in heat]
    there.sort(key=lambda c: (c.invasiveness[0], heat[c.name].level, c.rank))
    best = first = next(c for c in there if c.name == NOTHING)
    for candidate in there:
        over = {first.name, best.name}
        mine = heat[candidate.name]
        if all(gain_of(mine, heat[name], confidence).clear for name in over):
            best = candidate
    return best


def survivors(candidates: Sequence[Candidate], heat: Heat) -> list[Candidate]:
    """Those that go on: changing nothing, and at most half of the others.

    First go those that did not end, then those that another clearly beats, then the last by rank.
    The least invasive of the rest stays with them where it is clearly better than nothing.
    """
    rest = [c for c in candidates if c.name != NOTHING and heat[c.name].sound]
    if not rest:
        return [c for c in candidates if c.name == NOTHING]
    best = min(rest, key=lambda c: heat[c.name].level)
    alike = [c for c in rest if not gain_of(heat[best.name], heat[c.name]).clear]
    alike.sort(key=lambda c: c.rank)
    kept = alike[: max(1, len(candidates) // 2)]
    least = min(alike, key=lambda c: c.invasiveness)
    if gain_of(heat[least.name], heat[NOTHING]).clear:
        kept.append(least)
    return [c for c in candidates if c.name == NOTHING or c in kept]


def decided(candidates: Sequence[Candidate], heat: Heat) -> bool:
    """Whether no further heat is needed: one candidate clearly beats every other one."""
    best = leader(candidates, heat)
    others = [c for c in candidates if c is not best and c.name in heat]
    return best.name != NOTHING and all(
        gain_of(heat[best.name], heat[other.name]).clear for other in others
    )


@dataclass(frozen=True)
class Outcome:
    """The heats that were run and what became of each candidate."""

    heats: tuple[Heat, ...]
    entries: tuple[Entry, ...]
    complete: bool
    """Whether no heat was cut short."""


def halved(candidates: Sequence[Candidate], lengths: Sequence[int], left: int, run: Run) -> Outcome:
    """Runs heats of these lengths, and longer ones until one candidate has won.

    left: steps that all of them may take together. `run` trains candidates for some steps with a
    seed; it may give fewer courses than asked for when time is up, and such a heat counts for
    nothing.
    """
    running, heats = list(candidates), list[Heat]()
    while len(running) > 1:
        steps = _next_length(lengths, heats, left // len(running))
        if steps is None:
            break
        courses = run(running, steps, len(heats))
        if len(courses) < len(running):
            return Outcome(tuple(heats), tuple(_entries(candidates, heats, False)), False)
        left -= sum(len(course.losses) for course in courses)
        heats.append(Heat(seed=len(heats), steps=steps, courses=courses))
        # A first heat of several has chosen whom it would confirm.
        if len(heats) > 1 and decided(running, heats[-1]):
            break
        running = survivors(running, heats[-1])
    return Outcome(tuple(heats), tuple(_entries(candidates, heats, len(lengths) == 1)), bool(heats))


def _next_length(lengths: Sequence[int], heats: Sequence[Heat], room: int) -> int | None:
    """Steps of the next heat: as planned, then twice the last one's, if there is room for that.

    None where there is no room for one that could tell more than the last.
    """
    if not heats:
        return lengths[0] if lengths else None
    last, planned = heats[-1].steps, len(heats) < len(lengths)
    steps = min(lengths[len(heats)] if planned else 2 * last, room)
    return steps if steps >= LONGER * last else None


def _entries(
    candidates: Sequence[Candidate], heats: Sequence[Heat], alone: bool
) -> Iterator[Entry]:
    winner = next(c for c in candidates if c.name == NOTHING)
    if len(heats) > 1:
        winner = leader(candidates, heats[-1])
    elif heats and alone:
        winner = leader(candidates, heats[0], CONFIDENCE_ALONE)
    for candidate in candidates:
        there = [heat for heat in heats if candidate.name in heat]
        gain = None
        if there and candidate.name != NOTHING:
            gain = gain_of(there[-1][candidate.name], there[-1][NOTHING])
        fate, words = _fate(candidate, winner, there, heats, gain)
        yield Entry(candidate=candidate, fate=fate, words=words, gain=gain, heats=len(there))


def _fate(
    candidate: Candidate, winner: Candidate, there: Sequence[Heat], heats: Sequence[Heat],
    gain: Gain | None,
) -> tuple[Fate, str]:  # fmt: skip
    if candidate is winner:
        if gain is None:
            return "won", "nothing was clearly better"
        return "won", f"loss {gain.share:.1%} below that of changing nothing"
    last = there[-1][candidate.name] if there else None
    if last is None:
        return "dropped", "the time was up before it ran"
    if last.stopped is not None:
        return "stopped", last.stopped
    if len(there) < len(heats):
        return "dropped", f"left after {there[-1].steps} steps"
    if gain is None:
        return "not better", f"{winner.name} is"
    than = winner.name if gain.clear else "changing nothing"
    return "not better", f"not clearly better than {than}"


def _blocks(values: Sequence[float]) -> list[float]:
    count = min(BLOCKS, len(values))
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in pairwise(bounds)]


def _stderr(blocks: Sequence[float]) -> float:
    """Standard error of the mean from successive differences, which a steady rise leaves alone.

    Von Neumann 1941: the more one learns, the wider the gap grows, which is no noise.
    """
    if len(blocks) < 2:
        return math.inf
    squares = [(b - a) ** 2 for a, b in pairwise(blocks)]
    return math.sqrt(statistics.fmean(squares) / 2 / len(blocks))


def _quantile(freedom: int, confidence: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, confidence)) if freedom > 0 else math.inf
