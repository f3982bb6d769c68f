import importlib.util
import sys
from pathlib import Path

# importlib import mode keeps test folders off sys.path; the small model is loaded by file.
if "fake" not in sys.modules:
    spec = importlib.util.spec_from_file_location("fake", Path(__file__).parents[1] / "training" / "fake.py")
    sys.modules["fake"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fake"])
