"""On a GPU: are fused paths right, how fast do LoRA and QLoRA train, decode and quantise?

    python benchmarks/gpu.py --out benchmarks/results/gpu.md --minutes 60
    python benchmarks/gpu.py --size 1b --only numerics train
    python benchmarks/gpu.py --device cpu --size tiny      the same code where there is no GPU

numerics  Loss and gradients with fused paths on, off (`plain_paths`) and in fp32: fused is right
          where it is as near to fp32 as the plain paths are.
train     Tokens per second and peak memory (base included) of Llama-like models with random
          weights: our LoRA in an ordinary loop, peft's in transformers' Trainer, and the floor,
          the frozen model's forward and backward to activations. Both clip gradients at 1 and
          step with fused AdamW; the first steps are not counted.
decode    New tokens per second of one batch whose rows are on 1, 8, 64 or 256 adapters.
nf4       Quantising a base.

The most important cells come first, each is written as soon as it is there, and none begins after
the minutes are over. Where a batch does not fit, half of it is tried; what does not fit at all is
written as such.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import espalier as esp
import measure
from bases import Size
from espalier.fast.switch import plain_paths

SIZES = {
    "1b": Size(2048, 16, 8192, heads=32, kv_heads=8, vocabulary=32_000, batch=16_384),
    "8b": Size(4096, 32, 14_336, heads=32, kv_heads=8, vocabulary=128_256, batch=8_192),
    "tiny": Size(64, 2, 128, heads=4, kv_heads=2, vocabulary=128, batch=32),
}  # `batch` counts tokens: what a step takes where it fits
FIRST, LATER = (2048,), (512, 8192)  # lengths, the most telling first

RANK, ALPHA = 8, 16
RECIPE = f"LoRA(rank={RANK}, alpha={ALPHA})"
WARMUP, SECONDS = 3, 10.0  # steps that are not counted, and for how long others are
SECTIONS = ("numerics", "train", "decode", "nf4")


# ---------------------------------------------------------------------------------- what is written


@dataclass
class Paper:
    """A markdown file that is written anew with every row; rows are printed as they come."""

    path: Path | None
    head: str
    tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = field(default_factory=dict)

    def row(self, title: str, columns: tuple[str, ...], cells: tuple[str, ...]) -> None:
        """Add a row to the table of that title."""
        if title not in self.tables:
            print(f"\n{title}\n{' | '.join(columns)}", flush=True)
        self.tables.setdefault(title, (columns, []))[1].append(cells)
        print(" | ".join(cells), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.text())

    def text(self) -> str:
        """The whole file."""
        parts = [self.head]
        for title, (columns, rows) in self.tables.items():
            lines = [columns, ("---",) * len(columns), *rows]
            parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(one)} |" for one in lines))
        return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Bench:
    """Where and for how long it runs."""

    device: torch.device
    size: str
    deadline: float
    steps: int  # counted, at most
    paper: Paper

    @property
    def dtype(self) -> torch.dtype:
        """The base's type."""
        return torch.bfloat16

    def attempt(self, work: Callable[[], Any]) -> Any:
        """What the work gives, or a sentence on why it gave nothing; memory is free afterwards."""
        if time.monotonic() > self.deadline:
            return "not run: out of time"
        try:
            found = work()
        except torch.OutOfMemoryError:
            found = OUT_OF_MEMORY
        except Exception as error:  # one cell that fails is no reason to lose the others
            found = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak(self) -> str:
        """The most memory since the last call, where the device counts it."""
        if self.device.type != "cuda":
            return "–"
        most = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return f"{most:.2f} GiB"


OUT_OF_MEMORY = "out of memory"


def llama(
    size: Size, device: torch.device, dtype: torch.dtype, storage: str = "", words: int = 8192
) -> Any:
    """A decoder with random weights, made where it stays; `storage` such as "nf4" quantises it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=2 * words,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if storage:
        esp.quantize(model, storage)
    return model


def texts(size: Size, rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random ids that are their own labels."""
    numbers = torch.Generator().manual_seed(1)
    ids = torch.randint(2, size.vocabulary, (rows, length), generator=numbers).to(device)
    return {"input_ids": ids, "labels": ids}


# ---------------------------------------------------------------------------------------- numerics


