"""Training recipes: each name is a function that returns a complete TrainConfig; derive a variant by `replace`.

Every recipe NAME has a NAME-tiny beside it that needs no data outside the package and trains in some minutes at most on
two CPU cores, but for `word`, `t2i-adapter`, `reflow-tiny` and `one-step-tiny`, which need models that do not ship, and
for `ddpm-mini`, whose miniature is that of `ddpm`.
"""

from __future__ import annotations

from collections.abc import Callable

from limner.errors import UnknownName
from limner.recipes import adapters, autoencoders, distillation, icons, pixels, reflow, stable_diffusion, transformers
from limner.training.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "icons-autoencoder": icons.autoencoder,
    "icons-autoencoder-tiny": icons.autoencoder_tiny,
    "icons": icons.icons,
    "icons-tiny": icons.icons_tiny,
    "kl-f8": autoencoders.kl_f8,
    "kl-f8-tiny": autoencoders.kl_f8_tiny,
    "vq-f4": autoencoders.vq_f4,
    "vq-f4-tiny": autoencoders.vq_f4_tiny,
    "sohl-dickstein-2015": pixels.sohl_dickstein,
    "sohl-dickstein-2015-tiny": pixels.sohl_dickstein_tiny,
    "ddpm": pixels.ddpm,
    "ddpm-tiny": lambda: pixels.tiny(pixels.ddpm()),
    "ddpm-mini": pixels.ddpm_mini,
    "iddpm": pixels.iddpm,
    "iddpm-tiny": lambda: pixels.tiny(pixels.iddpm()),
    "adm": pixels.adm,
    "adm-tiny": lambda: pixels.tiny(pixels.adm()),
    "adm-classifier": pixels.adm_classifier,
    "adm-classifier-tiny": pixels.adm_classifier_tiny,
    "edm": pixels.edm,
    "edm-tiny": lambda: pixels.tiny(pixels.edm()),
    "flow-matching": pixels.flow_matching,
    "flow-matching-tiny": lambda: pixels.tiny(pixels.flow_matching()),
    "vp-sde": pixels.vp_sde,
    "vp-sde-tiny": lambda: pixels.tiny(pixels.vp_sde()),
    "subvp-sde": pixels.subvp_sde,
    "subvp-sde-tiny": lambda: pixels.tiny(pixels.subvp_sde()),
    "ve-sde": pixels.ve_sde,
    "ve-sde-tiny": lambda: pixels.tiny(pixels.ve_sde()),
    "dit-32": pixels.dit,
    "dit-32-tiny": lambda: pixels.tiny(pixels.dit()),
    "sit-32": pixels.sit,
    "sit-32-tiny": lambda: pixels.tiny(pixels.sit()),
    "sd1": stable_diffusion.sd1,
    "sd1-tiny": stable_diffusion.sd1_tiny,
    "sd2-v": stable_diffusion.sd2_v,
    "sd2-v-tiny": stable_diffusion.sd2_v_tiny,
    "sdxl": stable_diffusion.sdxl,
    "sdxl-tiny": stable_diffusion.sdxl_tiny,
    "sd3": transformers.sd3,
    "sd3-tiny": transformers.sd3_tiny,
    "flux": transformers.flux,
    "flux-tiny": transformers.flux_tiny,
    "dit": transformers.dit,
    "dit-tiny": transformers.dit_tiny,
    "lora": adapters.lora,
    "lora-tiny": adapters.lora_tiny,
    "dreambooth": adapters.dreambooth,
    "dreambooth-tiny": adapters.dreambooth_tiny,
    "finetune": adapters.finetune,
    "finetune-tiny": adapters.finetune_tiny,
    "word": adapters.word,
    "control": adapters.control,
    "control-tiny": adapters.control_tiny,
    "t2i-adapter": adapters.t2i_adapter,
    "lcm": distillation.lcm,
    "lcm-tiny": distillation.lcm_tiny,
    "lcm-lora": distillation.lcm_lora,
    "lcm-lora-tiny": distillation.lcm_lora_tiny,
    "consistency": distillation.consistency,
    "consistency-tiny": distillation.consistency_tiny,
    "consistency-training": distillation.consistency_training,
    "consistency-training-tiny": distillation.consistency_training_tiny,
    "progressive": distillation.progressive,
    "progressive-tiny": distillation.progressive_tiny,
    "guidance-distillation": distillation.guidance,
    "guidance-distillation-tiny": distillation.guidance_tiny,
    "reflow": reflow.reflow,
    "reflow-tiny": reflow.reflow_tiny,
    "one-step": reflow.one_step,
    "one-step-tiny": reflow.one_step_tiny,
}


def names() -> list[str]:
    return list(RECIPES)


def get(name: str) -> TrainConfig:
    """Raises UnknownName."""
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES, hint="`limner recipes` lists all.")
    return RECIPES[name]()
