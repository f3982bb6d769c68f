"""docs/growth.md: its stages can be trained, its commands and its ways to grow are those that there are."""

import re
from pathlib import Path
from typing import get_args

import typer
import yaml

from postformer.cli.verbs.train import train
from postformer.design import load
from postformer.surgery import GROUP
from postformer.surgery.grow import How
from postformer.training import staged

PAGE = (Path(__file__).parents[2] / "docs" / "growth.md").read_text(encoding="utf-8")


def test_the_stages_of_the_page():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    one, two = staged(load("transformer", width=64, layers=2), yaml.safe_load(text))
    assert [len(stage.recipe.model.stack) for stage in (one, two)] == [2, 8]
    assert [stage.config.total_steps for stage in (one, two)] == [400, 600]
    assert [stage.config.seed for stage in (one, two)] == [0, 1000]
    assert two.config.batch_size == 8


def test_what_it_names_is_there():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == set(get_args(How))
    assert f"`{GROUP}`" in PAGE
    app = typer.Typer(add_completion=False)
    app.command()(train)
    given = {name for parameter in typer.main.get_command(app).params for name in parameter.opts}
    shown = {word for line in re.findall(r"^postformer train .*", PAGE, re.M) for word in re.findall(r"--\w+", line)}
    assert shown <= given
    assert shown == {"--width", "--layers", "--stages", "--out", "--resume"}
