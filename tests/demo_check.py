"""Greedy answers of a model folder by transformers in f32, a line each: demo_check.py FOLDER PROMPT..."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], sys.argv[2:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**ids, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(out[0][ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
