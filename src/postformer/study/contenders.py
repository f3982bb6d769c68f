"""What the demo compares: five shipped recipes, what each is in words, and the three trials they go through.

All sizes are those at which a laptop's CPU tells the architectures apart in minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from postformer.design import Recipe, load

WIDTH = 32
_HEADS = "{value: 2, dim_key: 16, dim_value: 16}"


@dataclass(frozen=True)
class Contender:
    """An architecture of the demo: the recipe it comes from, how it is cut to size, and what it is."""

    name: str
    recipe: str
    mixer: str
    """Name of the recipe's memory, whose short convolution a trial may take away."""
    heads: str
    """Heads at width 32, in the recipe's own notation."""
    summary: str
    memory: str
    inner_loss: str
    retention: str
    update: str
    equation: tuple[str, ...]
    """In the notation of postformer.report.equation."""
    paper: str | tuple[str, ...]
    overrides: tuple[str, ...] = ()
    least_layers: int = 1
    """Fewer would leave out one of the recipe's kinds of layer."""
    bare: bool = False
    """Its layers have no feed-forward part, so that about two of them weigh as much as one of the others."""

    def describe(self) -> dict[str, Any]:
        """The words for demo.json."""
        return {
            "name": self.name, "recipe": self.recipe, "paper": self.paper, "summary": self.summary,
            "memory": self.memory, "inner_loss": self.inner_loss, "retention": self.retention, "update": self.update,
            "equation": list(self.equation),
        }


