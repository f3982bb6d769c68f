"""Stop strings: where a text ends, however its tokens are cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class StopText:
    """Follows one growing text and finds the first of some strings in it.

    Raises ValueError for an empty string.
    """

    def __init__(self, strings: Sequence[str | bytes]) -> None:
        self.strings = [s.encode("utf-8", "surrogateescape") if isinstance(s, str) else bytes(s) for s in strings]
        if not all(self.strings):
            raise ValueError("an empty stop string would stop at once; leave it out")
        self._held = b""
        self.done = False

    def push(self, piece: bytes) -> bytes:
        """What has become certain with this piece: the text before a stop string, which itself is never given out.
        What may be the beginning of one is held back. After a stop string `done` is set, and there is no more."""
        if self.done:
            return b""
        text = self._held + piece
        found = [at for s in self.strings if (at := text.find(s)) >= 0]
        if found:
            self.done, self._held = True, b""
            return text[:min(found)]
        held = max((n for s in self.strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - held:]
        return text[:len(text) - held]

    def cut(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces of a text up to the first of the strings."""
        for piece in pieces:
            if certain := self.push(piece):
                yield certain
            if self.done:
                return
        if rest := self.rest():
            yield rest

    def rest(self) -> bytes:
        """What was held back, when there is no more text."""
        held, self._held = self._held, b""
        return held
