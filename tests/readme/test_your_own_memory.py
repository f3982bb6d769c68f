"""docs/your-own-memory.md: its code runs, its commands work, and every mistake gets the message that the page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from postformer.design import DesignError, load, registry
from postformer.verify import verify

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-own-memory.md").read_text(encoding="utf-8")
BEFORE, MISTAKES = PAGE.split("## Mistakes")
RECIPE = {"version": 1, "name": "fading", "model": {
    "width": 64, "memory": {"kind": "fading", "heads": 4}, "feedforward": {"kind": "swiglu"}, "num_layers": 2}}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


MODULE, SCRIPT, NOT_AFFINE, RULE, LOSS = blocks(BEFORE, "python")
SECTIONS = {part.split("\n", 1)[0]: part for part in MISTAKES.split("### ")[1:]}
METHODS = {title: part for title, part in SECTIONS.items() if "Fading)" not in part and blocks(part, "python")}


def fading(changes=""):
    """The page's class, with some methods replaced; registered as `fading`."""
    registry._classes.pop("fading", None)
    module = ModuleType("fading")
    exec(MODULE, module.__dict__)
    cls, space = module.Fading, module.__dict__
    space.update(right=cls.step, setup=cls.__init__, start=cls.initial)
    found = {}
    exec(changes, space, found)
    for name, method in found.items():
        setattr(cls, name, method)
    return cls


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    registry._classes.pop("fading", None)


def lines(only=()):
    return [f"{({True: 'ok  ', False: 'FAIL', None: 'n/a '})[r.passed]} {r.name}: {r.note}"
            for r in verify(RECIPE, only=only).results]


def assert_shown(text, actual):
    """Each line of the page is one of verify's; `...` stands for anything."""
    for line in text.strip().splitlines():
        words = line.split(": ...; ")
        assert any(all(word in given for word in words) for given in actual), (line, actual)


def test_the_class_of_the_page_is_verified_and_runs_in_blocks():
    fading()
    actual = lines()
    assert not [line for line in actual if line.startswith("FAIL")]
    shown = blocks(BEFORE, "text")
    assert_shown(shown[0], actual)
    assert_shown(shown[1], actual)


def test_a_step_that_is_not_affine_says_so():
    fading(NOT_AFFINE)
    assert_shown(blocks(BEFORE, "text")[2], lines(["parallel = token by token, fp64"]))


@pytest.mark.parametrize("title", METHODS)
def test_a_mistake_gets_its_message(title):
    part = METHODS[title]
    fading(blocks(part, "python")[0])
    (text,) = blocks(part, "text")
    names = [line.removeprefix("FAIL ").split(": ")[0] for line in text.strip().splitlines()]
    assert_shown(text, lines() if "it builds and runs" in names else lines(names))


def test_there_are_mistakes():
    assert len(METHODS) >= 15


def test_without_an_entry_point():
    registry._classes.pop("fading", None)
    with pytest.raises(DesignError) as e:
        load(RECIPE)
    for line in blocks(SECTIONS["The entry point is forgotten"], "text")[0].splitlines():
        assert line in str(e.value)


def test_a_kind_that_is_taken():
    part = SECTIONS["The kind is somebody else's"]
    space = {}
    exec(MODULE, space)
    with pytest.raises(TypeError) as e:
        exec(blocks(part, "python")[0], space)
    assert blocks(part, "text")[0].strip() in str(e.value)


def test_an_unknown_field():
    fading()
    recipe = {**RECIPE, "model": {**RECIPE["model"], "memory": {"kind": "fading", "head": 4}}}
    with pytest.raises(DesignError) as e:
        load(recipe)
    assert blocks(SECTIONS["A field that the design does not have"], "text")[0].strip() in str(e.value)


def test_the_packages_are_shown_as_they_are():
    assert RULE.strip() in (ROOT / "examples" / "coupled" / "coupled.py").read_text(encoding="utf-8")
    assert LOSS.strip() in (ROOT / "examples" / "log-cosh" / "log_cosh.py").read_text(encoding="utf-8")
    (first, second), files = blocks(BEFORE, "toml"), [ROOT / "examples" / "log-cosh" / "pyproject.toml"]
    assert second in files[0].read_text(encoding="utf-8")
    assert "postformer.kinds" in first


@pytest.mark.slow
def test_the_script_and_the_commands(tmp_path):
    """As a package would: the module, the recipe and the entry point of the page, installed by pip."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "fading.py").write_text(MODULE)
    (tmp_path / "package" / "pyproject.toml").write_text(
        (ROOT / "examples" / "leaky" / "pyproject.toml").read_text(encoding="utf-8").split("[project.entry")[0]
        .replace("leaky", "fading") + blocks(BEFORE, "toml")[0]
        + '\n[tool.hatch.build.targets.wheel]\nonly-include = ["fading.py"]\n')
    (tmp_path / "fading.yaml").write_text(blocks(BEFORE, "yaml")[0])
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    done = subprocess.run([*pip, "--target", tmp_path / "site", tmp_path / "package"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "POSTFORMER_CACHE": str(tmp_path / "cache"),
           "OMP_NUM_THREADS": "1"}
    (commands,) = blocks(BEFORE, "sh")
    verbs = [line.split() for line in commands.splitlines() if line.startswith("postformer")]
    assert [words[1] for words in verbs] == ["verify", "train", "generate"]
    shorter = {"verify": ["--only", "parallel"], "train": [], "generate": ["--tokens", "8"]}
    for words in verbs:
        words = ["20k" if w == "100k" else w for w in words[1:]] + shorter[words[1]]
        done = subprocess.run([sys.executable, "-m", "postformer", *words], cwd=tmp_path, env=env, text=True,
                              capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    script = MODULE + SCRIPT.replace("100_000", "10_000")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "elsewhere", text=True,
                          capture_output=True, timeout=600, env={k: v for k, v in env.items() if k != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "def " in done.stdout
