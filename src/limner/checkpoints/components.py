"""What else people own: parts of models and additions to them, told from the names of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Component:
    """`needs` is what it is of no use without."""

    what: str
    needs: str = ""


def recognise(shapes: Shapes) -> Component | None:
    """What a file with these tensors is, if it is no whole model; None for what nobody here knows."""
    names = shapes.keys()
    return next((component for component, test in MARKS if test(names)), None) or _part(shapes)


def _ending(*endings: str) -> Callable[[Collection[str]], bool]:
    return lambda names: any(name.endswith(endings) for name in names)


def _with(*wanted: str) -> Callable[[Collection[str]], bool]:
    return lambda names: any(name in names for name in wanted)


MODEL = "a whole model"
SD3_PARTS = "the autoencoder of Stable Diffusion 3 and its text encoders (--vae, --clip-l, --clip-g, --t5)"
FLUX_PARTS = "the autoencoder of FLUX.1 and its text encoders (--vae, --clip-l, --t5)"
MARKS: list[tuple[Component, Callable[[Collection[str]], bool]]] = [  # the first that fits
    (Component("control-LoRA", MODEL), _with("lora_controlnet")),
    (Component("ControlNet-LLLite"), lambda names: any(name.startswith("lllite_unet_") for name in names)),
    (Component("LoRA as kohya's programs write it", MODEL), _ending(".lora_down.weight")),
    (Component("LoRA as PEFT and diffusers write it", MODEL), _ending(".lora_A.weight", ".lora_A.default.weight")),
    (Component("LoRA as early diffusers wrote it", MODEL), _ending("_lora.down.weight", ".lora.down.weight")),
    (Component("LoHa", MODEL), _ending(".hada_w1_a")),
    (Component("LoKr", MODEL), _ending(".lokr_w1", ".lokr_w1_a")),
    (Component("OFT", MODEL), _ending(".oft_blocks", ".oft_diag")),
    (Component("IA3", MODEL), _ending(".on_input")),
    (Component("ControlNet of several kinds (union)", MODEL), _with("task_embedding")),
    (Component("ControlNet as diffusers writes it", MODEL), _with("controlnet_cond_embedding.conv_in.weight")),
    (Component("ControlNet of FLUX.1 for several kinds (union)", MODEL), _with("controlnet_mode_embedder.weight")),
    (Component("ControlNet of Stable Diffusion 3", MODEL), _with("pos_embed_input.proj.weight")),
    (
        Component("ControlNet of FLUX.1 as XLabs writes it", MODEL),
        lambda names: {"controlnet_blocks.0.weight", "pos_embed_input.weight"} <= set(names),
    ),
    (
        Component("ControlNet of FLUX.1", MODEL),
        lambda names: {"controlnet_blocks.0.weight", "controlnet_x_embedder.weight"} <= set(names),
    ),
    (Component("ControlNet of another transformer"), _with("controlnet_blocks.0.weight")),
    (
        Component("ControlNet as its authors write it", MODEL),
        _with("control_model.input_hint_block.0.weight", "input_hint_block.0.weight"),
    ),
    (Component("Redux of FLUX.1", f"{MODEL} and an image encoder of SigLIP's kind"), _with("redux_up.weight")),
    (Component("IP-Adapter", f"{MODEL} and an image encoder of CLIP"), _with("ip_adapter.1.to_k_ip.weight")),
    (
        Component("T2I-Adapter as diffusers writes it", MODEL),
        _with("adapter.body.0.resnets.0.block1.weight", "body.0.resnets.0.block1.weight"),
    ),
    (
        Component("T2I-Adapter as its authors write it", MODEL),
        _with("body.0.block1.weight", "body.0.body.0.block1.weight"),
    ),
    (Component("textual inversion", MODEL), _with("emb_params", "clip_l", "clip_g", "<concept>")),
    (Component("network of Stable Diffusion 3", SD3_PARTS), _ending("joint_blocks.0.context_block.attn.qkv.weight")),
    (
        Component("network of FLUX.1", FLUX_PARTS),
        _ending("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    ),
    (Component("network of Stable Diffusion 3", SD3_PARTS), _ending("transformer_blocks.0.attn.add_q_proj.weight")),
    (
        Component("DiT or SiT", "the autoencoder of Stable Diffusion 1"),
        _ending("blocks.0.adaLN_modulation.1.weight"),
    ),
    (Component("VAR"), _with("pos_1LC")),
    (
        Component("classifier of ADM", "a model that draws pixels (--classifier FILE)"),
        _with("out.2.positional_embedding"),
    ),
]
UNETS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL", 1280: "XL's refiner"}
USES = {4: "", 5: ", told of depth", 7: ", for enlarging", 8: ", for editing", 9: ", for inpainting"}


def _part(shapes: Shapes) -> Component | None:
    """A part of a Stable Diffusion, which may lie under the prefix that it has in a whole one."""

    def find(ending: str) -> tuple[int, ...] | None:
        return next((shape for name, shape in shapes.items() if name.endswith(ending)), None)

    text = find("attn2.to_k.weight")
    first = find("input_blocks.0.0.weight") or shapes.get("conv_in.weight")
    if text and first:
        kind = UNETS.get(text[-1], "a model of another size")
        return Component(f"U-Net of {kind}{USES.get(first[1], '')}", "an autoencoder and a text encoder")
    latent = find("decoder.conv_in.weight")
    if latent and len(latent) == 4:
        family = {4: "Stable Diffusion 1, 2 or XL", 16: "Stable Diffusion 3 or FLUX"}.get(latent[1], "another model")
        return Component(f"autoencoder of {family}, whose scale no name tells", MODEL)
    if find("vision_model.embeddings.class_embedding"):
        return Component("image encoder of CLIP's kind", "an IP-Adapter")
    if find("vision_model.embeddings.patch_embedding.bias"):
        return Component("image encoder of SigLIP's kind", "Redux")
    if find("text_model.embeddings.token_embedding.weight") or find("transformer.resblocks.0.ln_1.weight"):
        return Component("text encoder of CLIP's kind", MODEL)
    if query := find("encoder.block.0.layer.0.SelfAttention.q.weight"):
        return Component(f"text encoder of T5's kind, {query[-1]} wide", MODEL)
    return None
