"""Readings from the events of watched training steps: order, threshold and scale of the clip."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rnnguard.probe.step_events import Event, Kind
from rnnguard.usage import ClipOrder, ClipUse

NEVER = 100.0  # a threshold that many times the largest norm never acts
ALWAYS = 0.1  # of its norm is left of a gradient that the clip governs altogether
HAND_SCALED = 8.0  # gradients that shrink that much on the way to the step were scaled by hand


@dataclass(frozen=True)
class Segment:
    """One optimizer step, the events since the one before, and that one."""

    events: tuple[Event, ...]
    step: Event
    previous: Event | None

    @property
    def first_backward(self) -> int | None:
        numbers = (i for i, e in enumerate(self.events) if e.kind == "backward" and e.touched)
        return next(numbers, None)

    @property
    def last_backward(self) -> Event | None:
        found = self.of("backward")
        return found[-1] if found else None

    def of(self, kind: Kind) -> list[Event]:
        """The events of that kind that concern this optimizer."""
        return [e for e in self.events if e.kind == kind and e.touched]

    def clips(self, order: ClipOrder) -> list[Event]:
        return [clip for clip in self.of("clip") if _bounds(clip) and self._order(clip) == order]

    def _order(self, clip: Event) -> ClipOrder:
        first, number = self.first_backward, self.events.index(clip)
        if first is None or number > first:
            return "sound"
        cleared = any(e.kind == "clear" and e.touched for e in self.events[:number])
        same_call = self.previous is not None and self.previous.call == clip.call
        return "after the step" if same_call and not cleared else "before backward"


def segments_of(events: Sequence[Event]) -> list[Segment]:
    """The events cut behind each optimizer step; what follows the last step is left out."""
    ends = [i for i, event in enumerate(events) if event.kind == "step"]
    starts = [0, *(end + 1 for end in ends)]
    previous = [None, *(events[end] for end in ends)]
    return [
        Segment(tuple(events[start:end]), events[end], before)
        for start, end, before in zip(starts, ends, previous, strict=False)
    ]


def step_readings(events: Sequence[Event], *, half: bool, scaled: bool) -> dict[str, Any]:
    """The fields of RunUsage that watched steps tell; none where no step was seen.

    half: gradients flowed through float16; scaled: an enabled GradScaler took part.
    """
    segments = segments_of(events)
    if not segments:
        return {}
    order, order_place = _order(segments, events)
    clips = [clip for segment in segments for clip in segment.clips("sound")]
    every = [clip for segment in segments for clip in segment.of("clip") if _bounds(clip)]
    use, use_place = _use(segments)
    scaled_clips = [c for segment in segments for c in segment.clips("sound") if _raw(segment, c)]
    retained = _retained(events)
    cleared = _cleared_before_step(segments)
    piled = _never_cleared(segments)
    unscaled = half and not scaled and not all(map(_scaled_by_hand, segments))
    last = segments[-1]
    places = {
        "clip_order": order_place,
        "clip_use": use_place,
        "clip_scaled": scaled_clips[0].place if scaled_clips else None,
        "graph_retained": retained,
        "cleared_before_step": cleared.place if cleared else None,
        "never_cleared": piled.place if piled else None,
        "nonfinite_passed": last.step.place,
        "fp16_unscaled": last.last_backward.place if last.last_backward else None,
    }
    return {
        "watched_steps": len(segments),
        "clip_order": order,
        "clip_scaled": bool(scaled_clips) and len(scaled_clips) == len(clips),
        "clip_norm": (clips or every)[-1].threshold if every else None,
        "clip_use": use,
        "graph_retained": retained is not None,
        "cleared_before_step": cleared is not None,
        "never_cleared": piled is not None,
        "fp16_unscaled": unscaled,
        "places": {name: place for name, place in places.items() if place is not None},
    }


def _bounds(clip: Event) -> bool:
    """Whether a clip is one; with an infinite threshold it only tells the norm."""
    return clip.threshold is not None and clip.threshold != math.inf


def _order(segments: list[Segment], events: Sequence[Event]) -> tuple[ClipOrder, str | None]:
    for order in _ORDERS:
        found = [clip for segment in segments for clip in segment.clips(order)]
        if order == "after the step":
            found += _behind(events, segments[-1].step)
        if found:
            return order, found[0].place
    return "none", segments[-1].step.place


_ORDERS: tuple[ClipOrder, ...] = ("sound", "after the step", "before backward")


def _behind(events: Sequence[Event], step: Event) -> Iterator[Event]:
    """The clips directly behind the last step."""
    for event in events[events.index(step) + 1 :]:
        if event.kind in ("clear", "backward") and event.touched:
            return
        if event.kind == "clip" and event.touched and _bounds(event):
            yield event


def _use(segments: list[Segment]) -> tuple[ClipUse, str | None]:
    every = [c for s in segments for c in s.of("clip") if _bounds(c) and c.threshold is not None]
    odd = [clip for clip in every if not (clip.threshold or 0.0) > 0]
    if odd:
        return "not positive", odd[0].place
    sound = [[(c, _share(c)) for c in s.clips("sound")] for s in segments]
    shares = [[share for _, share in found if share is not None] for found in sound]
    flat = [share for found in shares for share in found]
    if not flat:
        return "none", None
    place = next(clip.place for found in sound for clip, _ in found)
    if len(segments) > 1 and all(found and min(found) < ALWAYS for found in shares):
        return "always", place
    return ("never" if min(flat) > NEVER else "sound"), place


def _share(clip: Event) -> float | None:
    """The threshold in units of what it bounds; None where that is nothing or no number."""
    if clip.threshold is None or not math.isfinite(clip.size) or clip.size <= 0:
        return None
    return clip.threshold / clip.size


def _raw(segment: Segment, clip: Event) -> bool:
    """Whether the clip met gradients multiplied by the loss scale, which nobody divided out."""
    made = [e for e in segment.events[: segment.events.index(clip)] if e.kind == "backward"]
    return clip.unit > 1 and any(e.touched for e in made) and not clip.before < 0.5 * made[-1].after


def _retained(events: Sequence[Event]) -> str | None:
    """The place of the last backward of every training step, if it keeps its graph for nothing."""
    found: list[str | None] = []
    for number in {event.call: None for event in events if event.kind == "step"}:
        inside = [e for e in events if e.call == number and e.kind in ("backward", "grad", "step")]
        while inside and inside[-1].kind == "step":
            inside.pop()
        if not inside or not inside[-1].retained or _one_of_several(inside):
            return None
        found.append(inside[-1].place)
    return found[0] if found else None


def _one_of_several(inside: list[Event]) -> bool:
    """Whether the last line has run before since the step: several losses through one graph."""
    for event in reversed(inside[:-1]):
        if event.kind == "step":
            return False
        if event.place == inside[-1].place:
            return True
    return False


def _cleared_before_step(segments: list[Segment]) -> Event | None:
    """The call that, in every step, wipes out the gradients of the backward before it.

    The step itself, where no call did it.
    """
    found = []
    for segment in segments:
        made = [e for e in segment.of("backward") if e.after > 0]
        if not made or segment.step.closure or segment.step.before != 0:
            return None
        later = segment.events[segment.events.index(made[-1]) :]
        if any(e.kind == "clip" and e.before > 0 and e.after == 0 for e in later):
            return None  # by a threshold of zero
        cleared = (e for e in later if e.kind == "clear" and e.touched and e.after == 0)
        found.append(next(cleared, segment.step))
    return found[0]


def _never_cleared(segments: list[Segment]) -> Event | None:
    """The backward that, in every step but the first, adds to the gradients of the last one."""
    found = []
    for earlier, later in pairwise(segments):
        first, made = later.first_backward, later.of("backward")
        if first is None or later.of("clear") or any(e.before == 0 for e in made):
            return None
        # What was scaled down in between is kept on purpose.
        left = (earlier.step, *later.events[:first])[-1].after
        if not math.isclose(made[0].before, left, rel_tol=1e-6):
            return None
        found.append(made[0])
    return found[0] if found else None


def _scaled_by_hand(segment: Segment) -> bool:
    """Whether the gradients shrink between the last backward and the clip or step after it."""
    made = segment.last_backward
    if made is None:
        return False
    later = segment.events[segment.events.index(made) :]
    clips = (e for e in later if e.kind == "clip" and e.touched and _bounds(e))
    return next(clips, segment.step).before * HAND_SCALED < made.after
