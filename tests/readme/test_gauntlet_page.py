"""docs/gauntlet.md: its task is the example's, its options are those that there are, its Python makes a plan."""

import re
from pathlib import Path

import typer

from postformer.cli.verbs.gauntlet import gauntlet
from postformer.study.asking import ask

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gauntlet.md").read_text(encoding="utf-8")
TASK, PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_the_package_is_shown_as_it_is():
    package = ROOT / "examples" / "first-token"
    assert TASK.strip() in (package / "first_token.py").read_text(encoding="utf-8")
    (point,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    assert point in (package / "pyproject.toml").read_text(encoding="utf-8")


def test_every_option_is_there():
    app = typer.Typer(add_completion=False)
    app.command()(gauntlet)
    given = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
    shown = set(re.findall(r"^\| `(--?[a-z]+)", PAGE, re.M))
    assert shown <= given
    assert given - shown <= {"recipes", "--set", "--quiet", "-q", "--json"}


def test_the_plan_of_the_page():
    call = re.search(r"plan = (ask\(.*\))", PYTHON)[1]
    plan = eval(call, {"ask": ask})
    assert len(plan.cells) == 4
    assert plan.match == "params"
