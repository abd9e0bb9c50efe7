"""Trains the language model and writes a bf16 checkpoint.

    python -m ep_runtime.lm.train --corpus corpus --out checkpoint.safetensors --minutes 5

Needs torch, numpy and safetensors; no native module, no network. The learning rate follows elapsed
time, so a run ends on time on any device; with `--steps` it follows the number of steps, and the
same seed on the same kind of device repeats the run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_runtime.lm import checkpoint
from ep_runtime.lm.config import VOCAB, LmConfig
from ep_runtime.lm.model import LanguageModel

Step = Callable[[Tensor], tuple[Tensor, Tensor]]


def read_bytes(path: Path, device: torch.device) -> Tensor:
    """A file as one uint8 tensor [N]."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).to(device)


def windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """[B, length] int64 rows of `data` at `starts`."""
    index = starts[:, None] + torch.arange(length, device=data.device)
    return data[index].long()


def learning_rate(progress: float, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak. progress 0 to 1."""
    if progress < warmup:
        return peak * (progress + 1e-3) / (warmup + 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (0.02 + 0.98 * cosine)


def make_optimizer(model: LanguageModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; norms, the router and the embedding are not decayed."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        keep = parameter.dim() < 2 or "router" in name or "embedding" in name
        (plain if keep else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel, data: Tensor, batch: int, limit: int | None = None
) -> float:
    """Mean over non-overlapping windows of max_context bytes, in float32; `limit` windows at most.

    A window's first byte has no context and is not counted.
    """
    length = model.config.max_context
    starts = torch.arange(0, data.numel() - length + 1, length, device=data.device)
    if limit is not None and starts.numel() > limit:
        starts = starts[torch.linspace(0, starts.numel() - 1, limit).long().to(starts.device)]
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for first in range(0, starts.numel(), batch):
        tokens = windows(data, starts[first : first + batch], length)
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        total += loss.item()
        count += tokens[:, 1:].numel()
    model.train(was_training)
    return total / count / math.log(2)


@torch.no_grad()
def sample(model: LanguageModel, prompt: str, num_bytes: int) -> str:
    """Greedy continuation (slow: the whole context every step)."""
    model.eval()
    device = model.embedding.device
    tokens = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(num_bytes):
        logits, _ = model(tokens[:, -model.config.max_context :])
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    return bytes(tokens[0].tolist()).decode("ascii", errors="replace")


def make_step(model: LanguageModel, device: torch.device, compile_mode: str, batch: int) -> Step:
    """tokens [B, S + 1] -> (cross entropy, balancing loss), under bf16 autocast on a GPU."""

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits, balance = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.view(-1, VOCAB), tokens[:, 1:].flatten())
        return loss, balance

    if compile_mode == "off" or (compile_mode == "auto" and device.type != "cuda"):
        return step
    compiled: Step = torch.compile(step)
    try:
        tokens = torch.zeros(batch, model.config.max_context + 1, dtype=torch.long, device=device)
        loss, balance = compiled(tokens)
        torch.autograd.backward(loss + balance)
    except Exception as error:  # the compiler raises many kinds; each means: run eagerly
        if compile_mode == "on":
            raise
        print(
            f"torch.compile does not work here, training eagerly: {type(error).__name__}: {error}"
        )
        torch._dynamo.reset()
        return step
    finally:
        model.zero_grad(set_to_none=True)
    return compiled


class Progress:
    """How far a run is, by the clock or, for a run that can be repeated exactly, by steps."""

    def __init__(self, minutes: float, max_steps: int) -> None:
        self._began = time.monotonic()
        self._budget = minutes * 60
        self._max_steps = max_steps
        self.steps = 0

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self._began

    @property
    def fraction(self) -> float:
        """0 to 1; 1 and above: the run is over."""
        if self._max_steps:
            return self.steps / self._max_steps
        return self.elapsed / self._budget


def optimize(
    model: LanguageModel, data: Tensor, val: Tensor, arguments: argparse.Namespace
) -> tuple[Progress, float]:
    """Train `model` in place. Returns the progress made and the last training bits per byte."""
    device = data.device
    progress = Progress(arguments.minutes, arguments.steps)
    optimizer = make_optimizer(model, arguments.lr, arguments.weight_decay)
    step_fn = make_step(model, device, arguments.compile, arguments.batch)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    length = model.config.max_context + 1
    bits, reports = 0.0, 0
    while (fraction := progress.fraction) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction, arguments.lr)
        starts = torch.randint(
            data.numel() - length, (arguments.batch,), generator=generator, device=device
        )
        loss, balance = step_fn(windows(data, starts, length))
        torch.autograd.backward(loss + arguments.balance * balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.steps += 1
        if progress.steps % 10 == 0 or device.type == "cpu":
            bits = loss.item() / math.log(2)  # also keeps the host from running ahead of the clock
        if fraction * 20 >= reports + 1:
            reports = int(fraction * 20)
            val_bits = bits_per_byte(model, val, arguments.batch, limit=arguments.val_windows)
            print(
                f"{progress.elapsed:6.0f} s  step {progress.steps:6d}"
                f"  {progress.steps * arguments.batch * (length - 1) / 1e6:8.1f} MB"
                f"  train {bits:.3f}  val {val_bits:.3f} bits per byte"
                f"  balance {balance.item():.3f}",
                flush=True,
            )
    return progress, bits


def train(arguments: argparse.Namespace) -> dict[str, object]:
    """Run the training that `arguments` describe; returns what the checkpoint records."""
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    model = LanguageModel(LmConfig(), dropout=arguments.dropout).to(device).train()
    data = read_bytes(arguments.corpus / "train.txt", device)
    val = read_bytes(arguments.corpus / "val.txt", device)
    sources = json.loads((arguments.corpus / "SOURCES.json").read_text())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {data.numel():,} training bytes, {device}", flush=True)
    progress, train_bits = optimize(model, data, val, arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())  # judge what is saved
    limit = arguments.val_windows if device.type == "cpu" else None
    val_bits = bits_per_byte(model, val, arguments.batch, limit)
    record: dict[str, object] = {
        "train_bits_per_byte": train_bits,
        "val_bits_per_byte": val_bits,
        "val_windows": limit or val.numel() // model.config.max_context,
        "parameters": parameters,
        "steps": progress.steps,
        "seconds": progress.elapsed,
        "batch": arguments.batch,
        "seed": arguments.seed,
        "lr": arguments.lr,
        "weight_decay": arguments.weight_decay,
        "dropout": arguments.dropout,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "corpus": sources,
    }
    checkpoint.save(arguments.out, model, record)
    print(
        f"final: train {train_bits:.3f}, val {val_bits:.3f} bits per byte, {progress.steps} steps;"
        f" wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB)"
    )
    for prompt in arguments.prompt:
        print("--", sample(model, prompt, 200))
    return record


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the ep_runtime language model.")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/checkpoint.safetensors"))
    parser.add_argument("--minutes", type=float, default=5.0, help="wall clock, compiling included")
    parser.add_argument(
        "--steps", type=int, default=0, help="end after so many steps instead; repeatable exactly"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="windows of max_context bytes")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the balancing loss")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument(
        "--val-windows", type=int, default=128, help="windows of a report (CPU: final one too)"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="print a greedy continuation at the end"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
