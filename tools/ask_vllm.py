"""Ask a checkpoint something through vLLM on the CPU: `python tools/ask_vllm.py REPOSITORY PROMPT`.

To be run by a Python that has vLLM and vllm-bnb-plugin (docs/loading.md, "vLLM"). qlformat is not imported.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, which a test can stop
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    llm = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=256, enforce_eager=True, max_num_seqs=1)
    settings = SamplingParams(temperature=0, max_tokens=8)
    answers = llm.chat([{"role": "user", "content": sys.argv[2]}], settings)
    print(answers[0].outputs[0].text)
