"""What goes wrong with data."""


class CorpusError(ValueError):
    """A corpus that is missing, empty, damaged, too short or cannot be stored; the message says what to do."""


class CorpusWarning(UserWarning):
    """Something that was asked for is not part of the corpus, for instance a binary file."""
