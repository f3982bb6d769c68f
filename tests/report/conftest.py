"""Fabricated results with the shape that a demo and a trainer write, so that the page is tested without training."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

ARCHITECTURES = [
    ("transformer", "1706.03762", "append"),
    ("mamba2 (state 4)", "2405.21060", "gradient"),
    ("gated-deltanet", "2412.06464", "gradient"),
    ("deltaproduct", "2502.10297", "2 gradient steps"),
    ("hybrid", "2412.06464", "gradient; append"),
]
TRACKING = {
    "transformer": (0.61, 0.52, 0.36, 0.26),
    "mamba2 (state 4)": (0.62, 0.50, 0.35, 0.25),
    "gated-deltanet": (0.97, 0.84, 0.60, 0.45),
    "deltaproduct": (1.0, 1.0, 1.0, 0.998),
}
RECALL = {
    "transformer": (1.0, 1.0, 0.86),
    "mamba2 (state 4)": (0.96, 0.86, 0.51),
    "gated-deltanet": (1.0, 0.999, 0.965),
    "deltaproduct": (1.0, 0.997, 0.955),
    "hybrid": (1.0, 1.0, 0.97),
}
TEXT = {"transformer": 2.61, "mamba2 (state 4)": 2.66, "gated-deltanet": 2.52, "deltaproduct": 2.55, "hybrid": 2.50}


def write_run(directory: Path, name: str, floor: float, steps: int = 400) -> Path:
    """One fabricated run directory: recipe.yaml, run.json, metrics.jsonl, result.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(
        f"version: 1\nname: {name}\npaper: '2412.06464'\nmodel:\n  width: 64\n  mixers:\n"
        "    memory: {kind: matrix, loss: l2, retention: {per: head}, update: {kind: gradient}}\n"
    )
    (directory / "run.json").write_text(
        json.dumps({"name": name, "recipe_id": "ab12" * 16, "seed": 0, "command": "postformer train " + name})
    )
    lines = []
    for step in range(10, steps + 1, 10):
        bits = floor + 5.4 * math.exp(-step / 60) + 0.04 * math.sin(step * 1.7 + floor * 9)
        line = {
            "step": step,
            "tokens": step * 1024,
            "loss": bits * math.log(2),
            "bits_per_byte": bits,
            "lr": 3e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 21000.0,
            "elapsed_s": step * 0.05,
        }
        if step % 100 == 0:
            line["validation_bits_per_byte"] = bits + 0.05
        lines.append(json.dumps(line))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "result.json").write_text(
        json.dumps(
            {
                "steps": steps,
                "tokens": steps * 1024,
                "validation_bits_per_byte": floor + 0.05,
                "tokens_per_s": 21000.0,
                "elapsed_s": steps * 0.05,
                "params": 21345,
            }
        )
    )
    return directory


