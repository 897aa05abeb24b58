"""Drives a running server with the official client: python openai_client.py BASE_URL MODEL ADAPTER DONE RUNS, the last
two a job that completes with ADAPTER and one that runs until it is cancelled."""

import sys
import time

import openai

base_url, model, adapter, done, runs = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=60)
hello = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def check(name, good, seen=None):
    print(("ok   " if good else "FAIL ") + name)
    if not good:
        sys.exit(f"{name}: {seen!r}")


def chat(**more):
    return client.chat.completions.create(**{"model": model, "messages": hello, "max_tokens": 12, **more})


def complete(**more):
    return client.completions.create(**{"model": model, "prompt": "Hello", "max_tokens": 12, **more})


# Models.
ids = [m.id for m in client.models.list()]
check("models are listed", ids == [model, adapter], ids)
check("a model with a slash is retrieved", client.models.retrieve(model).id == model)
check("an adapter is retrieved", client.models.retrieve(adapter).id == adapter)

# Chats.
whole = chat(seed=7)
check("a chat is answered", whole.choices[0].message.role == "assistant", whole)
check("its text is a string", isinstance(whole.choices[0].message.content, str), whole)
check("finish reason", whole.choices[0].finish_reason in ("stop", "length"), whole)
check("usage adds up", whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens)
check("max_tokens holds", 1 <= whole.usage.completion_tokens <= 12, whole.usage)
check("the same seed, the same answer", chat(seed=7).choices[0].message.content == whole.choices[0].message.content)
texts = {chat(seed=s, temperature=1.5).choices[0].message.content for s in range(6)}
check("other seeds, other answers", len(texts) > 1, texts)
again = chat(messages=[*hello, whole.choices[0].message, {"role": "user", "content": "More"}])
check("an answer goes back into the conversation", again.usage.prompt_tokens > whole.usage.prompt_tokens)
parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
check("content in parts", chat(messages=parts, temperature=0).choices[0].message.content is not None)

chunks = list(chat(seed=7, stream=True, stream_options={"include_usage": True}))
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
check("the stream is the whole answer", text == whole.choices[0].message.content, text)
check("the stream begins with the role", chunks[0].choices[0].delta.role == "assistant", chunks[0])
check("the stream ends with the reason", chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason)
check("the stream has the usage", chunks[-1].usage == whole.usage and not chunks[-1].choices, chunks[-1])
check("without being asked it has none", all(c.usage is None for c in chat(seed=7, stream=True)))

four = chat(n=4, seed=5, temperature=1.5)
check("n answers", [c.index for c in four.choices] == [0, 1, 2, 3], four)
check("n answers differ", len({c.message.content for c in four.choices}) > 1, four)
by_index = {i: "" for i in range(4)}
for chunk in chat(n=4, seed=5, temperature=1.5, stream=True):
    by_index[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
check("n answers in one stream", [by_index[i] for i in range(4)] == [c.message.content for c in four.choices])

scored = chat(logprobs=True, top_logprobs=3, temperature=0, extra_body={"ignore_eos": True})
content = scored.choices[0].logprobs.content
check("log-probabilities of each token", len(content) == scored.usage.completion_tokens == 12, content)
check("likeliest first", all(t.token == t.top_logprobs[0].token and len(t.top_logprobs) == 3 for t in content))
check("they are logarithms", all(t.logprob <= 0 for t in content))

greedy = chat(temperature=0, max_tokens=40, extra_body={"ignore_eos": True}).choices[0].message.content
stop = greedy[4:6]
cut = chat(temperature=0, max_tokens=40, stop=[stop], extra_body={"ignore_eos": True}).choices[0]
check("stop", cut.message.content == greedy[: greedy.index(stop)] and cut.finish_reason == "stop", cut)
check("an adapter as model", chat(model=adapter, temperature=0).model == adapter)
check("fields beyond OpenAI's", chat(extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2}).choices)
check("fields without effect", chat(user="me", metadata={"a": "b"}, store=False).choices)

# Completions.
plain = complete(temperature=0)
check("a completion", isinstance(plain.choices[0].text, str) and plain.object == "text_completion", plain)
check("the default is 16 tokens", complete(max_tokens=openai.omit, extra_body={"ignore_eos": True}).usage.completion_tokens == 16)
streamed = "".join(c.choices[0].text for c in complete(temperature=0, stream=True))
check("a completion in parts", streamed == plain.choices[0].text, streamed)
check("echo", complete(temperature=0, echo=True).choices[0].text == "Hello" + plain.choices[0].text)
two = complete(prompt=["Hello", "Bye"], temperature=0)
check("two prompts", len(two.choices) == 2 and two.choices[0].text == plain.choices[0].text, two)
check("token ids", len(complete(prompt=[[5, 6, 7], [8, 9]], temperature=0).choices) == 2)
scored = complete(logprobs=2, temperature=0, extra_body={"ignore_eos": True}).choices[0].logprobs
check("four lists of log-probabilities", len(scored.tokens) == len(scored.token_logprobs) == len(scored.text_offset) == 12)
check("the likeliest tokens by text", all(len(top) >= 1 for top in scored.top_logprobs), scored.top_logprobs)

