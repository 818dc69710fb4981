"""All benchmarks, as tables of ratios:  make bench      (about an hour on 2 cores)

    python benchmarks/run.py [proposals_stage] [propose_aggregate] [scale] [stage_memory] [nodes] [resume] [stage_start]
                             [engine_death] [serving] [serving_saturation] [training_speed] [training_modes]
                             [training_memory] [training_kill]

Each benchmark is a separate process and prints one table. A ratio compares two ways of doing the same work in the same
run on the same machine, since absolute times on shared machines mean little.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("proposals_stage", "propose_aggregate", "scale", "stage_memory", "nodes", "resume", "stage_start")
NAMES += ("engine_death", "serving", "serving_saturation")
NAMES += ("training_speed", "training_modes", "training_memory", "training_kill")


def main(chosen: list[str]) -> int:
    unknown = set(chosen) - set(NAMES)
    if unknown:
        print(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    codes = [
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=False).returncode for name in chosen or NAMES
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
