"""The command line: `postformer <verb>`. Verbs import what they need when they run, so that --help is instant."""

from __future__ import annotations

import typer

from postformer.cli import trouble
from postformer.cli.verbs import bench, demo, doctor, explain, gauntlet, generate, listing, report, train, verify

app = typer.Typer(
    name="postformer", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="A laboratory for what comes after the Transformer: describe, verify, train and compare architectures.",
    epilog="Exit codes: 0 done, 1 an unexpected error, 2 wrong input, 3 not finite, 4 out of memory, 5 disk full, "
           "6 bad checkpoint, 7 a check failed, 130 interrupted.",
)
app.command("demo")(demo.demo)
app.command("list")(listing.list_)
app.command("explain")(explain.explain)
app.command("verify")(verify.verify)
app.command("train")(train.train)
app.command("gauntlet")(gauntlet.gauntlet)
app.command("bench")(bench.bench)
app.command("generate")(generate.generate)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point."""
    trouble.run(app)
