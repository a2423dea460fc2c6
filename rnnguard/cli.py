"""The command line: audit, demo, rule, rules check, version.

Exit codes: 0 clean, 1 findings at or above --fail-on, 2 could not audit (any crash included).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import rnnguard
from rnnguard.errors import RNNGuardError, RulesError
from rnnguard.files import write_text

if TYPE_CHECKING:
    from rnnguard.report import Report

Format = Literal["text", "json", "html"]
RuleFormat = Literal["text", "json"]


def _target(words: str) -> Any:
    return typer.Option(metavar="TARGET", help=words)


# The options of `audit`, in the order of its help.
Data = Annotated[str | None, _target("Batches of (inputs, target), such as a DataLoader.")]
Inputs = Annotated[str | None, _target("Inputs alone: a tensor, a tuple or a dict of arguments.")]
Loss = Annotated[str | None, _target("loss(output, target), such as 'torch.nn:MSELoss()'.")]
Step = Annotated[str | None, _target("step(model, batch) -> loss, for what --loss cannot say.")]
Optimizer = Annotated[str | None, _target("An optimizer, a function of the model, or a class.")]
Memory = Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps the task needs.")]
Skip = Annotated[list[str] | None, typer.Option(metavar="SITE", help="Leave a site out.")]
Rules = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, metavar="DIR", help="More rule files.")
]
Select = Annotated[
    list[str] | None, typer.Option(metavar="RULE", help="Only these: RG401, RG4 or a name.")
]
Ignore = Annotated[list[str] | None, typer.Option(metavar="RULE", help="All but these.")]
FailOn = Annotated[
    Literal["error", "warning", "info"],
    typer.Option(help="Lowest severity that makes exit code 1."),
]
ExitZero = Annotated[bool, typer.Option("--exit-zero", help="Exit 0 in spite of findings.")]
OutputFormat = Annotated[
    Format | None, typer.Option(help="By default as the suffix of --output says, else text.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Where to write, if not to stdout."),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seeds all that is drawn, the model too.")]
AppDir = Annotated[
    Path, typer.Option(exists=True, file_okay=False, metavar="DIR", help="Where modules are found.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Text without the readings.")]

PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
app = typer.Typer(
    help="Finds out whether a recurrent PyTorch model can learn what its data asks of it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    **PLAIN,
)
rules_app = typer.Typer(help="Work on rule files.", **PLAIN)
app.add_typer(rules_app, name="rules")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    try:
        app(args=argv, prog_name="rnnguard")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    return 0


@app.command(no_args_is_help=True)
def audit(
    target: Annotated[str, typer.Argument(metavar="TARGET", show_default=False)],
    data: Data = None,
    inputs: Inputs = None,
    loss: Loss = None,
    step: Step = None,
    optimizer: Optimizer = None,
    memory: Memory = None,
    skip: Skip = None,
    rules: Rules = None,
    select: Select = None,
    ignore: Ignore = None,
    fail_on: FailOn = "error",
    exit_zero: ExitZero = False,
    output_format: OutputFormat = None,
    output: Output = None,
    seed: Seed = 0,
    app_dir: AppDir = Path(),
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Find what keeps a model from learning; changes no file and no weight.

    TARGET is module:attr, module:factory(64, bias=False) or file.py:attr: a model, or a function
    that gives one, (model, inputs), (model, optimizer), (model, optimizer, inputs), or a dict of
    stabilize's arguments. Its code is run, so audit only what you trust.

    Exit codes: 0 clean, 1 findings at or above --fail-on, 2 could not audit.
    """
    named = {"data": data, "inputs": inputs, "loss": loss, "step": step, "optimizer": optimizer}
    options = {"memory": memory, "skip": tuple(skip or ()), "rules": [rules] if rules else None}

    def work() -> int:
        # The report alone belongs on stdout; what the user's code prints does not.
        with contextlib.redirect_stdout(sys.stderr):
            arguments = _arguments(target, named, app_dir, seed)
            arguments |= {name: value for name, value in options.items() if value}
            report = rnnguard.audit(**arguments, verbose=False)
            report = report.only(_split(select), _split(ignore), rules=[rules] if rules else [])
        _deliver(report, output_format or _by_suffix(output), output, quiet)
        return 1 if report.exceeds(fail_on) and not exit_zero else 0

    _answer(work, debug)


