"""Ask a checkpoint one question with plain transformers: this process never imports qlformat.

python tools/demo_plain_transformers.py DIRECTORY
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

QUESTION = "What is the capital of France?"
EXPECTED = "Paris"


def main(directory: str) -> int:
    """Print the question and the greedy answer; 1 unless the answer is right and qlformat was not involved."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = prompt.to(model.device)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    kinds = sorted({type(module).__name__ for module in model.modules() if "4bit" in type(module).__name__})
    print(f"  question  {QUESTION}")
    print(f"  answer    {answer.strip()}")
    print(f"  layers    {', '.join(kinds) or 'none in 4 bit'}")
    if "qlformat" in sys.modules:
        print("error: qlformat was imported, needed a process without it", file=sys.stderr)
        return 1
    if EXPECTED not in answer or not kinds:
        print(f"error: needed an answer with {EXPECTED} from 4-bit layers", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
