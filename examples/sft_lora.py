"""Fine-tunes a small language model with LoRA by TRL's SFTTrainer, without a learning rate.

The model is pretrained here, on Python's manual, then adapted to the code of Python's own modules; nothing is downloaded, and a byte is a
token. Optional argument: steps. Two minutes on one core.

    pip install ".[transformers]" trl peft datasets -c constraints.txt
"""

import inspect
import sys
import tarfile
import turtle
from pydoc_data.topics import topics

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from learned_optim.integrations.transformers import LearnedOptimizerTrainer

STEPS, LENGTH = int(sys.argv[1]) if len(sys.argv) > 1 else 300, 64
QUIET = {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "report_to": []}


class LearnedSFTTrainer(LearnedOptimizerTrainer, SFTTrainer):
    """SFTTrainer with LearnedOptimizer in place of AdamW."""


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def passages(text):
    return [text[i : i + LENGTH - 1] for i in range(0, len(text), LENGTH - 1)]


if __name__ == "__main__":
    set_seed(0)
    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    manual = "\n".join(topics.values()).encode("ascii", "ignore").decode()
    ids = [tokenizer(passage)["input_ids"] for passage in passages(manual)[:-1]]
    args = TrainingArguments("runs/sft_lora", max_steps=STEPS, **QUIET)
    LearnedOptimizerTrainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()

    code = [{"text": passage} for passage in passages(inspect.getsource(turtle) + inspect.getsource(tarfile))]
    trainer = LearnedSFTTrainer(
        model=model,
        args=SFTConfig("runs/sft_lora", max_steps=STEPS, max_length=LENGTH, **QUIET),
        train_dataset=Dataset.from_list(code[: -len(code) // 10]),
        eval_dataset=Dataset.from_list(code[-len(code) // 10 :]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"evaluation loss on code, nats per byte: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after {STEPS} steps of LoRA")
