"""The options of the command line, each with its help, in the order of `audit`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Format = Literal["text", "json", "html"]
RuleFormat = Literal["text", "json"]


def _target(words: str) -> Any:
    return typer.Option(metavar="TARGET", help=words)


Data = Annotated[str | None, _target("Batches of (inputs, target), such as a DataLoader.")]
Inputs = Annotated[str | None, _target("Inputs alone: a tensor, a tuple or a dict of arguments.")]
Loss = Annotated[str | None, _target("loss(output, target), such as 'torch.nn:MSELoss()'.")]
Step = Annotated[str | None, _target("step(model, batch) -> loss, for what --loss cannot say.")]
Optimizer = Annotated[str | None, _target("An optimizer, a function of the model, or a class.")]
TrainStep = Annotated[
    str | None, _target("train_step(model, optimizer, batch): a whole training step, to watch.")
]
Trial = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Take N optimizer steps, and take them back.")
]
Memory = Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps the task needs.")]
Skip = Annotated[list[str] | None, typer.Option(metavar="SITE", help="Leave a site out.")]
Rules = Annotated[
    list[Path] | None,
    typer.Option(exists=True, metavar="PATH", help="More rules: a folder, or a file."),
]
Select = Annotated[
    list[str] | None, typer.Option(metavar="RULE", help="Only these: RG401, RG4 or a name.")
]
ExtendSelect = Annotated[
    list[str] | None,
    typer.Option(metavar="RULE", help="These too, if ignored more widely."),
]
Ignore = Annotated[list[str] | None, typer.Option(metavar="RULE", help="All but these.")]
FailOn = Annotated[
    Literal["error", "warning", "info"] | None,
    typer.Option(help="Lowest severity that makes exit code 1; by default error."),
]
ExitZero = Annotated[bool, typer.Option("--exit-zero", help="Exit 0 in spite of findings.")]
OutputFormat = Annotated[
    Format | None, typer.Option(help="By default as the suffix of --output says, else text.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Where to write, if not to stdout."),
]
_SEED = "Seeds all that is drawn, the model too; by default 0."
Seed = Annotated[int, typer.Option(metavar="N", help=_SEED)]
OptionalSeed = Annotated[int | None, typer.Option(metavar="N", help=_SEED)]
AppDir = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, metavar="DIR", help="Where modules are found."),
]
Config = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Settings to take instead."),
]
Isolated = Annotated[bool, typer.Option("--isolated", help="Look for no file of settings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Text without the readings.")]
Explained = Annotated[str | None, typer.Argument(metavar="CODE|NAME", show_default=False)]
Named = Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)]
Every = Annotated[bool, typer.Option("--all", help="Explain all of them.")]
ExplainedFormat = Annotated[RuleFormat, typer.Option(help="How to write.")]
