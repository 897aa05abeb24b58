"""What the Python package `datasets` finds in the data sets of a hub: one line of JSON in, one line out.

Asked `{"repo": ..., "split": ..., ...}` with any of `name`, `data_files`, `data_dir` and `revision`, it answers with the
split's files and rows, or with the error. `HF_ENDPOINT` says which hub.
"""

import json
import sys

import datasets

datasets.disable_progress_bars()
for line in sys.stdin:
    case = json.loads(line)
    repo, split = case.pop("repo"), case.pop("split")
    try:
        builder = datasets.load_dataset_builder(repo, **case)
        paths = [path.split("@", 1)[1].split("/", 1)[1] for path in builder.config.data_files[split]]
        rows = list(datasets.load_dataset(repo, split=split, streaming=True, **case))
        answer = {"files": paths, "rows": rows}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
print("datasets", datasets.__version__, file=sys.stderr)
