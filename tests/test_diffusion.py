"""Denoisers of diffusers: their places, training on the denoising loss, LoRA files both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import espalier as esp
from espalier.errors import AdapterError, CheckpointError

diffusers = pytest.importorskip("diffusers")
from peft import LoraConfig, get_peft_model_state_dict  # noqa: E402

diffusers.utils.logging.set_verbosity_error()

FILE = "pytorch_lora_weights.safetensors"


def unet() -> nn.Module:
    torch.manual_seed(7)
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=8,
    ).eval()  # fmt: skip


def flux() -> nn.Module:
    torch.manual_seed(7)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def sd3() -> nn.Module:
    torch.manual_seed(7)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=64, out_channels=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip


def pixart() -> nn.Module:
    torch.manual_seed(7)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
        cross_attention_dim=16, sample_size=8, caption_channels=8, out_channels=8,
    ).eval()  # fmt: skip


def aura() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _unet_batch() -> dict[str, Tensor]:
    return {
        "sample": _noise(2, 4, 8, 8), "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": _noise(2, 5, 24),
    }  # fmt: skip


def _flux_batch() -> dict[str, Tensor]:
    return {
        "hidden_states": _noise(2, 16, 4), "timestep": torch.tensor([0.1, 0.7]),
        "encoder_hidden_states": _noise(2, 5, 24), "pooled_projections": _noise(2, 20),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


BATCHES: dict[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]] = {
    unet: _unet_batch,
    flux: _flux_batch,
}
ON = pytest.mark.parametrize("make", BATCHES, ids=lambda make: make.__name__)


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, return_dict=False)[0]


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return run(model, batch)


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 3) -> list[float]:
    """Steps of denoising: the model is given noise and should say which."""
    target = _noise(*output(model, batch).shape) * 2
    optimiser = torch.optim.AdamW(esp.groups(model, learning_rate=2e-2))
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.mse_loss(run(model, batch), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def shaken(make: Callable[[], nn.Module], recipe: str, name: str = "style") -> nn.Module:
    model = make()
    esp.attach(model, recipe, name)
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for p in esp.parameters(model):
        p.data.add_(0.2 * torch.randn(p.shape, generator=generator))


def pipeline(model: nn.Module) -> Any:
    """A tiny pipeline around a denoiser, without its text encoders."""
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    if type(model).__name__.startswith("Flux"):
        return diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=model,
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, unet=model, text_encoder=None, tokenizer=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def theirs(make: Callable[[], nn.Module], *folders: Path) -> Any:
    """A pipeline into which diffusers has loaded LoRA files."""
    pipe = pipeline(make())
    for folder in folders:
        pipe.load_lora_weights(str(folder), weight_name=FILE, adapter_name=folder.name)
    return pipe


def denoiser(pipe: Any) -> nn.Module:
    return (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).eval()


# ------------------------------------------------------------------------------------------ places

GOLDEN = {
    (unet, "down_blocks.0.attentions.0.transformer_blocks.0"): """
        attention.q attn1.to_q 16 16
        attention.k attn1.to_k 16 16
        attention.v attn1.to_v 16 16
        attention.o attn1.to_out.0 16 16
        attention attn1.to_out.0 16 16 from attn1.to_q
        cross.q attn2.to_q 16 16
        cross.k attn2.to_k 24 16
        cross.v attn2.to_v 24 16
        cross.o attn2.to_out.0 16 16
        cross attn2.to_out.0 16 16 from attn2.to_q
        ffn.gate_in ff.net.0.proj 16 128
        ffn.gate ff.net.0.proj 16 64 rows 64-128
        ffn.in ff.net.0.proj 16 64 rows 0-64
        ffn.out ff.net.2 64 16
        ffn ff.net.2 16 16 from ff.net.0.proj""",
    (flux, "transformer_blocks.0"): """
        other norm1.linear 32 192
        other norm1_context.linear 32 192
        attention.q attn.to_q 32 32
        attention.k attn.to_k 32 32
        attention.v attn.to_v 32 32
        attention.o attn.to_out.0 32 32
        attention attn.to_out.0 32 32 from attn.to_q
        attention.extra attn.add_q_proj 32 32
        attention.extra attn.add_k_proj 32 32
        attention.extra attn.add_v_proj 32 32
        attention.extra attn.to_add_out 32 32
        ffn.in ff.net.0.proj 32 128
        ffn.out ff.net.2 128 32
        ffn ff.net.2 32 32 from ff.net.0.proj
        ffn.in ff_context.net.0.proj 32 128
        ffn.out ff_context.net.2 128 32
        ffn ff_context.net.2 32 32 from ff_context.net.0.proj""",
    (flux, "single_transformer_blocks.0"): """
        other norm.linear 32 96
        ffn.in proj_mlp 32 128
        other proj_out 160 32
        attention.q attn.to_q 32 32
        attention.k attn.to_k 32 32
        attention.v attn.to_v 32 32""",
    (sd3, "transformer_blocks.0"): """
        other norm1.linear 32 288
        other norm1_context.linear 32 192
        attention.q attn.to_q 32 32
        attention.k attn.to_k 32 32
        attention.v attn.to_v 32 32
        attention.o attn.to_out.0 32 32
        attention attn.to_out.0 32 32 from attn.to_q
        attention.extra attn.add_k_proj 32 32
        attention.extra attn.add_v_proj 32 32
        attention.extra attn.add_q_proj 32 32
        attention.extra attn.to_add_out 32 32
        attention.q attn2.to_q 32 32
        attention.k attn2.to_k 32 32
        attention.v attn2.to_v 32 32
        attention.o attn2.to_out.0 32 32
        attention attn2.to_out.0 32 32 from attn2.to_q
        ffn.in ff.net.0.proj 32 128
        ffn.out ff.net.2 128 32
        ffn ff.net.2 32 32 from ff.net.0.proj
        ffn.in ff_context.net.0.proj 32 128
        ffn.out ff_context.net.2 128 32
        ffn ff_context.net.2 32 32 from ff_context.net.0.proj""",
    (pixart, "transformer_blocks.0"): """
        attention.q attn1.to_q 16 16
        attention.k attn1.to_k 16 16
        attention.v attn1.to_v 16 16
        attention.o attn1.to_out.0 16 16
        attention attn1.to_out.0 16 16 from attn1.to_q
        cross.q attn2.to_q 16 16
        cross.k attn2.to_k 16 16
        cross.v attn2.to_v 16 16
        cross.o attn2.to_out.0 16 16
        cross attn2.to_out.0 16 16 from attn2.to_q
        ffn.in ff.net.0.proj 16 64
        ffn.out ff.net.2 64 16
        ffn ff.net.2 16 16 from ff.net.0.proj""",
    (aura, "single_transformer_blocks.0"): """
        other norm1.linear 16 96
        attention.q attn.to_q 16 16
        attention.k attn.to_k 16 16
        attention.v attn.to_v 16 16
        attention.o attn.to_out.0 16 16
        attention attn.to_out.0 16 16 from attn.to_q
        ffn.gate ff.linear_1 16 256
        ffn.in ff.linear_2 16 256
        ffn.out ff.out_projection 256 16
        ffn ff.out_projection 16 16 from ff.linear_2""",
}


@pytest.mark.parametrize(
    ("make", "block"), GOLDEN, ids=[f"{make.__name__}-{block}" for make, block in GOLDEN]
)
def test_golden_block(make: Callable[[], nn.Module], block: str) -> None:
    with torch.device("meta"):
        places = esp.sites(make())
    found = set()
    for site in places:
        if site.path.startswith(block + ".") and site.kind == "linear":
            words = [site.role, site.path.removeprefix(block + "."), site.n_in, site.n_out]
            words += ["rows", f"{site.rows.start}-{site.rows.stop}"] if site.rows else []
            words += ["from", site.enter.removeprefix(block + ".")] if site.enter else []
            found.add(" ".join(map(str, words)))
    golden = GOLDEN[make, block]
    assert found == {" ".join(row.split()) for row in golden.splitlines() if row.strip()}
    assert any(site.role == "block" and site.path == block for site in places)


def test_the_halves_of_a_geglu_are_what_they_are_called() -> None:
    model = unet()
    site = esp.sites(model).select("ffn.in")[0]
    part = model.get_submodule(site.path.removesuffix(".proj"))
    x = _noise(3, site.n_in)
    before = part(x)
    assert site.rows is not None
    with torch.no_grad():
        for p in part.proj.parameters():
            p[site.rows.start : site.rows.stop] *= 2
    assert torch.allclose(part(x), 2 * before, atol=1e-6)  # the other half meets an activation


def test_layers_run_on_through_the_way_down_and_up() -> None:
    with torch.device("meta"):
        places = esp.sites(
            diffusers.UNet2DConditionModel(
                layers_per_block=2, block_out_channels=(16, 32, 32), norm_num_groups=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 2), use_linear_projection=True,
                cross_attention_dim=24, attention_head_dim=8,
            )
        )  # fmt: skip
    assert set(places.notes.stacks) == {"down", "up", "mid"}
    for stack, count in (("down", 8), ("up", 12), ("mid", 2)):
        blocks = [s for s in places if s.role == "block" and s.stack == stack]
        assert [s.layer for s in blocks] == list(range(count))
        assert all("transformer_blocks" in s.path for s in blocks)
    assert {s.stack for s in places.select("down/cross.k@2-")} == {"down"}
    assert not places.notes.unknown
    every = {s.path.rpartition("transformer_blocks.")[0] for s in places.select("all-linear")}
    assert "" not in every


@ON
def test_nothing_of_a_denoiser_is_a_task_head(make: Callable[[], nn.Module]) -> None:
    model = make()
    esp.attach(model, "LoRA(rank=2)", "style")
    assert esp.account(model, "style").head == 0


# ---------------------------------------------------------------------------------------- training

RECIPES = {
    "lora": "LoRA(rank=3, alpha=8)",
    "lora-conv": "LoRA(rank=2, sites='conv') + LoRA(rank=3, sites='cross.*', alpha=5)",
    "dora": "LoRA(rank=3, alpha=8, dora=True)",
    "pissa": "LoRA(rank=3, alpha=8, init='pissa')",
    "slices": "LoRA(rank=3, alpha=8, sites='ffn.gate, attention.q')",
    "ia3": "IA3()",
}
PAIRS = [(unet, name) for name in RECIPES] + [(flux, "lora"), (flux, "dora"), (flux, "ia3")]
EACH = pytest.mark.parametrize(
    ("make", "recipe"), PAIRS, ids=[f"{make.__name__}-{name}" for make, name in PAIRS]
)


@EACH
def test_trains_merges_saves_and_leaves_no_trace(
    make: Callable[[], nn.Module], recipe: str, tmp_path: Path
) -> None:
    model, batch = make(), BATCHES[make]()
    before = output(model, batch)
    base = {name: p.clone() for name, p in model.named_parameters()}
    esp.attach(model, RECIPES[recipe], "style")
    assert torch.allclose(output(model, batch), before, atol=1e-6)
    losses = train(model.train(), batch, steps=6)
    assert losses[-1] < losses[0]
    assert esp.dead_sites(model) == []
    after = output(model.eval(), batch)
    assert not torch.allclose(after, before, atol=1e-3)
    assert all(p.equal(base[name]) for name, p in model.named_parameters() if name in base)
    esp.save(model, "style", tmp_path / "style")
    fresh = make()
    esp.load(fresh, tmp_path / "style")
    assert torch.equal(output(fresh, batch), after)
    esp.merge(model)
    assert torch.allclose(output(model, batch), after, atol=2e-5)
    esp.unmerge(model)
    esp.detach(model, "style")
    assert torch.equal(output(model, batch), before)


@ON
def test_checkpointed_gradients_are_the_same(make: Callable[[], nn.Module]) -> None:
    model, batch = shaken(make, RECIPES["lora"]).train(), BATCHES[make]()
    grads = []
    for _ in range(2):
        run(model, batch).square().mean().backward()
        grads += [p.grad.clone() for p in esp.parameters(model)]
        for p in esp.parameters(model):
            p.grad = None
        model.enable_gradient_checkpointing()
    torch.testing.assert_close(*grads)


def test_over_a_bf16_base_fresh_is_exact_and_the_type_stays() -> None:
    model = unet().to(torch.bfloat16)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in _unet_batch().items()}
    before = output(model, batch)
    for recipe in ("lora", "dora", "pissa", "ia3"):
        esp.attach(model, RECIPES[recipe], recipe)
        assert torch.equal(output(model, batch), before)
    assert before.dtype == torch.bfloat16
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}


def test_compiled_whole_without_a_break() -> None:
    torch._dynamo.reset()
    model, batch = shaken(flux, RECIPES["dora"]), _flux_batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(run(compiled, batch), run(model, batch), atol=1e-5)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- files

FILED = [pair for pair in PAIRS if pair[1] != "ia3"]


@pytest.mark.parametrize(
    ("make", "recipe"), FILED, ids=[f"{make.__name__}-{name}" for make, name in FILED]
)
def test_a_pipeline_of_diffusers_loads_what_we_write(
    make: Callable[[], nn.Module], recipe: str, tmp_path: Path
) -> None:
    model, batch = shaken(make, RECIPES[recipe]), BATCHES[make]()
    expected = output(model, batch)
    assert not torch.allclose(expected, output(make(), batch), atol=1e-2)
    folder = tmp_path / "style"
    esp.save(model, "style", folder, format="diffusers")
    other = denoiser(theirs(make, folder))
    assert torch.allclose(output(other, batch), expected, atol=2e-5)
    component = "unet" if make is unet else "transformer"
    held = get_peft_model_state_dict(other, adapter_name="style")
    assert set(load_file(folder / FILE)) == {f"{component}.{key}" for key in held}
    for where in (folder, folder / FILE):  # back again, by the folder or by the file
        back = make()
        esp.load(back, where, "again")
        assert torch.allclose(output(back, batch), expected, atol=1e-5)


def test_the_scale_survives_a_reader_that_knows_of_no_alpha(tmp_path: Path) -> None:
    model, batch = shaken(unet, RECIPES["lora"]), _unet_batch()
    esp.save(model, "style", tmp_path / "style", format="diffusers")
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(load_file(tmp_path / "style" / FILE), bare / FILE)
    for folder in (tmp_path / "style", bare):
        assert torch.allclose(
            output(denoiser(theirs(unet, folder)), batch), output(model, batch), atol=2e-5
        )


@ON
@pytest.mark.parametrize("header", [True, False], ids=["with-alpha", "without"])
def test_what_diffusers_writes_means_here_what_it_means_there(
    make: Callable[[], nn.Module], header: bool, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "ff.net.0.proj"],
        rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 5},
    )  # fmt: skip
    model, batch = make(), BATCHES[make]()
    model.add_adapter(config, adapter_name="theirs")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.add_(0.2 * torch.randn_like(p))
    state = get_peft_model_state_dict(model, adapter_name="theirs")
    component = "unet" if make is unet else "transformer"
    said = {f"{component}_lora_adapter_metadata": config.to_dict()} if header else {}
    folder = tmp_path / "theirs"
    kind = diffusers.StableDiffusionPipeline if make is unet else diffusers.FluxPipeline
    kind.save_lora_weights(str(folder), **{f"{component}_lora_layers": state}, **said)
    expected = output(denoiser(theirs(make, folder)), batch)
    ours = make()
    assert esp.load(ours, folder) == "theirs"
    assert torch.allclose(output(ours, batch), expected, atol=1e-5)
    assert torch.allclose(output(model, batch), expected, atol=1e-5) == header  # alpha lost there


def test_older_keys_and_alphas_are_read(tmp_path: Path) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    a, b = _noise(3, 32), _noise(32, 3)
    save_file(
        {
            f"unet.{path}.lora.down.weight": a, f"unet.{path}.lora.up.weight": b,
            f"unet.{path}.alpha": torch.tensor(6.0), "text_encoder.x.lora.down.weight": a.clone(),
        },
        tmp_path / "old.safetensors",
    )  # fmt: skip
    model, batch = unet(), _unet_batch()
    assert esp.load(model, tmp_path / "old.safetensors") == "old"
    changed = unet()
    with torch.no_grad():
        changed.get_submodule(path).weight += 2 * b @ a
    assert torch.allclose(output(model, batch), output(changed, batch), atol=1e-5)


@ON
def test_two_styles_weighted_together_equal_set_adapters(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, batch = make(), BATCHES[make]()
    esp.attach(model, "LoRA(rank=3, alpha=8, sites='attention.*')", "style")
    shake(model)
    esp.attach(model, "LoRA(rank=2, sites='attention.q, ffn.out')", "subject")
    shake(model)
    for name in ("style", "subject"):
        esp.save(model, name, tmp_path / name, format="diffusers")
    pipe = theirs(make, tmp_path / "style", tmp_path / "subject")
    for weights in ({"style": 0.7, "subject": 0.5}, {"style": 1.3, "subject": -0.4}):
        esp.activate(model, weights)
        pipe.set_adapters(list(weights), list(weights.values()))
        expected = output(denoiser(pipe), batch)
        assert torch.allclose(output(model, batch), expected, atol=2e-5)
    esp.merge(model)
    assert torch.allclose(output(model, batch), expected, atol=2e-5)


def test_a_whole_pipeline_runs_with_an_adapted_unet(tmp_path: Path) -> None:
    model = shaken(unet, RECIPES["lora"])
    esp.save(model, "style", tmp_path / "style", format="diffusers")
    given = {
        "prompt_embeds": _noise(1, 5, 24), "negative_prompt_embeds": _noise(1, 5, 24) / 2,
        "num_inference_steps": 2, "output_type": "latent", "latents": _noise(1, 4, 8, 8),
    }  # fmt: skip
    images = []
    for pipe in (pipeline(model), theirs(unet, tmp_path / "style"), pipeline(unet())):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(**copy.deepcopy(given)).images)
    assert torch.allclose(images[0], images[1], atol=1e-4)
    assert not torch.allclose(images[0], images[2], atol=1e-2)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("recipe", ["IA3()", "LoRA(rank=2, bias='lora_only')"])
def test_what_diffusers_has_no_form_for_is_refused(recipe: str, tmp_path: Path) -> None:
    model = shaken(unet, recipe)
    with pytest.raises(CheckpointError, match="keeps low-rank changes of layers only"):
        esp.save(model, "style", tmp_path, format="diffusers")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_pipeline_denoises_with_is_refused(tmp_path: Path) -> None:
    from zoo import BY_NAME

    model = BY_NAME["bert"].make()
    esp.attach(model, "LoRA(rank=2)", "mine", head=False)
    with pytest.raises(CheckpointError, match="use the format 'peft'"):
        esp.save(model, "mine", tmp_path, format="diffusers")


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"lora_unet_mid_block.lora_down.weight": (2, 3)}, "holds no LoRA for a unet"),
        ({"unet.mid_block.lora_mid.weight": (2, 3)}, "cannot place the tensor 'unet.mid_block"),
        ({"unet.nowhere.lora_A.weight": (2, 3)}, "made for another model"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, "only one of its two matrices"),
        (
            {
                "unet.conv_in.lora_A.weight": (2, 9, 3, 3),
                "unet.conv_in.lora_B.weight": (16, 2, 1, 1),
            },
            r"conv_in\.a has shape \(2, 9, 3, 3\)",
        ),
    ],
    ids=["another-trainer", "unknown-key", "another-model", "half", "shape"],
)
def test_files_that_do_not_fit_are_named(
    tensors: dict[str, tuple[int, ...]], named: str, tmp_path: Path
) -> None:
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / FILE)
    model = unet()
    with pytest.raises(CheckpointError, match=named):
        esp.load(model, tmp_path, "style")
    assert "espalier" not in model._modules


def test_a_merged_adapter_is_not_written(tmp_path: Path) -> None:
    model = shaken(unet, RECIPES["lora"])
    esp.merge(model)
    with pytest.raises(AdapterError, match="merged"):
        esp.save(model, "style", tmp_path, format="diffusers")
