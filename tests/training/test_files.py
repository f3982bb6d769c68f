"""Files that are replaced as one action."""

import subprocess
import sys

WRITER = """
import sys
from pathlib import Path
from postformer.training.files import write_json
for i in range(150):
    write_json(Path(sys.argv[1]), {"who": sys.argv[2], "times": i, "more": [i] * 2000})
"""


def test_several_processes_may_replace_one_file(tmp_path):
    path = tmp_path / "found.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stderr=subprocess.PIPE, text=True)
               for name in "ab"]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