CONTENDERS = (
    Contender(
        "transformer", "transformer", "attention", "{query: 2, key_value: 2, dim: 16}",
        "Softmax attention keeps every key and value it has seen and compares each new query with all of them.",
        "a list of all keys and values", "none is lowered step by step; a weighted mean is fitted when it is read",
        "everything, for ever", "append",
        ("o_t = ∑_{i≤t} softmax_i(q_t · k_i / √{d}) v_i",), "1706.03762",
    ),
    Contender(
        "mamba2 (state 4)", "mamba2", "mamba", "{value: 2, key: 1, dim_key: 4, dim_value: 32}",
        "Mamba-2 adds each value to a small decaying matrix; its state is cut here to 4 where 64 and more are usual, "
        "to show what too little memory does.",
        "a matrix per head, with keys of 4 numbers", "dot product, −v · S k",
        "one decay per head and token, from the input",
        "one gradient step: write, never erase",
        ("S_t = α_t S_{t-1} + v_t k_t^⊤",), "2405.21060", bare=True,
    ),
    Contender(
        "gated-deltanet", "gated-deltanet", "memory", _HEADS,
        "The delta rule first takes out what the memory holds under a key, then writes the new value there; a gate "
        "lets all of it fade.",
        "a matrix per head", "squared error, ½‖S k − v‖²", "one decay per head and token, from the input",
        "one gradient step with a rate β in (0, 1)",
        ("S_t = α_t S_{t-1} (I − β_t k_t k_t^⊤) + β_t v_t k_t^⊤",), "2412.06464",
    ),
    Contender(
        "deltaproduct", "deltaproduct", "memory", _HEADS,
        "Two delta steps per token, each with a rate up to 2: a step can then reflect the memory, and two reflections "
        "make a rotation.",
        "a matrix per head", "squared error, ½‖S k − v‖²", "nothing fades",
        "two gradient steps with rates β in (0, 2)",
        ("S ← S (I − β_j k_j k_j^⊤) + β_j v_j k_j^⊤, j = 1, 2",), ("2502.10297", "2411.12537"),
    ),
    Contender(
        "hybrid", "qwen3-next", "memory", _HEADS,
        "Gated delta layers with an attention layer among them, as in Qwen3-Next: a fixed memory for most of the work, "
        "a list for what must be looked up.",
        "matrices, and in the attention layers a list", "squared error; none in attention",
        "one decay per head and token; attention keeps everything", "one gradient step; append",
        ("S_t = α_t S_{t-1} (I − β_t k_t k_t^⊤) + β_t v_t k_t^⊤", "o_t = ∑_{i≤t} softmax_i(q_t · k_i / √{d}) v_i"),
        "2412.06464", ("model.mixers.attention.heads={query: 2, key_value: 2, dim: 16}", "model.embedding={tie: true}",
                       "model.mixers.feedforward={kind: swiglu}"),
        least_layers=2,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A task or a corpus with the settings that every contender is trained in."""

    key: str
    title: str
    about: str
    paper: str | None
    difficulty: str
    unit: str
    layers: int
    vocab: int
    width: int
    batch_size: int
    length: int
    """Tokens of one training sequence, the mean where they differ."""
    learning_rate: float
    weight: float
    """Share of the time."""
    enough: int
    """Steps after which the trial shows what it is about; all trials get so many before any gets more."""
    most: int
    """Steps beyond which nothing is learnt that the page would show."""
    match_params: bool = False
    """Whether layers without a feed-forward part count half."""
    local: bool = True
    """Whether recipes keep their short convolution."""
    task: str | None = None
    """None: text."""
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[Any, ...] = ()
    trained: int = 0
    expected: Mapping[str, Any] | None = None

    def contenders(self) -> list[Contender]:
        """Those that have enough layers here."""
        return [c for c in CONTENDERS if c.least_layers <= self.layers]

    def left_out(self) -> dict[str, str]:
        """{name: reason} of the others."""
        layers = "one layer" if self.layers == 1 else f"{self.layers} layers"
        return {
            c.name: f"it needs {c.least_layers} layers or more, and this test is about {layers}"
            for c in CONTENDERS if c.least_layers > self.layers
        }

    def recipe(self, contender: Contender) -> Recipe:
        """The contender's recipe at this trial's size. Raises DesignError."""
        heads = _scaled_heads(contender, self.width)
        changes = [f"model.vocab={self.vocab}", *heads]
        if not self.local and contender.mixer != "attention":
            changes.append(f"model.mixers.{contender.mixer}.local=none")
        if contender.least_layers == 2 and self.layers == 2:
            # The recipe's pattern has its attention last, after three others; with two layers, each kind gets one.
            changes.append("model.stack=[memory/feedforward, attention/feedforward]")
            layers = 4
        else:
            layers = self.layers * (2 if contender.bare and self.match_params else 1)
        recipe = load(contender.recipe, changes, self.width, layers)
        return recipe.model_copy(update={"name": contender.name})

    def setup(self, steps: int) -> dict[str, Any]:
        """How it was trained, for the page."""
        bare = [c.name for c in self.contenders() if c.bare and self.match_params]
        return {
            "layers": f"{self.layers} ({' and '.join(bare)} {2 * self.layers}, lighter ones)" if bare else self.layers,
            "width": self.width, "steps": steps, "sequences per step": self.batch_size,
            "tokens per architecture": steps * self.batch_size * self.length, "learning rate": self.learning_rate,
            "optimiser": "AdamW, cosine", "short convolution": "as in the recipe" if self.local else "none",
        }


def _scaled_heads(contender: Contender, width: int) -> list[str]:
    if width == WIDTH:
        return [f"model.mixers.{contender.mixer}.heads={contender.heads}", *contender.overrides]
    # Twice the width is twice the heads, so that a head's state is the same in every trial.
    factor = width // WIDTH

    def wider(text: str) -> str:
        # The first also finds key_value.
        return text.replace("value: 2", f"value: {2 * factor}").replace("query: 2", f"query: {2 * factor}")

    return [f"model.mixers.{contender.mixer}.heads={wider(contender.heads)}", *map(wider, contender.overrides)]


TRIALS = (
    Trial(
        "s3", "Tracking a state: products in the group S3",
        "Each token is one of the six ways to shuffle three cups; after each, the model says which order the cups are "
        "in now. Training stops at 16 shuffles; whoever has learned the shuffles, and not the examples, can go on. "
        "Every position is scored.",
        "2502.10297", "length", "tokens", layers=1, vocab=6, width=WIDTH, batch_size=64, length=16, learning_rate=3e-3,
        weight=0.3, enough=900, most=1500, local=False, task="group",
        options={"group": "S3", "train": 16, "evaluate": (8, 16, 32, 64)}, settings=(8, 16, 32, 64), trained=16,
        expected={"holds": ["deltaproduct"], "falls": ["transformer", "mamba2 (state 4)", "gated-deltanet"], "at": 32,
                  "source": "2502.10297"},
    ),
    Trial(
        "mqar", "Recalling: many keys, many values",
        "Pairs of a key and a value, then the keys again in another order, among noise; the answer to a key is its "
        "value. Training shows up to 8 pairs; the test goes to 16. A memory of fixed size must be large enough for "
        "what it is asked to keep.",
        "2312.04927", "pairs", "pairs", layers=2, vocab=64, width=WIDTH, batch_size=64, length=19, learning_rate=6e-3,
        weight=0.45, enough=650, most=1200, task="mqar",
        options={"vocab": 64, "train": ((8, 2), (16, 4), (32, 8)), "evaluate": ((8, 2), (16, 4), (32, 8), (64, 16))},
        settings=((8, 2), (16, 4), (32, 8), (64, 16)), trained=8,
        expected={"holds": ["transformer", "gated-deltanet"], "falls": ["mamba2 (state 4)"], "at": 8, "level": 0.9,
                  "source": "2312.04927"},
    ),
    Trial(
        "text", "Reading: the source code of Python's standard library",
        "Predict the next byte of real text. Bits per byte on files that training never saw; 8 is no idea at all.",
        None, "tokens", "tokens", layers=4, vocab=256, width=64, batch_size=8, length=128, learning_rate=4e-3,
        weight=0.25, enough=250, most=6000, match_params=True,
    ),
)  # fmt: skip


def trial(key: str) -> Trial:
    """The trial of that key. Raises KeyError."""
    return {t.key: t for t in TRIALS}[key]


def contender(name: str) -> Contender:
    """The contender of that name. Raises KeyError."""
    return {c.name: c for c in CONTENDERS}[name]
