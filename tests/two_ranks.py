"""Tensor and expert parallelism in transformers, on two ranks of gloo: test_transformers.py runs
this with torchrun.

    torchrun --nproc-per-node 2 tests/two_ranks.py FOLDER

FOLDER holds models and, with each, tokens.pt and the logits.pt of all ranks' experts together.
"""

import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moe_ops

PLANS = {
    "tensor parallel": dict(tp_size=2, tp_plan="auto"),
    "expert parallel": dict(tp_size=2, tp_plan="auto", ep_size=2),
}


def check(folder: Path, plan: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**PLANS[plan]),
        experts_implementation="simple_moe",
    ).eval()  # fmt: skip
    answers = moe_ops.transformers.explain(model)
    assert answers and all(a.startswith("simple_moe: ") for a in answers.values()), answers
    expected = torch.load(folder / "logits.pt")
    experts = model.get_submodule(next(iter(answers)))
    whole, held = experts.down_proj.shape, experts.down_proj.to_local().shape  # [E, H, I]
    halved = 0 if plan == "expert parallel" else 2
    assert [2 * h if i == halved else h for i, h in enumerate(held)] == list(whole), held
    with torch.no_grad():
        logits = model(torch.load(folder / "tokens.pt")).logits
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5, f"{folder.name}, {plan}: {error:.1e}"
    if distributed.get_rank() == 0:
        print(f"{folder.name}, {plan}: {error:.1e}", flush=True)


def main() -> None:
    distributed.init_process_group("gloo")
    moe_ops.transformers.register()
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        for plan in PLANS:
            # GPT-OSS's tensor-parallel plan leaves the experts whole.
            if (folder.name, plan) != ("gpt-oss", "tensor parallel"):
                check(folder, plan)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
