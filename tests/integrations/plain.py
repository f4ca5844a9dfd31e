"""examples/plain_loop.py on one rank of several, as under torchrun.

python tests/integrations/plain.py STUDENT TEACHER DATA.jsonl OUTPUT
"""

import os
import runpy

from tests.tiny import ROOT


def main() -> None:
    """Run the example in this process."""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"  # what torchrun sets beside rank and world size
    runpy.run_path(str(ROOT / "examples" / "plain_loop.py"), run_name="__main__")


if __name__ == "__main__":
    main()