def passed(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """The loss and all gradients of an adapter, side by side."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    grads = [p.grad for p in esp.parameters(model) if p.grad is not None]
    return float(loss.detach()), torch.cat([grad.flatten().double() for grad in grads])


def apart(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> tuple[float, float]:
    """Relative differences of loss and gradients."""
    norm = float((one[1] - other[1]).norm() / other[1].norm())
    return abs(one[0] - other[0]) / abs(other[0]), norm


def compare(bench: Bench, recipe: str, storage: str, dtype: torch.dtype, saved: bool) -> list[str]:
    """Fused and plain paths beside fp32, and whether fused is as near to it as plain."""
    size = SIZES["tiny"]
    model = llama(size, bench.device, dtype, storage)
    exact = copy.deepcopy(model)
    if storage:
        esp.dequantize(exact, torch.float32)
    exact.float()
    for one in (model, exact):
        torch.manual_seed(2)
        esp.attach(one, recipe)
        numbers = torch.Generator().manual_seed(3)
        with torch.no_grad():  # a fresh adapter changes nothing, so half of it would go unseen
            for p in esp.parameters(one):
                p += 0.02 * torch.randn(p.shape, generator=numbers).to(p)
        one.train()
        if saved:
            checkpoint(one)
    batch = texts(size, 3, 24, bench.device)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] % 5 == 0, -100)
    fused = passed(model, batch)
    with plain_paths():
        plain, reference = passed(model, batch), passed(exact, batch)
    far, usual = apart(fused, reference), apart(plain, reference)
    slack = max(2e-6, torch.finfo(dtype).eps / 32)  # by chance plain may come very near
    right = all(mine <= 1.5 * other + slack for mine, other in zip(far, usual, strict=True))
    taken = "no" if torch.equal(fused[1], plain[1]) and fused[0] == plain[0] else "yes"
    figures = [f"{a:.1e}, {b:.1e}" for a, b in zip(far, usual, strict=True)]
    return [*figures, taken, "right" if right else "WRONG"]


def numerics(bench: Bench) -> None:
    """Every fused path, in fp32 and bf16, over dense and 4-bit weights."""
    recipes = {
        "LoRA": RECIPE,
        "DoRA": f"LoRA(rank={RANK}, alpha={ALPHA}, dora=True)",
        "LoRA on q, v": f"LoRA(rank={RANK}, sites='attention.q, attention.v')",
        "LoRA and head": f"LoRA(rank={RANK}, sites='all-linear, head')",
        "(IA)³": "IA3()",
    }
    columns = ("", "loss: fused, plain", "gradients: fused, plain", "differs from plain", "")
    title = "Numerics: distance to the same step in fp32"
    both = ("LoRA", "DoRA")
    for dtype, names in ((torch.bfloat16, tuple(recipes)), (torch.float32, both)):
        for storage in ("", "nf4"):
            saved = [(name, True) for name in both if dtype == torch.bfloat16]
            for name, checkpointed in [*((name, False) for name in names), *saved]:
                label = f"{name}, {storage or 'dense'}, {str(dtype).removeprefix('torch.')}"
                label += ", checkpointed" if checkpointed else ""
                args = (bench, recipes[name], storage, dtype, checkpointed)
                found = bench.attempt(lambda args=args: compare(*args))
                row = found if isinstance(found, list) else ["", "", "", found]
                bench.paper.row(title, columns, (label, *row))


# ---------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Cell:
    """One training to measure."""

    size: str
    storage: str
    length: int
    saved: bool  # with gradient checkpointing
    rows: int

    @property
    def label(self) -> str:
        """As in the table."""
        return "QLoRA (nf4)" if self.storage else "LoRA (bf16)"


class Pace:
    """When each step ended, until there are enough of them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.ends = [bench.now()]

    def tick(self) -> bool:
        """Note the end of a step; whether it was the last."""
        self.ends.append(self.bench.now())
        if len(self.ends) == WARMUP + 1:
            self.bench.peak()  # begin to count memory here
        counted = len(self.ends) - 1 - WARMUP
        spent = self.ends[-1] - self.ends[min(WARMUP, len(self.ends) - 1)]
        return counted >= self.bench.steps or (counted >= 2 and spent > SECONDS)

    def seconds(self) -> float:
        """The middle of the steps that count."""
        times = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(times[WARMUP:])


def checkpoint(model: Any) -> None:
    """Turn gradient checkpointing on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def loop(bench: Bench, model: Any, batch: dict[str, Tensor], trained: list[nn.Parameter]) -> Pace:
    """An ordinary loop; without anything to train it only computes the gradients."""
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    pace = Pace(bench)
    while True:
        model(**batch).loss.backward()
        if optimiser is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if pace.tick():
            return pace


def ours(bench: Bench, cell: Cell, model: Any) -> Pace:
    """Our LoRA on all linear layers."""
    esp.attach(model, RECIPE)
    batch = texts(SIZES[cell.size], cell.rows, cell.length, bench.device)
    return loop(bench, model, batch, esp.parameters(model))


def floor(bench: Bench, cell: Cell, model: Any) -> Pace:
    """The frozen model forward, and backward to its activations."""
    model.requires_grad_(False)
    words = model.get_input_embeddings()
    words.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
    batch = texts(SIZES[cell.size], cell.rows, cell.length, bench.device)
    return loop(bench, model, batch, [])


def theirs(bench: Bench, cell: Cell, model: Any) -> Pace:
    """peft's LoRA on all linear layers, in transformers' Trainer."""  # noqa: D403
    import peft
    from transformers import Trainer, TrainerCallback, TrainingArguments

    if cell.storage:
        model.is_loaded_in_4bit = True  # else peft takes its general layer
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped: Any = peft.get_peft_model(model, config)
    some = texts(SIZES[cell.size], 1, cell.length, torch.device("cpu"))
    row = {name: value[0] for name, value in some.items()}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            per_device_train_batch_size=cell.rows,
            max_steps=WARMUP + bench.steps,
            learning_rate=1e-4,
            bf16=True,
            optim="adamw_torch_fused",
            use_cpu=bench.device.type == "cpu",
            dataloader_pin_memory=bench.device.type == "cuda",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        pace: list[Pace] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
                pace.append(Pace(bench))

            def on_step_end(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
                control.should_training_stop |= pace[0].tick()

        data: Any = [row] * (cell.rows * (WARMUP + bench.steps))
        Trainer(wrapped, settings, train_dataset=data, callbacks=[Clock()]).train()
    return pace[0]


WHO: dict[str, Callable[[Bench, Cell, Any], Pace]] = {
    "ours": ours,
    "peft, Trainer": theirs,
    "floor": floor,
}


def measured(bench: Bench, cell: Cell, who: str) -> tuple[str, ...]:
    """Rows of the batch, tokens per second and peak memory of one contender."""
    model = llama(SIZES[cell.size], bench.device, bench.dtype, cell.storage, cell.length).train()
    model.config.use_cache = False
    if cell.saved:
        checkpoint(model)
    bench.peak()
    pace = WHO[who](bench, cell, model)
    speed = cell.rows * cell.length / pace.seconds()
    return str(cell.rows), f"{speed:,.0f}", bench.peak()


def cells(size: str, lengths: tuple[int, ...]) -> Iterator[Cell]:
    """Trainings of one size, the most important first."""
    for length in lengths:
        rows = max(1, SIZES[size].batch // length)
        for storage in ("nf4", "") if size == "8b" else ("", "nf4"):
            both = (True, False) if size == "8b" or length > 2048 else (False, True)
            for saved in (bool(storage),) if size == "tiny" else both:
                yield Cell(size, storage, length, saved, rows)


def train(bench: Bench, size: str, lengths: tuple[int, ...]) -> None:
    """Every training of one size at these lengths by every contender."""
    columns = ("", "length", "checkpointing", "who", "rows", "tokens / s", "peak memory")
    for cell in cells(size, lengths):
        for who in WHO:
            found: Any = OUT_OF_MEMORY
            rows = cell.rows
            while rows and found == OUT_OF_MEMORY:
                asked = replace(cell, rows=rows)
                found = bench.attempt(lambda asked=asked, who=who: measured(bench, asked, who))
                rows //= 2
            row = found if isinstance(found, tuple) else ("", found, "")
            given = (cell.label, str(cell.length), "on" if cell.saved else "off", who)
            bench.paper.row(f"Training, Llama-like {size}", columns, (*given, *row))


# ------------------------------------------------------------------------- decoding and quantising


def decode(bench: Bench) -> None:
    """Batches whose rows are on ever more adapters; the bare base first."""
    tiny = bench.size == "tiny"
    size, rows = ("tiny", 4) if tiny else ("1b", 256)
    counts = (0, 1, 2) if tiny else (0, 1, 8, 64, 256)
    columns = ("adapters", "who", "new tokens / s", "peak memory")
    for count in counts:
        for who in ("ours", "peft") if count else ("base",):
            args = (bench, size, rows, count, who)
            slow = who == "peft" and count > 64  # adding so many takes longer than all the rest
            found = "not run" if slow else bench.attempt(lambda args=args: written(*args))
            row = found if isinstance(found, tuple) else (found, "")
            title = f"Decoding, Llama-like {size}, {rows} rows, their adapters in turn"
            bench.paper.row(title, columns, (str(count), who, *row))


def written(bench: Bench, size: str, rows: int, count: int, who: str) -> tuple[str, str]:
    """New tokens per second of a batch on `count` adapters, and the peak memory."""
    words, new = (8, 4) if size == "tiny" else (64, 64)
    model: Any = llama(SIZES[size], bench.device, bench.dtype).eval()
    ids = texts(SIZES[size], rows, words, bench.device)["input_ids"]
    more: dict[str, Any] = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    turn = [str(row % max(1, count)) for row in range(rows)]
    mixed: Any = nullcontext
    if who == "ours":
        for name in range(count):
            esp.attach(model, RECIPE, str(name))
        mixed = lambda: esp.rows(model, turn)  # noqa: E731
    elif who == "peft":
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        model = peft.get_peft_model(model, config, "0").eval()  # type: ignore[assignment]
        for name in range(1, count):
            model.add_adapter(str(name), config)
        more["adapter_names"] = turn
    bench.peak()
    times = []
    with torch.no_grad(), mixed():
        for _ in range(3):
            start = bench.now()
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
            times.append(bench.now() - start)
    assert out.shape[1] == words + new
    return f"{rows * new / min(times[1:]):,.0f}", bench.peak()


def quantising(bench: Bench) -> None:
    """A base's linear weights from bf16 to NF4 with double quantisation."""
    columns = ("where", "how", "seconds", "million numbers / s")
    size = "tiny" if bench.size == "tiny" else "1b"
    cpu = torch.device("cpu")
    places = [cpu] if bench.device == cpu else [bench.device, cpu]
    for device in places:
        for how, paths in (("ours", nullcontext), ("bitsandbytes", plain_paths)):
            if device.type == "cuda" and how == "ours":
                continue  # there both are bitsandbytes' kernel
            found = bench.attempt(lambda at=device, paths=paths: _quantised(bench, size, at, paths))
            row = found if isinstance(found, tuple) else (found, "")
            title = f"Quantising a Llama-like {size} to NF4"
            bench.paper.row(title, columns, (device.type, how, *row))


def _quantised(bench: Bench, size: str, device: torch.device, paths: Any) -> tuple[str, str]:
    one = replace(SIZES[size], layers=min(4, SIZES[size].layers))
    times = []
    for _ in range(2):
        model = llama(one, device, bench.dtype)
        start = bench.now()
        with paths():
            numbers = esp.quantize(model, "nf4").numbers[0]
        times.append(bench.now() - start)
    return f"{min(times):.3f} ({one.layers} layers)", f"{numbers / min(times) / 1e6:,.0f}"


# ------------------------------------------------------------------------------------------ running


def device_of(name: str) -> torch.device:
    """The device asked for. Raises SystemExit where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; try the script with --device cpu --size tiny")
    return torch.device(name)


def about(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, the device first."""
    facts: dict[str, Any] = {"device": "CPU"}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        facts = {"device": f"{card.name}, {memory}", "CUDA": torch.version.cuda}
    return facts | measure.setting("bitsandbytes") | {"clock": "wall time"}


def main(argv: list[str] | None = None) -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="LoRA and QLoRA on a GPU, ours beside peft's.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="all", choices=("all", *SIZES))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=60.0, help="no cell begins after these")
    parser.add_argument("--steps", type=int, default=20, help="most steps counted in a training")
    parser.add_argument("--out", type=Path, help="a markdown file, written as results come")
    asked = parser.parse_args(argv)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # else Trainer would share a batch out
    device = device_of(asked.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    told = ", ".join(f"{key} {value}" for key, value in about(device).items())
    paper = Paper(asked.out, f"# LoRA and QLoRA on a device\n\nMeasured with: {told}.")
    bench = Bench(device, asked.size, time.monotonic() + 60 * asked.minutes, asked.steps, paper)
    sizes = ("1b", "8b") if asked.size == "all" else (asked.size,)

    def trained(lengths: tuple[int, ...]) -> None:
        for size in sizes if "train" in asked.only else ():
            train(bench, size, lengths)

    if "numerics" in asked.only:
        numerics(bench)
    trained((16,) if asked.size == "tiny" else FIRST)
    if "decode" in asked.only:
        decode(bench)
    if "nf4" in asked.only:
        quantising(bench)
    trained(() if asked.size == "tiny" else LATER)


if __name__ == "__main__":
    main()
