"""Sums through a Ray dataset: each actor has an engine, and every row keeps its columns.

pip install "remask[ray]"
python examples/ray_data.py
"""

import ray

from remask.ray import RemaskProcessorConfig, build_processor


def ask(row):
    """The columns that the engine reads."""
    return {
        "prompt": f"{row['a']:03}+{row['b']:03}=",
        "sampling_params": {"max_tokens": 8, "unmask": "threshold:0.9"},
    }


def check(row):
    """The columns that are made of the engine's."""
    text = row["generated_text"]
    return {"is_right": text is not None and text == f"{row['a'] + row['b']:04}"}


def main():
    processor = build_processor(
        RemaskProcessorConfig(
            model="tiny",
            engine_kwargs={"max_num_seqs": 128},
            concurrency=1,  # actors; (1, 4) lets Ray choose their number
            batch_size=32,
            num_cpus=1,  # num_gpus=0.5 would let two actors share a GPU
        ),
        preprocess=ask,
        postprocess=check,
    )
    sums = ray.data.from_items([{"a": 100 + i, "b": 9 * i} for i in range(96)])
    rows = processor(sums).take_all()
    for row in rows[:3]:
        print(f"{row['prompt']}{row['generated_text']} (nfe {row['nfe']}, seed {row['seed']})")
    print(
        f"{sum(row['is_right'] for row in rows)} of {len(rows)} right, "
        f"{sum(row['error'] is not None for row in rows)} refused"
    )


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    main()
