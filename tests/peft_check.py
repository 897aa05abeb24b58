"""Logits of PEFT's adapter, of the same adapter as we wrote it, and of the model that we merged it into: equal within
1e-4. Arguments, four folders a case: base model, PEFT's adapter, our adapter, merged model."""

import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(2)
TOLERANCE = 1e-4


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def adapted(base, adapter, ids):
    with warnings.catch_warnings():
        # A target that matches nothing, a key that is missing or left over: all of them are only warnings.
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return logits(model, ids)


folders = sys.argv[1:]
assert folders and len(folders) % 4 == 0, "four folders a case"
for base, theirs, ours, merged in zip(*[iter(folders)] * 4):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (2, 24))
    plain = logits(model, ids)
    expected = adapted(base, theirs, ids)
    assert (plain - expected).abs().max() > 1e-2, f"{base}: the adapter changes nothing"
    of_ours = (adapted(base, ours, ids) - expected).abs().max().item()
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    AutoTokenizer.from_pretrained(merged)
    of_merged = (logits(loaded, ids) - expected).abs().max().item()
    print(f"{base}: our adapter {of_ours:.2e}, merged {of_merged:.2e}")
    assert of_ours < TOLERANCE and of_merged < TOLERANCE
print("all checks passed")
