"""Samplers and schedules: our names, and how A1111, ComfyUI, diffusers and others spell them.

Spellings are compared without capitals, blanks and signs, so `DPM++ 2M`, `dpmpp_2m` and `k_dpmpp_2m` are one.
"""

from __future__ import annotations

from collections.abc import Mapping

SAMPLERS: dict[str, tuple[str, ...]] = {  # first the title that A1111 shows and writes into pictures
    "euler": ("Euler", "EulerDiscreteScheduler"),
    "euler_a": ("Euler a", "euler_ancestral", "EulerAncestralDiscreteScheduler"),
    "heun": ("Heun", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "rk4": ("RK4", "runge_kutta"),
    "dopri5": ("Dopri5", "dormand_prince"),
    "restart": ("Restart",),
    "lms": ("LMS", "LMSDiscreteScheduler"),
    "dpm2": ("DPM2", "dpm_2", "KDPM2DiscreteScheduler", "kdpm_2"),
    "dpm2_a": ("DPM2 a", "dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler", "kdpm_2_a"),
    "ddim": ("DDIM", "DDIMScheduler"),
    "ddpm": ("DDPM", "DDPMScheduler"),
    "ddpm_large": ("DDPM Large", "fixed_large"),
    "pc": ("PC", "predictor_corrector"),
    "pc_a": ("PC a", "pc_ancestral"),
    "plms": ("PLMS", "PNDMScheduler"),
    "dpmpp_2s_a": ("DPM++ 2S a", "dpmpp_2s_ancestral"),
    "dpmpp_sde": ("DPM++ SDE", "dpmpp_sde_gpu", "DPMSolverSDEScheduler"),
    "dpmpp_2m": ("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "dpmpp_2m_sde_gpu"),
    "dpmpp_2m_sde_heun": ("DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun_gpu"),
    "dpmpp_3m_sde": ("DPM++ 3M SDE", "dpmpp_3m_sde_gpu"),
    "unipc": ("UniPC", "uni_pc_bh2", "UniPCMultistepScheduler"),
    "deis": ("DEIS", "DEISMultistepScheduler"),
    "res_multistep": ("Res Multistep",),
    "lcm": ("LCM", "LCMScheduler"),
    "tcd": ("TCD", "TCDScheduler"),
    "flow_euler": ("Flow Euler", "FlowMatchEulerDiscreteScheduler"),
}
SCHEDULES: dict[str, tuple[str, ...]] = {
    "auto": ("Automatic",),
    "uniform": ("Uniform",),
    "shifted": ("Shifted",),
    "karras": ("Karras", "use_karras_sigmas"),
    "exponential": ("Exponential", "Polyexponential", "use_exponential_sigmas"),
    "normal": ("Normal",),
    "sgm_uniform": ("SGM Uniform",),
    "simple": ("Simple",),
    "ddim_uniform": ("DDIM",),
    "beta": ("Beta",),
    "beta_sigmas": ("Beta sigmas", "use_beta_sigmas"),
    "kl_optimal": ("KL Optimal",),
    "align_your_steps": ("Align Your Steps", "ays"),
    "align_your_steps_xl": ("Align Your Steps XL", "ays_xl"),
    "linear_quadratic": ("Linear Quadratic",),
    "lcm": ("LCM",),
    "leading": ("Leading",),
    "linspace": ("Linspace",),
    "trailing": ("Trailing", "Turbo"),
    "hyper": ("Hyper",),
}


def find(name: str, table: Mapping[str, tuple[str, ...]]) -> str | None:
    """Our name for `name`, None for one that nobody uses."""
    wanted = _bare(name)
    return next((ours for ours, others in table.items() if wanted in map(_bare, (ours, *others))), None)


def title(name: str, table: Mapping[str, tuple[str, ...]]) -> str:
    """What A1111 calls it; `name` itself where that has no word for it."""
    return table[name][0] if name in table else name


def split(sampler: str) -> tuple[str, str | None]:
    """A sampler and the schedule at its end, as older A1111 joins them: "DPM++ 2M Karras"."""
    head, _, tail = sampler.rpartition(" ")
    if head and find(sampler, SAMPLERS) is None and find(tail, SCHEDULES) is not None:
        return head, tail
    return sampler, None


def _bare(name: str) -> str:
    name = name.lower().removeprefix("k_").removesuffix("scheduler").replace("+", "p")
    return "".join(sign for sign in name if sign.isalnum())
