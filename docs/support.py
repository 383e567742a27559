"""Writes docs/support.md from the code: python docs/support.py > docs/support.md"""

import re
from pathlib import Path

import torch

import moe_ops
from moe_ops import flashinfer, reference, transformers
from moe_ops._library import build_info

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# A backend's line in csrc/backends.cpp: name, whether it runs here, whether it keeps all promises.
BACKEND = re.compile(r'\{"(\w+)",\s+[\w:]+,\s+\[\] \{ return (.*?); \},\s+(true|false)\b')


def works(activation: str, dtype: torch.dtype, gate_layout: str, backward: bool) -> bool:
    """Whether a layer runs, and is right."""
    rows = 16 if reference.ACTIVATIONS[activation].gated else 8
    torch.manual_seed(0)
    shapes = [(5, 8), (3, rows, 8), (3, 8, 8)]
    tensors = [torch.randn(shape).to(dtype).requires_grad_(backward) for shape in shapes]
    weights, ids = torch.rand(5, 2), torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2], [2, 1]])
    options = dict(activation=activation, gate_layout=gate_layout)
    out = moe_ops.fused_moe(*tensors, weights, ids, **options)
    if backward:
        gradients = torch.autograd.grad(out.float().sum(), tensors)
        return all(gradient.isfinite().all() for gradient in gradients)
    wide = [tensor.double() for tensor in (*tensors, weights)]
    expected = reference.fused_moe(*wide, ids, **options)
    return ((out.double() - expected).norm() / expected.norm()).item() < 1e-2


def tick(value: bool) -> str:
    return "yes" if value else "no"


def activation_rows() -> list[str]:
    theirs = {ours: kind.name for kind, ours in flashinfer._ACTIVATIONS.items()}
    of_models = {}
    for kind, ungated in transformers._UNGATED.items():
        of_models.setdefault(ungated, []).append(kind.__name__)
        if ungated in transformers._GATED:
            of_models.setdefault(transformers._GATED[ungated], []).append(kind.__name__)
    of_models["swiglu_oai"] = list(transformers._GATES)
    rows = []
    for name, entry in reference.ACTIVATIONS.items():
        dtypes = [d for d in DTYPES if works(name, d, "gate_up", backward=False)]
        layouts = reference.GATE_LAYOUTS if entry.gated else ("gate_up",)
        layouts = [g for g in layouts if works(name, torch.float32, g, backward=False)]
        backward = all(works(name, d, g, backward=True) for d in dtypes for g in layouts)
        parameters = ", ".join(f"{k} {v:g}" for k, v in entry.defaults.items())
        rows.append(
            f"| `{name}` | {', '.join(str(d).removeprefix('torch.') for d in dtypes)} "
            f"| {', '.join(layouts) if entry.gated else 'not gated'} | {parameters or 'none'} "
            f"| {tick(backward)} | {theirs.get(name, '')} | {', '.join(of_models.get(name, []))} |"
        )
    return rows


def backend_rows() -> list[str]:
    found = BACKEND.findall((ROOT / "csrc/backends.cpp").read_text())
    built = [name for name, *_ in found if name in build_info()["backends"]]
    assert ["auto", *built] == build_info()["backends"], found
    runs = {
        "cuda::has_sm90()": "SM90: H100, H200",
        "device_info().major >= 8": "SM80 and up",
    }
    rows = []
    for name, where, promises in found:
        rows.append(
            f"| `{name}` | {runs[where]} | {tick(promises == 'true')} | {tick(promises == 'true')} "
            f"| {tick(promises == 'true')} |"
        )
    return rows


def main() -> None:
    print("# What is supported\n")
    print(
        "Written by `python docs/support.py` from the code: the first table by running every row on the CPU."
    )
    print("\n## Activations\n")
    print("In every backend alike, with biases, on the CPU and CUDA.\n")
    print("| activation | dtypes | gate layouts | parameters | gradients | FlashInfer's"
          " | transformers' classes |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(activation_rows()))
    print("\n## Backends on CUDA\n")
    print("Every dtype: float16 and bfloat16 with float32 sums, float32 in IEEE arithmetic (by cublas"
          " as torch's own products: in tf32, if torch is told to allow it). Any H, I, alignment and"
          " number of experts; rows of whole 16 bytes are fast.\n")  # fmt: skip
    print("| backend | GPUs | CUDA graphs, no host synchronisation | batch_invariant=True"
          " | chosen by auto |")  # fmt: skip
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(backend_rows()))
    print("\n## Operators\n")
    print("| operator | CPU, CUDA, fake | gradients |")
    print("| --- | --- | --- |")
    for name in sorted(n for n in moe_ops.__all__ if hasattr(torch.ops.simple_moe, n)):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        kernels = [has(f"simple_moe::{name}", key) for key in ("CPU", "CUDA", "Meta")]
        shown = ", ".join(tick(k) for k in kernels)
        gradients = tick(has(f"simple_moe::{name}", "Autograd"))
        print(f"| `{name}` | {shown} | {gradients} |")


if __name__ == "__main__":
    main()
