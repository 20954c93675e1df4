"""What an adapter has learned from, as its file tells it."""

from typing import Any

from vislora.config.data import BaseData, pictures_to_dict


def trainings(*abouts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the trainings behind adapters noted down of the data that they learned; behind one that was blended, or that
    a training went on from, there are several. One that told nothing, as another program's, is an empty dict."""
    found: list[dict[str, Any]] = []
    for about in abouts:
        own = {key: about[key] for key in ("data", "seed", "held_out_key") if key in about}
        told = about.get("trainings")
        for one in told if isinstance(told, list) else [own]:
            known = one if isinstance(one, dict) else {}
            if known not in found:
                found.append(known)
    return found


def learned_held_out(about: dict[str, Any], data: BaseData, held_out_key: str | None) -> bool:
    """Whether the training that noted `about` down learned, of the same data, pictures that are held out now: it held
    out others, or none."""
    own = pictures_to_dict(data)
    trained = about["data"] if isinstance(about.get("data"), dict) else {}
    same = all(trained.get(key) == value for key, value in own.items() if key != "val_fraction")
    return same and about.get("held_out_key", held_out_key) != held_out_key
