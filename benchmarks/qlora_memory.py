"""Does a model of a billion parameters take a QLoRA step on a CPU within 8 GB?

    python benchmarks/qlora_memory.py [--precision bf16] [--markdown FILE]

A Llama of that size with random weights is written to disk, one layer per file, then loaded in 4
bits as a run loads its base: each weight is quantised as it is read. LoRA goes on all linear
layers, and one training step is taken with gradient checkpointing. The peak of the process is
compared with what the arithmetic says before anything is loaded. Files that are mapped into memory
while they are read count as resident until the system needs the room, so the process's own memory
is given beside them.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import espalier as esp
from espalier import container
from espalier.quantised import measure
from espalier.storage import Storage
from espalier.training import fewbits
from espalier.training.models import checkpointed

GB = 1e9
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Peak:
    """The most memory of the process's own seen while it was watched, in bytes."""

    own: int = 0


@contextmanager
def watched() -> Iterator[Peak]:
    """Look every few milliseconds."""
    peak, stop = Peak(own_memory()), threading.Event()

    def look() -> None:
        while not stop.wait(0.005):
            peak.own = max(peak.own, own_memory())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def own_memory() -> int:
    """Bytes of the process's memory that are no mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def resident_peak() -> int:
    """The most bytes ever resident, mapped files included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_random(config: object, folder: Path) -> int:
    """A checkpoint of random bf16 weights, a file per layer, written tensor by tensor."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    files: dict[str, list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        layer = parts[2] if parts[1] == "layers" else "rest"
        files.setdefault(layer, []).append((name, p.to(torch.bfloat16)))
    where = {}
    for number, tensors in enumerate(files.values(), 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        where |= dict.fromkeys((name for name, _ in tensors), file)
        container.write(folder / file, tensors, map(_random, tensors), {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _random(named: tuple[str, Tensor]) -> Tensor:
    name, like = named
    made = torch.empty(like.shape, dtype=torch.bfloat16)
    return made.fill_(1) if "norm" in name else made.normal_(std=0.02)


def main(arguments: list[str] | None = None) -> None:
    """Write, load, step; print a Markdown table."""
    import transformers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quantize", choices=["nf4", "fp4", "int8"], default="nf4")
    parser.add_argument("--precision", choices=list(TYPES), default="fp32")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="for trying the script out")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    size = (64, 2, 128, 4, 2, 256) if given.tiny else (2048, 22, 5632, 32, 4, 32_000)
    hidden, layers, inner, heads, kv, words = size
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv, vocab_size=words,
        tie_word_embeddings=False,
    )  # fmt: skip
    storage, dtype = Storage(given.quantize), TYPES[given.precision]
    auto = transformers.AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as name:
        count = write_random(config, Path(name))
        told = fewbits.arithmetic(auto, name, {}, storage, dtype)
        before = own_memory()
        with watched() as loading:
            model, _ = fewbits.loaded(auto, name, {}, storage, dtype)
        held = own_memory()
    esp.attach(model, esp.LoRA(rank=8))
    numbers = sum(p.numel() for p in esp.parameters(model))
    optimiser = torch.optim.AdamW(esp.parameters(model), lr=1e-4)
    ids = torch.randint(0, words, (1, given.length))
    model.train()
    with watched() as stepping, checkpointed(model, True):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        seconds = time.perf_counter() - start
    assert torch.isfinite(loss)
    assert not esp.dead_sites(model)
    rows = [
        ("parameters", f"{count:,}, {told.numbers[0]:,} of them in {storage}"),
        ("base by arithmetic", f"{told.total / GB:.3f} GB ({storage.bits:.3f} bits a number)"),
        ("base as measured", f"{bytes_of(model) / GB:.3f} GB"),
        (f"base in {given.precision}", f"{told.dense / GB:.2f} GB"),
        ("the libraries alone", f"{before / GB:.2f} GB"),
        ("own memory while loading, at most", f"{loading.own / GB:.2f} GB"),
        ("own memory once loaded", f"{held / GB:.2f} GB"),
        ("LoRA's numbers, gradients and moments", f"{16 * numbers / GB:.3f} GB"),
        (f"own memory in a step on {given.length} tokens, at most", f"{stepping.own / GB:.2f} GB"),
        ("most resident ever, mapped files included", f"{resident_peak() / GB:.2f} GB"),
    ]
    lines = ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    print("\n".join(lines), f"\n\nloss {loss.item():.3f}, {seconds:.0f} s", sep="\n")
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n")


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of the base's tensors, counted where they lie."""
    found = measure(model)
    assert found is not None
    assert found.measured is not None
    return found.measured


if __name__ == "__main__":
    main()
