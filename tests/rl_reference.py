"""Losses and LoRA gradients of policy gradients and preferences by PyTorch and PEFT, and by TRL's own GRPO loss where
it has the same one, on a fixed batch over the llama fixture with its adapter. Writes tests/fixtures/rl/. To be run by
hand from the repository's root, with torch, transformers, peft, trl and safetensors."""

import json
import types
from collections import defaultdict
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
torch.set_num_threads(2)
BASE = Path("tests/fixtures/parity/llama")
OUT = Path("tests/fixtures/rl")
PROMPT, LENGTHS, LONGEST = 5, [9, 6, 12, 7], 16
ADVANTAGES = [1.2, -0.7, 0.4, -0.9]
CASES = {
    "importance_sampling": dict(loss="importance_sampling"),
    "importance_sampling_kl": dict(loss="importance_sampling", kl=0.1),
    "ppo_clip": dict(loss="ppo_clip", low=0.2, high=0.28),
    "ppo_clip_kl": dict(loss="ppo_clip", low=0.2, high=0.28, kl=0.1),
    "ppo_clip_unbiased": dict(loss="ppo_clip", low=0.2, high=0.28, unbiased=True),
    "ppo_clip_temperature": dict(loss="ppo_clip", low=0.2, high=0.28, kl=0.1, temperature=0.7),
    "dpo": dict(loss="dpo", beta=0.5),
}

model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64)
model = PeftModel.from_pretrained(model, BASE / "adapter", is_trainable=True).double()
model.eval()
ids = torch.zeros(len(LENGTHS), PROMPT + max(LENGTHS), dtype=torch.long)
mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.float64)
for row, length in enumerate(LENGTHS):
    ids[row, : PROMPT + length] = torch.randint(4, 500, (PROMPT + length,))
    mask[row, :length] = 1
attention = torch.cat([torch.ones(len(LENGTHS), PROMPT, dtype=torch.float64), mask], 1).long()


def logps(temperature=1.0):
    """ln p of the completions' tokens, and the entropies."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, PROMPT - 1 : -1] / temperature
    all_logps = logits.log_softmax(-1)
    return all_logps.gather(-1, ids[:, PROMPT:, None])[..., 0], -(all_logps.exp() * all_logps).sum(-1)


noise = 0.35 * torch.randn(mask.shape, dtype=torch.float64)
advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)


def compared(temperature):
    """ln p of the policy that sampled, made up near the adapter's, and of the base model; as f32 has them."""
    with torch.no_grad():
        old = logps(temperature)[0] + noise
        with model.disable_adapter():
            reference = logps(temperature)[0]
    return old.float().double(), reference.float().double()


def policy(case, old, reference):
    now, entropy = logps(case.get("temperature", 1.0))
    ratio = (now - old).exp()
    pushed = ratio * advantages[:, None]
    if case["loss"] == "ppo_clip":
        clipped = ratio.clamp(1 - case["low"], 1 + case["high"]) * advantages[:, None]
        pushed = torch.min(pushed, clipped)
    d = reference - now
    loss = -pushed + case.get("kl", 0.0) * (d.exp() - d - 1)
    lengths = torch.full((len(LENGTHS),), float(LONGEST)) if case.get("unbiased") else mask.sum(1)
    return ((loss * mask).sum(1) / lengths).mean(), (entropy * mask).sum() / mask.sum()


def dpo(case, reference):
    now, entropy = logps()
    sums = ((now - reference) * mask).sum(1)
    z = case["beta"] * (sums[0::2] - sums[1::2])
    return -torch.nn.functional.logsigmoid(z).mean(), (entropy * mask).sum() / mask.sum()


def trl(case, old, reference):
    """The same by TRL's trainer, without a trainer around it."""
    from trl import GRPOTrainer

    this = GRPOTrainer.__new__(GRPOTrainer)
    metrics = defaultdict(list)
    fields = dict(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=case.get("kl", 0.0),
        loss_type="dr_grpo" if case.get("unbiased") else "grpo", epsilon_low=case.get("low", 1e9),
        epsilon_high=case.get("high", 1e9), use_vllm=False, max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, temperature=1.0,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=types.SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1), model=model,
        _metrics={"train": metrics, "eval": metrics},
    )
    this.__dict__.update(fields)
    this._get_per_token_logps_and_entropies = lambda *a, **k: (*logps(case.get("temperature", 1.0)), None)
    inputs = dict(
        prompt_ids=ids[:, :PROMPT], prompt_mask=attention[:, :PROMPT], completion_ids=ids[:, PROMPT:],
        completion_mask=mask, advantages=advantages, old_per_token_logps=old, ref_per_token_logps=reference,
    )
    return GRPOTrainer._compute_loss(this, model, inputs)


def gradients(loss):
    model.zero_grad()
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            site, part = name.removeprefix("base_model.model.").split(".lora_")
            site = site.removeprefix("model.")
            found[f"{site}.lora_{part[0]}"] = parameter.grad.detach().clone()
    return found


out, tensors = {}, {}
for name, case in CASES.items():
    old, reference = compared(case.get("temperature", 1.0))
    loss, entropy = dpo(case, reference) if case["loss"] == "dpo" else policy(case, old, reference)
    grads = gradients(loss)
    entry = dict(case, value=loss.item(), entropy=entropy.item())
    if case["loss"] != "dpo":
        cut = lambda t: [t[row, :length].tolist() for row, length in enumerate(LENGTHS)]
        entry.update(old=cut(old), reference=cut(reference))
        theirs = trl(case, old, reference)
        apart = (theirs - loss).abs().item()
        worst = max((a - grads[key]).abs().max().item() for key, a in gradients(theirs).items())
        assert apart < 1e-9 and worst < 1e-9, (name, apart, worst)
        entry["trl_apart"] = dict(loss=apart, gradient=worst)
    out[name] = entry
    tensors.update({f"{name}/{key}": grad.float().contiguous() for key, grad in grads.items()})
    print(name, entry["value"], entry.get("trl_apart"), "largest gradient", max(g.abs().max().item() for g in grads.values()))

OUT.mkdir(parents=True, exist_ok=True)
save_file(tensors, OUT / "gradients.safetensors")
sequences = [ids[row, : PROMPT + length].tolist() for row, length in enumerate(LENGTHS)]
fixture = dict(prompt=PROMPT, longest=LONGEST, sequences=sequences, advantages=ADVANTAGES, cases=out)
(OUT / "batch.json").write_text(json.dumps(fixture, indent=1) + "\n")
