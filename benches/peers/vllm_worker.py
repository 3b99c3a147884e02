"""Takes the jobs of compare.py with vLLM: each line on standard input holds the bodies of its chat rows."""

import json
import sys
import time

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    engine = LLM(model=sys.argv[1], dtype="bfloat16", max_num_seqs=256, max_model_len=1024, enable_prefix_caching=True)
    print("@{}", flush=True)
    for line in sys.stdin:
        rows = json.loads(line)
        sampling = [SamplingParams(temperature=0, max_tokens=row["max_tokens"], ignore_eos=True) for row in rows]
        begun = time.perf_counter()
        outputs = engine.chat([row["messages"] for row in rows], sampling, use_tqdm=False)
        answer = {
            "seconds": time.perf_counter() - begun,
            "prompt": sum(len(output.prompt_token_ids) for output in outputs),
            "generated": sum(len(output.outputs[0].token_ids) for output in outputs),
        }
        print("@" + json.dumps(answer), flush=True)
