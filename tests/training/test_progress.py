import io

import pytest

from postformer.training.progress import Progress, duration

LINE = {"step": 1, "loss": 1.5, "bits_per_byte": 2.164, "tokens_per_s": 1234.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    progress = Progress(100, stream=out, log=tmp_path / "train.log")
    progress.update(LINE, 65)
    progress.update(LINE | {"step": 2}, 60)  # too soon after the first
    progress.update(LINE | {"step": 3, "validation_loss": 1.0, "validation_bits_per_byte": 1.443}, 60)
    progress.note("saved")
    progress.close()
    assert out.getvalue() == (
        "step 1/100: loss 1.5000, 2.164 bits/byte, 1,234 tokens/s, 1:05 left\n"
        "step 3/100: loss 1.5000, 2.164 bits/byte, validation bits/byte 1.443, 1,234 tokens/s, 1:00 left\nsaved\n")
    assert (tmp_path / "train.log").read_text().count("\n") == 3


def test_a_bar_on_a_terminal():
    out = Terminal()
    progress = Progress(100, stream=out)
    progress.update(LINE, 65)
    progress.note("[saved]")
    progress.close()
    assert "1/100" in out.getvalue()
    assert "2.164 bits/byte" in out.getvalue()
    assert "[saved]" in out.getvalue()


def test_quiet(tmp_path):
    out = Terminal()
    progress = Progress(100, mode="quiet", stream=out, log=tmp_path / "train.log")
    progress.update(LINE)
    progress.note("saved")
    progress.close()
    assert out.getvalue() == ""
    assert "loss 1.5" in (tmp_path / "train.log").read_text()
    with pytest.raises(ValueError, match="quiet"):
        Progress(1, mode="loud")


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3600, 3723)] == ["0:00", "1:00", "1:00:00", "1:02:03"]


def test_a_watcher_that_has_gone_does_not_stop_the_run(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    progress = Progress(2, stream=Closed(), log=tmp_path / "train.log")
    for step in (1, 2):
        progress.update(LINE | {"step": step, "validation_loss": 1.0})
    progress.close()
    assert (tmp_path / "train.log").read_text().count("\n") == 2