# Files.
line = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
first = client.files.create(file=("first.jsonl", line * 3), purpose="fine-tune")
second = client.files.create(file=("second.jsonl", line), purpose="fine-tune")
check("a file is uploaded", (first.filename, first.bytes, first.status) == ("first.jsonl", 3 * len(line), "processed"), first)
check("a file is retrieved", client.files.retrieve(first.id) == first)
check("files are listed by pages", [f.id for f in client.files.list(limit=1)] == [second.id, first.id])
check("a file is downloaded", client.files.content(first.id).read() == line * 3)
check("a file is processed at once", client.files.wait_for_processing(first.id, max_wait_seconds=1).id == first.id)
check("a file is deleted", client.files.delete(first.id).deleted and len(list(client.files.list())) == 1)


# Training jobs.
def job_is(id, status):
    for _ in range(300):
        job = client.fine_tuning.jobs.retrieve(id)
        if job.status == status:
            return job
        time.sleep(0.1)
    sys.exit(f"{id} does not become {status}: {job}")


job = job_is(done, "succeeded")
check("its adapter is its model", job.fine_tuned_model == adapter and job.model == model, job)
check("it says how it trained", (job.seed, job.hyperparameters.n_epochs, job.trained_tokens) == (7, 2, 30), job)
check("jobs are listed by pages", [j.id for j in client.fine_tuning.jobs.list(limit=1)][1:] == [job.id])
events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
steps = [e.data["step"] for e in events if e.type == "metrics"]
check("its events are its steps and its log", steps == [3, 2, 1] and len(events) == 6, events)
left = list(client.fine_tuning.jobs.checkpoints.list(job.id))
check("its checkpoint is its model", [c.fine_tuned_model_checkpoint for c in left] == [adapter], left)
job_is(runs, "running")
client.fine_tuning.jobs.cancel(runs)
check("a job is cancelled", job_is(runs, "cancelled").fine_tuned_model is None)


# Errors, by the client's own types.
def raises(kind, call, code, param):
    try:
        call()
    except kind as error:
        good = type(error) is kind and error.code == code and error.param == param
        check(f"{kind.__name__} {code}", good, error)
    else:
        check(f"{kind.__name__} {code}", False, "nothing was raised")


raises(openai.NotFoundError, lambda: chat(model="gpt-4o"), "model_not_found", "model")
raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-4o"), "model_not_found", "model")
raises(openai.BadRequestError, lambda: chat(temperature=-1), "invalid_value", "temperature")
raises(openai.BadRequestError, lambda: chat(top_p=2), "invalid_value", "top_p")
raises(openai.BadRequestError, lambda: chat(max_tokens=0), "invalid_value", "max_tokens")
raises(openai.BadRequestError, lambda: chat(extra_body={"typo": 1}), "unknown_parameter", "typo")
raises(openai.BadRequestError, lambda: chat(presence_penalty=1), "unsupported_parameter", "presence_penalty")
raises(openai.BadRequestError, lambda: chat(messages=[{"role": "user", "content": "word " * 2000}]),
       "context_length_exceeded", "messages")
raises(openai.BadRequestError, lambda: complete(best_of=3), "unsupported_parameter", "best_of")
raises(openai.NotFoundError, lambda: client.files.retrieve("file-nowhere"), "file_not_found", "file_id")
raises(openai.BadRequestError, lambda: client.files.create(file=("a.jsonl", line + b"{}"), purpose="fine-tune"),
       "invalid_file", "file")
raises(openai.BadRequestError, lambda: client.files.create(file=("a.jsonl", line), purpose="assistants"),
       "unsupported_parameter", "purpose")
raises(openai.NotFoundError, lambda: client.fine_tuning.jobs.retrieve("ftjob-nowhere"), "job_not_found", "fine_tuning_job_id")
raises(openai.ConflictError, lambda: client.fine_tuning.jobs.cancel(runs), "job_state", "fine_tuning_job_id")
raises(openai.NotFoundError, lambda: client.fine_tuning.jobs.create(model="gpt-4o", training_file=second.id),
       "model_not_found", "model")
raises(openai.NotFoundError, lambda: client.fine_tuning.jobs.create(model=model, training_file="file-nowhere"),
       "file_not_found", "training_file")
raises(openai.BadRequestError,
       lambda: client.fine_tuning.jobs.create(model=model, training_file=second.id, validation_file=second.id),
       "unsupported_parameter", "validation_file")

print("all checks passed")
