"""Tasks: seeded generators with a scorer and a difficulty knob.

    from postformer import task

    recall = task.load("mqar", vocab=128)
    generator = task.seeded(0, "train", 12)                      # seed, stream, step
    batch = recall.batch((64, 8), batch_size=32, generator=generator)
    recall.score(logits.argmax(-1), batch)                       # {"token_accuracy": ..., ...}

A task of your own: subclass `Task`, decorate it with `@register`, and point an entry point of the group
"postformer.tasks" at it if it should be found in an installed package.
"""

from postformer.task.aggregate import Aggregate
from postformer.task.arithmetic import ModularArithmetic
from postformer.task.base import (
    IGNORE,
    METRICS,
    Difficulties,
    Setting,
    Task,
    TaskBatch,
    TaskError,
    seeded,
    setting_length,
    setting_name,
)
from postformer.task.compression import Compression
from postformer.task.copying import Copy
from postformer.task.documents import Documents
from postformer.task.dyck import Dyck
from postformer.task.group import Group, GroupWord
from postformer.task.hops import Hops
from postformer.task.in_context import InContextRecall
from postformer.task.memorization import Memorization
from postformer.task.needle import Needle, PhoneBook
from postformer.task.recall import MQAR
from postformer.task.registry import load, names, register
from postformer.task.selective_copying import SelectiveCopying
from postformer.task.text import Bytes, RecallPerplexity

__all__ = [
    "IGNORE",
    "METRICS",
    "MQAR",
    "Aggregate",
    "Bytes",
    "Compression",
    "Copy",
    "Difficulties",
    "Documents",
    "Dyck",
    "Group",
    "GroupWord",
    "Hops",
    "InContextRecall",
    "Memorization",
    "ModularArithmetic",
    "Needle",
    "PhoneBook",
    "RecallPerplexity",
    "SelectiveCopying",
    "Setting",
    "Task",
    "TaskBatch",
    "TaskError",
    "load",
    "names",
    "register",
    "seeded",
    "setting_length",
    "setting_name",
]