def fabricate_demo(directory: Path) -> Path:
    """A whole demo directory with plausible numbers; every value is invented."""
    growing = {"transformer": 256, "hybrid": 64}
    fixed = {"mamba2 (state 4)": 4224, "gated-deltanet": 17408, "deltaproduct": 17408, "hybrid": 13000}

    def state(name: str, context: int) -> int:
        return growing.get(name, 0) * context + fixed.get(name, 0)

    def run(task: str, index: int, name: str, **extra) -> dict:
        return {
            "architecture": name,
            "directory": f"runs/{task}-{index}",
            "status": "done",
            "recipe_id": f"{index}f3c" * 16,
            "params": 19000 + 713 * index,
            "flops_per_token": 41000 + 5100 * index,
            "steps": 900,
            "tokens": 921600,
            "tokens_per_s": 30000.0 - 3100 * index,
            "seconds": 21.0 + index,
            "seed": 0,
            **extra,
        }

    architectures = [
        {
            "name": name,
            "recipe": name.split(" ")[0],
            "paper": paper,
            "summary": f"{name}: one invented sentence about what this architecture keeps, and what it lets go.",
            "memory": "matrix, one per head",
            "inner_loss": "squared error of v against S k",
            "retention": "one gate per head, from the input",
            "update": update,
            "equation": ["S_t = α_t S_{t-1} (I − β_t k_t k_t^⊤) + β_t v_t k_t^⊤", "o_t = S_t q_t"][: 1 + len(name) % 2],
        }
        for name, paper, update in ARCHITECTURES
    ]
    names = [name for name, _, _ in ARCHITECTURES]
    tracking = [
        run(
            "s3",
            i,
            n,
            state_bytes=state(n, 64),
            points=[
                {"at": at, "accuracy": a, "state_bytes": state(n, at)} for at, a in zip((8, 16, 32, 64), TRACKING[n])
            ],
        )
        for i, n in enumerate(names)
        if n in TRACKING
    ]
    recall = [
        run(
            "mqar",
            i,
            n,
            state_bytes=state(n, 64),
            points=[{"at": at, "accuracy": a, "state_bytes": state(n, 4 * at)} for at, a in zip((4, 8, 16), RECALL[n])],
        )
        for i, n in enumerate(names)
    ]
    text = [
        run("text", i, n, state_bytes=state(n, 256), validation_bits_per_byte=TEXT[n] + 0.05)
        for i, n in enumerate(names)
    ]
    for row, name in zip(text, names):
        write_run(directory / row["directory"], name, TEXT[name])
    contexts = [128, 512, 2048, 8192, 16384]
    decode = [
        {
            "architecture": n,
            "status": "done",
            "points": [
                {
                    "context": c,
                    "declared_bytes": state(n, c),
                    "measured_bytes": state(n, c),
                    "seconds_per_token": 0.0006 + 0.0001 * i + growing.get(n, 0) * c * 1.2e-9,
                }
                for c in contexts
            ],
        }
        for i, n in enumerate(names)
    ]
    demo = {
        "schema": 1,
        "kind": "demo",
        "command": "postformer demo --minutes 4 --output demo",
        "minutes": 4,
        "seed": 0,
        "elapsed_s": 233.1,
        "started": "2026-01-02T03:04:05+00:00",
        "environment": {
            "postformer": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "processor": "x86_64",
            "cores": 2,
            "processes": 2,
            "threads": 1,
        },
        "architectures": architectures,
        "tasks": [
            {
                "key": "s3",
                "title": "Tracking a state: products in the group S3",
                "paper": "2502.10297",
                "about": "Each token is one of the six ways to shuffle three cups; where are they now?",
                "difficulty": "length",
                "unit": "tokens",
                "trained": 16,
                "chance": 1 / 6,
                "setup": {"layers": 1, "width": 32, "steps": 900, "batch": 64, "tokens": 921600},
                "left_out": {"hybrid": "it needs several layers, and this test is about one"},
                "expected": {
                    "holds": ["deltaproduct"],
                    "falls": ["transformer", "mamba2 (state 4)", "gated-deltanet"],
                    "at": 64,
                    "source": "2502.10297",
                },
                "runs": tracking,
            },
            {
                "key": "mqar",
                "title": "Recalling: many keys, many values",
                "paper": "2312.04927",
                "about": "Pairs of a key and a value, then the keys again in another order; the answer is the value.",
                "difficulty": "pairs",
                "unit": "pairs",
                "trained": 8,
                "chance": 1 / 64,
                "setup": {"layers": 2, "width": 32, "steps": 900, "batch": 64, "tokens": 921600},
                "left_out": {},
                "expected": {
                    "holds": ["transformer", "gated-deltanet"],
                    "falls": ["mamba2 (state 4)"],
                    "at": 8,
                    "source": "2312.04927",
                },
                "runs": recall,
            },
            {
                "key": "text",
                "title": "Reading: Python's standard library",
                "about": "Predict the next byte of source code.",
                "corpus": "stdlib",
                "setup": {"layers": 4, "width": 64, "steps": 400, "tokens": 409600},
                "left_out": {},
                "runs": text,
            },
        ],
        "decode": {"setup": {"layers": 4, "width": 64, "batch": 1}, "runs": decode},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "demo.json").write_text(json.dumps(demo))
    return directory


VOID = {"meta", "br", "hr", "img", "input", "link", "use"}


class Page(HTMLParser):
    """Checks nesting, and keeps ids, links, references and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.references: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        elif "href" in values:
            self.references.append(values["href"])
        self.references += [values[name] for name in ("src", "srcset", "data", "action", "poster") if name in values]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def _page_of(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def page_of():
    """A page's text and what a parser finds in it; elements that are not closed in order fail."""
    return _page_of


@pytest.fixture
def demo_directory(tmp_path: Path) -> Path:
    return fabricate_demo(tmp_path / "demo")


@pytest.fixture
def run_directories(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / f"run-{i}", f"design-{i}", 2.4 + 0.1 * i) for i in range(3)]


@pytest.fixture
def make_run():
    return write_run
