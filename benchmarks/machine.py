"""What the machine is and what it can reach at best: matmul rate per precision, copy bandwidth.

python -m benchmarks.machine
"""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import run, save, show
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import set_fp32_precision
from fasttrain.system.rates import measure_copy_gbps, measure_matmul_tflops


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure this machine's peak rates."""

    device: str = "auto"
    """auto, cpu, cuda, ..."""


def main(options: Options) -> None:
    device = pick_device(options.device)
    precisions = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if device.type == "cuda":
        precisions["fp16"] = torch.float16
    set_fp32_precision(allow_tf32=False)
    rows: list[dict[str, Any]] = [
        {"figure": f"matmul {name}, TFLOP/s", "value": measure_matmul_tflops(device, dtype)}
        for name, dtype in precisions.items()
    ]
    if device.type == "cuda":
        set_fp32_precision(allow_tf32=True)
        rows.append({"figure": "matmul tf32, TFLOP/s", "value": measure_matmul_tflops(device, torch.float32)})
    rows.append({"figure": "copy, GB/s", "value": measure_copy_gbps(device)})
    path = save("machine", device, {"rows": rows})
    show("best of half a second", ["figure", "value"], [[r["figure"], f"{r['value']:,.3f}"] for r in rows])
    print(path)


if __name__ == "__main__":
    run(main, Options)
