"""Describe the GPU; this section runs first."""

import shutil
import subprocess
from typing import Any

import torch

from gpu_sections.tools import GIB, Report, Scale, this_gpu
from nanochat.common import environment


def device(scale: Scale, report: Report) -> None:
    "Describe the GPU, and run something on it."
    if not scale.tiny and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        report.note(
            missing=f"PyTorch {torch.__version__}, built for {built}, sees none"
        )
        return
    device: dict[str, Any] = {
        "name": "CPU",
        "memory_gib": None,
        "driver": "",
        "cuda": "",
    }
    device |= {"capability": "", "key": None}
    if not scale.tiny:
        facts = torch.cuda.get_device_properties(0)
        device["name"] = facts.name
        device["key"] = this_gpu()[0]
        device["memory_gib"] = round(facts.total_memory / GIB, 1)
        device["capability"] = f"{facts.major}.{facts.minor}"
        device["cuda"] = torch.version.cuda
        device["driver"] = driver_version()
        torch.ones(1, device="cuda").item()  # a broken GPU fails here
    report.note(device=device, environment=environment())


def driver_version() -> str:
    "Return the version of the driver."
    if not shutil.which("nvidia-smi"):
        return ""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    return told.stdout.split("\n")[0].strip()
