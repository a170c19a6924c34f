"""A capture-like process for faults/test_kill.py: writes known parts slowly, so that it can be killed anywhere. No torch."""

import sys
from pathlib import Path

from analysis.writing import RunWriter

from .synthetic import PLAIN, card, make_parts


def main(folder: Path, n: int) -> None:
    parts = make_parts(PLAIN, n)
    with RunWriter.open(folder, card(PLAIN), {"seed": 0}) as writer:
        for part in parts[writer.parts :]:
            writer.write(part)
            print(writer.parts, flush=True)
        writer.commit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
