"""The peer of bench_finetune.py: a plain script with transformers' Trainer, peft and bitsandbytes, padded batches.

python benchmarks/finetune_plain.py BASE DATA SEQ_LEN BATCH STEPS OUT

DATA holds the rows that `qlf finetune` trains on too, tokenized and masked alike: a JSONL file of input_ids and labels.
The adapter goes to OUT, the figures to OUT/figures.json. Tokens are those of the rows; padding does not count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Train, and write the adapter and a JSON file of figures."""
    base, data, seq_len, batch, steps, out = sys.argv[1:]
    import peft
    import torch
    import transformers
    from bitsandbytes.nn import Linear4bit

    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu")
    for module in model.modules():
        if isinstance(module, Linear4bit):  # what bnb_4bit_compute_dtype=torch.float32 does
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    rows = [{name: row[name][: int(seq_len)] for name in ("input_ids", "labels")} for row in rows]
    arguments = transformers.TrainingArguments(
        output_dir=f"{out}.run", per_device_train_batch_size=int(batch), gradient_accumulation_steps=1,
        max_steps=int(steps), learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=0.03, max_grad_norm=0.3,
        adam_beta2=0.999, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
        include_num_input_tokens_seen="non_padding",
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    tokens = int(trainer.state.num_input_tokens_seen)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(out)
    figures = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "losses": losses}
    (Path(out) / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
