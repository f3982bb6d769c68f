"""T10: the most similar pair among many vectors, by attention and by memories whose size does not grow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from postformer.kernels import attention, gdr
from postformer.study.claims.base import Claim, Figure, claim
from postformer.study.claims.results import Results

SHARPNESS = 60.0
CODE = 16
"""Numbers that name a vector's place in the recurrent memory, so that its size is dim * CODE for any n."""


def problems(count: int, vectors: int, seed: int) -> tuple[Tensor, Tensor]:
    """x [count, n, d] of +-1 with d = 4 log2 n, and the most similar pair [count, 2], later place first.

    Rows whose two best pairs are equally similar are drawn again, so that there is one answer.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, kept = 4 * round(math.log2(vectors)), []
    while sum(map(len, kept)) < count:
        x = 2.0 * torch.randint(2, (4 * count, vectors, dim), generator=generator) - 1
        best = _similar(x).flatten(1).topk(2).values
        kept.append(x[best[:, 0] > best[:, 1]])
    x = torch.cat(kept)[:count]
    return x, _place(_similar(x))


def _similar(x: Tensor) -> Tensor:
    """[count, n, n]: x_i . x_j for j before i, else minus infinity."""
    return (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(), -torch.inf)


def _place(scores: Tensor) -> Tensor:
    """[count, 2]: row and column of the largest entry."""
    flat = scores.flatten(1).argmax(1)
    return torch.stack([flat // scores.shape[2], flat % scores.shape[2]], 1)


def by_attention(x: Tensor) -> Tensor:
    """One head and one maximum: a query finds the nearest earlier vector, itself excluded by its position.

    The value is the vector and its place; the similarity of what was fetched decides between the queries.
    """
    count, n, dim = x.shape
    place = torch.eye(n).expand(count, n, n)
    q = torch.cat([x, -2 * dim * place], 2)[:, None] * SHARPNESS
    k, v = torch.cat([x, place], 2)[:, None], torch.cat([x, place], 2)[:, None]
    read = attention(q, k, v, scale=1.0)[:, 0]
    near = (x * read[..., :dim]).sum(-1)
    near[:, 0] = -torch.inf  # the first has nothing before it
    later = near.argmax(1)
    return torch.stack([later, read[torch.arange(count), later, dim:].argmax(-1)], 1)


def by_memory(x: Tensor, delta: bool) -> Tensor:
    """A matrix memory dim x CODE, read before each write; the decoder knows every place's code.

    delta: by the delta rule, which erases what it overwrites; else by addition.
    """
    count, n, dim = x.shape
    codes = (2.0 * torch.randint(2, (n, CODE), generator=torch.Generator().manual_seed(0)) - 1) / math.sqrt(CODE)
    q = k = x[:, None] / math.sqrt(dim)
    v = codes.expand(count, 1, n, CODE)
    w, u, k_add, v_add = (k, v, None, None) if delta else (None, None, k, v)
    read = gdr(q, None, w=w, e=w, u=u, k_add=k_add, v_add=v_add, read_before_update=True)[0][:, 0]
    later = torch.ones(n, n, dtype=torch.bool).triu()
    return _place((read @ codes.T).masked_fill(later, -torch.inf))


def accuracy(found: Tensor, truth: Tensor) -> float:
    """The fraction of rows whose pair is found."""
    return (found == truth).all(1).double().mean().item()


@claim("T10")
def most_similar_pair(results: Results, quick: bool) -> Claim:
    """How often each finds the pair as n grows."""
    sizes, count = ((8, 16, 32), 100) if quick else ((8, 16, 32, 64, 128), 200)
    figures, attending, fixed, chance = [], [], [], []
    for n in sizes:
        x, truth = problems(count, n, seed=n)
        with torch.no_grad():
            found = {"attention": by_attention(x), "additive memory": by_memory(x, False),
                     "delta memory": by_memory(x, True)}
        scores = {name: accuracy(pair, truth) for name, pair in found.items()}
        attending.append(scores["attention"])
        fixed.append(max(scores["additive memory"], scores["delta memory"]))
        chance.append(2 / (n * (n - 1)))
        figures += [Figure(name=f"{name}, n = {n}", value=score) for name, score in scores.items()]
        figures.append(Figure(name=f"chance, n = {n}", value=chance[-1]))
    solves, falls = min(attending) == 1.0, fixed[-1] < fixed[0] / 2
    return Claim(
        id="T10", title="The most similar pair needs quadratic time",
        statement="One layer of attention finds the most similar pair among n vectors of c log n bits; no model that "
        "runs in truly subquadratic time does, if a common conjecture holds.",
        source="Alman and Yu 2024", papers=("2410.04271",),
        test=f"Attention with weights set by hand, against a memory of dim x {CODE} numbers (additive and delta rule, "
        "also set by hand, its decoder given every place's code), both with our kernels. It holds if attention finds "
        "every pair and the better memory finds, at the largest n, less than half as many as at the smallest. This "
        "shows that these two memories fail, not that all do: the theorem says that, as n goes to infinity.",
        figures=tuple(figures), verdict="holds" if solves and falls else "does not hold",
        reason=f"Attention finds {100 * min(attending):.0f} % at worst; the better memory {100 * fixed[0]:.0f} % at "
        f"n = {sizes[0]} and {100 * fixed[-1]:.1f} % at n = {sizes[-1]} (chance {100 * chance[-1]:.3f} %).",
        misread="That a fixed state cannot find similar pairs at all: for few vectors it does. The conjecture is about "
        "growth, and concerns time, not only the size of the state.",
    )
