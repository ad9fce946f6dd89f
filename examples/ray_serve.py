"""The server on Ray Serve, with an engine behind it: HTTP, and a deployment handle that streams.

pip install "remask[ray]"
python examples/ray_serve.py
"""

import json
import urllib.request

import ray
from ray import serve

from remask.ray import build_app

PORT = 8011


def ask(path, **body):
    """The response to a request over HTTP."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def main():
    serve.start(http_options={"port": PORT})
    app = build_app(
        {
            "model": "tiny",
            "engine_kwargs": {"max_num_seqs": 64},
            "deployment_config": {"num_replicas": 1},  # or autoscaling_config: {min_replicas, max_replicas}
        }
    )
    handle = serve.run(app, name="remask", route_prefix="/")
    sums = [f"{100 + i}+{9 * i:03}=" for i in range(8)]
    body = ask("v1/completions", prompt=sums, max_tokens=8)
    texts = [choice["text"] for choice in body["choices"]]
    for prompt, text in zip(sums, texts, strict=True):
        print(prompt + text)
    right = sum(text == f"{100 + 10 * i:04}" for i, text in enumerate(texts))
    stream = handle.options(stream=True).generate.remote(
        "12..34..2.4.43.1=", {"max_tokens": 16, "block_length": 4}, output_kind="delta"
    )
    print("in blocks:", " ".join(sample.text for output in stream for sample in output.outputs))
    print(f"{right} of {len(sums)} right, 0 refused")
    serve.shutdown()


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    main()