@app.command()
def demo(seed: Seed = 0, output: Output = None, debug: Debug = False) -> None:
    """Audit, stabilize and train a model on handwritten digits; writes rnnguard-demo.html."""

    def work() -> int:
        from rnnguard import demo as story

        story.run(seed, output)
        return 0

    _answer(work, debug)


@app.command()
def rule(
    name: Annotated[str | None, typer.Argument(metavar="[CODE|NAME]", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="Explain all rules.")] = False,
    output_format: Annotated[RuleFormat, typer.Option(help="How to write.")] = "text",
    debug: Debug = False,
) -> None:
    """Explain a rule, or list them all."""

    def work() -> int:
        from rnnguard.decision.rulebook import load_rulebook
        from rnnguard.report.words import rule_data, rule_page

        book = load_rulebook()
        shown = [book.rule(name)] if name else list(book.rules)
        if output_format == "json":
            _print(json.dumps([rule_data(r) for r in shown], indent=2))
        elif name or every:
            _print("\n\n".join(map(rule_page, shown)))
        else:
            _print("\n".join(f"{r.code}  {r.severity:7}  {r.fix:9}  {r.name}" for r in shown))
        return 0

    _answer(work, debug)


@rules_app.command()
def check(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """Check the built-in rule files, and those in DIR on top of them; exit code 1 if wrong."""

    def work() -> int:
        from rnnguard.decision.rulebook import load_rulebook

        try:
            book = load_rulebook([folder] if folder else [])
        except RulesError as error:
            _print(str(error))
            return 1
        _print(f"{len(book.rules)} rules and {len(book.scenarios)} scenarios are in order.")
        return 0

    _answer(work, debug)


@app.command()
def version(
    verbose: Annotated[bool, typer.Option("--verbose", help="With what it runs on.")] = False,
) -> None:
    """Print the version; with --verbose what a bug report needs."""
    lines = [f"rnnguard {rnnguard.__version__}"]
    if verbose:
        import platform
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        lines.append(f"python {platform.python_version()}   {platform.platform()}")
        for package in ("torch", "numpy", "scikit-learn", "pydantic", "typer", "rich", "jinja2"):
            with contextlib.suppress(PackageNotFoundError):
                lines.append(f"{package} {installed(package)}")
    _print("\n".join(lines))


def _answer(work: Callable[[], int], debug: bool) -> None:
    """Ends the command with the code that `work` gives, or 2 and one sentence on stderr."""
    try:
        code = work()
    except BaseException as error:  # SystemExit and KeyboardInterrupt must not look like findings
        if debug:
            traceback.print_exc()
        print(_sentence(error), file=sys.stderr)
        code = 2
    raise typer.Exit(code)


def _sentence(error: BaseException) -> str:
    if isinstance(error, RNNGuardError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    from rnnguard.targets import origin

    said = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}{origin(error)}: {said or 'no message'} (--debug shows the traceback)"


def _arguments(
    target: str, named: dict[str, str | None], app_dir: Path, seed: int
) -> dict[str, Any]:
    """The arguments of rnnguard.audit that the targets of the command line stand for."""
    import random

    import numpy
    import torch

    from rnnguard import targets

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    arguments = {"seed": seed} | targets.audit_arguments(target, app_dir)
    for name, text in named.items():
        if text and name == "optimizer":
            arguments[name] = targets.load_optimizer(text, app_dir, arguments["model"])
        elif text:
            makes = name in ("data", "inputs")
            arguments[name] = targets.load_value(text, app_dir, from_function=makes)
    return arguments


def _split(names: list[str] | None) -> list[str]:
    return [name for listed in names or () for name in listed.split(",") if name]


def _by_suffix(output: Path | None) -> Format:
    known: dict[str, Format] = {".json": "json", ".html": "html"}
    return known.get(output.suffix, "text") if output else "text"


def _deliver(report: Report, output_format: Format, output: Path | None, quiet: bool) -> None:
    if output_format == "text":
        from rich.console import Console

        from rnnguard.report.text import brief, plain

        console = Console(file=sys.stdout)
        if console.is_terminal and output is None and not quiet:
            console.print(report)
            return
        text = plain(report, file=sys.stdout, parts=brief if quiet else None)
    else:
        text = report.to_json() if output_format == "json" else report.to_html()
    if output is None:
        _print(text.rstrip("\n"))
    else:
        write_text(output, text.rstrip("\n") + "\n")


def _print(text: str) -> None:
    """Writes to stdout; neither an old encoding nor a reader that went away is a failure."""
    with contextlib.suppress(AttributeError):  # a captured stdout may not be a file
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
