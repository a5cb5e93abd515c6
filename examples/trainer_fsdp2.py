"""A GPT whose parameters, gradients and optimizer state are spread over processes, by Trainer's `fsdp`. Optional argument: steps.

    pip install ".[transformers]" -c constraints.txt
    torchrun --nproc-per-node 2 examples/trainer_fsdp2.py

Run again with more steps, it goes on from its checkpoint. On CPUs accelerate does not shard: each process keeps the whole model there.
"""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from learned_optim.integrations.transformers import LearnedOptimizerTrainer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
FOLDER, LENGTH = "runs/trainer_fsdp2", 32

if __name__ == "__main__":
    set_seed(0)
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    config = GPT2Config(vocab_size=64, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    rows = (torch.arange(LENGTH) * torch.randint(1, 8, (512, 1)) + torch.randint(64, (512, 1))) % 64
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        FOLDER,
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=8,
        fsdp=True,
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    trainer = LearnedOptimizerTrainer(model=GPT2LMHeadModel(config), args=args, train_dataset=data, eval_dataset=data[:64])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(FOLDER))
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"loss {torch.tensor(64.0).log():.3f} if words were guessed, {loss:.3f} after {STEPS} steps")
    trainer.accelerator.end_training()
