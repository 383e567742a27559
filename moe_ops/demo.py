"""A small Mixture-of-Experts language model learns to write: `python -m moe_ops.demo`.

It reads a text that comes with Python (the language reference, as `help()` shows it) byte by byte,
and every feed-forward layer is a moe_ops.FusedMoE. The same model on the eager reference says
whether the fused operators train it to the same losses, and how much faster.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import FusedMoE, reference

COMPARED_STEPS = 20
AGREEMENT = 1e-2  # How far any of these steps' losses may lie from the reference's.
CONTEXT, BATCH = 128, 16


class ReferenceMoE(FusedMoE):
    """The same layer as a loop over the experts in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.hidden_size)
        weights, ids = reference.topk_route(self.gate(tokens), self.topk)
        w1, w2, _, _ = self.experts.weights()
        return reference.fused_moe(tokens, w1, w2, weights, ids).view(x.shape)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, moe: type[FusedMoE]):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.moe = moe(width, 2 * width, num_experts=8, topk=2)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).flatten(2))
        return x + self.moe(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, moe: type[FusedMoE] = FusedMoE, width: int = 96, depth: int = 3):
        super().__init__()
        # What a byte means depends on the few before it: one table for each of them.
        self.tables = nn.ModuleList(nn.Embedding(256, width) for _ in range(4))
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, 4, moe) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for embedding in (*self.tables, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def logits(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        x = self.places.weight[:length]
        for distance, table in enumerate(self.tables):
            x = x + table(F.pad(text, (distance, 0))[:, :length])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def forward(self, text: Tensor) -> Tensor:
        """The mean loss, in nats a byte, of each byte's successor. text: [batch, length + 1]."""
        return F.cross_entropy(self.logits(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def corpus() -> tuple[Tensor, Tensor]:
    """The text as bytes, the last tenth apart."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batches(data: Tensor, seed: int, device: str):
    """An endless random choice of passages, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(CONTEXT + 1)
    while True:
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        yield data[starts + window].long().to(device)


def train(model, parameters, data: Tensor, seed: int, steps: int, warmup: int, device: str, show):
    """-> (loss of every step, seconds of every step)."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.01)
    losses, seconds = [], []
    for step, batch in zip(range(steps), batches(data, seed, device), strict=False):
        start = time.perf_counter()
        # Up, then down to a tenth over the whole run.
        rate = 3e-3 * min((step + 1) / 20, 1 - 0.9 * step / warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # Waits for the device.
        seconds.append(time.perf_counter() - start)
        show(step + 1, steps, losses[-1])
    return losses, seconds


# ---- What is shown ----


def progress(label: str):
    """A bar that is redrawn on a terminal, and a line now and then elsewhere."""
    begin = time.perf_counter()

    def show(step: int, steps: int, loss: float) -> None:
        filled = 30 * step // steps
        bar = "█" * filled + "░" * (30 - filled)
        line = f"{label:<22} {bar} {step:>4}/{steps}  loss {loss:5.3f}"
        line += f"  {time.perf_counter() - begin:4.0f} s"
        if sys.stdout.isatty():
            print("\r" + line, end="\n" if step == steps else "", flush=True)
        elif step == steps or step % max(1, steps // 5) == 0:
            print(line, flush=True)

    return show


def title(text: str) -> None:
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\n\033[1m{text}\033[0m" if bold else f"\n{text}")


@torch.no_grad()
def write(model: LanguageModel, prompt: str, length: int, seed: int, device: str) -> str:
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(length):
        logits = model.logits(text[:, -CONTEXT:])[0, -1].float().cpu()
        chances = torch.softmax(logits / 0.7, dim=0)
        following = torch.multinomial(chances, 1, generator=generator)
        text = torch.cat([text, following.to(device)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


@torch.no_grad()
def expert_loads(model: LanguageModel, batch: Tensor) -> list[Tensor]:
    """Every layer's share of tokens by expert, over one batch."""
    loads = []

    def count(moe, inputs):
        _, ids = moe.route(inputs[0])
        chosen = torch.bincount(ids.flatten(), minlength=moe.num_experts)
        loads.append(chosen.float().cpu() / ids.numel())

    hooks = [block.moe.register_forward_pre_hook(count) for block in model.blocks]
    model(batch)
    for hook in hooks:
        hook.remove()
    return loads


def show_loads(loads: list[Tensor]) -> None:
    levels = " ▁▂▃▄▅▆▇█"
    for layer, load in enumerate(loads):
        bars = "".join(levels[min(8, round(8 * share / load.max().item()))] * 2 + " "
                       for share in load.tolist())  # fmt: skip
        figures = " ".join(f"{100 * share:3.0f}" for share in load.tolist())
        print(f"  layer {layer + 1}  {bars} {figures}  % (even: {100 / len(load):.1f})")


def why_not_compiled(device: str) -> str | None:
    """What torch.compile would lack here, None if nothing."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    names = [os.environ.get("CXX", "g++"), "clang++"] if device == "cpu" else ["gcc", "cc", "clang"]
    if not any(shutil.which(name) for name in names):
        return f"there is no compiler ({', '.join(names)})"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_ops.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="training steps (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="CUDA where there is one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def build(moe: type[FusedMoE]) -> LanguageModel:
        torch.manual_seed(args.seed)
        return LanguageModel(moe).to(device)

    data, held_out = corpus()
    fused, eager = build(FusedMoE), build(ReferenceMoE)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores"
    title("A language model of mixtures of experts")
    parameters = sum(p.numel() for p in fused.parameters())
    moe = fused.blocks[0].moe
    print(f"  {parameters:,} parameters, {len(fused.blocks)} layers of {moe.num_experts} experts,"
          f" {moe.topk} for each byte; float32 on {device} ({where})\n"
          f"  {len(data):,} bytes of Python's own documentation to learn from")  # fmt: skip
    missing = why_not_compiled(device)
    if missing:
        print(f"  not compiled: {missing}, so all of it runs eager")
    # The buffers of fullgraph=True: one graph, or an error.
    model = fused if missing else torch.compile(fused, fullgraph=True)

    title("Learning")
    compared = min(COMPARED_STEPS, args.steps)
    expected, eager_seconds = train(eager, eager.parameters(), data, args.seed, compared,
                                    args.steps, device, progress("eager reference"))  # fmt: skip
    label = "moe_ops" if missing else "moe_ops, compiled"
    losses, seconds = train(model, fused.parameters(), data, args.seed, args.steps,
                            args.steps, device, progress(label))  # fmt: skip
    return report(args, fused, held_out, losses, expected, seconds, eager_seconds, label, device)


def report(args, model, held_out, losses, expected, seconds, eager_seconds, label, device) -> int:
    with torch.no_grad():
        passages = batches(held_out, args.seed, device)
        held_out_loss = statistics.mean(model(next(passages)).item() for _ in range(4))
    print(f"  {losses[0]:.2f} nats a byte at first, {statistics.mean(losses[-10:]):.2f} at last,"
          f" {held_out_loss:.2f} on text it has not seen")  # fmt: skip

    title("What it writes")
    for line in write(model, "The ", 400, args.seed, device).splitlines():
        print(f"  │ {line}")

    title("Where the bytes went")
    show_loads(expert_loads(model, next(passages)))

    title(f"Losses of the first {len(expected)} steps")
    for name, values in (("moe_ops", losses), ("reference", expected)):
        rows = [values[i : min(i + 10, len(expected))] for i in range(0, len(expected), 10)]
        for i, row in enumerate(rows):
            print(f"  {name if i == 0 else '':<10}" + " ".join(f"{loss:6.4f}" for loss in row))
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=False))
    agrees = worst <= AGREEMENT
    print(f"  {'agree' if agrees else 'DO NOT AGREE'}: {worst:.1e} apart at most"
          f" (allowed {AGREEMENT:.0e})")  # fmt: skip

    title("Speed")
    # The first steps compile and warm up.
    later = [statistics.median(s[min(3, len(s) - 1) :]) for s in (seconds, eager_seconds)]
    print(f"  {1e3 * later[0]:7.1f} ms a step   {label} (the first took {seconds[0]:.1f} s)\n"
          f"  {1e3 * later[1]:7.1f} ms a step   eager PyTorch, a loop over the experts\n"
          f"  {later[1] / later[0]:7.2f} times as fast, the whole training step")  # fmt: skip
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
