"""What each of two processes does for test_many.py: `espalier launch many_worker.py FOLDER`.

The functions are also what one process does, to compare with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import espalier as esp
import tiny_runs as tiny
from espalier.errors import AdapterError, EspalierError, SettingError
from espalier.training.loop import Loop

STEPS, ROWS = 3, 4
RECIPES = {
    "lora": "LoRA(rank=4)",
    "serial": "SerialAdapter(reduction=4)",
    "prefix": "PrefixTuning(length=4)",
    "ia3": "IA3()",
    "mam": "MAM()",
    "adalora": "AdaLoRA(rank=4, target=2)",
}
READING = {  # those that read whole weights: at the start, in every pass, or to stand in for them
    "dora": "LoRA(rank=4, dora=True)",
    "pissa": "LoRA(rank=4, init='pissa')",
    "full": "FullTuning()",
    "mask": "PartialTuning(mask='magnitude', share=0.01)",
    "words": "PromptTuning(length=4)",
    "ladder": "LadderSideTuning(reduction=2)",
}
Wrap = Callable[[Any], Any]
PLAN = {"batch": 4, "steps": 6, "lr": 0.01, "threads": 1, "quiet": True, "save_every": 1}
STOP = 3


def words() -> torch.Tensor:
    return torch.randint(5, 60, (ROWS, 12), generator=torch.Generator().manual_seed(1))


def model(recipe: str, checkpointing: str = "", shard: str = "", half: bool = False) -> Any:
    """A small Llama with an adapter, in training mode."""
    made = tiny.llama().to(torch.bfloat16 if half else torch.float32).train()
    if shard == "first":
        esp.shard(made)
    torch.manual_seed(0)
    esp.attach(made, recipe)
    if shard == "last":
        esp.shard(made)
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        made.enable_input_require_grads()
    return made


def loop(made: Any, share: slice = slice(None), wrap: Wrap = lambda m: m) -> dict[str, Any]:
    """Some steps on a share of the rows; the adapter's numbers and the model's outputs."""
    optimiser = torch.optim.SGD(esp.parameters(made), lr=0.1)
    life = esp.Lifecycle(made, STEPS).follow(optimiser)
    run, rows = wrap(made), words()
    for _ in range(STEPS):
        run(input_ids=rows[share], labels=rows[share]).loss.backward()
        if run is made and dist.is_initialized():
            esp.average_gradients(made)
        optimiser.step()
        optimiser.zero_grad()
    life.leave()
    made.eval()
    with torch.no_grad():
        outputs = made(input_ids=rows).logits
    numbers = torch.cat([p.detach().flatten() for p in esp.parameters(made)])
    return {"numbers": numbers, "outputs": outputs.float()}


def trainer(folder: Path) -> dict[str, Any]:
    """transformers' Trainer, which puts DistributedDataParallel around the model."""
    from transformers import Trainer, TrainingArguments

    from espalier.training import AdapterCallback

    made = model(RECIPES["lora"])
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
        per_device_train_batch_size=ROWS // 2, max_grad_norm=0, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True, average_tokens_across_devices=False,
    )  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in words()]
    Trainer(made, arguments, train_dataset=rows, callbacks=[AdapterCallback()]).train()
    return {"numbers": torch.cat([p.detach().flatten() for p in esp.parameters(made)])}


def fit(out: Path, stop: int = 0, **changes: Any) -> None:
    """A run in a folder, stopped like a killed one after `stop` steps."""
    inner = Loop._step

    def stopping(self: Loop, *given: Any) -> None:
        if self.at.step == stop:
            raise KeyboardInterrupt
        inner(self, *given)

    loops: Any = Loop
    loops._step = stopping if stop else inner
    try:
        with suppress(KeyboardInterrupt):
            esp.fit(
                tiny.llama(), tiny.tokenizer("gpt2"), tiny.sums(43), RECIPES["lora"], out=out,
                **{**PLAN, **changes},
            )  # fmt: skip
    finally:
        loops._step = inner


def from_files(base: str, rows: str, out: Path, **changes: Any) -> None:
    """A run of a classifier from files, whose last step has one micro-batch too few."""
    plan = {**PLAN, "steps": None, "epochs": 1, "save_every": None}
    config = {"model": base, "train": rows, "method": "LoRA(rank=2)", "out": out}
    esp.train(esp.RunConfig(**{**plan, **config, **changes}))


def refused(act: Callable[[], object], kind: type[EspalierError]) -> bool:
    try:
        act()
    except kind:
        return True
    return False


def main(folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    fit(folder / "one-two", resume=True, accumulate=1)  # begun by one process
    fit(folder / "two-one", STOP, accumulate=1)
    assert dist.is_initialized()
    drawn = torch.nn.functional.dropout(torch.ones(64))  # seeded by the run
    rank, found = dist.get_rank(), {"drawn": {"drawn": drawn}}
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)

    def static(made: Any) -> Any:
        return DistributedDataParallel(made, static_graph=True)

    for name, recipe in RECIPES.items():
        found[f"ddp {name}"] = loop(model(recipe), half, DistributedDataParallel)
    beside = model(RECIPES["lora"])
    esp.attach(beside, RECIPES["ia3"], "resting")
    esp.freeze(beside, "resting")
    esp.activate(beside, "default")
    found["ddp lora beside"] = loop(beside, half, DistributedDataParallel)
    found["ddp lora plain"] = loop(model(RECIPES["lora"], "plain"), half, DistributedDataParallel)
    found["ddp lora reentrant"] = loop(model(RECIPES["lora"], "reentrant"), half, static)
    for name, recipe in {**RECIPES, **READING}.items():
        for order in ("first", "last"):
            found[f"fsdp {name} {order}"] = loop(model(recipe, shard=order), half)
    for kind in ("plain", "reentrant"):
        found[f"fsdp mam {kind}"] = loop(model(RECIPES["mam"], kind, "first"), half)
    found["fsdp lora half"] = loop(model(RECIPES["lora"], shard="first", half=True), half)
    found["trainer lora"] = trainer(folder / "trainer")
    base, rows = str(folder / "base"), str(folder / "rows.jsonl")
    from_files(base, rows, folder / "files-fsdp", sharding="fsdp")
    from_files(base, rows, folder / "files-hybrid", sharding="hybrid", checkpointing=True)

    held = model(RECIPES["lora"], shard="first")
    if rank == 0:  # alone
        esp.save(held, "default", folder / "saved")
    dist.barrier()
    esp.load(held, folder / "saved", name="again")
    checks = {
        "merge": refused(lambda: esp.merge(held), AdapterError),
        "twice": refused(lambda: esp.shard(held), AdapterError),
        "generates": held.eval().generate(words()[:1], max_new_tokens=3, pad_token_id=0).shape[1],
    }
    esp.attach(held, "PartialTuning(mask='fisher', share=0.01)", "fisher")
    batches = [{"input_ids": words(), "labels": words()}]
    checks["calibrate"] = refused(lambda: esp.calibrate(held, "fisher", batches), SettingError)
    found["checks"] = {name: torch.tensor(int(value)) for name, value in checks.items()}
    flat = {f"{case}/{key}": v.clone() for case, part in found.items() for key, v in part.items()}
    save_file(flat, folder / f"found-{rank}.safetensors")
    print(f"process {rank} is done")
    dist.barrier()
    if rank == 1:
        sys.exit(7)  # the launcher has to say so, and not to wait for the other
    with suppress(RuntimeError):
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
