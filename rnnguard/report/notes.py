"""What a report says beside its figures: what they rest on, and what the inspection saw."""

from __future__ import annotations

from rnnguard.decision.diagnosis import audit_finding
from rnnguard.decision.rulebook import Rulebook
from rnnguard.errors import Refusal
from rnnguard.probe.measurement import Look
from rnnguard.probe.subject import Subject
from rnnguard.records import Finding

ORDER = (
    "Order: stabilize, then compile or wrap, then build the scheduler, then EMA copies, "
    "then load checkpoints."
)

NO_SITE = Refusal(
    "RG003",
    "",
    "no torch recurrent module or cell was called while the model ran.",
    "Check that this is the recurrent model; hand-written recurrences are not judged yet.",
)


def audit_findings(rulebook: Rulebook, look: Look) -> list[Finding]:
    """What the inspection saw beside the readings: no site, made-up input, unregistered cells."""
    found = []
    basis = look.measurement.run.basis
    if not look.sites:
        found.append(audit_finding(rulebook, "RG003", f"0 sites: {NO_SITE.fact}"))
    if basis == "inferred inputs":
        text = "the batch was made up from the first layer: the figures describe noise, not data."
        found.append(audit_finding(rulebook, "RG002", text))
    if basis == "site alone":
        text = "the whole model could not be run: each recurrence was probed alone."
        found.append(audit_finding(rulebook, "RG001", text))
    for place in look.unregistered:
        text = "a recurrent module is called that the model does not hold; it never trains."
        found.append(audit_finding(rulebook, "RG109", text, location=place))
    return found


def notes_of(look: Look, subject: Subject) -> tuple[str, ...]:
    run, notes = look.measurement.run, []
    notes.append(f"Rests on {run.basis}; graph recorded while the model ran.")
    for site in look.measurement.sites:
        demand = subject.demands.get(site.path)
        if demand is not None:
            notes.append(
                f"`{site.label}`: a read-out of the last {demand.steps} steps scores "
                f"{demand.score:.2f} (chance {demand.chance:.2f}), longer ones no better; "
                f"the last {demand.half} give half of the gain over chance. Hence the memory."
            )
        if site.memory_source == "assumed":
            notes.append(
                f"`{site.label}`: the memory needed is assumed from the sequence length, an "
                "upper bound; declare it with memory= for a firm verdict."
            )
        if site.memory_source == "unknown":
            notes.append(
                f"`{site.label}`: the memory needed is unknown "
                f"({_why_unknown(site.readout)}); declare it with memory=."
            )
    return tuple(notes)


def _why_unknown(readout: str) -> str:
    return "every step is read out" if readout == "all_steps" else "the sequences were made up"
