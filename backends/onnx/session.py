"""onnxruntime sessions that behave the same everywhere: fully optimised, a fixed number of threads, torch tensors in and out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import InputFileError, UsageError


class Session:
    """An ONNX model in onnxruntime on the CPU. `session(flat)` takes and gives flat tensors in the model's own order.

    round_activations: False keeps the activations of blocked DequantizeLinear + MatMul in float, which onnxruntime rounds to 8 bits.
    """

    def __init__(self, model: Path | bytes, threads: int = 1, profile: Path | None = None, round_activations: bool = True) -> None:
        import onnxruntime

        self.name = "the model in memory" if isinstance(model, bytes) else str(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        if not round_activations:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        try:
            self.session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own classes for missing, damaged and unsupported models
            raise InputFileError(f"onnxruntime can't load {self.name}: {str(error).splitlines()[0][:300]}") from error
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        lengths = {i.shape[1] for i in self.session.get_inputs() if len(i.shape) == 2 and "int" in i.type}
        length = lengths.pop() if len(lengths) == 1 else None
        self.token_count = length if isinstance(length, int) else None
        """The fixed length of its texts; None where it is dynamic, or there are none."""

    def __call__(self, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run once. Inputs beyond what the model reads are an error, as a missing one is."""
        feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in zip(self.inputs, flat, strict=True)}
        try:
            found = self.session.run(self.outputs, feeds)
        except Exception as error:  # its own classes again: sizes or numbers the model does not take
            sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in feeds.items())
            raise UsageError(f"onnxruntime can't run {self.name} on {sizes}: {str(error).splitlines()[0][:300]}") from error
        return tuple(_tensor(a) for a in found)


def _tensor(array: Any) -> Tensor:
    """onnxruntime's own spelling of uint64 is strange to torch."""
    return torch.from_numpy(array.view("uint64") if array.dtype == "uint64" else array)
