"""The command line: audit, demo, bench, rule, remedy, config, rules check, version.

Exit codes: 0 clean, 1 findings at or above --fail-on, 2 could not audit (any crash included);
130 where Ctrl-C ended a bench.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import rnnguard
from rnnguard import options
from rnnguard.answers import answer, print_out
from rnnguard.bench.command import bench
from rnnguard.errors import RulesError
from rnnguard.files import write_text

if TYPE_CHECKING:
    from rnnguard.report import Report

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


@app.command()
def audit(
    target: Annotated[str | None, typer.Argument(metavar="TARGET", show_default=False)] = None,
    data: options.Data = None,
    inputs: options.Inputs = None,
    loss: options.Loss = None,
    step: options.Step = None,
    optimizer: options.Optimizer = None,
    train_step: options.TrainStep = None,
    trial: options.Trial = None,
    memory: options.Memory = None,
    skip: options.Skip = None,
    rules: options.Rules = None,
    select: options.Select = None,
    extend_select: options.ExtendSelect = None,
    ignore: options.Ignore = None,
    config: options.Config = None,
    isolated: options.Isolated = False,
    fail_on: options.FailOn = None,
    exit_zero: options.ExitZero = False,
    output_format: options.OutputFormat = None,
    output: options.Output = None,
    seed: options.OptionalSeed = None,
    app_dir: options.AppDir = None,
    debug: options.Debug = False,
    quiet: options.Quiet = False,
) -> None:
    """Find what keeps a model from learning; changes no file and no weight.

    TARGET is module:attr, module:factory(64, bias=False) or file.py:attr: a model, or a function
    that gives one, (model, inputs), (model, optimizer), (model, optimizer, inputs), or a dict of
    stabilize's arguments. Its code is run, so audit only what you trust.

    What is not said here is taken from [tool.rnnguard] in pyproject.toml, or from rnnguard.toml,
    in this folder or the nearest one above; TARGET too.

    Exit codes: 0 clean, 1 findings at or above --fail-on, 2 could not audit.
    """
    said = {
        "target": target, "data": data, "inputs": inputs, "loss": loss, "step": step,
        "optimizer": optimizer, "train_step": train_step, "trial": trial, "memory": memory,
        "seed": seed, "rules": rules,
        "select": _split(select), "extend_select": _split(extend_select),
        "ignore": _split(ignore), "fail_on": fail_on,
    }  # fmt: skip

    def work() -> int:
        from rnnguard.arguments import arguments_of
        from rnnguard.settings_file import effective

        settings = effective(said, file=config, isolated=isolated)
        # The report alone belongs on stdout; what the user's code prints does not.
        with contextlib.redirect_stdout(sys.stderr):
            arguments = arguments_of(settings, app_dir)
            more = {"skip": tuple(skip)} if skip else {}
            report = rnnguard.audit(**arguments | more, verbose=False)
        _deliver(report, output_format or _by_suffix(output), output, quiet)
        return 1 if report.exceeds(settings.fail_on or "error") and not exit_zero else 0

    answer(work, debug)


@app.command()
def demo(
    seed: options.Seed = 0, output: options.Output = None, debug: options.Debug = False
) -> None:
    """Audit, stabilize and train a model on handwritten digits; writes rnnguard-demo.html."""

    def work() -> int:
        from rnnguard import demo as story

        story.run(seed, output)
        return 0

    answer(work, debug)


app.command()(bench)


@app.command()
def rule(
    name: options.Explained = None,
    every: options.Every = False,
    output_format: options.ExplainedFormat = "text",
    config: options.Config = None,
    isolated: options.Isolated = False,
    debug: options.Debug = False,
) -> None:
    """Explain a rule, or list them all, as they are in force here."""
    _explain("rules", name, every, output_format, config, isolated, debug)


@app.command()
def remedy(
    name: options.Named = None,
    every: options.Every = False,
    output_format: options.ExplainedFormat = "text",
    config: options.Config = None,
    isolated: options.Isolated = False,
    debug: options.Debug = False,
) -> None:
    """Explain a remedy, or list them all, with the scenarios that apply it."""
    _explain("remedies", name, every, output_format, config, isolated, debug)


def _explain(
    what: Literal["rules", "remedies"], name: str | None, every: bool,
    output_format: options.RuleFormat, config: Path | None, isolated: bool, debug: bool,
) -> None:  # fmt: skip
    def work() -> int:
        from rnnguard.decision.rulebook import load_rulebook
        from rnnguard.report.explain import remedies_told, rules_told
        from rnnguard.settings_file import effective

        told = rules_told if what == "rules" else remedies_told
        book = load_rulebook([effective(file=config, isolated=isolated)])
        print_out(told(book, name, every, output_format))
        return 0

    answer(work, debug)


@app.command("config")
def settings_in_force(
    config: options.Config = None, isolated: options.Isolated = False, debug: options.Debug = False
) -> None:
    """Print the settings in force, and where each of them was made."""

    def work() -> int:
        from rnnguard.decision.rulebook import load_rulebook
        from rnnguard.settings_file import effective, told

        settings = effective(file=config, isolated=isolated)
        load_rulebook([settings])  # for what is said of a wrong word
        print_out(told(settings))
        return 0

    answer(work, debug)


@rules_app.command()
def check(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", show_default=False)] = None,
    debug: options.Debug = False,
) -> None:
    """Check the built-in rule files, and those in DIR on top of them; exit code 1 if wrong.

    Wrong are rows that cannot be read, never match, or name what does not exist. Rows of one
    priority that meet, and situations without a row, are warnings.
    """

    def work() -> int:
        from rnnguard.decision.rulebook import load_rulebook
        from rnnguard.decision.tablecheck import problems
        from rnnguard.remedies import REMEDIES

        try:
            book = load_rulebook([folder] if folder else [])
        except RulesError as error:
            print_out(str(error))
            return 1
        found = problems(book, [remedy.name for remedy in REMEDIES])
        for problem in found:
            print_out(str(problem))
        if any(problem.severity == "error" for problem in found):
            return 1
        print_out(f"{len(book.rules)} rules and {len(book.scenarios)} scenarios are in order.")
        return 0

    answer(work, debug)


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
    print_out("\n".join(lines))


def _split(names: Sequence[str] | None) -> list[str]:
    return [name for listed in names or () for name in listed.split(",") if name]


def _by_suffix(output: Path | None) -> options.Format:
    known: dict[str, options.Format] = {".json": "json", ".html": "html"}
    return known.get(output.suffix, "text") if output else "text"


def _deliver(
    report: Report, output_format: options.Format, output: Path | None, quiet: bool
) -> None:
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
        print_out(text.rstrip("\n"))
    else:
        write_text(output, text.rstrip("\n") + "\n")
