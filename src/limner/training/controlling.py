"""ControlNets and T2I-Adapters as what is trained, beside a model that stays as it was loaded."""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from limner import pictures, pipeline
from limner.adapters.attaching import stack
from limner.adapters.control import open_control
from limner.checkpoints import flux, joint_dit_controlnet, layouts, mmdit, t2i_adapter
from limner.checkpoints.files import write_atomically
from limner.data.batches import ImageBatches
from limner.data.hinted import to_hints
from limner.data.streams import Stream
from limner.errors import UsageError
from limner.models.controlnet import HINT_WIDTHS, ControlNet
from limner.models.flux import FluxConfig
from limner.models.flux_controlnet import FluxControlNet
from limner.models.joint_dit import JointDiTConfig
from limner.models.joint_dit_controlnet import JointDiTControlNet, config_for
from limner.models.mmdit import MMDiTConfig
from limner.models.mmdit_controlnet import MMDiTControlNet, MMDiTControlNetConfig
from limner.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from limner.models.unet import UNetConfig
from limner.nn.graphs import compile_blocks
from limner.training.adapting import Beside
from limner.types import Conditioning

DEPTH = 6
"""Of the blocks of a Stable Diffusion 3 or FLUX.1, so many are copied."""
SHOWN = 4
"""Pictures whose hints and captions are drawn with during a run."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """A network that tells a model of a picture, its hint, while it draws, trained beside it; `data.hints` says what
    the hints are. `kind` is what it is, a ControlNet or a T2I-Adapter. A ControlNet (arXiv:2302.05543) begins as a copy
    of the U-Net's way down, or of the first `depth` blocks of a transformer (0: six), and that of icons anew (0: four
    blocks); a T2I-Adapter (arXiv:2302.08453), for U-Nets, begins anew. A caption is left out with a chance of
    `caption_dropout`. `bits` are what the file has of its numbers, 8 that of icons alone."""

    kind: Literal["controlnet", "t2i_adapter"] = "controlnet"
    depth: int = 0
    caption_dropout: float = 0.5
    bits: Literal[8, 16, 32] = 16


class Controlling(Beside):
    """A control network in training. What it adds to the model enters the loss as it enters a drawing."""

    def __init__(self, base: Any, config: ControlConfig, seed: int) -> None:
        super().__init__(base)
        check(base, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.control = begun(base, config)
        self.control.to(base.device).requires_grad_(True)
        for parameter in unreached(self.control):
            parameter.requires_grad_(False)
        self.bits = config.bits
        self.hints: list[Image.Image] = []
        self.prompts: tuple[str, ...] = ()
        """What is drawn with during a run."""
        base.caption_dropout = config.caption_dropout

    def on(self) -> None:
        """Nothing of the model changes."""

    def off(self) -> None:
        """As `on`."""

    @property
    def passed(self) -> list[nn.Module]:
        return [self, self.base]

    def compile(self, **how: Any) -> None:
        self.base.compile(**how)
        compile_blocks(self.control, **how)

    def examples(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Those of the model, and "hints" (b, 3, h, w) in [0, 1] as the control takes them."""
        return self.base.examples(batch, generator) | {"hints": self.base.as_seen(self.control, batch["hints"])}

    def error(self, examples: dict[str, Any]) -> dict[str, Tensor]:
        asked, control = dict(examples), cast(Any, self.control)
        seen = control.see(asked.pop("hints"))

        def more(x: Tensor, t: Tensor, cond: Conditioning) -> list[Any]:
            return [self.base.network.together([control(x, t, cond, seen)])]

        return self.base.error(asked, more)

    def show(self, images: ImageBatches | Stream) -> None:
        """Draw from now on with the hints of the first pictures, and if nobody says another, with their captions."""
        found = list(images.first(SHOWN))
        self.hints = [pictures.to_pil(2 * to_hints(hint[None].cpu())[0] - 1) for _, hint in found]
        if all(self.can_be_drawn(caption) for caption, _ in found):
            self.prompts = tuple(caption for caption, _ in found)

    def can_be_drawn(self, caption: str) -> bool:
        try:
            pipeline.prepare(self.base, prompt=caption)
        except UsageError:
            return False
        return bool(caption.strip())

    def write(self, path: Path) -> None:
        network = self.control
        if isinstance(network, JointDiTControlNet):
            joint_dit_controlnet.save(network, path, self.bits)
            return
        of_unet = isinstance(network, ControlNet | T2IAdapter)
        dtype = torch.float32 if self.bits == 32 else torch.float16 if of_unet else torch.bfloat16
        tensors = {name: tensor.detach().cpu().to(dtype) for name, tensor in network.state_dict().items()}
        if isinstance(network, FluxControlNet):
            tensors = layouts.write(flux.controlnet_layout(network.config, 0, ()), tensors)
        elif isinstance(network, MMDiTControlNet):
            tensors = layouts.write(mmdit.control_layout(network.control), tensors)
        elif isinstance(network, T2IAdapter):
            tensors = {f"adapter.{name}": tensor for name, tensor in tensors.items()}
        write_atomically(path, save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"}))

    def opened(self, path: Path) -> nn.Module:
        """One in a file, to begin from. Raises FileProblem, CheckpointMismatch, UsageError."""
        found = open_control(self.base, path, Image.new("RGB", (8, 8))).network
        stack(self.base).controls.clear()
        return nn.ModuleDict({"control": found.float()})


# -------------------------------------------------------------------- how it begins


def check(base: Any, config: ControlConfig) -> None:
    """Raises UsageError for a model that takes none, and for what cannot be."""
    size = getattr(base.network, "config", None)
    if not isinstance(size, UNetConfig | FluxConfig | MMDiTConfig | JointDiTConfig) or not size.text_width:
        raise UsageError(f"{base.name} takes no ControlNets: those are for Stable Diffusion, FLUX.1 and icons")
    if base.sees or base.enlarges > 1:
        raise UsageError(f"{base.name} sees a picture of its own: train a control for the model that it was made from")
    if config.kind == "t2i_adapter" and not isinstance(size, UNetConfig):
        raise UsageError(f"{base.name} takes no T2I-Adapter, those are for U-Nets: give control.kind=controlnet")
    if config.depth and isinstance(size, UNetConfig):
        raise UsageError(f"control.depth={config.depth} is of blocks of a transformer, {base.name} is a U-Net: give 0")
    if not 0 <= config.depth <= (most := getattr(size, "depth", 0)):
        raise UsageError(f"control.depth={config.depth}: {base.name} has {most} blocks")
    if not 0 <= config.caption_dropout <= 1:
        raise UsageError(f"control.caption_dropout={config.caption_dropout:g}: give 0 to 1")
    if config.bits == 8 and not isinstance(size, JointDiTConfig):
        raise UsageError(f"control.bits=8 is for icons, no program reads it for {base.name}: give 16 or 32")


def begun(base: Any, config: ControlConfig) -> nn.Module:
    """The network before the first step. One with zero convolutions adds nothing yet."""
    size, depth = base.network.config, config.depth
    made: nn.Module
    if config.kind == "t2i_adapter":
        return T2IAdapter(t2i_config(size, base.grid))
    if isinstance(size, JointDiTConfig):
        return JointDiTControlNet(config_for(size, int(math.log2(base.grid)), depth))
    if isinstance(size, UNetConfig):
        made = ControlNet(replace(size, guidance_width=0), HINT_WIDTHS[: 1 + int(math.log2(base.grid))])
    elif isinstance(size, FluxConfig):
        made = FluxControlNet(replace(size, depth=depth or min(DEPTH, size.depth), depth_single=0))
    else:
        few = replace(size, depth=depth or min(DEPTH, size.depth - 1))
        made = MMDiTControlNet(MMDiTControlNetConfig(size=few, hint_channels=size.channels))
    own, mine = stack(base).bare("network"), made.state_dict()
    mine |= {name: own[name].float() for name, t in mine.items() if name in own and own[name].shape == t.shape}
    made.load_state_dict(mine)
    return made


def t2i_config(size: UNetConfig, factor: int) -> T2IAdapterConfig:
    """As the authors have it for a U-Net of this configuration: a level each, or, as XL's, pixels folded twice as far,
    halved once, and the middle told besides. Raises UsageError."""
    wanted = t2i_adapter.places(size, factor)
    plain = T2IAdapterConfig(widths=size.widths, halved=tuple(range(1, len(size.widths))), fold=factor)
    large = T2IAdapterConfig(widths=(*size.widths, size.widths[-1]), halved=(2,), fold=2 * factor)
    for config in (plain, large):
        if t2i_adapter.told(config) in (wanted, wanted[:-1]):
            return config
    raise UsageError("no T2I-Adapter is known that fits the levels of this U-Net: give control.kind=controlnet")


def unreached(network: nn.Module) -> list[nn.Parameter]:
    """What no loss depends on: in a last block, what the words ask, and what is made of them after."""
    if isinstance(network, MMDiTControlNet):
        last: Any = network.joint_blocks[-1].context_block
        parts = [last.attn.proj, last.mlp, *([last.attn.ln_q] if last.attn.normed else [])]
    elif isinstance(network, FluxControlNet):
        last = network.double_blocks[-1]
        parts = [last.txt_attn.proj, last.txt_mlp, last.txt_attn.norm.query_norm]
    else:
        parts = []
    return [parameter for part in parts for parameter in part.parameters()]


# -------------------------------------------------------------------- during a run


def draw(system: Controlling, config: Any) -> list[Image.Image]:
    """Prompt i with seed i and a hint, to the left of the drawing: by the very code that draws for users, from the file
    that the run would leave now."""
    base, shown = system.base, []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{config.file_name}.safetensors"
        system.write(file)
        prompts = config.sample_prompts or system.prompts
        try:
            for i, (prompt, hint) in enumerate(zip(prompts, itertools.cycle(system.hints), strict=False)):
                told = {"control": [open_control(base, file, hint)], **pipeline.size_of(base, hint)}
                request = pipeline.prepare(base, prompt=prompt, seed=i, **told)
                (drawn,) = pipeline.draw(base, [prompt], [i], request)
                shown.append(beside(hint, pictures.to_pil(drawn)))
        finally:
            stack(base).controls.clear()
    return shown


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures, the first in the second's size, as one."""
    both = Image.new("RGBA", (2 * right.width, right.height))
    both.paste(left.resize(right.size), (0, 0))
    both.paste(right, (right.width, 0))
    return both
