"""A search in Python, too short to learn the task: its front, and a text from a point of it. Half a minute on a CPU.

    python examples/search.py [folder]    # the folder of the runs; runs/ unless it is given

A second time it finds everything done and shows it again.
"""

from __future__ import annotations

import sys

from natsl import api


def main(root: str) -> None:
    """Search below ``root``, and print what can be done with the outcome."""
    front = api.search(
        name="example",
        root=root,
        experiment="smoke",  # a preset, as on the command line
        search={"n_trials": 6, "objectives": ["val_loss", "kept_fraction"]},
        tracking={"mode": "disabled"},
        export=False,
    )
    print(front)
    for point in front:
        print(point.id, point.policy.describe(), point.values)
    picture = front.run.path / "example.png"
    front.plot().savefig(picture)
    print("picture:", picture)

    model, policy = api.load(run="example", root=root, pick=front["knee"].id)
    print("knee:", policy.describe(), "of", *(kind.value for kind in model.kinds))
    # the same weights under another policy: a quarter of the chunks in every routed layer
    (text,) = api.generate(run="example", root=root, budget=0.25, prompt="def main(", max_new_tokens=16)
    print("text:", repr(text))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs"])
