"""What the Python package `datasets` finds in the data sets of a hub: one line of JSON in, one line out. The files found
are downloaded with `huggingface_hub` as well, and must have the sizes that the hub's listing tells.

Asked `{"repo": ..., "split": ..., ...}` with any of `name`, `data_files`, `data_dir` and `revision`, it answers with the
split's files and rows, or with the error. `HF_ENDPOINT` says which hub.
"""

import json
import os
import sys

import datasets
import huggingface_hub

datasets.disable_progress_bars()
huggingface_hub.utils.disable_progress_bars()


def download(repo, path, commit):
    """Downloads a file of a data set; one whose size is not the listed one is an error."""
    listed = huggingface_hub.HfApi().get_paths_info(repo, [path], repo_type="dataset", revision=commit)
    local = huggingface_hub.hf_hub_download(repo, path, repo_type="dataset", revision=commit)
    if os.path.getsize(local) != listed[0].size:
        raise ValueError(f"{path} has {os.path.getsize(local)} bytes, listed with {listed[0].size}")


for line in sys.stdin:
    case = json.loads(line)
    repo, split = case.pop("repo"), case.pop("split")
    try:
        builder = datasets.load_dataset_builder(repo, **case)
        found = [path.split("@", 1)[1].split("/", 1) for path in builder.config.data_files[split]]
        for commit, path in found:
            download(repo, path, commit)
        rows = list(datasets.load_dataset(repo, split=split, streaming=True, **case))
        answer = {"files": [path for _, path in found], "rows": rows}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
print("datasets", datasets.__version__, "huggingface_hub", huggingface_hub.__version__, file=sys.stderr)
