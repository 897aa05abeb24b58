"""Trains on a running server with the official client: python openai_training.py BASE_URL MODEL."""

import json
import sys
import time

import openai

base_url, model = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=60)


def check(name, good, seen=None):
    print(("ok   " if good else "FAIL ") + name)
    if not good:
        sys.exit(f"{name}: {seen!r}")


def example(i):
    return {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"number {i}"}]}


lines = "".join(json.dumps(example(i)) + "\n" for i in range(20)).encode()
file = client.files.create(file=("numbers.jsonl", lines), purpose="fine-tune")
job = client.fine_tuning.jobs.create(
    model=model,
    training_file=file.id,
    suffix="numbers",
    seed=3,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
)
check("a job is accepted", job.status in ("queued", "running") and job.training_file == file.id, job)
for _ in range(600):
    job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status not in ("queued", "running"):
        break
    time.sleep(0.1)
check("it succeeds", job.status == "succeeded", job)
check("its tokens are counted", job.trained_tokens > 0, job)
events = [event for event in client.fine_tuning.jobs.list_events(job.id, limit=3)]
metrics = [event for event in events if event.type == "metrics"]
check("its steps are events", sorted(event.data["step"] for event in metrics) == list(range(1, 11)), events)
checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
check("its model is a checkpoint", [c.fine_tuned_model_checkpoint for c in checkpoints] == [job.fine_tuned_model])
check("its model is a model", job.fine_tuned_model in [m.id for m in client.models.list()])
answer = client.chat.completions.create(
    model=job.fine_tuned_model, messages=[{"role": "user", "content": "say 3"}], max_tokens=4
)
check("its model answers", answer.model == job.fine_tuned_model, answer)
client.files.delete(file.id)

print("all checks passed")
