"""What judges features: the vote of neighbours, and attention rollout."""

from __future__ import annotations

import re
from typing import Any

import torch

from rcmae.evaluation import attention, knn
from rcmae.weights.names import published_names

from .downstream import classifier
from .fixture import PRECISIONS, Fixture


def knn_votes(fixture: Fixture) -> None:
    """Scores, predictions and accuracies of the vote."""
    config = fixture.config
    stated = fixture.value("accuracy")
    for precision, dtype in PRECISIONS.items():
        inputs = fixture.arrays("inputs.safetensors")
        expected = fixture.arrays("expected.safetensors")
        limits = fixture.limits(precision)
        labels = inputs["test_labels"]
        votes = knn.votes(
            inputs["train_features"].to(dtype),
            inputs["train_labels"],
            inputs["test_features"].to(dtype),
            k=config["ks"],
            num_classes=config["num_classes"],
            temperature=config["T"],
        )
        for k, scores in votes.items():
            fixture.close(
                "scores",
                f"k{k}.scores",
                scores,
                expected[f"k{k}.scores"],
                limits.activation,
                precision,
            )
            guess = scores.argmax(dim=1)
            same = torch.equal(guess, expected[f"k{k}.prediction"])
            fixture.true("predictions", f"k={k}", same, "differ from those recorded", precision)
            best = scores.topk(min(5, config["num_classes"]), dim=1)
            hits = ((best.indices == labels[:, None]) & (best.values > 0)).any(dim=1)
            row = stated[str(k)]
            for name, got in (
                ("top1", guess == labels),
                ("top5_counting_only_positive_scores", hits),
            ):
                share = 100.0 * got.double().mean()
                fixture.close(
                    "accuracies", f"k={k} {name}", share, row[name], limits.loss, precision
                )
    fixture.left_out["accuracy: top5"] = (
        "depends on how equal scores of 0 are sorted; the well-defined one is checked"
    )
    fixture.left_out["accuracy: smallest_gap_between_best_two_scores"] = (
        "says how safe the predictions are"
    )


def rollout(fixture: Fixture) -> None:
    """Attention of a classifier and its rollout, as published and by the textbook."""
    weights = published_names(fixture.arrays("vit.safetensors"))
    # of the class token
    weights = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in weights.items()}
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        expected = fixture.arrays("expected.safetensors")
        images = fixture.arrays("inputs.safetensors")["images"].to(dtype)
        model, _ = classifier(fixture, weights, "cls", dtype)
        features = model.forward_head(model.encoded(images), pre_logits=True)
        outputs = {"logits": model(images), "features": features}
        wanted = {name: expected[name] for name in outputs}
        fixture.all_close("features and scores", outputs, wanted, limits.activation, precision)
        for index in range(len(images)):
            maps = attention.attention_maps(model, images[index : index + 1])[:, 0]
            # which entries are the smallest hangs on the last digits: discard by the maps recorded,
            # to this precision
            recorded = expected[f"image{index}.attention"].to(dtype)
            for name, want in expected.items():
                match = re.fullmatch(
                    rf"image{index}\.(mean|max|min)\.discard([\d.]*\d)(?:\.layer(\d+))?", name
                )
                if name == f"image{index}.attention":
                    fixture.close("attention", name, maps, want, limits.activation, precision)
                elif name == f"image{index}.textbook_mean":
                    got = attention.rollout(maps).view(want.shape)
                    fixture.close(
                        "rollout by the textbook", name, got, want, limits.activation, precision
                    )
                elif match:
                    fusion: Any = match[1]
                    share = float(match[2])
                    some = recorded if share else maps
                    some = some if match[3] is None else some[int(match[3])][None]
                    got = attention.rollout(some, fusion=fusion, discard=share, published=True)
                    fixture.close(
                        "rollout as published",
                        name,
                        got.view(want.shape),
                        want,
                        limits.activation,
                        precision,
                    )
