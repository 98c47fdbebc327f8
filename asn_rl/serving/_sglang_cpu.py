"""What SGLang 0.5.23 from PyPI lacks on a machine without GPU kernels: names to import, and nothing behind them.

On PyPI SGLang's kernels and torchvision are built for CUDA. Where they are missing, or cannot be loaded, SGLang's
imports end in errors although its paths in plain torch need none of them. The stand-ins let the imports through and
raise where something calls them. No result comes from here: with `--attention-backend torch_native` the server computes
in torch alone, as the same code does that a GPU runs, apart from kernels, CUDA graphs and the overlapped scheduler.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch

FLAGS = ("--device", "cpu", "--attention-backend", "torch_native")
"""options of the server; its default attention on a CPU needs kernels that are not on PyPI"""
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1"}
_KERNELS = "sgl_kernel"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library that defined it


def install() -> list[str]:
    """Put stand-ins where something is missing, before SGLang is imported. Their names; once per process."""
    done = []
    if _KERNELS not in sys.modules and importlib.util.find_spec(_KERNELS) is None:
        sys.modules[_KERNELS] = _kernels()
        done.append(_KERNELS)
    if not _loads_torchvision():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _OPERATORS:
            library.define(schema)
        _libraries.append(library)
        done.append("torchvision's operators")
    return done


def _kernels() -> ModuleType:
    """A module from which every name can be imported, as a function that raises."""
    module = ModuleType(_KERNELS, "Stand-in of asn_rl for kernels that are not installed.")

    def missing(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(
                f"{_KERNELS}.{name} is not installed: there are no kernels on this machine; start the server with "
                f"{' '.join(FLAGS)}"
            )

        return refuse

    module.__getattr__ = missing  # PEP 562
    return module


def _loads_torchvision() -> bool:
    """Whether its operators are there: PyPI's torchvision does not load its own beside a torch without CUDA."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True
