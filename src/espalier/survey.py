"""Reads a model once and lists its sites.

One walk over the modules finds hosts and repeated blocks; `grammar` names each host from its path
inside the block; sizes come from module attributes, never from a weight that may be packed.
A block is a numbered child with children of its own. Where numbered children of one class sit
inside a numbered child (Swin's stages), the inner ones are the blocks; layers run on over stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from espalier import fused, grammar, widths
from espalier.modules import plain_type
from espalier.places import CHILD, Conv, Notes, Rows, Site, Sites

if TYPE_CHECKING:
    from torch import nn

# Wrappers that pass attribute access through: their inner name is left out of every path.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_BITS = {"Linear4bit": 4, "LinearNF4": 4, "LinearFP4": 4, "Linear8bitLt": 8}
# Where each kind of module keeps its widths; a weight may be packed and its shape say nothing.
_WIDTHS = {
    "linear": ("in_features", "out_features"),
    "conv1d": ("nx", "nf"),
    "conv2d": ("in_channels", "out_channels"),
    "embedding": ("num_embeddings", "embedding_dim"),
}


@dataclass(slots=True, eq=False)
class _Block:
    path: str
    container: str
    index: int
    module: nn.Module
    above: _Block | None
    stage: bool = False  # holds blocks itself, so is none
    real: bool = False  # something in it has a role
    layer: int | None = None
    stack: str = ""


@dataclass(slots=True, eq=False)
class _Found:
    path: str
    module: nn.Module
    kind: str
    block: _Block | None
    n_in: int
    n_out: int
    role: str = ""
    part: str = ""
    rows: tuple[tuple[str, Rows], ...] = ()


@dataclass(slots=True)
class _Survey:
    model: nn.Module
    hosts: list[_Found] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    bare: list[tuple[str, str]] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    kinds: dict[type, str] = field(default_factory=dict)
    denoiser: bool = False  # one of diffusers' models


def survey(model: nn.Module) -> Sites:
    """Every site of a model, in model order."""
    homes = {cls.__module__.partition(".")[0] for cls in type(_unwrap(model)).__mro__}
    work = _Survey(model, denoiser="diffusers" in homes)
    _walk(work, model, "", None, {id(model)})
    _name(work)
    stacks = _number(work)
    _divide(work)
    found = list(_emit(work))
    notes = Notes(plain_type(_unwrap(model)).__name__, stacks, work.unknown, tuple(work.bare))
    return Sites(found, notes)


def _unwrap(module: nn.Module) -> nn.Module:
    if children := module._modules:
        for name in _WRAPPERS:
            if (inner := children.get(name)) is not None:
                return _unwrap(inner)
    return module


def _walk(work: _Survey, module: nn.Module, path: str, block: _Block | None, seen: set) -> None:
    module = _unwrap(module)
    work.modules[path] = module
    kind = work.kinds.get(type(module))
    if kind is None:
        kind = work.kinds[type(module)] = _kind(module)
    if kind == "norm" and not _norm_width(module):
        kind = "none"
    if kind not in ("none", "bypass"):
        work.hosts.append(_Found(path, module, kind, block, *_widths(module, kind)))
        return
    if kind == "bypass":
        work.bare.append((path, type(module).__name__))
        return
    for name, tensor in module._parameters.items():
        if tensor is not None and sum(size > 1 for size in tensor.shape) > 1:
            work.bare.append((_join(path, name), "bare parameter"))
    for name, child in module._modules.items():
        if child is None or id(child) in seen or name == CHILD:
            continue
        seen.add(id(child))
        inner = _block_at(work, module, path, name, block) if name.isdigit() else block
        _walk(work, child, _join(path, name), inner, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _block_at(
    work: _Survey, container: nn.Module, path: str, name: str, above: _Block | None
) -> _Block | None:
    child = _unwrap(container._modules[name])  # type: ignore[arg-type]
    if not child._modules or grammar.is_head(path) or _kind(child) != "none":
        return above
    if work.denoiser and grammar.STAGES.match(path.rpartition(".")[2]):
        return above
    if above is not None:
        if not grammar.LAYERS.match(path.rpartition(".")[2]):
            return above
        if len({type(_unwrap(m)) for m in container._modules.values() if m is not None}) > 1:
            return above  # T5 keeps its attention and feed-forward in such a list
        above.stage = True
    block = _Block(_join(path, name), path, int(name), child, above)
    work.blocks.append(block)
    return block


def _kind(module: nn.Module) -> str:
    from torch import nn

    name = type(module).__name__
    if isinstance(module, nn.Linear) or (
        name.endswith("Linear") and isinstance(getattr(module, "out_features", None), int)
    ):
        return "bypass" if "Group" in name else "linear"
    if name == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    # These multiply by their weights themselves, so nothing would pass through a seat on a child.
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.modules.conv._ConvNd):
        return "bypass"
    return "norm" if "Norm" in name and module._modules.keys() <= {CHILD} else "none"


def _norm_width(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return int(weight.shape[0]) if weight is not None and weight.dim() == 1 else 0


def _widths(module: nn.Module, kind: str) -> tuple[int, int]:
    if kind not in _WIDTHS:
        return _norm_width(module), _norm_width(module)
    a, b = _WIDTHS[kind]
    return int(getattr(module, a)), int(getattr(module, b))


# ------------------------------------------------------------------------------ names and numbers


def _name(work: _Survey) -> None:
    model: Any = _unwrap(work.model)
    prefix = getattr(model, "base_model_prefix", "")
    backbone = f"{prefix}." if prefix and prefix in model._modules else ""
    words = _word_tables(model)
    for host in work.hosts:
        block = host.block
        if block is not None and block.stage:
            block = host.block = None
        if host.kind in ("linear", "conv1d"):
            if block is not None:
                block.real = True
                host.role, host.part = _role_in(block, host.path)
            elif backbone and not host.path.startswith(backbone) and "pooler" not in host.path:
                host.role = "head"
            else:
                role = grammar.outer_role(host.path)
                # What gives a denoiser's output is pretrained and no task head.
                host.role = "other" if work.denoiser and role == "head" else role
        elif host.kind == "embedding":
            known = id(host.module) in words
            host.role = "embedding" if known else grammar.embedding_role(host.path)
        else:
            host.role = {"conv2d": "conv", "norm": "norm"}[host.kind]
    _set_stores_aside(work)
    parts: dict[tuple[_Block | None, str], list[widths.Named]] = {}
    for host in work.hosts:
        if host.role.startswith("ffn."):
            parts.setdefault((host.block, host.part), []).append(host)
    widths.settle(parts.values())


def _word_tables(model: Any) -> set[int]:
    """The input embedding, where a transformers model says which it is."""
    try:
        return {id(_unwrap(model.get_input_embeddings()))}
    except (AttributeError, NotImplementedError, TypeError):
        return set()


def _set_stores_aside(work: _Survey) -> None:
    """T5 and BART keep a `shared` table that no stack calls; each stack has its own, tied to it."""
    words = [host for host in work.hosts if host.role == "embedding"]
    if any(grammar.stack_of(host.path) for host in words):
        for host in words:
            if host.path.rpartition(".")[2] in grammar.STORES and not grammar.stack_of(host.path):
                host.role = "embedding.extra"


def _role_in(block: _Block, path: str) -> tuple[str, str]:
    # XLM keeps its attentions and feed-forwards in lists of their own, whose name is the context.
    leaf = block.container.rpartition(".")[2]
    before = f"{leaf}." if grammar.names_a_part(leaf) else ""
    inside = grammar.alone(path[len(block.path) + 1 :], block.module._modules)
    role, part = grammar.block_role(before + inside)
    return role, f"{block.path}.{part}"


def _number(work: _Survey) -> tuple[str, ...]:
    """Gives blocks their layer and stack; the stacks in model order."""
    counts: dict[str, int] = {}
    blocks = [block for block in work.blocks if not block.stage and block.real]
    for block in blocks:
        root = block
        while root.above is not None:
            root = root.above
        block.stack = grammar.stack_of(block.container)
        key = block.stack if work.denoiser and block.stack else root.container
        if root is block and key == block.container:
            block.layer = block.index
        else:
            block.layer = counts.get(key, 0)
            counts[key] = block.layer + 1
    named = dict.fromkeys(block.stack for block in blocks)
    if len(named) < 2:
        named = {_single_stack(work, blocks): None}
        for block in blocks:
            block.stack = next(iter(named))
    elif "" in named and named.keys() & {"vision", "audio"}:
        for block in blocks:
            block.stack = block.stack or "text"
        named = dict.fromkeys(block.stack for block in blocks)
    for host in work.hosts:
        if host.block is not None and host.block.layer is None:
            host.block = None
    return tuple(name for name in named if name)


def _single_stack(work: _Survey, blocks: list[_Block]) -> str:
    model: Any = _unwrap(work.model)
    fed = getattr(model, "main_input_name", "input_ids")
    if fed == "pixel_values":
        return "vision"
    if fed in ("input_values", "input_features"):
        return "audio"
    if not blocks or work.denoiser or not hasattr(model, "config"):
        return blocks[0].stack if blocks else ""
    if any(getattr(module, "is_causal", False) for module in blocks[0].module.modules()):
        return "decoder"
    if grammar.CAUSAL_CLASS.search(type(model).__name__):
        return "decoder"
    return blocks[0].stack or "encoder"


def _divide(work: _Survey) -> None:
    """Finds the rows of the slices of each fused host, or notes why they are not known."""
    for host in work.hosts:
        family, _, part = host.role.partition(".")
        if part not in grammar.SLICES:
            continue
        owner = work.modules[host.path.rpartition(".")[0]]
        slices = fused.rows(owner, part, host.n_out)
        if slices is None:
            work.unknown[host.path] = fused.why_not(owner, host.n_out)
        else:
            names = (f"{family}.{name}" for name in grammar.SLICES[part])
            host.rows = tuple(zip(names, slices, strict=True))


# ------------------------------------------------------------------------------------------ sites


def _emit(work: _Survey) -> Iterator[Site]:
    parts: dict[tuple[str, str], list[_Found]] = {}
    in_block: dict[_Block, list[_Found]] = {}
    for host in work.hosts:
        if host.block is not None:
            in_block.setdefault(host.block, []).append(host)
            parts.setdefault((host.role.partition(".")[0], host.part), []).append(host)
    tied = _ties(work)
    stacks = {block.stack for block in in_block}
    only = next(iter(stacks)) if len(stacks) == 1 else None
    begun: set[_Block] = set()
    for host in work.hosts:
        block = host.block
        if block is not None and block not in begun:
            begun.add(block)
            if not grammar.names_a_part(block.container.rpartition(".")[2]):
                width = _block_width(in_block[block])
                at = (block.path, "block", block.layer, block.stack)
                yield Site("block", *at, width, width, enter=block.path)
        stack = grammar.stack_of(host.path) if only is None else only
        site = _site(host, stack if stack in stacks else "", tied.get(host.path, ()))
        yield site
        for role, rows in host.rows:
            yield replace(site, role=role, n_out=rows.size, rows=rows)
        family, _, part = host.role.partition(".")
        if part in ("o", "out") and (enter := _enter(parts[family, host.part], host)):
            at = (family, host.path, host.kind, site.layer, site.stack, enter.n_in, host.n_out)
            kv = None if family == "ffn" else _kv(family, parts[family, host.part])
            yield Site(*at, None, enter.path, site.conv, site.tied, site.bits, kv)


def _site(host: _Found, stack: str, tied: tuple[str, ...]) -> Site:
    block, conv = host.block, None
    if host.kind == "conv2d":
        m: Any = host.module
        conv = Conv(m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
    return Site(
        host.role,
        host.path,
        host.kind,
        None if block is None else block.layer,
        stack if block is None else block.stack,
        host.n_in,
        host.n_out,
        conv=conv,
        tied=tied,
        bits=_BITS.get(type(host.module).__name__),
    )


def _enter(part: list[_Found], out: _Found) -> _Found | None:
    """Where the change of a span reads: the first module that sees what enters the part."""
    for tail in ("in", "gate", "gate_in", "q", "qkv", "extra", "kv", "k"):
        for host in part:
            # Latent attention: q_b_proj is named q, but what enters the part enters at q_a_proj.
            if host.role.endswith("." + tail) and host.n_in == out.n_out:
                return host
    return None


def _kv(family: str, part: list[_Found]) -> tuple[int, int] | None:
    """The widths of an attention's keys and values, as it attends to them."""
    widths = {host.role: host.n_out for host in part}
    for host in part:
        if host.role.endswith(".kv") and any(rows.groups > 1 for _, rows in host.rows):
            return None  # latent attention: a rotary part that all heads share joins these keys
        widths.update({role: rows.size for role, rows in host.rows})
    k, v = widths.get(f"{family}.k"), widths.get(f"{family}.v")
    return (k, v) if k and v else None


def _block_width(hosts: list[_Found]) -> int:
    for roles in (("ffn.out", "attention.o"), ("norm",), ("other", "attention.extra")):
        for host in reversed(hosts):
            # Norms of queries and keys are as wide as a head.
            if host.role in roles and not (host.role == "norm" and grammar.of_attention(host.path)):
                return host.n_out
    return hosts[-1].n_out


def _ties(work: _Survey) -> dict[str, tuple[str, ...]]:
    holders: dict[int, list[str]] = {}
    for host in work.hosts:
        weight = host.module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(host.path)
    return {
        path: tuple(other for other in paths if other != path)
        for paths in holders.values()
        if len(paths) > 1
        for path in paths
    }
