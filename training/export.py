"""Stage 6: the finished modules as a diffusers pipeline, in bf16 safetensors."""

import json
from pathlib import Path

import torch
from diffusers import FluxPipeline

from training.flow import make_flow
from training.loop import Run
from training.models import make_scheduler, make_vae, parameter_count

# The T5 tokenizer lower-cases, which T5's own class would drop: the generic class keeps tokenizer.json as it is.
_T5_TOKENIZER = "PreTrainedTokenizerFast"


def assemble(run: Run) -> FluxPipeline:
    """The pipeline of a finished run, on the CPU in bf16."""
    facts = run.facts()
    modules, vae = make_flow(), make_vae()
    vae.register_to_config(shift_factor=facts["shift_factor"], scaling_factor=facts["scaling_factor"])
    run.load("vae", vae)
    run.load("text", modules["text"])
    run.load("transformer", modules["transformer"])
    text = modules["text"]
    return FluxPipeline(
        scheduler=make_scheduler(),
        vae=vae.cpu().bfloat16(),
        text_encoder=text.clip.cpu().bfloat16(),
        tokenizer=text.tokenizers[1],
        text_encoder_2=text.t5.cpu().bfloat16(),
        tokenizer_2=text.tokenizers[0],
        transformer=modules["transformer"].cpu().bfloat16(),
    )


def _edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


def export(run: Run, folder: Path) -> None:
    """Write the pipeline to a folder that ``FluxPipeline.from_pretrained`` reads."""
    pipeline = assemble(run)
    pipeline.save_pretrained(folder, safe_serialization=True)
    _edit(folder / "tokenizer_2" / "tokenizer_config.json", tokenizer_class=_T5_TOKENIZER)
    for encoder in ("text_encoder", "text_encoder_2"):
        # Without a dtype diffusers reads its modules as float32; transformers would follow this entry.
        _edit(folder / encoder / "config.json", dtype="float32")
    _edit(folder / "model_index.json", tokenizer_2=["transformers", _T5_TOKENIZER])
    parts = [pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer]
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    run.log(stage="export", parameters=parameter_count(*parts), megabytes=round(size / 1e6, 2))
    assert all(p.dtype == torch.bfloat16 for part in parts for p in part.parameters())
