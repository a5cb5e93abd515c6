"""LearnedOptimizer in sentence-transformers: word vectors that match numbers with their names. Optional argument: steps.

pip install ".[transformers]" sentence-transformers datasets -c constraints.txt
"""

import sys

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import set_seed

from learned_optim.integrations.transformers import LearnedOptimizerTrainer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
TENS, ONES = (
    ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"],
    ["null", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
)


class LearnedSentenceTransformerTrainer(LearnedOptimizerTrainer, SentenceTransformerTrainer):
    """SentenceTransformerTrainer with LearnedOptimizer in place of AdamW."""


if __name__ == "__main__":
    set_seed(0)
    pairs = [{"anchor": f"t{i // 10} o{i % 10}", "positive": f"{TENS[i // 10]} {ONES[i % 10]}"} for i in range(100)]
    words = sorted({word for pair in pairs for text in pair.values() for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")

    def share_found():
        similarity = model.similarity(*(model.encode([pair[side] for pair in pairs]) for side in ("anchor", "positive")))
        return (similarity.argmax(1).cpu() == similarity.new_tensor(range(100)).long().cpu()).float().mean().item()

    before = share_found()
    args = SentenceTransformerTrainingArguments(
        "runs/with_sentence_transformers",
        max_steps=STEPS,
        per_device_train_batch_size=50,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    loss = MultipleNegativesRankingLoss(model)
    LearnedSentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_list(pairs), loss=loss).train()
    print(f"numbers matched with their names: {before:.0%} before, {share_found():.0%} after {STEPS} steps")
