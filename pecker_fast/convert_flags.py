"""Arguments of ``pecker-fast convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pecker_fast.flags import new_command, overwrite_flag, positive_int


def convert_command(commands: Any) -> None:
    """Other people's files in, and out again."""
    parser = new_command(
        commands,
        "convert",
        "import published checkpoints and masks, or export a model to diffusers",
        "pecker-fast convert --from ckpt.pth --to teacher\n"
        "  pecker-fast convert --from snapshot.pth --which generator --t_init 440 --to generator\n"
        "  pecker-fast convert --kind mask --from with_0.5.pt --to salun\n"
        "  pecker-fast convert --kind diffusers --from out/model --to exported\n"
        "  pecker-fast convert --kind sid_lsg --from batch512_cfg4.54.54.5_t625_8380_v2.pkl \\\n"
        "      --pretrained_model_name_or_path stable-diffusion-v1-5 --to generator",
    )
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, metavar="PATH", help="the file, or the model folder")
    add("--to", dest="output_dir", type=Path, required=True, metavar="DIR", help="the folder to write")
    overwrite_flag(parser)
    add(
        "--kind",
        choices=("checkpoint", "mask", "diffusers", "sid_lsg"),
        default="checkpoint",
        help="a DDPM of SFD, SA or SalUn; a mask of SalUn; a model folder, to be exported; or a pickled one-step "
        "generator of SiD-LSG or SFD's Stable Diffusion, to become a pipeline (checkpoint)",
    )
    add(
        "--pretrained_model_name_or_path",
        dest="base",
        type=Path,
        metavar="DIR",
        help="of sid_lsg: the pipeline folder that the generator was distilled from; all but its UNet and scheduler "
        "is copied",
    )
    add("--which", choices=("ema", "model", "generator", "fake_score"), help="which network of a checkpoint (ema)")
    add("--t_init", type=int, metavar="T", help="timestep at which a generator starts (440; sid_lsg: 625)")
    add("--num_inference_steps", type=positive_int, metavar="N", help="of DDIM for other networks (50)")
    add("--resolution", type=positive_int, metavar="N", help="of the images, where the weights do not tell")
