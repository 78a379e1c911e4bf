"""A merged model in the programs that read the base, and an adapter switched inside a running vLLM.

    python -m integration.serving.readers make FOLDER       a small base model, an adapter, their merge, and its answers
    python -m integration.serving.readers gguf FOLDER --converter convert_hf_to_gguf.py
    python -m integration.serving.readers vllm FOLDER       in vLLM's environment, with PEFT installed there

`gguf` runs llama.cpp's converter and compares every tensor of its file with the merged model's. `vllm` asks vLLM for
the greedy answers of the merged model, and of the base without, with and again without the adapter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPTS = ([5, 17, 40, 8], [100, 3, 77, 42, 9, 61])
ANSWER_TOKENS = 12


def make(folder: Path) -> None:
    """``base``, in several files; ``adapter``, which changes its answers; ``merged``; and ``answers.json``."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from axolotl_spft import SpftConfig
    from axolotl_spft.checkpoint.merge import merge

    _make_tokenizer(folder / "base")
    torch.manual_seed(0)
    # sizes that engines' kernels take; random weights far apart, so that no two answers are as likely
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="400KB")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    adapted = get_peft_model(base, SpftConfig(density=0.05, task_type="CAUSAL_LM", init_weights=False))
    adapted.save_pretrained(folder / "adapter")
    merge(folder / "adapter", folder / "merged", folder / "base")
    answers = {name: _answers(folder / name) for name in ("base", "merged")}
    if answers["base"] == answers["merged"]:
        raise SystemExit("the adapter changes no answer: make it larger")
    (folder / "answers.json").write_text(json.dumps(answers, indent=1))


def _make_tokenizer(folder: Path) -> None:
    """A SentencePiece tokenizer, which llama.cpp's converter reads whatever its pieces are."""
    import sentencepiece

    folder.mkdir(parents=True)
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=512, byte_fallback=True, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    for name in ("text.txt", "tokenizer.vocab"):
        (folder / name).unlink()


def _answers(folder: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [
        model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip


def check_gguf(folder: Path, converter: Path) -> str:
    """llama.cpp's own converter on the merged model; transformers reads its file and undoes its order of rows."""
    from transformers import AutoModelForCausalLM

    file = folder / "merged.gguf"
    command = [sys.executable, str(converter), str(folder / "merged"), "--outfile", str(file), "--outtype", "bf16"]
    subprocess.run(command, check=True)
    converted = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.bfloat16).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.bfloat16).state_dict()
    different = [name for name in merged if not torch.equal(merged[name], converted[name])]
    if different or merged.keys() != converted.keys():
        raise SystemExit(f"the converter's file has other tensors than the merged model: {different}")
    return f"llama.cpp's converter: {len(merged)} tensors, each with the bits of the merged model"


def check_vllm(folder: Path) -> str:
    """vLLM's answers are those of transformers, whether merged or switched."""
    import vllm

    expected = json.loads((folder / "answers.json").read_text())
    found = {"merged": _ask(_engine(folder / "merged"))}
    engine = _engine(folder / "base", worker_extension_cls="integration.serving.vllm_worker.SpftWorker")
    engine.collective_rpc("load_spft", args=("own", str(folder / "adapter")))
    for name, used in (("base", None), ("switched", "own"), ("switched back", None)):
        engine.collective_rpc("use_spft", args=(used,))
        engine.reset_prefix_cache()
        found[name] = _ask(engine)
    wanted = {**expected, "switched": expected["merged"], "switched back": expected["base"]}
    wrong = [name for name, answers in found.items() if answers != wanted[name]]
    if wrong:
        raise SystemExit(f"vLLM answers otherwise: {', '.join(wrong)}: {found} instead of {wanted}")
    return f"vLLM {vllm.__version__}: the answers of transformers, for {', '.join(found)}"


def _engine(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=128, max_num_seqs=2,
        gpu_memory_utilization=0.1, **options,
    )  # fmt: skip


def _ask(engine: Any) -> list[list[int]]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    done = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], settings, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("make", "gguf", "vllm"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    options = parser.parse_args()
    if options.step == "gguf" and options.converter is None:
        parser.error("gguf needs --converter")
    steps: dict[str, Callable[[], str | None]] = {
        "make": lambda: make(options.folder),
        "gguf": lambda: check_gguf(options.folder, options.converter),
        "vllm": lambda: check_vllm(options.folder),
    }
    print(steps[options.step]() or f"{options.folder}: base, adapter, merged")


if __name__ == "__main__":
    main()
